"""Layers that compute with what a number format leaves of their weights, while the weights themselves train as floats.

The gradient of the rounded matrix is taken for that of the float one (`straight_through.py`): the float weights drift until other roundings fit better. A layer changes its class and nothing else, so that names, shapes and values in
`state_dict()` stay what they were.
"""

import itertools
from collections.abc import Mapping
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmforge.errors import ConfigError, some
from llmforge.nn.straight_through import straight_through
from llmforge.quant.ggml import ENCODABLE, block_shape, round_to


class Rounding:
    """A type of ggml and the matrix that was last rounded to it; layers that share a matrix share it."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name
        self.number = next(_numbers)
        self._key: tuple[object, ...] = ()
        self._rounded: Tensor | None = None
        _roundings[self.number] = self

    def __reduce__(self) -> tuple[type["Rounding"], tuple[str]]:  # copies and files do without the matrix
        return Rounding, (self.type_name,)

    def of(self, weight: Tensor) -> Tensor:
        """The rounded matrix in the weight's dtype; computed in float32, and anew only when the weight has changed."""
        # Not under inference_mode, whose tensors no backward pass can use later.
        with torch.inference_mode(False), torch.no_grad():
            key = _key_of(weight)
            if self._rounded is None or key != self._key:
                rounded = round_to(weight, self.type_name)
                # What has diverged stays so: some types would make a number of it.
                rounded = torch.where(weight.isfinite(), rounded, torch.nan)
                self._rounded, self._key = rounded.to(weight.dtype), key
            return self._rounded


def _key_of(weight: Tensor) -> tuple[object, ...]:
    """What differs when the weight does. Fused optimizers and writes through `.data` do not count as a version, so its bits are summed."""
    bits = weight.detach().reshape(-1)
    whole = bits.nbytes % 8 == 0 and bits.storage_offset() * bits.itemsize % 8 == 0
    checksum = bits.view(torch.int64 if whole else torch.uint8).sum().item()
    version = None if weight.is_inference() else weight._version
    return checksum, version, weight.data_ptr(), weight.dtype, weight.device


_numbers = itertools.count()
_roundings: WeakValueDictionary[int, Rounding] = WeakValueDictionary()


# For torch.compile: one operation, whatever happens inside. The number stands for the Rounding, since operations take numbers only.
@torch.library.custom_op("llmforge::straight_through", mutates_args=())
def _straight_through(weight: Tensor, number: int) -> Tensor:
    return _roundings[number].of(weight).clone()  # operations return tensors of their own


@_straight_through.register_fake
def _(weight: Tensor, number: int) -> Tensor:
    return torch.empty_like(weight)


_straight_through.register_autograd(lambda ctx, grad: (grad, None))


class _Rounded(nn.Module):
    """What the layers below share."""

    rounding: Rounding
    weight: Tensor

    def rounded_weight(self) -> Tensor:
        """The matrix that the layer computes with; its gradient goes to the weight as it is."""
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.llmforge.straight_through(self.weight, self.rounding.number)
            return compiled
        return straight_through(self.weight, self.rounding.of(self.weight))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rounded to {self.rounding.type_name}"


class RoundedLinear(_Rounded, nn.Linear):
    """nn.Linear with a rounded matrix; the bias is not rounded."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        return F.linear(input, self.rounded_weight(), self.bias)


class RoundedEmbedding(_Rounded, nn.Embedding):
    """nn.Embedding with a rounded matrix."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids -> (..., embedding_dim)"""
        return F.embedding(
            input,
            self.rounded_weight(),
            self.padding_idx,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )


_ROUNDED: dict[type[nn.Module], type[_Rounded]] = {nn.Linear: RoundedLinear, nn.Embedding: RoundedEmbedding}
_FLOAT: dict[type[nn.Module], type[nn.Module]] = {rounded: plain for plain, rounded in _ROUNDED.items()}


def round_weights_(model: nn.Module, types: Mapping[str, str]) -> dict[str, str]:
    """Let layers of any module compute with rounded weights from now on; what was rounded before and is not named no longer is.

    Args:
        types: name of a weight of an nn.Linear or nn.Embedding, as in `named_parameters()` -> type of ggml; "F32" rounds nothing.
    Returns:
        those of `types` that round.
    Raises:
        ConfigError: a name that is no such weight, an unknown type, or rows that its blocks do not divide; nothing is changed.
    >>> model = nn.Sequential(nn.Linear(32, 2))
    >>> round_weights_(model, {"0.weight": "Q4_0"})
    {'0.weight': 'Q4_0'}
    >>> model
    Sequential(
      (0): RoundedLinear(in_features=32, out_features=2, bias=True, rounded to Q4_0)
    )
    """
    types = {name: type_name for name, type_name in types.items() if type_name != "F32"}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(module)
    roundings: dict[nn.Parameter, Rounding] = {}
    for name, type_name in types.items():
        if name not in parameters:
            raise ConfigError(f"the model has no weight {name!r}; its names are like {some(list(parameters))}")
        weight = parameters[name]
        if type_name not in ENCODABLE:
            raise ConfigError(f"type {type_name!r} (of {name}) must be one of {', '.join(ENCODABLE)}")
        if not all(_can_round(module, weight) for module in holders[weight]):
            kinds = {type(module).__name__ for module in holders[weight]}
            raise ConfigError(
                f"{name} is not the matrix of a plain nn.Linear or nn.Embedding alone but of {', '.join(kinds)}"
            )
        block = block_shape(type_name)[0]
        if weight.shape[1] % block:
            raise ConfigError(f"{name} has rows of {weight.shape[1]} weights, but {type_name} has blocks of {block}")
        roundings[weight] = Rounding(type_name)
    float_weights_(model)
    for weight, rounding in roundings.items():
        for module in holders[weight]:
            module.__class__ = _ROUNDED[type(module)]
            module.rounding = rounding  # type: ignore[assignment]
    return types


def _can_round(module: nn.Module, weight: nn.Parameter) -> bool:
    plain = _FLOAT.get(type(module), type(module))
    return plain in _ROUNDED and module.weight is weight and getattr(module, "max_norm", None) is None


def rounded_weights(model: nn.Module) -> dict[str, str]:
    """The weights that a model's layers round, each shared one under its first name, and the types they round to."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    rounded = (module for module in model.modules() if isinstance(module, _Rounded))
    return {names[module.weight]: module.rounding.type_name for module in rounded}


def float_weights_(model: nn.Module) -> list[str]:
    """Let all layers compute with their float weights again, which are as the training left them.

    Returns:
        the names of the weights that were rounded before.
    """
    names = list(rounded_weights(model))
    for module in model.modules():
        if isinstance(module, _Rounded):
            module.__class__ = _FLOAT[type(module)]  # type: ignore[assignment]
            del module.rounding
    return names
