"""Encode and decode rows of weights in any type of ggml.

Most types are ours (`types`); where the gguf package writes one byte for byte as llama.cpp does, it does it here too.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from llmforge.errors import ConvertError
from llmforge.quant.ggml.types import TYPES, Parts, search

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_PIECE = 1 << 18  # weights that a thread takes at a time: what fits its caches

# Written byte for byte by the gguf package. (Its Q4_0 to Q5_1 have another scale than llama.cpp's for blocks with -0.0.)
_BY_GGUF = ("TQ1_0", "TQ2_0", "MXFP4")

ENCODABLE = ("F32", "F16", "BF16", *TYPES, *_BY_GGUF)

# Largest magnitude that a type without search can hold: its scales and minima are float16. What a search finds is looked at
# afterwards; beyond 1e9 no scale is small enough, and the search itself would overflow.
_HALF_MAX = 65_504.0
_LARGEST = {name: torch.finfo(dtype).max for name, dtype in FLOATS.items()}
_LARGEST |= {"Q4_0": 8 * _HALF_MAX, "Q4_1": _HALF_MAX, "Q5_0": 16 * _HALF_MAX, "Q5_1": _HALF_MAX}
_LARGEST |= {"Q8_0": 127 * _HALF_MAX, "TQ1_0": _HALF_MAX, "TQ2_0": _HALF_MAX, "MXFP4": float("inf")}


def block_shape(type_name: str) -> tuple[int, int]:
    """Weights and bytes of a block.

    >>> block_shape("Q4_K")
    (256, 144)
    """
    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]


def encode(values: Tensor, type_name: str, *, importance: Tensor | None = None) -> Tensor:
    """Weights as the bytes of a type, which are those that llama.cpp writes.

    Args:
        values: (rows, n), any float type and device; n is a multiple of the type's block. Float32 arithmetic.
        type_name: one of `ENCODABLE`.
        importance: (n), 0 or more: how much an error in each column matters; None = all alike. Types whose scale is the largest
            weight's (Q8_0, TQ1_0, TQ2_0, MXFP4) and floats have no use for it.
    Returns:
        (rows, bytes of a row) uint8, on the same device.
    Raises:
        ConvertError: a type that cannot be written, rows that its blocks do not divide, an importance that does not fit, or a
            value that is not finite or too large for the type.
    """
    if type_name not in ENCODABLE:
        raise ConvertError(f"type {type_name!r} cannot be written; it can be one of {', '.join(ENCODABLE)}")
    if values.dim() != 2 or values.shape[1] % block_shape(type_name)[0]:
        raise ConvertError(
            f"weights of shape {tuple(values.shape)} cannot be {type_name}: they must be rows of a multiple of "
            f"{block_shape(type_name)[0]} weights"
        )
    if importance is not None and (importance.shape != values.shape[1:] or not importance.isfinite().all()):
        raise ConvertError(
            f"the importance, of shape {tuple(importance.shape)}, must be a finite number for each of the {values.shape[1]} columns"
        )
    if not values.numel():
        return values.new_empty(
            len(values), values.shape[1] // block_shape(type_name)[0] * block_shape(type_name)[1]
        ).byte()
    if (
        type_name in FLOATS
    ):  # to the nearest, ties to even, as ggml rounds; not in pieces, which would be copied together
        _check(values, type_name)
        return values.to(FLOATS[type_name]).contiguous().view(torch.uint8)
    return _in_pieces(lambda rows: _encode(rows, type_name, importance), values)


def _encode(rows: Tensor, type_name: str, importance: Tensor | None) -> Tensor:
    _check(rows, type_name)
    rows = rows.float().contiguous()
    ours = TYPES.get(type_name)
    if ours is None:
        data = quants.quantize(rows.cpu().numpy(), GGMLQuantizationType[type_name])
        return torch.from_numpy(np.ascontiguousarray(data)).to(rows.device)
    parts = _parts(rows, type_name, importance)
    if not (parts.d.isfinite().all() and parts.m.isfinite().all()):
        raise _too_large(rows, type_name)
    return ours.pack(parts).view(len(rows), -1)


def decode(data: Tensor, type_name: str) -> Tensor:
    """Bytes (rows, bytes of a row) as weights (rows, n): float32, or the float type itself.

    Raises:
        ConvertError: a type that cannot be decoded.
    """
    if type_name in FLOATS:
        return data.contiguous().view(FLOATS[type_name])
    block_bytes = block_shape(type_name)[1]
    if data.dim() != 2 or data.shape[1] % block_bytes:
        raise ConvertError(
            f"bytes of shape {tuple(data.shape)} are not {type_name}: they must be rows of a multiple of {block_bytes} bytes"
        )
    if not data.numel():
        return torch.empty(len(data), data.shape[1] // block_bytes * block_shape(type_name)[0], device=data.device)
    if ours := TYPES.get(type_name):
        return _in_pieces(
            lambda rows: ours.values(ours.unpack(rows.reshape(-1, block_bytes))).view(len(rows), -1), data
        )
    if not can_decode(type_name):
        raise ConvertError(f"{type_name} cannot be decoded; it can be one of F32, F16, BF16, {', '.join(TYPES)}")
    return torch.from_numpy(quants.dequantize(data.cpu().numpy(), GGMLQuantizationType[type_name])).to(data.device)


def round_to(values: Tensor, type_name: str) -> Tensor:
    """The values (.., n) that are left of weights (.., n) in a type: decode(encode(values)), without the bytes. Float32."""
    if type_name in FLOATS:
        return values.to(FLOATS[type_name]).float()
    ours = TYPES.get(type_name)
    rows = values.detach().float().reshape(-1, values.shape[-1]).contiguous()
    if ours is None or rows.shape[1] % ours.block_size or not rows.numel():
        return decode(encode(rows, type_name), type_name).view(values.shape)
    return _in_pieces(lambda piece: ours.values(_parts(piece, type_name, None)).view(piece.shape), rows).view(
        values.shape
    )


@cache
def can_decode(type_name: str) -> bool:
    """Whether `decode` knows the type."""
    if type_name in FLOATS or type_name in TYPES:
        return True
    try:
        quants.dequantize(np.zeros((1, block_shape(type_name)[1]), np.uint8), GGMLQuantizationType[type_name])
    except NotImplementedError:
        return False
    return True


def _in_pieces(work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """work(rows), on the CPU some rows at a time in all of torch's threads.

    Each piece is work for one thread, torch's operations too: threads that share every small operation would mostly wait for each
    other, above all on a machine that has other work.
    """
    if rows.device.type not in ("cpu", "cuda"):  # roots are taken in float64, which MPS lacks
        return _in_pieces(work, rows.cpu()).to(rows.device)
    pieces = torch.split(rows, max(1, _PIECE // max(1, rows.shape[1])))
    n_threads = torch.get_num_threads()
    if rows.device.type != "cpu" or len(pieces) == 1:
        return work(rows)
    search(pieces[0])  # compiles, if it does, once
    torch.set_num_threads(1)  # of this thread and of those that are made here
    try:
        with ThreadPoolExecutor(n_threads) as threads:
            return torch.cat(list(threads.map(work, pieces)))
    finally:
        torch.set_num_threads(n_threads)


def _parts(rows: Tensor, type_name: str, importance: Tensor | None) -> Parts:
    ours = TYPES[type_name]
    n_blocks = rows.shape[1] // ours.block_size
    blocks = rows.reshape(-1, ours.block_size)
    if importance is None:
        return ours.round(blocks, None, None)
    important = (
        importance.float().to(rows.device).view(1, -1).expand(len(rows), -1).contiguous().view(-1, ours.block_size)
    )
    row_sigma2 = None
    if ours.block_size == 32:
        sigma2 = search(rows).sums(rows, squares=True) / torch.full_like(rows[:, 0], rows.shape[1])
        row_sigma2 = sigma2.repeat_interleave(n_blocks)
    return ours.round(blocks, important, row_sigma2)


def _check(values: Tensor, type_name: str) -> None:
    low, high = values.aminmax()
    largest = torch.maximum(-low, high).item()
    if not largest < float("inf"):  # NaN too
        raise ConvertError(
            f"a value is {'infinite' if largest == float('inf') else 'NaN'}; {type_name} has finite numbers only"
        )
    if largest > _LARGEST.get(type_name, 1e9):
        raise _too_large(values, type_name)


def _too_large(values: Tensor, type_name: str) -> ConvertError:
    return ConvertError(f"a value of {values.abs().max().item():.3g} is too large for {type_name}; take BF16 or F32")
