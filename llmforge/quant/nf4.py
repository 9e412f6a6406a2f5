"""NF4: four bits per weight, a scale per block of 64, and the scales themselves in eight bits.

A code is one of 16 values, the quantiles of a normal distribution; the largest weight of a block is 1 or -1. Double quantization
stores the scales, less their mean, as dynamic 8-bit codes with a float32 per 256: 0.516 bytes per weight in all. Codes, packing and
decoded values are those of bitsandbytes, so that its files are read and its kernels can be used; see `decoder_for`.

A matrix is taken in row-major order, and blocks run on from row to row. `NF4Quantizer` takes it in pieces of any size.

Source: Dettmers et al. 2023, arXiv:2305.14314 (QLoRA), section 3 and appendix E.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmforge.errors import ConfigError
from llmforge.quant.dynamic8 import BLOCK_SIZE, dequantize_dynamic, is_plain, quantize_dynamic

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes' kernels know

# Weights that are worked on at a time: on a CPU they stay in its caches, elsewhere the start of a kernel must not count.
_CHUNK_CPU = 1 << 20
_CHUNK = 1 << 22
_SMALLEST = 1e-38  # of a scale that divides: a block of zeros is zeros


@dataclass(frozen=True)
class NF4Tensor:
    """A tensor in NF4.

    codes: uint8 (numel / 2 rounded up), the first of two weights in the high bits.
    absmax: the scales, one per block; float32, or uint8 codes with double quantization.
    nested_absmax: float32, one per 256 scales, and offset: float32 (), their mean; None without double quantization.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The scales of blocks `start` to `stop` (None: all), float32."""
        stop = self.absmax.numel() if stop is None else stop
        if self.nested_absmax is None or self.offset is None:
            return self.absmax[start:stop]
        begin = start // BLOCK_SIZE * BLOCK_SIZE  # of a scale of scales
        nested = self.nested_absmax[begin // BLOCK_SIZE : -(-stop // BLOCK_SIZE)]
        scales = dequantize_dynamic(self.absmax[begin:stop], nested, signed=True)
        return scales[start - begin :].add_(self.offset)


class NF4Quantizer:
    """Quantizes a tensor that comes in pieces; beside the result it needs memory for some of them.

    Args:
        shape: of the whole.
        block_size: weights that share a scale.
        double_quant: store the scales in 8 bits.
        device: where the result is made; None = that of the first piece.
    >>> quantizer = NF4Quantizer((2, 64))
    >>> for row in torch.eye(2, 64):
    ...     quantizer.add(row)
    >>> dequantize_nf4(quantizer.finish()).sum()
    tensor(2.)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        check_block_size(block_size)
        self.shape, self.block_size, self.double_quant = tuple(shape), block_size, double_quant
        self._device = None if device is None else torch.device(device)
        self._numel, self._done = math.prod(self.shape), 0
        self._codes = self._absmax = torch.empty(0)
        self._rest: Tensor | None = None  # less than a block, which the next piece completes

    def add(self, values: Tensor) -> None:
        """The next values in row-major order, any shape and float dtype, on any device."""
        flat = values.detach().reshape(-1)
        if self._device is None:
            self._device = flat.device
        flat = flat.to(self._device)
        received = self._done + flat.numel() + (0 if self._rest is None else self._rest.numel())
        if received > self._numel:
            raise ConfigError(f"{received} values do not fit a tensor of shape {self.shape}, which has {self._numel}")
        self._allocate(flat)
        if self._rest is not None:
            flat = torch.cat([self._rest, flat.float()])
        whole = flat.numel() if received == self._numel else flat.numel() // self.block_size * self.block_size
        chunk = _CHUNK_CPU if flat.device.type == "cpu" else _CHUNK
        for start in range(0, whole, chunk):
            self._encode(flat[start : min(start + chunk, whole)])
        self._rest = flat[whole:].float().clone() if whole < flat.numel() else None

    def finish(self) -> NF4Tensor:
        """The result.

        Raises:
            ConfigError: values are missing, or one was NaN or infinite.
        """
        if self._device is None:
            self._device = torch.device("cpu")
        self._allocate(torch.empty(0, device=self._device))
        if self._done != self._numel:
            found = self._done + (0 if self._rest is None else self._rest.numel())
            raise ConfigError(f"{found} values for a tensor of shape {self.shape}, which has {self._numel}")
        absmax, nested, offset = self._absmax, None, None
        # Tensors without values (FakeTensorMode's) cannot be asked.
        if is_plain(absmax) and not absmax.is_meta and not bool(absmax.isfinite().all()):
            raise ConfigError(
                "NaN or infinity among the weights, for which NF4 has no codes; take an earlier checkpoint"
            )
        if self.double_quant:
            offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
            absmax, nested = quantize_dynamic(absmax - offset, signed=True)
        return NF4Tensor(self._codes, absmax, nested, offset, self.shape, self.block_size)

    def _allocate(self, like: Tensor) -> None:
        if self._codes.dtype != torch.uint8:
            self._codes = like.new_empty(-(-self._numel // 2), dtype=torch.uint8)
            self._absmax = like.new_empty(-(-self._numel // self.block_size), dtype=torch.float32)

    def _encode(self, flat: Tensor) -> None:
        """Whole blocks, or the end of the tensor."""
        n, start = flat.numel(), self._done
        # Zeros make no scale larger; of an odd number of weights the last byte has the code of 0 in its low bits.
        blocks = torch.nn.functional.pad(flat.float(), (0, -n % self.block_size)).view(-1, self.block_size)
        low, high = blocks.aminmax(dim=1)
        absmax = torch.maximum(-low, high)
        # Multiplied by the reciprocal, as bitsandbytes: a quotient rounds otherwise.
        scaled = blocks * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]
        codes = torch.bucketize(scaled.view(-1), _midpoints(flat), out_int32=True).to(torch.uint8)
        packed = codes[::2].bitwise_left_shift_(4).bitwise_or_(codes[1::2])
        self._codes[start // 2 : (start + n + 1) // 2] = packed[: (n + 1) // 2]
        self._absmax[start // self.block_size : -(-(start + n) // self.block_size)] = absmax
        self._done += n


def quantize_nf4(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Round a tensor to NF4.

    Args:
        weight: any shape, float dtype and device; an odd number of values, and a last block that is not full, are fine.
        block_size, double_quant: see `NF4Quantizer`.
    Raises:
        ConfigError: a block size that is none of BLOCK_SIZES, or NaN or infinity among the weights.
    >>> nf4 = quantize_nf4(torch.tensor([2.0, -1.4, 0.0, 0.1]), double_quant=False)
    >>> nf4.codes.tolist(), nf4.absmax.tolist()  # 15 and 1, 7 and 8
    ([241, 120], [2.0])
    """
    quantizer = NF4Quantizer(
        tuple(weight.shape), block_size=block_size, double_quant=double_quant, device=weight.device
    )
    quantizer.add(weight)
    return quantizer.finish()


def dequantize_nf4(nf4: NF4Tensor, *, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """The tensor that codes and scales stand for: each product in float32, rounded once to `dtype`.

    Args:
        backend: "torch"; "bitsandbytes", whose kernel gives the same values; None = the latter for CUDA tensors where it is installed
            and works, else the former.
    """
    if backend is None:
        backend = decoder_for(nf4.codes)
    if backend == "bitsandbytes":
        return _bitsandbytes_decode(nf4, dtype)
    out = nf4.codes.new_empty(nf4.numel, dtype=dtype)
    _decode(nf4.codes, nf4.scales(), out, nf4.block_size)
    return out.view(nf4.shape)


def dequantize_rows_nf4(nf4: NF4Tensor, start: int, stop: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `start` to `stop` of `dequantize_nf4`, in the time and memory of these rows."""
    width = math.prod(nf4.shape[1:])
    first, last = start * width, stop * width
    block = first // nf4.block_size
    begin = block * nf4.block_size  # whole blocks, hence whole bytes
    out = nf4.codes.new_empty(last - begin, dtype=dtype)
    _decode(nf4.codes[begin // 2 :], nf4.scales(block, -(-last // nf4.block_size)), out, nf4.block_size)
    return out[first - begin :].view(stop - start, *nf4.shape[1:])


def check_block_size(block_size: int) -> None:
    """ConfigError for a block size that NF4 does not have."""
    if block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size ({block_size}) must be one of {', '.join(map(str, BLOCK_SIZES))}; 64 is the usual one"
        )


def _decode(codes: Tensor, scales: Tensor, out: Tensor, block_size: int) -> None:
    """The first values of codes into `out`, flat; begins with a block."""
    n = out.numel()
    if not n:
        return
    if torch.compiler.is_compiling():  # one kernel of the compiler's; what follows is for those without
        values = _pairs_table(codes)[codes[: (n + 1) // 2].int()].view(torch.float32)[:n]
        out.copy_(values * scales.repeat_interleave(block_size)[:n])
        return
    # A byte is a pair of weights: their two float32 are moved as one int64. Buffers are made once, and small: memory that
    # was just used is many times faster than fresh one.
    pairs = _pairs_table(codes)
    chunk = min(_CHUNK_CPU if codes.device.type == "cpu" else _CHUNK, n + n % 2)
    index = codes.new_empty(chunk // 2, dtype=torch.int32)
    into_out = out.dtype == torch.float32 and n % 2 == 0
    buffer = codes.new_empty(0 if into_out else chunk // 2, dtype=torch.int64)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        packed = codes[start // 2 : (stop + 1) // 2]
        k = packed.numel()
        pair = out[start:stop].view(torch.int64) if into_out else buffer[:k]
        torch.index_select(pairs, 0, index[:k].copy_(packed), out=pair)
        values = pair.view(torch.float32)
        whole = (stop - start) // block_size
        end = whole * block_size
        first = start // block_size
        values[:end].view(-1, block_size).mul_(scales[first : first + whole, None])
        if end < stop - start:
            values[end:].mul_(scales[first + whole])
        if not into_out:
            out[start:stop].copy_(values[: stop - start])


_PAIRS = [value for high in CODEBOOK for low in CODEBOOK for value in (high, low)]
_tables: dict[tuple[str, torch.device], Tensor] = {}


def _pairs_table(like: Tensor) -> Tensor:
    """Byte -> the two float32 of its weights, as one int64: (256), in memory's order."""
    return _table("pairs", like, _PAIRS).view(torch.int64)


def _midpoints(like: Tensor) -> Tensor:
    """Between neighbours of the codebook, in float32."""
    codebook = _table("codebook", like, list(CODEBOOK))
    return (codebook[:-1] + codebook[1:]) / 2


def _table(name: str, like: Tensor, values: list[float]) -> Tensor:
    key = (name, like.device)
    if not is_plain(like):
        return like.new_tensor(values, dtype=torch.float32)
    if key not in _tables:
        with torch.inference_mode(False):
            _tables[key] = torch.tensor(values, dtype=torch.float32, device=like.device)
    return _tables[key]


def decoder_for(codes: Tensor) -> str:
    """Who decodes these codes: "bitsandbytes" where its kernel for the device is installed and gives our values, else "torch"."""
    # Tensors without values (FakeTensorMode's) may stand for a machine that is not this one.
    if not codes.is_cuda or not is_plain(codes) or torch.compiler.is_compiling():
        return "torch"
    return "bitsandbytes" if _bitsandbytes_works(codes.device) else "torch"


@functools.cache
def _bitsandbytes_works(device: torch.device) -> bool:
    """Tried once per device: an installation for another CUDA fails only when a kernel is called."""
    nf4 = NF4Tensor(
        torch.arange(256, dtype=torch.uint8, device=device), torch.ones(8, device=device), None, None, (512,), 64
    )
    try:
        return torch.equal(_bitsandbytes_decode(nf4, torch.float32), dequantize_nf4(nf4, backend="torch"))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # importing it can end in many ways
        return False


def _bitsandbytes_decode(nf4: NF4Tensor, dtype: torch.dtype) -> Tensor:
    import bitsandbytes  # noqa: F401

    op: Any = torch.ops.bitsandbytes.dequantize_4bit
    decoded: Tensor = op(nf4.codes.view(-1, 1), nf4.scales(), nf4.block_size, "nf4", nf4.shape, dtype)
    return decoded
