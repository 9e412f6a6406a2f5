"""Number formats of ggml: float weights as blocks of bytes and back, the same bytes that llama.cpp writes."""

from llmforge.quant.ggml.codec import ENCODABLE, FLOATS, block_shape, can_decode, decode, encode, round_to

__all__ = ["ENCODABLE", "FLOATS", "block_shape", "can_decode", "decode", "encode", "round_to"]
