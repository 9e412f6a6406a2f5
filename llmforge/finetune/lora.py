"""LoRA on any model: which layers get low-rank matrices beside their frozen ones, and how they are trained, switched and merged."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from llmforge.config import Config
from llmforge.errors import ConfigError, shown, some
from llmforge.nn.host import HostEmbedding, HostEmbedding8bit
from llmforge.nn.int8 import Embedding8bit, Int8Matrix, Linear8bit
from llmforge.nn.linear4bit import Linear4bit
from llmforge.nn.lora import (
    LoRALinear,
    SavedModule,
    check_mergeable,
    check_together,
    dense_weight,
    lora_layers,
    saved_modules,
)
from llmforge.nn.replace import exchange_modules_

ALL_LINEAR = "all-linear"

_CODED = (Linear4bit, Linear8bit)  # layers whose matrix is codes


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Shape and training of an adapter: y = W x + scale * B A dropout(x), W frozen, A (r, in), B (out, r).

    Fields are PEFT's. Sources: LoRA, Hu et al. 2021, arXiv:2106.09685; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732; DoRA, Liu et al.
    2024, arXiv:2402.09353.

    Raises:
        ConfigError: a rank below 1, an alpha that is not above 0, a dropout outside [0, 1), or no target.
    """

    r: int = 16  # rank; a rank above the smaller side of a matrix only costs memory
    lora_alpha: float = 32  # numerator of the scale, so that a rank can change and the learning rate stay
    lora_dropout: float = 0.0  # of the adapter's input, in training
    # "all-linear": every linear layer but the output projection; names: the last parts of layers' names, or whole ones; any other
    # text: a regular expression that whole names match.
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False  # scale lora_alpha / sqrt(r) in place of lora_alpha / r, for ranks of 64 and more
    use_dora: bool = False  # train the length of each row of W + scale * B A by itself; slower, better at small ranks
    modules_to_save: tuple[
        str, ...
    ] = ()  # modules trained whole, by their last parts or whole names: "embed_tokens", "lm_head"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r ({self.r}) must be at least 1; 8 to 64 are common")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"lora_alpha ({self.lora_alpha}) must be above 0; r or 2 * r are common")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout ({self.lora_dropout}) must be at least 0 and below 1; 0.05 is common")
        if not self.target_modules or (isinstance(self.target_modules, tuple) and not all(self.target_modules)):
            raise ConfigError(
                f"target_modules ({shown(self.target_modules)}) must name layers, like ('q_proj', 'v_proj'), or be {ALL_LINEAR!r}"
            )
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            compiled(self.target_modules)
        if not all(self.modules_to_save):
            raise ConfigError(f"modules_to_save ({shown(self.modules_to_save)}) must name modules, like ('lm_head',)")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def targets(name: str, target_modules: str | Sequence[str]) -> bool:
    """Whether a layer's name is meant, as PEFT reads it; "all-linear" means every one here.

    >>> targets("model.layers.0.self_attn.q_proj", ["q_proj"]), targets("model.layers.0.self_attn.q_proj", "q_proj")
    (True, False)
    """
    if isinstance(target_modules, str):
        return target_modules == ALL_LINEAR or compiled(target_modules).fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression for names of layers.

    Raises:
        ConfigError: it is none, too long to be meant, or of a form that can take forever: patterns come from files of others.
    """
    if len(pattern) > 1000:
        raise ConfigError(f"the pattern {shown(pattern)} has {len(pattern):,} characters; at most 1,000 are allowed")
    if _repeats_a_choice(pattern):
        raise ConfigError(
            f"the pattern {shown(pattern)} repeats a group that has repeats or alternatives inside, which can take forever; write it "
            "without, or list the layers' names"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"the pattern {shown(pattern)} is no regular expression: {error}") from error


# An escape, a set, or one character of a regular expression; a count as a whole.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def _repeats_a_choice(pattern: str) -> bool:
    """Whether a group that can match a text in several ways is repeated, as in (a*)*: the ways multiply with each round."""
    several = [False]  # by open group: whether it can
    was_group = False  # the token before ended a group that can
    for token in _TOKEN.findall(pattern):
        repeats = token in ("*", "+") or (token[0] == "{" and token != "{")
        if repeats and was_group:
            return True
        if token == "(":
            several.append(False)
        elif repeats or token == "|":
            several[-1] = True
        was_group = token == ")" and len(several) > 1 and several.pop()
        if was_group:
            several[-1] = True
    return False


@dataclass(frozen=True)
class LayerSettings:
    """What the adapter of one layer has for itself, where it is not the same in all (rank_pattern, alpha_pattern of PEFT)."""

    r: int
    lora_alpha: float


def apply_lora_(model: nn.Module, config: LoRAConfig, *, name: str = "default") -> list[str]:
    """Give a model's linear layers an adapter, which is active and alone trains: all other parameters are frozen.

    The layers become `LoRALinear`, with the old layer as `base`; so names in `state_dict()` change until `merge_lora_` or
    `unload_lora_`. Files are those of `save_adapter`. Modules of `modules_to_save` become `SavedModule`s and train as float32 copies.
    In a model that ties its output projection to the embedding, a copy of one is no longer tied to the other, as in peft: name both,
    or the other stays what it was.

    Args:
        name: of the adapter; a model can have several, see `set_adapter_`.
    Returns:
        the names of the layers, in order, and of the modules that are trained whole.
    Raises:
        ConfigError: the model has no such layers, with those it has; an adapter of that name; a module that cannot be trained whole.
            Nothing is changed then.
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> apply_lora_(model, LoRAConfig(r=2, target_modules=("2",)))
    ['2']
    """
    chosen = targeted(model, config.target_modules)
    if not chosen:
        raise ConfigError(f"the model has no linear layers for target_modules ({shown(config.target_modules)})")
    saved = _to_save(model, config.modules_to_save)
    return attach_(
        model, config, {layer: LayerSettings(config.r, config.lora_alpha) for layer in chosen}, saved, name=name
    )


def targeted(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The linear layers of a model that are meant, in order.

    Raises:
        ConfigError: a name or pattern that is no linear layer's.
    """
    layers = linear_layers(model)
    if target_modules == ALL_LINEAR:
        heads = [getattr(model, "lm_head", None), _call(model, "get_output_embeddings")]
        return [
            name
            for name, layer in layers.items()
            if name.rpartition(".")[2] != "lm_head" and all(layer is not head for head in heads)
        ]
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    found: dict[str, list[str]] = {}
    for target in wanted:
        pattern = target if isinstance(target_modules, str) else [target]
        found[target] = [name for name in layers if targets(name, pattern)]
        if not found[target]:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers})[:20]) or "none"
            hint = "; a single text is a regular expression for whole names, a list holds last parts" * (
                isinstance(target_modules, str)
            )
            raise ConfigError(f"no linear layer is named {shown(target)} (target_modules); there are {known}{hint}")
    chosen = {name for names in found.values() for name in names}
    return [name for name in layers if name in chosen]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter can stand beside, in order: nn.Linear and its subclasses, `Linear4bit`, `Linear8bit`, and what
    has an adapter."""
    # A matrix that its owner multiplies with itself, past the layer, would never see the adapter.
    aside = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
    return {
        name: module
        for name, module in _outer_modules(model)
        if name and isinstance(module, (nn.Linear, *_CODED, LoRALinear)) and not isinstance(module, aside)
    }


def attach_(
    model: nn.Module,
    config: LoRAConfig,
    layers: Mapping[str, LayerSettings],
    saved: Sequence[str],
    *,
    name: str,
) -> list[str]:
    """`apply_lora_`, with the layers and modules already found, and each layer's rank and alpha."""
    if not name or "." in name:
        raise ConfigError(f"the name of an adapter ({name!r}) must be text without dots")
    if name in adapter_names(model):
        raise ConfigError(f"the model has an adapter {name!r} already; give the new one another name")
    outer = dict(_outer_modules(model))
    _check_savable(outer, layers, saved)
    new: dict[nn.Module, nn.Module] = {}
    for path in layers:
        old = outer[path]
        if not isinstance(old, LoRALinear):
            new[old] = LoRALinear(old).train(old.training)
    for path in saved:
        old = outer[path]
        if not isinstance(old, SavedModule):
            new[old] = SavedModule(old).train(old.training)
    wrapped = {path: new.get(outer[path], outer[path]) for path in [*layers, *saved]}
    for path, settings in layers.items():
        layer = wrapped[path]
        assert isinstance(layer, LoRALinear)
        layer.add(
            name,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )
    for path in saved:
        module = wrapped[path]
        assert isinstance(module, SavedModule)
        module.add(name)
    exchange_modules_(model, new)
    model.requires_grad_(False)
    set_adapter_(model, name)
    return [*layers, *saved]


def _to_save(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    outer = [name for name, _ in _outer_modules(model) if name]
    chosen = []
    for wanted in modules_to_save:
        found = [name for name in outer if targets(name, [wanted])]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in outer} - {str(i) for i in range(1000)})[:20])
            raise ConfigError(f"no module is named {shown(wanted)} (modules_to_save); there are {known}")
        chosen += found
    return [name for name in outer if name in set(chosen)]


def _check_savable(outer: Mapping[str, nn.Module], layers: Mapping[str, Any], saved: Sequence[str]) -> None:
    for layer in layers:
        if isinstance(outer[layer], SavedModule):
            raise ConfigError(
                f"{layer} is trained whole by another adapter (modules_to_save) and cannot have a low-rank one"
            )
    for path in saved:
        module = outer[path]
        if path in layers or isinstance(module, LoRALinear):
            raise ConfigError(
                f"{path} cannot have an adapter (target_modules) and be trained whole (modules_to_save); choose"
            )
        kinds = (*_CODED, Embedding8bit, LoRALinear)
        inside = [kind for kind in kinds if any(isinstance(m, kind) for m in module.modules())]
        if inside:
            of_8_bits = inside[0] in (Linear8bit, Embedding8bit)
            raise ConfigError(
                f"{path} holds a {inside[0].__name__} and cannot be trained whole; leave it out of modules_to_save, or of the rounding "
                f"(NF4Config.{'embedding_bits=16' if of_8_bits else 'skip'})"
            )
        if not any(True for _ in module.parameters()):
            raise ConfigError(f"{path} has no parameters to train; leave it out of modules_to_save")
        if any(path.startswith(f"{other}.") for other in [*saved, *layers] if other != path):
            raise ConfigError(f"{path} is part of another module that is trained; leave it out of modules_to_save")
        if any(other.startswith(f"{path}.") for other in layers):
            raise ConfigError(f"{path} holds layers that get adapters; leave it out of modules_to_save")


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model's modules by name, without what is inside of those that adapters brought, or of 8 bits."""
    hidden: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(hidden) and hidden:
            continue
        if isinstance(module, (LoRALinear, SavedModule, Embedding8bit, Linear8bit)):
            hidden += (f"{name}.",)
        yield name, module


def module_paths(model: nn.Module) -> list[str]:
    """The names of a model's modules, without what is inside of those that adapters brought."""
    return [path for path, _ in _outer_modules(model)]


def _call(model: nn.Module, method: str) -> object:
    """What a method without arguments gives, where there is one (models of transformers say so which layer is their head)."""
    found = getattr(model, method, None)
    return found() if callable(found) else None


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters."""
    names: dict[str, None] = {}
    for layer in lora_layers(model).values():
        names |= dict.fromkeys(layer.adapters)
    for module in saved_modules(model).values():
        names |= dict.fromkeys(module.copies)
    return list(names)


def set_adapter_(model: nn.Module, name: str | Sequence[str] | None) -> list[str]:
    """Let a model compute with this adapter, with several added, or with none, as its base does (None).

    The adapters that are active train, the others are frozen; with None that stays as it was.

    Returns:
        the names of the layers and modules that compute with an adapter now.
    Raises:
        ConfigError: no adapter of that name; several with copies of the same module, or with DoRA, which cannot be added. Nothing is
            changed then.
    """
    names = [] if name is None else [name] if isinstance(name, str) else list(dict.fromkeys(name))
    _check_known(model, names)
    layers, modules = lora_layers(model), saved_modules(model)
    for path, layer in layers.items():
        try:
            check_together([layer.adapter(each) for each in names if each in layer.adapters])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    for path, module in modules.items():
        if len(several := [each for each in names if each in module.copies]) > 1:
            raise ConfigError(f"{path} has copies of {some(several)}, which cannot be added; activate one of them")
    for layer in layers.values():
        layer.active = tuple(each for each in names if each in layer.adapters)
    for module in modules.values():
        module.active = next((each for each in names if each in module.copies), None)
    if name is not None:
        held = [layer.adapters for layer in layers.values()] + [module.copies for module in modules.values()]
        for inner in held:
            for each in inner:
                inner[each].requires_grad_(each in names)
    return [path for path, wrapper in (*layers.items(), *modules.items()) if wrapper.active]


def scale_adapter_(model: nn.Module, factor: float, *, name: str = "default") -> list[str]:
    """Multiply what an adapter adds: 0 is the base, 1 the adapter as it was trained, 0.5 half of it. No part of its files.

    Copies of `modules_to_save` are not scaled, and of DoRA only B A.

    Returns:
        the names of the layers.
    Raises:
        ConfigError: no adapter of that name, or a factor that is no number.
    """
    if not math.isfinite(factor):
        raise ConfigError(f"the factor ({factor}) must be a number, like 0.5")
    _check_known(model, [name])
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    for layer in layers.values():
        layer.adapter(name).factor = float(factor)
    return list(layers)


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base computes, to the bit; what trains stays."""
    layers, modules = list(lora_layers(model).values()), list(saved_modules(model).values())
    before = [layer.active for layer in layers], [module.active for module in modules]
    try:
        set_adapter_(model, None)
        yield
    finally:
        for layer, active in zip(layers, before[0], strict=True):
            layer.active = active
        for module, name in zip(modules, before[1], strict=True):
            module.active = name


def merge_lora_(model: nn.Module, *, dtype: torch.dtype | None = None) -> list[str]:
    """Add the active adapters to the weights and put plain layers back; the model computes what it computed, up to rounding.

    Every 4-bit layer becomes an nn.Linear, whether it has an adapter or not: nothing is rounded to 4 bits a second time; embeddings
    and output projections of 8 bits become plain ones, too. Adapters
    that are not active are lost. Where a tied output projection or embedding was trained, they are no longer tied, and the model's
    config says so. Parameters stay frozen.

    Args:
        dtype: of what was in 4 or 8 bits; None = that of the model's other weights. Others keep theirs.
    Returns:
        the names of the layers exchanged.
    Raises:
        ConfigError: no adapter is active, or a layer cannot be merged, with the reason. Nothing is changed then.
    """
    layers, modules = lora_layers(model), saved_modules(model)
    if not any(wrapper.active for wrapper in (*layers.values(), *modules.values())):
        raise ConfigError(
            "no adapter is active, so there is nothing to merge; set_adapter_ activates one, unload_lora_ removes all"
        )
    for path, layer in layers.items():
        try:
            check_mergeable(layer.base)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    dtype = dtype or _dtype_of(model)
    decoded: dict[Int8Matrix, nn.Parameter] = {}
    names = []
    for path, module in list(_outer_modules(model)):
        new: nn.Module
        base = module.base if isinstance(module, LoRALinear) and not module.active else module
        if isinstance(base, (Embedding8bit, Linear8bit)):
            new = _plain(base, dtype, decoded)
        elif isinstance(module, LoRALinear):
            if not module.active and not isinstance(base, Linear4bit):
                new = base
            else:
                new = _linear(module.merged_weight(dtype if isinstance(module.base, _CODED) else None), module.base)
        elif isinstance(module, Linear4bit):
            new = _linear(dense_weight(module).to(dtype), module)
        elif isinstance(module, SavedModule):
            new = module.merged()
        else:
            continue
        exchange_modules_(model, {module: new.train(module.training)})
        names.append(path)
    _untie_config_(model)
    return names


def unload_lora_(model: nn.Module) -> list[str]:
    """Remove all adapters: the model is its base again, to the bit, and frozen.

    Returns:
        the names of the layers and modules that had one.
    """
    wrappers = {**lora_layers(model), **saved_modules(model)}
    exchange_modules_(model, {wrapper: _base(wrapper) for wrapper in wrappers.values()})
    return list(wrappers)


def lora_config(model: nn.Module, *, name: str = "default") -> LoRAConfig:
    """The settings of an adapter of a model: those of most of its layers, where they differ.

    target_modules are last parts of names where these mean the same layers, else whole names.

    Raises:
        ConfigError: no adapter of that name.
    """
    _check_known(model, [name])
    layers = {path: layer.adapter(name) for path, layer in lora_layers(model).items() if name in layer.adapters}
    saved = [path for path, module in saved_modules(model).items() if name in module.copies]
    if not layers:
        raise ConfigError(f"the adapter {name!r} has no low-rank layers, only copies; save the model instead")
    first = next(iter(layers.values()))
    paths = module_paths(model)
    return LoRAConfig(
        r=most_common(adapter.r for adapter in layers.values()),
        lora_alpha=most_common(adapter.lora_alpha for adapter in layers.values()),
        lora_dropout=first.dropout,
        target_modules=_last_parts(list(layers), paths),
        use_rslora=first.use_rslora,
        use_dora=first.magnitude is not None,
        modules_to_save=_last_parts(saved, paths, of_copies=True),
    )


_T = TypeVar("_T")


def most_common(values: Iterator[_T]) -> _T:
    """The value that occurs most often."""
    return Counter(values).most_common(1)[0][0]


def _last_parts(chosen: Sequence[str], paths: Sequence[str], *, of_copies: bool = False) -> tuple[str, ...]:
    """The shortest names that mean these modules and no other.

    Args:
        of_copies: peft's modules_to_save, unlike its target_modules, mean every name that ends so: "norm" is "input_layernorm", too.
    """
    parts = sorted({path.rpartition(".")[2] for path in chosen})
    meant = {path for path in paths if (path.endswith(tuple(parts)) if of_copies else targets(path, parts))}
    return tuple(parts) if meant == set(chosen) else tuple(chosen)


def _check_known(model: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"the model has no adapter {name!r}; it has {', '.join(known) or 'none (apply_lora_, load_adapter_)'}"
            )


def _base(wrapper: nn.Module) -> nn.Module:
    assert isinstance(wrapper, (LoRALinear, SavedModule))
    return wrapper.base


def _linear(weight: torch.Tensor, base: nn.Module) -> nn.Linear:
    """A plain layer with this matrix and the bias of another, frozen."""
    bias = getattr(base, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return linear


def _plain(
    module: Embedding8bit | Linear8bit, dtype: torch.dtype, decoded: dict[Int8Matrix, nn.Parameter]
) -> nn.Module:
    """A plain module with the matrix of one of 8 bits; modules with one matrix get one parameter."""
    if module.matrix not in decoded:
        decoded[module.matrix] = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    weight = decoded[module.matrix]
    if isinstance(module, HostEmbedding8bit):
        return HostEmbedding(weight)
    if isinstance(module, Linear8bit):
        new: nn.Linear | nn.Embedding = _linear(weight, module)
    else:
        new = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    new.weight = weight
    return new


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of most weights of the base, without adapters, copies and codes."""
    trained: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (LoRALinear, SavedModule)):
            trained |= set((module.adapters if isinstance(module, LoRALinear) else module.copies).modules())
    counts: Counter[torch.dtype] = Counter()
    for module in model.modules():
        for parameter in module._parameters.values():
            if module not in trained and parameter is not None and parameter.is_floating_point():
                counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def _untie_config_(model: nn.Module) -> None:
    """Correct a config that says that output projection and embedding are one, where they are no longer."""
    config, head = getattr(model, "config", None), getattr(model, "lm_head", None)
    if not getattr(config, "tie_word_embeddings", False) or head is None:
        return
    if not any(isinstance(module, nn.Embedding) and module.weight is head.weight for module in model.modules()):
        if isinstance(config, Config):
            model.config = config.replace(tie_word_embeddings=False)  # type: ignore[assignment]
        else:
            config.tie_word_embeddings = False  # type: ignore[union-attr]
