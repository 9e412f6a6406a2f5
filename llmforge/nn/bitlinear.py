"""BitLinear: a linear layer that trains with the ternary weights and 8-bit activations that it will run with (BitNet b1.58).

    y = int8(x) @ ternary(W).T

The weights that the optimizer sees, the latent ones, stay floats; gradients pass the rounding as if it were not there. Arithmetic of
the rounding is that of `llmforge.quant.ternary`, in float32 under autocast too.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmforge.errors import ConfigError
from llmforge.nn.norm import RMSNorm
from llmforge.nn.straight_through import straight_through
from llmforge.quant.ternary import GROUP, fake_int8, fake_ternary, int8_codes, ternary_codes

ActQuant = Literal["token", "group", "none"]


class BitLinear(nn.Linear):
    """nn.Linear with ternary weights and 8-bit activations.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear; the bias is not quantized, and BitNet has none. Keep the
            weights in float32: in bfloat16 small updates are lost, and the codes freeze.
        act_quant: "token": one scale per token, the paper's and transformers' (default); "group": one per 256 values, what llama.cpp
            computes with TQ1_0 and TQ2_0, so that training and llama.cpp agree; "none": activations stay floats (TriLM).
        group_size: so many weights of a row share a scale; None = the whole matrix does (the paper; the only form that transformers
            reads). llama.cpp can have a scale per 256.
        scale_dtype: what the scale is rounded to. bfloat16 (default) can be exported exactly, since ggml's scales are float16.
        norm: an RMSNorm inside, before the activations are rounded, as in the paper; off by default, since the norms of a
            transformer's block stand there already.
    Raises:
        ConfigError: an unknown act_quant or scale_dtype, or in_features that the groups do not divide.
    Source: Ma et al. 2024, arXiv:2402.17764, and its training tips.
    >>> layer = BitLinear(4, 2)
    >>> len(layer.quantized_weight().unique()) <= 3
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        act_quant: ActQuant = "token",
        group_size: int | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if act_quant not in ("token", "group", "none"):
            raise ConfigError(f"act_quant ({act_quant!r}) must be 'token', 'group' or 'none'")
        if scale_dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(f"scale_dtype ({scale_dtype}) must be torch.bfloat16 or torch.float32")
        for name, size in (("act_quant='group'", GROUP if act_quant == "group" else 1), ("group_size", group_size)):
            if size is not None and (size < 1 or in_features % size):
                raise ConfigError(
                    f"{name} makes groups of {size}, which do not divide in_features ({in_features}); "
                    f"{_nearest(in_features, max(size, 1))}"
                )
        self.act_quant, self.group_size, self.scale_dtype = act_quant, group_size, scale_dtype
        self.rms_norm = RMSNorm(in_features) if norm else None
        if self.rms_norm is not None and self.weight.device.type != "meta":
            self.rms_norm.to(self.weight.device)
        # How much of the rounding applies: 0.0 = a float layer, 1.0 = all; between them a tensor, so that compiled code, which is made
        # for one float, need not be made anew for each. See `set_quantization_`.
        self.strength: float | Tensor = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        x = input if self.rms_norm is None else self.rms_norm(input)
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)

    def quantized_weight(self) -> Tensor:
        """The matrix that the layer computes with, (out_features, in_features); its gradient goes to the weight as it is."""
        if self._is_float():
            return self.weight
        if _kept is None or torch.compiler.is_compiling():
            return straight_through(self.weight, self._ternary())
        key = (self.weight._version, self.weight.data_ptr(), self._strength_key())
        found = _kept.get(self)
        if found is None or found[0] != key:
            with torch.inference_mode(False):  # whose tensors no backward pass can use later
                found = _kept[self] = (key, self._ternary())
        return straight_through(self.weight, found[1])

    def quantized_input(self, x: Tensor) -> Tensor:
        """Activations as the layer computes with them, in the shape and dtype of x; the gradient goes to x as it is.

        Layers that get the same tensor (q, k and v of an attention; gate and up of a feed-forward) share the result, which hangs on
        that tensor and goes with it.
        """
        if self.act_quant == "none" or self._is_float():
            return x
        leaf = x.is_leaf and x.requires_grad  # it would hang on to itself through the graph
        if leaf or torch.compiler.is_compiling():
            return self._int8(x)
        version = None if x.is_inference() else x._version
        key = (version, self.act_quant, self._strength_key(), torch.is_grad_enabled())
        found: tuple[object, Tensor] | None = getattr(x, "_int8", None)
        if found is None or found[0] != key:
            found = x._int8 = (key, self._int8(x))  # type: ignore[attr-defined]
        return found[1]

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """What an exporter writes: (out_features, in_features) int8 codes -1, 0 and 1, and the float32 scale or scales."""
        return ternary_codes(self.weight, group_size=self.group_size, scale_dtype=self.scale_dtype)

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer makes of activations: (..., in_features) int8 codes, and what a step of them is worth."""
        x = x if self.rms_norm is None else self.rms_norm(x)
        return int8_codes(x, group_size=GROUP if self.act_quant == "group" else None)

    @torch.no_grad()
    def _ternary(self) -> Tensor:
        rounded = fake_ternary(self.weight, group_size=self.group_size, scale_dtype=self.scale_dtype)
        return self._mixed(self.weight, rounded)

    def _int8(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rounded = fake_int8(x, group_size=GROUP if self.act_quant == "group" else None)
            rounded = self._mixed(x, rounded)
        return straight_through(x, rounded)

    def _is_float(self) -> bool:
        return not isinstance(self.strength, Tensor) and self.strength == 0

    def _mixed(self, value: Tensor, rounded: Tensor) -> Tensor:
        strength = self.strength
        return torch.lerp(value, rounded, strength.to(value.dtype)) if isinstance(strength, Tensor) else rounded

    def _strength_key(self) -> object:
        return (id(self.strength), self.strength._version) if isinstance(self.strength, Tensor) else self.strength

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act_quant={self.act_quant}"


_kept: dict[BitLinear, tuple[object, Tensor]] | None = None  # quantized weights, where `constant_weights` promises them


class constant_weights:
    """Within the block no weight changes, so every BitLinear rounds its weights once: over the micro-steps of one optimizer step, an
    evaluation, the tokens of a generation. May be entered again, for more of the same. (Compiled code rounds each time, fused with
    what follows.)
    """

    def __init__(self) -> None:
        self._weights: dict[BitLinear, tuple[object, Tensor]] = {}

    def __enter__(self) -> None:
        global _kept
        self._outer = _kept
        if _kept is None:
            _kept = self._weights

    def __exit__(self, *exception: object) -> None:
        global _kept
        _kept = self._outer


def bit_linears(model: nn.Module) -> dict[str, BitLinear]:
    """A model's BitLinears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


def set_quantization_(model: nn.Module, strength: float) -> list[str]:
    """Let every BitLinear apply this much of its rounding: x + strength * (rounded(x) - x), for weights and activations.

    0 makes them float layers (the first part of a run that switches to ternary), values between warm the rounding up (a model that
    was trained as floats), 1 is what is exported.

    Returns:
        the names of the layers.
    Raises:
        ConfigError: a strength outside 0 .. 1.
    Source: the warm-up, https://huggingface.co/blog/1_58_llm_extreme_quantization; the switch, arXiv:2502.11895.
    """
    if not 0.0 <= strength <= 1.0:
        raise ConfigError(f"strength ({strength}) must be between 0 (floats) and 1 (rounded)")
    layers = bit_linears(model)
    for layer in layers.values():
        if strength in (0.0, 1.0):
            layer.strength = float(strength)
        elif isinstance(layer.strength, Tensor):
            layer.strength.fill_(strength)
        else:
            layer.strength = torch.tensor(strength, device=layer.weight.device)
    return list(layers)


def check_ternary_width(name: str, width: int) -> None:
    """Refuse a width of matrices that a GGUF could not hold as ternary ones.

    Raises:
        ConfigError: it is no multiple of 256; with the nearest that are.
    """
    if width % GROUP:
        raise ConfigError(
            f"{name} ({width}) must be a multiple of {GROUP}, the block of ternary weights in a GGUF; {_nearest(width, GROUP)}"
        )


def _nearest(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"the nearest are {below} and {below + unit}" if below else f"the nearest is {unit}"
