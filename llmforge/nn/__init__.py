"""Layers that other packages can import: tensors in, tensors out, no configuration objects.

Shapes are written with one alphabet: B batch, T tokens of this call, S tokens seen so far, C width, H heads, D head width, V vocabulary.
"""

from llmforge.nn.attention import causal_attention
from llmforge.nn.kv_cache import KVCache
from llmforge.nn.norm import LayerNorm

__all__ = ["KVCache", "LayerNorm", "causal_attention"]
