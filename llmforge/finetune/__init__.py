"""Adapters on any model, and the frozen base under them in four bits."""

from llmforge.finetune.quantize import NF4Config, quantize_

__all__ = ["NF4Config", "quantize_"]
