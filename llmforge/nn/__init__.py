"""Layers that other packages can import: tensors in, tensors out, no model's configuration.

Shapes are written with one alphabet: B batch, T tokens of this call, S tokens seen so far, C width, H heads, K heads of keys and
values, D head width, F feed-forward width, V vocabulary.
"""

from llmforge.nn.attention import attention_mask, causal_attention
from llmforge.nn.bitlinear import BitLinear, bit_linears, check_ternary_width, constant_weights, set_quantization_
from llmforge.nn.documents import Documents, document_backend
from llmforge.nn.frozen_codes import FrozenCodes
from llmforge.nn.host import HostEmbedding, HostEmbedding8bit, allocates_on_host, offload_embedding_
from llmforge.nn.int8 import Embedding8bit, Int8Matrix, Linear8bit
from llmforge.nn.kv_cache import KVCache, StaticKVCache
from llmforge.nn.linear4bit import Linear4bit
from llmforge.nn.mlp import SquaredReLU, SwiGLU
from llmforge.nn.norm import LayerNorm, RMSNorm
from llmforge.nn.packed import PackedBitLinear, pack_
from llmforge.nn.recompute import Checkpointing, checkpointed, in_tiles
from llmforge.nn.replace import replace_linear_
from llmforge.nn.rope import RopeScaling, apply_rope, rope_angles, rope_frequencies
from llmforge.nn.softcap import SoftCappedLinear

__all__ = [
    "BitLinear",
    "Checkpointing",
    "Documents",
    "Embedding8bit",
    "FrozenCodes",
    "HostEmbedding",
    "HostEmbedding8bit",
    "Int8Matrix",
    "KVCache",
    "LayerNorm",
    "Linear4bit",
    "Linear8bit",
    "PackedBitLinear",
    "RMSNorm",
    "RopeScaling",
    "SoftCappedLinear",
    "SquaredReLU",
    "StaticKVCache",
    "SwiGLU",
    "allocates_on_host",
    "apply_rope",
    "attention_mask",
    "bit_linears",
    "causal_attention",
    "check_ternary_width",
    "checkpointed",
    "constant_weights",
    "document_backend",
    "in_tiles",
    "offload_embedding_",
    "pack_",
    "replace_linear_",
    "rope_angles",
    "rope_frequencies",
    "set_quantization_",
]
