"""Exchange the linear layers of any model for layers of another kind."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from llmforge.errors import ConfigError


def replace_linear_(
    module: nn.Module, linear_class: Callable[..., nn.Linear], *, skip: Sequence[str] = ("lm_head",), **options: Any
) -> list[str]:
    """Exchange every plain nn.Linear for `linear_class(in_features, out_features, bias=..., **options)` with the same parameters.

    Names in `state_dict()` stay; so does whatever shares the parameters. What is not exactly nn.Linear is left alone: other kinds of
    layers, and linear layers whose weights somebody else uses directly (in nn.MultiheadAttention).

    Args:
        skip: names to leave out: the last part ("lm_head"), the whole ("model.lm_head"), or a pattern ("*.experts.*"). An output
            projection onto a vocabulary should stay as it is: ternary, it costs 0.2 nats and more.
    Returns:
        the names of the layers exchanged, in order.
    Raises:
        ConfigError: the module itself is an nn.Linear, which only its owner can exchange; or `linear_class` refuses a layer, named.
            Nothing is exchanged then.
    >>> from llmforge.nn import BitLinear
    >>> replace_linear_(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), BitLinear)
    ['0', '2']
    """
    if type(module) is nn.Linear:
        raise ConfigError("replace_linear_ exchanges layers within a module, and this is an nn.Linear itself")
    new_layers: dict[nn.Module, nn.Module] = {}
    names = []
    for name, old in module.named_modules():
        if type(old) is nn.Linear and not matches(name, skip):
            try:
                # On "meta", since its weights are thrown away; modules inside it have values, and follow.
                new = linear_class(
                    old.in_features, old.out_features, bias=old.bias is not None, device="meta", **options
                )
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
            for inner in new.children():
                inner.to(old.weight.device)
            new.weight, new.bias = old.weight, old.bias
            new_layers[old] = new.train(old.training)
            names.append(name)
    exchange_modules_(module, new_layers)
    return names


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns names a module: by its last part ("lm_head"), in whole ("model.lm_head"), or with wildcards.

    >>> [matches("model.layers.0.mlp.up_proj", [pattern]) for pattern in ("up_proj", "*.mlp.*", "mlp")]
    [True, True, False]
    """
    last = name.rpartition(".")[2]
    return any(last == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def exchange_modules_(module: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules in the places of the old ones, in all of them where one is shared."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
