"""The block types of ggml: what each block stores, how weights are rounded to it, and where its bits lie.

A block of `block_size` neighbouring weights of a row is, before it is packed, `Parts`: a code for each weight, and the scales that
give it its value. `round` makes parts of weights, `values` weights of parts; `pack` and `unpack` are the bytes.

Source: ggml/src/ggml-common.h (layouts) and ggml-quants.c (arithmetic) of llama.cpp, whose bytes these are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmforge.quant.ggml import vectorized
from llmforge.quant.ggml.compiled import kernels
from llmforge.quant.ggml.vectorized import divide, nearest, nearest_value

_ABSENT = torch.empty(0)


class Parts(NamedTuple):
    """A block for each row, before it is packed; no type has all of these parts."""

    codes: Tensor  # (N, block_size) uint8
    d: Tensor  # (N) float16: the scale, of the block or of its scales
    m: Tensor = _ABSENT  # (N) float16: the minimum, or the scale of the minima
    scales: Tensor = _ABSENT  # (N, sub-blocks) uint8 or int8
    minima: Tensor = _ABSENT  # (N, sub-blocks) uint8


class BlockType(ABC):
    """What a type owes."""

    block_size: int  # weights
    block_bytes: int

    @abstractmethod
    def round(self, x: Tensor, importance: Tensor | None, row_sigma2: Tensor | None) -> Parts:
        """x (N, block_size) float32; importance of the same shape; row_sigma2 (N), mean square of the row that a block is in."""

    @abstractmethod
    def values(self, parts: Parts) -> Tensor:
        """(N, block_size) float32"""

    @abstractmethod
    def pack(self, parts: Parts) -> Tensor:
        """(N, block_bytes) uint8"""

    @abstractmethod
    def unpack(self, data: Tensor) -> Parts:
        """data (N, block_bytes) uint8"""


COMPILE_FROM = 1 << 16  # weights at a time; for fewer the compiled form is not worth its compilation


def search(x: Tensor) -> Any:
    """The fastest form of the searches for these weights."""
    compiled = kernels() if x.device.type == "cpu" and x.numel() >= COMPILE_FROM else None
    return compiled or vectorized


def steps(start: float, step: float, count: int, offset: int = 0) -> list[np.float32]:
    """(start + step * i) + offset for i in 0..count-1, in float32 as ggml counts."""
    return [(np.float32(start) + np.float32(step) * np.float32(i)) + np.float32(offset) for i in range(count)]


def _around(half: int) -> list[np.float32]:
    """-(half + 0.1 i) for i = 0, -9..9: which of them the largest weight is mapped to is tried out."""
    tenth = np.float32(0.1)
    return [-(np.float32(half) + tenth * np.float32(i)) for i in (0, *range(-9, 0), *range(1, 10))]


_WIDE = (-0.9, 0.05, 37)  # steps of the affine search with importance


def _sigma2(x: Tensor, factor: float = 1) -> Tensor:
    """Mean square of each block, times a power of two."""
    return divide(search(x).sums(x, squares=True) * factor, x.shape[1])


# --- blocks of 32 with one scale ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Symmetric(BlockType):
    """value = d * (code - half): Q4_0, Q5_0, Q8_0."""

    half: int
    block_bytes: int
    block_size: int = 32

    def round(self, x: Tensor, importance: Tensor | None, row_sigma2: Tensor | None) -> Parts:
        if importance is not None and row_sigma2 is not None and self.half < 128:
            weights = search(x).important(x, importance, row_sigma2)
            scale, codes = search(x).symmetric(x, weights, half=self.half, factors=_around(self.half))
            return Parts(codes, scale.half())
        d, _, codes = search(x).plain(x, half=self.half, top=2 * self.half - 1)
        return Parts(codes, d.half())

    def values(self, parts: Parts) -> Tensor:
        return parts.d.float()[:, None] * (parts.codes.float() - self.half)

    def pack(self, parts: Parts) -> Tensor:
        if self.half == 128:
            return torch.cat([_bytes(parts.d), parts.codes ^ 128], 1)
        return torch.cat([_bytes(parts.d), *_high_bits(parts.codes, self.half == 16), _nibbles(parts.codes)], 1)

    def unpack(self, data: Tensor) -> Parts:
        if self.half == 128:
            return Parts(data[:, 2:] ^ 128, _halves(data[:, :2]))
        return Parts(_codes32(data[:, 2:], self.half == 16), _halves(data[:, :2]))


@dataclass(frozen=True)
class Affine(BlockType):
    """value = d * code + m: Q4_1, Q5_1."""

    top: int
    block_bytes: int
    block_size: int = 32

    def round(self, x: Tensor, importance: Tensor | None, row_sigma2: Tensor | None) -> Parts:
        if importance is not None and row_sigma2 is not None:
            weights = search(x).important(x, importance, row_sigma2)
            scale, low, codes = search(x).affine(x, weights, top=self.top, factors=steps(*_WIDE, self.top))
            return Parts(codes, scale.half(), (-low).half())
        d, low, codes = search(x).plain(x, half=0, top=self.top)
        return Parts(codes, d.half(), low.half())

    def values(self, parts: Parts) -> Tensor:
        return parts.d.float()[:, None] * parts.codes.float() + parts.m.float()[:, None]

    def pack(self, parts: Parts) -> Tensor:
        high = _high_bits(parts.codes, self.top == 31)
        return torch.cat([_bytes(parts.d), _bytes(parts.m), *high, _nibbles(parts.codes)], 1)

    def unpack(self, data: Tensor) -> Parts:
        return Parts(_codes32(data[:, 4:], self.top == 31), _halves(data[:, :2]), _halves(data[:, 2:4]))


def _nibbles(codes: Tensor) -> Tensor:
    return pack_planes(codes & 15, 2, 16)


def _high_bits(codes: Tensor, wanted: bool) -> list[Tensor]:
    return [pack_planes((codes >> 4).view(-1, 4, 8).transpose(1, 2), 8, 4)] if wanted else []


def _codes32(data: Tensor, high: bool) -> Tensor:
    if not high:
        return unpack_planes(data, 2, 16)
    bits = unpack_planes(data[:, :4], 8, 4).view(-1, 8, 4).transpose(1, 2).reshape(-1, 32)
    return unpack_planes(data[:, 4:], 2, 16) | bits << 4


# --- K-quants: blocks of 256 whose sub-blocks' scales are rounded too ------------------------------------------------------------


@dataclass(frozen=True)
class KAffine(BlockType):
    """value = (d * scale) * code - (m * minimum): Q2_K, Q4_K, Q5_K."""

    sub: int  # weights that share a scale
    top: int  # largest code
    scale_top: int  # largest scale and minimum
    grid: tuple[float, float, int]  # steps of the search without importance
    block_bytes: int
    block_size: int = 256

    def round(self, x: Tensor, importance: Tensor | None, row_sigma2: Tensor | None) -> Parts:
        del row_sigma2
        N, two_bit = len(x), self.top == 3
        subs = x.view(-1, self.sub)
        if importance is None:
            if two_bit:
                weights = subs.abs()
            else:
                weights = search(x).magnitudes(subs)
            factors = steps(*self.grid, self.top)
            scale, low, codes = search(x).affine(subs, weights, top=self.top, factors=factors, absolute=two_bit)
            scale, low = scale.view(N, -1), low.view(N, -1)
            d, scales = self._rounded(scale)
            m, minima = self._rounded(low)
        else:
            sigma2 = _sigma2(x, 1 if two_bit else 2)
            weights = search(x).important(x, importance, sigma2).view(-1, self.sub)
            scale, low, codes = search(x).affine(subs, weights, top=self.top, factors=steps(*_WIDE, self.top))
            scale, low = scale.view(N, -1), low.view(N, -1)
            sub_weights = search(x).sums(weights).view(N, -1)
            tenth = np.float32(0.1)
            factors = [np.float32(self.scale_top)]
            factors += [tenth * np.float32(i) + np.float32(self.scale_top) for i in (-4, -3, -2, -1, 1, 2, 3, 4)]
            d, scales = search(x).positive(scale, sub_weights, top=self.scale_top, factors=factors, n_passes=5)
            m, minima = search(x).positive(low, sub_weights, top=self.scale_top, factors=factors, n_passes=5)
            d, m = d.half(), m.half()
        if two_bit:  # four bits each, in one byte
            minima, scales = (minima & 15) | scales >> 4, scales & 15
        else:
            scales, minima = scales.clamp(max=self.scale_top), minima.clamp(max=self.scale_top)
        step = d.float()[:, None] * scales.float()
        offset = m.float()[:, None] * minima.float()
        codes = search(x).recode(subs, step.view(-1), offset.view(-1), codes, low=0, high=self.top)
        return Parts(codes.view(N, -1), d, m, scales, minima)

    def _rounded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (N, sub-blocks) as multiples of the largest / scale_top."""
        largest = scale.amax(1)
        largest = torch.where(largest > 0, largest, 0.0)  # not clamp, which may leave -0.0
        inverse = torch.where(largest > 0, divide(self.scale_top, largest), 0.0)
        scales = nearest(inverse[:, None] * scale, None, None).int() & 0xFF
        return divide(largest, self.scale_top).half(), scales.to(torch.uint8)

    def values(self, parts: Parts) -> Tensor:
        step = parts.d.float()[:, None] * parts.scales.float()
        offset = parts.m.float()[:, None] * parts.minima.float()
        codes = parts.codes.float().view(len(step), -1, self.sub)
        return (step[..., None] * codes - offset[..., None]).view(len(step), -1)

    def pack(self, parts: Parts) -> Tensor:
        d, m = _bytes(parts.d), _bytes(parts.m)
        if self.top == 3:
            return torch.cat([parts.scales | parts.minima << 4, pack_planes(parts.codes, 4, 32), d, m], 1)
        scales, minima = parts.scales, parts.minima
        packed = torch.cat(
            [
                scales[:, :4] | scales[:, 4:] >> 4 << 6,
                minima[:, :4] | minima[:, 4:] >> 4 << 6,
                (scales[:, 4:] & 15) | minima[:, 4:] << 4,
            ],
            1,
        )
        high = [pack_planes(parts.codes >> 4, 8, 32)] if self.top == 31 else []
        return torch.cat([d, m, packed, *high, pack_planes(parts.codes & 15, 2, 32)], 1)

    def unpack(self, data: Tensor) -> Parts:
        if self.top == 3:
            both, codes = data[:, :16], unpack_planes(data[:, 16:80], 4, 32)
            return Parts(codes, _halves(data[:, 80:82]), _halves(data[:, 82:84]), both & 15, both >> 4)
        first, second, third = data[:, 4:8], data[:, 8:12], data[:, 12:16]
        scales = torch.cat([first & 63, (third & 15) | first >> 6 << 4], 1)
        minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
        codes = unpack_planes(data[:, -128:], 2, 32)
        if self.top == 31:
            codes = codes | unpack_planes(data[:, 16:48], 8, 32) << 4
        return Parts(codes, _halves(data[:, :2]), _halves(data[:, 2:4]), scales, minima)


@dataclass(frozen=True)
class KSymmetric(BlockType):
    """value = (d * scale) * (code - half), a scale for each 16 weights: Q3_K and Q6_K, which round and lie differently."""

    half: int
    block_bytes: int
    block_size: int = 256

    def values(self, parts: Parts) -> Tensor:
        step = parts.d.float()[:, None] * parts.scales.float()
        return (step[..., None] * (parts.codes.float().view(len(step), 16, 16) - self.half)).view(len(step), -1)

    def _recoded(self, subs: Tensor, d: Tensor, scales: Tensor, codes: Tensor) -> Parts:
        """subs and codes (16 N, 16), d (N), scales (N, 16): the codes for the scales as they are stored."""
        step = (d.float()[:, None] * scales).view(-1)
        codes = search(subs).recode(subs, step, torch.zeros_like(step), codes, low=-self.half, high=self.half - 1)
        return Parts(codes.view(len(d), -1), d, scales=scales.to(torch.int8))


class Q3K(KSymmetric):
    """Scales -32..31."""

    def round(self, x: Tensor, importance: Tensor | None, row_sigma2: Tensor | None) -> Parts:
        del row_sigma2
        N, subs = len(x), x.view(-1, 16)
        if importance is None:
            scale, codes = search(x).refined(subs, half=4, n_passes=5)
            scale = scale.view(N, 16)
            extreme = _first_extreme(scale)
            inverse = divide(-32, extreme)
            scales = nearest(inverse[:, None] * scale, -32, 31)
            d = torch.where(extreme != 0, divide(1, inverse), 0.0).half()
            scales = torch.where(extreme[:, None] != 0, scales, -32.0)
        else:
            weights = search(x).important(x, importance, _sigma2(x, 2)).view(-1, 16)
            scale, codes = search(x).symmetric(subs, weights, half=4, factors=_around(4))
            sub_weights = search(x).sums(weights).view(N, 16)
            d, stored = search(x).symmetric(scale.view(N, 16), sub_weights, half=32, factors=_around(32))
            d, scales = d.half(), stored.float() - 32
        return self._recoded(subs, d, scales, codes)

    def pack(self, parts: Parts) -> Tensor:
        stored = (parts.scales.int() + 32).to(torch.uint8)
        low = (stored[:, :8] & 15) | (stored[:, 8:] & 15) << 4
        high = pack_planes(stored >> 4, 4, 4)
        codes = parts.codes
        return torch.cat([pack_planes(codes >> 2, 8, 32), pack_planes(codes & 3, 4, 32), low, high, _bytes(parts.d)], 1)

    def unpack(self, data: Tensor) -> Parts:
        codes = unpack_planes(data[:, 32:96], 4, 32) | unpack_planes(data[:, :32], 8, 32) << 2
        low = torch.cat([data[:, 96:104] & 15, data[:, 96:104] >> 4], 1)
        stored = low | unpack_planes(data[:, 104:108], 4, 4) << 4
        return Parts(codes, _halves(data[:, 108:]), scales=(stored.int() - 32).to(torch.int8))


class Q6K(KSymmetric):
    """Scales -128..127."""

    def round(self, x: Tensor, importance: Tensor | None, row_sigma2: Tensor | None) -> Parts:
        del row_sigma2
        N, subs = len(x), x.view(-1, 16)
        weights = subs * subs if importance is None else importance.view(-1, 16)
        scale, codes = search(x).symmetric(subs, weights, half=32, factors=_around(32))
        scale = scale.view(N, 16)
        extreme = _first_extreme(scale)
        zero = extreme.abs() < vectorized.TINY
        inverse = divide(-128, extreme)
        d = torch.where(zero, 0.0, divide(1, inverse)).half()
        scales = torch.where(zero[:, None], 0.0, nearest(inverse[:, None] * scale, None, None).clamp_(max=127))
        parts = self._recoded(subs, d, scales, codes)
        return parts._replace(codes=parts.codes.masked_fill_(zero[:, None], 0))

    def pack(self, parts: Parts) -> Tensor:
        low, high = pack_planes(parts.codes & 15, 2, 64), pack_planes(parts.codes >> 4, 4, 32)
        return torch.cat([low, high, parts.scales.view(torch.uint8), _bytes(parts.d)], 1)

    def unpack(self, data: Tensor) -> Parts:
        codes = unpack_planes(data[:, :128], 2, 64) | unpack_planes(data[:, 128:192], 4, 32) << 4
        return Parts(codes, _halves(data[:, 208:]), scales=data[:, 192:208].contiguous().view(torch.int8))


def _first_extreme(scale: Tensor) -> Tensor:
    return vectorized.extreme(scale.t())[0]


# --- 16 values that are not evenly spaced ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nonlinear(BlockType):
    """value = (d * scale) * VALUES[code]: IQ4_XS; IQ4_NL is without scale."""

    block_bytes: int
    block_size: int

    VALUES: ClassVar = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    FACTORS: ClassVar = tuple(float(i - 127) for i in range(-7, 8))

    def round(self, x: Tensor, importance: Tensor | None, row_sigma2: Tensor | None) -> Parts:
        del row_sigma2
        N, subs = len(x), x.view(-1, 32)
        weights = (
            subs * subs if importance is None else search(x).important(x, importance, self._sigma2(x)).view(-1, 32)
        )
        scale = search(x).nonlinear(subs, weights, values=self.VALUES, factors=self.FACTORS).view(N, -1)
        if self.block_size == 32:
            d, scales, step = scale[:, 0].half(), _ABSENT, scale
        else:
            exact = divide(-_first_extreme(scale), 32)
            inverse = torch.where(exact != 0, divide(1, exact), 0.0)
            levels = nearest(inverse[:, None] * scale, -32, 31)
            d, scales, step = exact.half(), levels.to(torch.int8), exact[:, None] * levels
        inverse = torch.where(step != 0, divide(1, step), 0.0)
        codes = nearest_value(inverse.view(-1, 1) * subs, self.VALUES).to(torch.uint8)
        return Parts(codes.view(N, -1), d, scales=scales)

    def _sigma2(self, x: Tensor) -> Tensor:
        sums: Tensor = search(x).sums(x, squares=True)
        return sums * (2 / self.block_size)

    def values(self, parts: Parts) -> Tensor:
        table = torch.tensor(self.VALUES, dtype=torch.float32, device=parts.codes.device)
        step = parts.d.float()[:, None]
        if self.block_size == 256:
            step = step * parts.scales.float()
        return (step[..., None] * table[parts.codes.long()].view(*step.shape, 32)).view(len(step), -1)

    def pack(self, parts: Parts) -> Tensor:
        codes = pack_planes(parts.codes, 2, 16)
        if self.block_size == 32:
            return torch.cat([_bytes(parts.d), codes], 1)
        stored = (parts.scales.int() + 32).to(torch.uint8)
        high = pack_planes((stored >> 4).view(-1, 2, 4).transpose(1, 2), 4, 2)
        low = stored[:, ::2] & 15 | stored[:, 1::2] << 4
        return torch.cat([_bytes(parts.d), high, low, codes], 1)

    def unpack(self, data: Tensor) -> Parts:
        if self.block_size == 32:
            return Parts(unpack_planes(data[:, 2:], 2, 16), _halves(data[:, :2]))
        high = unpack_planes(data[:, 2:4], 4, 2).view(-1, 4, 2).transpose(1, 2).reshape(-1, 8)
        low = torch.stack([data[:, 4:8] & 15, data[:, 4:8] >> 4], 2).view(-1, 8)
        scales = ((low | high << 4).int() - 32).to(torch.int8)
        return Parts(unpack_planes(data[:, 8:], 2, 16), _halves(data[:, :2]), scales=scales)


TYPES: dict[str, BlockType] = {
    "Q4_0": Symmetric(8, 18),
    "Q4_1": Affine(15, 20),
    "Q5_0": Symmetric(16, 22),
    "Q5_1": Affine(31, 24),
    "Q8_0": Symmetric(128, 34),
    "Q2_K": KAffine(sub=16, top=3, scale_top=15, grid=(-0.5, 0.1, 16), block_bytes=84),
    "Q3_K": Q3K(half=4, block_bytes=110),
    "Q4_K": KAffine(sub=32, top=15, scale_top=63, grid=(-1, 0.1, 21), block_bytes=144),
    "Q5_K": KAffine(sub=32, top=31, scale_top=63, grid=(-0.5, 0.1, 16), block_bytes=176),
    "Q6_K": Q6K(half=32, block_bytes=210),
    "IQ4_NL": Nonlinear(18, 32),
    "IQ4_XS": Nonlinear(136, 256),
}


# --- bits -----------------------------------------------------------------------------------------------------------------------


def pack_planes(codes: Tensor, n_planes: int, width: int) -> Tensor:
    """Codes (N, groups * n_planes * width) of 8 / n_planes bits as bytes (N, groups * width): plane p takes the p-th bits from below."""
    planes = codes.reshape(len(codes), -1, n_planes, width)
    bits = 8 // n_planes
    packed = planes[:, :, 0]
    for plane in range(1, n_planes):
        packed = packed | planes[:, :, plane] << bits * plane
    return packed.reshape(len(codes), -1)


def unpack_planes(data: Tensor, n_planes: int, width: int) -> Tensor:
    """The inverse of `pack_planes`."""
    groups = data.reshape(len(data), -1, 1, width)
    bits = 8 // n_planes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).view(-1, 1)
    return (groups >> shifts & (1 << bits) - 1).view(len(data), -1)


def _bytes(halves: Tensor) -> Tensor:
    return halves.view(-1, 1).view(torch.uint8)


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).view(-1)
