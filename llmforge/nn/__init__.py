"""Layers that other packages can import: tensors in, tensors out, no model's configuration.

Shapes are written with one alphabet: B batch, T tokens of this call, S tokens seen so far, C width, H heads, K heads of keys and
values, D head width, F feed-forward width, V vocabulary.
"""

from llmforge.nn.attention import attention_mask, causal_attention
from llmforge.nn.kv_cache import KVCache, StaticKVCache
from llmforge.nn.mlp import SwiGLU
from llmforge.nn.norm import LayerNorm, RMSNorm
from llmforge.nn.rope import RopeScaling, apply_rope, rope_angles, rope_frequencies

__all__ = [
    "KVCache",
    "LayerNorm",
    "RMSNorm",
    "RopeScaling",
    "StaticKVCache",
    "SwiGLU",
    "apply_rope",
    "attention_mask",
    "causal_attention",
    "rope_angles",
    "rope_frequencies",
]
