"""Token embedding and output projection in eight bits: the large matrices beside a base of 4 bits, which a vocabulary makes.

Both are frozen. Of the embedding, rows are decoded as they are looked up; of the output projection, slices of rows as they are
multiplied, forward and, again, backward: for 128,256 tokens its 16-bit matrix would be the gigabyte that 8 bits have saved.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import Self

from llmforge.nn.frozen_codes import FrozenCodes
from llmforge.quant.int8 import dequantize_int8_rows, quantize_int8_rows

_SLICE_WEIGHTS = 2**22  # that are floats at a time: 8 MB in 16 bits; with 2**24 a CPU decodes several times slower


class Int8Matrix(FrozenCodes):
    """A frozen matrix in eight bits; what ties an embedding and an output projection has it in both.

    Buffers: codes, int8 (num_rows, num_columns), and scales, float32 (num_rows), as of `quant.int8`. They have no values yet: those come
    from a state_dict, from `set_rows`, or use `from_weight`.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, num_rows: int, num_columns: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(num_rows, num_columns, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(num_rows, dtype=torch.float32, device=device))

    @classmethod
    def from_weight(cls, weight: Tensor) -> Self:
        """Round a matrix, (num_rows, num_columns), on its device, some rows at a time.

        Raises:
            ConfigError: NaN or infinity among the weights.
        """
        matrix = cls(*weight.shape, device=weight.device)
        for rows in matrix.slices():
            matrix.set_rows(rows.start, weight[rows])
        return matrix

    @torch.no_grad()
    def set_rows(self, start: int, weight: Tensor) -> None:
        """Round rows from `start` on: (k, num_columns) of floats, on any device.

        Raises:
            ConfigError: NaN or infinity among the weights.
        """
        rows = slice(start, start + len(weight))
        codes, scales = quantize_int8_rows(weight.detach().to(self.codes.device))
        self.codes[rows], self.scales[rows] = codes, scales

    def slices(self) -> Iterator[slice]:
        """All rows, some megabytes of floats at a time."""
        return _slices(self.codes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix as it is computed with in `dtype`: (num_rows, num_columns)."""
        return dequantize_int8_rows(self.codes, self.scales, dtype=dtype)

    @property
    def num_rows(self) -> int:
        return self.codes.shape[0]

    @property
    def num_columns(self) -> int:
        return self.codes.shape[1]

    @property
    def num_weights(self) -> int:
        """How many weights the codes stand for."""
        return self.codes.numel()

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.num_columns}"


class Linear8bit(nn.Module):
    """What nn.Linear computes with a matrix in eight bits, for an output projection; gradients go to the input and the bias.

    It computes in the dtype of its input, or that of autocast. For the backward pass it keeps nothing of its own.

    Args:
        matrix: (out_features, in_features).
        bias: (out_features).
    """

    bias: nn.Parameter | None

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        x, device = input, input.device.type
        # Autocast does not know "meta", and leaves float64 alone.
        if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = _Product.apply(x, self.matrix.codes, self.matrix.scales)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the layer computes with in `dtype`: (out_features, in_features)."""
        return self.matrix.dequantize(dtype)

    @property
    def in_features(self) -> int:
        return self.matrix.num_columns

    @property
    def out_features(self) -> int:
        return self.matrix.num_rows

    @property
    def num_weights(self) -> int:
        """How many weights the codes stand for; the bias is a parameter."""
        return self.matrix.num_weights


class Embedding8bit(nn.Module):
    """What nn.Embedding looks up in a matrix in eight bits; only rows that are looked up are decoded.

    `model.bfloat16()` casts what it returns, not what it stores.

    Args:
        matrix: (num_embeddings, embedding_dim).
        dtype: of what it returns.
    """

    def __init__(self, matrix: Int8Matrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids -> (..., embedding_dim)"""
        return dequantize_int8_rows(*self._rows(input), dtype=self.dtype)

    def _rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of these ids: (..., embedding_dim) and (...)."""
        return F.embedding(ids, self.matrix.codes), F.embedding(ids, self.matrix.scales[:, None]).squeeze(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(self.matrix.scales.new_empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table as it is in `dtype`: (num_embeddings, embedding_dim)."""
        return self.matrix.dequantize(dtype)

    @property
    def num_embeddings(self) -> int:
        return self.matrix.num_rows

    @property
    def embedding_dim(self) -> int:
        return self.matrix.num_columns

    @property
    def num_weights(self) -> int:
        """How many weights the codes stand for."""
        return self.matrix.num_weights

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}"


class _Product(torch.autograd.Function):
    """x @ W.T; W is decoded in slices of its rows, for each pass anew, and neither it nor x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtype = x.dtype
        y = x.new_empty(*x.shape[:-1], len(codes))
        for rows in _slices(codes):
            y[..., rows] = F.linear(x, dequantize_int8_rows(codes[rows], scales[rows], dtype=x.dtype))
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        codes, scales = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        # Sums of many slices would lose bits in 16.
        wide = torch.promote_types(dtype, torch.float32)
        of_x = grad.new_zeros(*grad.shape[:-1], codes.shape[1], dtype=wide)
        for rows in _slices(codes):
            of_x += grad[..., rows].matmul(dequantize_int8_rows(codes[rows], scales[rows], dtype=dtype))
        return of_x.to(dtype), None, None


def _slices(codes: Tensor) -> Iterator[slice]:
    step = max(1, _SLICE_WEIGHTS // max(1, codes.shape[1]))
    return (slice(start, min(start + step, len(codes))) for start in range(0, len(codes), step))
