"""`kernels.c` through the C compiler of the machine, where there is one: about five times as fast as `vectorized` on the CPU.

Without a compiler, or where anything about it fails, there are no kernels, and `vectorized` does the work.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmforge.quant.compiler import compile_source
from llmforge.quant.ggml import vectorized
from llmforge.quant.ggml.reference import nearest_value


class Kernels:
    """The searches of `vectorized`, same arguments and results, for float32 tensors on the CPU; in one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def sums(self, x: Tensor, *, squares: bool = False) -> Tensor:
        out = x.new_empty(len(x))
        self._call("sums", x, len(x), x.shape[1], int(squares), out)
        return out

    def plain(self, x: Tensor, *, half: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
        d, low, codes = x.new_empty(len(x)), x.new_empty(len(x)), x.new_empty(x.shape, dtype=torch.uint8)
        self._call("plain", x, len(x), x.shape[1], half, top, d, low, codes)
        return d, low, codes

    def magnitudes(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._call("magnitudes", x, len(x), x.shape[1], out)
        return out

    def important(self, x: Tensor, importance: Tensor, sigma2: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._call("important", (x, importance, sigma2), len(x), x.shape[1], out)
        return out

    def recode(self, x: Tensor, step: Tensor, offset: Tensor, codes: Tensor, *, low: int, high: int) -> Tensor:
        self._call("recode", (x, step, offset), len(x), x.shape[1], low, high, codes)
        return codes

    def affine(
        self, x: Tensor, weights: Tensor, *, top: int, factors: Sequence[float], absolute: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, low, codes = x.new_empty(len(x)), x.new_empty(len(x)), x.new_empty(x.shape, dtype=torch.uint8)
        table, n = _floats(factors), len(factors)
        self._call("affine", (x, weights), len(x), x.shape[1], top, table, n, int(absolute), scale, low, codes)
        return scale, low, codes

    def symmetric(self, x: Tensor, weights: Tensor, *, half: int, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
        scale, codes = x.new_empty(len(x)), x.new_empty(x.shape, dtype=torch.uint8)
        self._call("symmetric", (x, weights), len(x), x.shape[1], half, _floats(factors), len(factors), scale, codes)
        return scale, codes

    def refined(self, x: Tensor, *, half: int, n_passes: int) -> tuple[Tensor, Tensor]:
        scale, codes = x.new_empty(len(x)), x.new_empty(x.shape, dtype=torch.uint8)
        self._call("refined", x, len(x), x.shape[1], half, n_passes, scale, codes)
        return scale, codes

    def nonlinear(self, x: Tensor, weights: Tensor, *, values: Sequence[int], factors: Sequence[float]) -> Tensor:
        scale, table = x.new_empty(len(x)), _floats(values)
        tables = (table, _floats(_thresholds(tuple(values))), _floats(factors))
        self._call("nonlinear", (x, weights), len(x), x.shape[1], *tables, len(factors), scale)
        return scale

    def positive(
        self, x: Tensor, weights: Tensor, *, top: int, factors: Sequence[float], n_passes: int
    ) -> tuple[Tensor, Tensor]:
        scale, codes = x.new_empty(len(x)), x.new_empty(x.shape, dtype=torch.uint8)
        table, n = _floats(factors), len(factors)
        self._call("positive", (x, weights), len(x), x.shape[1], top, table, n, n_passes, scale, codes)
        return scale, codes

    def _call(self, name: str, inputs: Tensor | tuple[Tensor, ...], count: int, n: int, *rest: int | Tensor) -> None:
        kept = [tensor.contiguous() for tensor in (inputs if isinstance(inputs, tuple) else (inputs,))]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in kept]
        arguments = [ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else ctypes.c_int(v) for v in rest]
        function = getattr(self._library, name)
        function.restype = None

        # ctypes lets go of Python's lock meanwhile.
        function(*pointers, ctypes.c_int64(0), ctypes.c_int64(count), ctypes.c_int(n), *arguments)


@cache
def kernels() -> Kernels | None:
    """The compiled searches, or None where they cannot be had."""
    return compile_source(resources.files(__package__).joinpath("kernels.c").read_bytes(), _checked)


def _checked(library: ctypes.CDLL) -> Kernels | None:
    made = Kernels(library)
    return made if _works(made) else None


def _works(made: Kernels) -> bool:
    """Whether a compiler that took the flags also did what they say: all results are those of plain torch, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 32, generator=generator), torch.rand(64, 32, generator=generator)
    factors, values = [-15.0, -14.1, -15.9], [10 * i - 75 for i in range(16)]
    calls: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("sums", (x,), {"squares": True}),
        ("plain", (x,), {"half": 8, "top": 15}),
        ("plain", (x,), {"half": 128, "top": 255}),
        ("plain", (x,), {"half": 0, "top": 15}),
        ("magnitudes", (x,), {}),
        ("important", (x, w, w[:, 0].contiguous()), {}),
        ("recode", (x, w[:, 0].contiguous(), w[:, 1].contiguous(), torch.zeros(64, 32).byte()), {"low": -4, "high": 3}),
        ("affine", (x, w), {"top": 15, "factors": [14.0, 14.9, 16.1]}),
        ("affine", (x, w), {"top": 3, "factors": [2.5, 3.1], "absolute": True}),
        ("symmetric", (x, w), {"half": 16, "factors": factors}),
        ("refined", (x,), {"half": 4, "n_passes": 5}),
        ("nonlinear", (x, w), {"values": values, "factors": factors}),
        ("positive", (w, w.flip(1)), {"top": 63, "factors": [63.0, 62.6, 63.4], "n_passes": 5}),
    ]
    for name, tensors, options in calls:
        expected, found = (getattr(form, name)(*tensors, **options) for form in (vectorized, made))
        if isinstance(expected, Tensor):
            expected, found = (expected,), (found,)
        if not all(torch.equal(left, right) for left, right in zip(expected, found, strict=True)):
            return False
    return True


def _floats(numbers: Sequence[float]) -> Tensor:
    return torch.tensor([float(number) for number in numbers], dtype=torch.float32)


@cache
def _thresholds(values: tuple[int, ...]) -> list[float]:
    """From which float32 on each next value is the nearest: found by halving, with the rule itself."""
    found = []
    for index in range(1, len(values)):
        low, high = np.float32(values[index - 1]), np.float32(values[index])
        while (middle := np.float32((float(low) + float(high)) / 2)) not in (low, high):
            low, high = (middle, high) if nearest_value(middle, values) < index else (low, middle)
        found.append(float(high))
    return found
