"""Texts to ids on disk to batches."""

from llmforge.data.dataset import Batch, TokenDataset

__all__ = ["Batch", "TokenDataset"]
