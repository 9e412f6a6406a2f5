"""Ternary layers for inference: two bits per weight in memory, products of integers (`pack_`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmforge.errors import ConfigError
from llmforge.nn.bitlinear import BitLinear
from llmforge.nn.replace import exchange_modules_
from llmforge.quant.ternary import GROUP, fake_int8, pack_2bit, unpack_2bit
from llmforge.quant.ternary_kernel import ternary_kernel

_WAY_OUT = "export the model to a GGUF of type TQ2_0 and run it in llama.cpp"


class PackedBitLinear(nn.Module):
    """What a BitLinear computes, from codes alone: no float weights, and no gradients.

    Buffers: codes, uint8 (out_features / 4 rounded up, in_features), four weights in a byte as `pack_2bit` packs them; scale, float32
    () or (out_features, groups, 1); bias, float32 (out_features), where there is one.

    Args:
        layer: stays as it is; its inner norm is shared.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.act_quant = layer.act_quant
        self.rms_norm = layer.rms_norm
        codes, scale = layer.codes()
        self.register_buffer("codes", pack_2bit(F.pad(codes, (0, 0, 0, -len(codes) % 4))))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        x = input if self.rms_norm is None else self.rms_norm(input)
        group = GROUP if self.act_quant == "group" else 0
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.llmforge.ternary_linear(
                x, self.codes, self.scale, self.bias, self.out_features, group
            )
            return compiled
        y = _ternary_linear(x, self.codes, self.scale, self.bias, self.out_features, group)
        if torch.is_grad_enabled() and x.requires_grad:
            y = _NoGradient.apply(y, x)  # type: ignore[no-untyped-call]
        return y

    @property
    def num_weights(self) -> int:
        """How many weights the codes stand for, with the bias."""
        return self.out_features * (self.in_features + (self.bias is not None))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"act_quant={self.act_quant}"
        )


def _ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, act_group: int
) -> Tensor:
    kernel = ternary_kernel() if x.is_cpu and codes.is_cpu else None
    # A model that was moved or cast since it was packed still computes the same.
    scale, bias = scale.float(), None if bias is None else bias.float()
    group = act_group or None
    if kernel is not None and x.numel() <= kernel.most_tokens * codes.shape[1]:
        y = kernel.linear(x.float(), codes, scale, bias, out_features=out_features, act_group=group)
        return y.to(x.dtype)
    with torch.no_grad():
        if kernel is not None:
            weight = kernel.decode(codes, scale, out_features=out_features)
        else:
            groups = 1 if scale.ndim == 0 else scale.shape[1]
            weight = unpack_2bit(codes)[:out_features].float()
            weight.view(out_features, groups, -1).mul_(scale)
        return F.linear(fake_int8(x, group_size=group), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


# For torch.compile: one operation, whatever happens inside.
@torch.library.custom_op("llmforge::ternary_linear", mutates_args=())
def _op(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, act_group: int) -> Tensor:
    return _ternary_linear(x, codes, scale, bias, out_features, act_group)


@_op.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, act_group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _no_gradient(*_: Any) -> None:
    raise ConfigError(
        "packed layers (pack_) have no weights to train and pass no gradients; load the model again to train it"
    )


_op.register_autograd(_no_gradient)


class _NoGradient(torch.autograd.Function):
    """The value, in place of which a backward pass finds an error: else it would train what is behind the layer, and nothing else."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _no_gradient()


def pack_(model: nn.Module) -> list[str]:
    """Make a ternary model fast and small for inference: every BitLinear becomes a PackedBitLinear, whose weights take two bits.

    It computes the same up to the order of float sums, does not train, and cannot be exported: keep the file it was loaded from. Layers
    with float activations (act_quant "none") stay as they are, since integers gain nothing there. The first call on a machine
    compiles a C kernel (half a second).

    Returns:
        the names of the layers packed.
    Raises:
        ConfigError: where packed layers would not be faster than the floats: without a C compiler, on a processor without AVX2 or
            ARM's dot products, not on the CPU, not in float32; a model whose rounding does not apply in full, or that is a BitLinear
            itself. Nothing is changed then.
    >>> pack_(nn.Sequential(nn.Linear(4, 8), BitLinear(8, 8)))  # doctest: +SKIP
    ['1']
    """
    if type(model) is BitLinear:
        raise ConfigError("pack_ exchanges layers within a module, and this is a BitLinear itself")
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is BitLinear and module.act_quant != "none"
    }
    for name, layer in layers.items():
        device, dtype = layer.weight.device.type, layer.weight.dtype
        if device != "cpu":
            raise ConfigError(
                f"{name} is on {device!r}, and packed layers are fast on the CPU alone: model.cpu(), or {_WAY_OUT}"
            )
        if dtype is not torch.float32:
            raise ConfigError(f"{name} is {dtype}, and packed layers compute in float32: model.float(), or {_WAY_OUT}")
        if layer.strength != 1:
            raise ConfigError(
                f"{name} applies its rounding by {layer.strength}, but codes are all of it; set_quantization_(model, 1) first"
            )
    if layers and ternary_kernel() is None:
        raise ConfigError(
            "packed layers would be slower than floats here: their kernel needs a C compiler (cc, gcc, clang, or the one that CC "
            f"names) and a processor with AVX2 or ARM's dot products; install one, or {_WAY_OUT}"
        )
    packed: dict[nn.Module, nn.Module] = {
        layer: PackedBitLinear(layer).train(layer.training) for layer in layers.values()
    }
    exchange_modules_(model, packed)
    return list(layers)
