"""Linear4bit: a frozen linear layer whose weights take four bits (NF4), the base under an adapter (QLoRA).

The matrix exists as floats only while it is multiplied, forward and, decoded again, backward: the autograd graph keeps codes.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from llmforge.nn.frozen_codes import FrozenCodes
from llmforge.quant.dynamic8 import BLOCK_SIZE
from llmforge.quant.nf4 import NF4Tensor, check_block_size, dequantize_nf4, quantize_nf4


class NF4Settings(Protocol):
    """What `finetune.NF4Config` says of a layer."""

    @property
    def block_size(self) -> int: ...
    @property
    def double_quant(self) -> bool: ...


class Linear4bit(FrozenCodes):
    """What nn.Linear computes with a matrix that was rounded to NF4; gradients go to the input and the bias, the matrix is frozen.

    Buffers: codes, absmax, nested_absmax, offset, as `quant.nf4.NF4Tensor` says; their types stay, whatever the model is cast to. It
    computes in the dtype of its input, or that of autocast.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear; dtype is the bias'. The codes have no values yet: they come
            from a state_dict, or use `from_weight`.
        block_size: weights that share a scale.
        double_quant: store the scales in 8 bits.
    Raises:
        ConfigError: a block size that NF4 does not have.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_block_size(block_size)
        n = in_features * out_features
        blocks = -(-n // block_size)
        scales = torch.uint8 if double_quant else torch.float32
        nf4 = NF4Tensor(
            torch.empty(-(-n // 2), dtype=torch.uint8, device=device),
            torch.empty(blocks, dtype=scales, device=device),
            torch.empty(-(-blocks // BLOCK_SIZE), dtype=torch.float32, device=device) if double_quant else None,
            torch.empty((), dtype=torch.float32, device=device) if double_quant else None,
            (out_features, in_features),
            block_size,
        )
        self._set(nf4, nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None)

    def _set(self, nf4: NF4Tensor, bias: nn.Parameter | None) -> None:
        self.out_features, self.in_features = nf4.shape
        self.block_size = nf4.block_size
        for name in ("codes", "absmax", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(nf4, name))
        self.register_parameter("bias", bias)

    @classmethod
    def from_nf4(cls, nf4: NF4Tensor, bias: nn.Parameter | None) -> Self:
        """A layer of these codes, (out_features, in_features), and this very bias."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(nf4, bias)
        return layer

    @classmethod
    def from_weight(cls, weight: Tensor, bias: nn.Parameter | None, config: NF4Settings) -> Self:
        """Round a matrix, (out_features, in_features), on its device.

        Raises:
            ConfigError: NaN or infinity among the weights.
        """
        nf4 = quantize_nf4(weight.detach(), block_size=config.block_size, double_quant=config.double_quant)
        return cls.from_nf4(nf4, bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        x, bias = input, self.bias
        device = x.device.type
        # Autocast does not know "meta", and leaves float64 alone.
        if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if bias is not None:
            bias = bias.to(x.dtype)  # type: ignore[assignment]
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        shape = (self.out_features, self.in_features)
        y: Tensor = _Linear.apply(x, bias, shape, self.block_size, *parts)  # type: ignore[no-untyped-call]
        return y

    def nf4(self) -> NF4Tensor:
        """Codes and scales of the matrix; not copies."""
        shape = (self.out_features, self.in_features)
        return NF4Tensor(self.codes, self.absmax, self.nested_absmax, self.offset, shape, self.block_size)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the layer computes with in `dtype`: (out_features, in_features)."""
        return dequantize_nf4(self.nf4(), dtype=dtype)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def num_weights(self) -> int:
        """How many weights the codes stand for; the bias is a parameter."""
        return self.in_features * self.out_features

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )


class _Linear(torch.autograd.Function):
    """x @ W.T + bias; W is decoded for each pass, and between them nobody holds it, nor x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], block_size: int, *parts: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.shape, ctx.block_size, ctx.dtype = shape, block_size, x.dtype
        return F.linear(x, _Linear.weight(ctx, parts), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        of_x = grad.matmul(_Linear.weight(ctx, ctx.saved_tensors)) if ctx.needs_input_grad[0] else None
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None, None, None, None, None, None

    @staticmethod
    def weight(ctx: Any, parts: Any) -> Tensor:
        with torch.no_grad():
            codes, absmax, nested_absmax, offset = parts
            nf4 = NF4Tensor(codes, absmax, nested_absmax, offset, ctx.shape, ctx.block_size)
            return dequantize_nf4(nf4, dtype=ctx.dtype)
