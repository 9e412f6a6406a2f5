"""Adapters on disk, as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors, and our base.json beside them.

    base_model.model.<module>.lora_A.weight            (r, in)
    base_model.model.<module>.lora_B.weight            (out, r)
    base_model.model.<module>.lora_magnitude_vector    (out), with DoRA
    base_model.model.<parameter>                       of modules_to_save, whole
    base_model.model.<module>.base_layer.<parameter>   of an embedding or output projection that has an adapter: the base's own

PEFT ignores keys that it does not expect and leaves out layers whose keys are missing. Here either is an error: an adapter is read
in full, or not at all.

Source: peft 0.21's LoraConfig and the files it writes.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.config import read_json_object
from llmforge.errors import CheckpointError, ConfigError, shown, some
from llmforge.finetune.lora import (
    LayerSettings,
    LoRAConfig,
    adapter_names,
    attach_,
    compiled,
    linear_layers,
    lora_config,
    module_paths,
    targeted,
    targets,
)
from llmforge.finetune.quantize import NF4Config
from llmforge.formats.atomic import atomic_folder
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import SINGLE_FILE, read_safetensors, write_safetensors
from llmforge.nn.int8 import Embedding8bit, Linear8bit
from llmforge.nn.linear4bit import Linear4bit
from llmforge.nn.lora import LoRALinear, lora_layers, saved_modules
from llmforge.tokenizers import Tokenizer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"

_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")

# Keys of adapter_config.json that do not change what the adapter computes.
_IGNORED = """
    peft_type base_model_name_or_path task_type inference_mode revision auto_mapping peft_version init_lora_weights fan_in_fan_out
    base_model_class parent_library megatron_core loftq_config qalora_group_size runtime_config layers_pattern
"""
_READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "modules_to_save"}
_PATTERNS = {"rank_pattern", "alpha_pattern"}
# Keys that must be off, and why. What is not known at all must be off, too.
_OFF = {
    "bias": "trained biases are no part of LoRALinear",
    "lora_bias": "biases of lora_B are no part of LoRALinear",
    "exclude_modules": "it leaves out layers that target_modules names",
    "layers_to_transform": "it leaves out layers that target_modules names",
    "trainable_token_indices": "rows of the embedding trained by themselves are not read",
    "layer_replication": "it changes how many layers the base has",
    "target_parameters": "adapters on bare parameters are not read",
    "ensure_weight_tying": "tied copies of embedding and output projection are not read",
}
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ ...) take out of its weights what they put
# into the adapter, so that it fits no base that others have.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoRATensors:
    """The adapter of one layer."""

    A: LazyTensor  # (r, in)
    B: LazyTensor  # (out, r)
    magnitude: LazyTensor | None  # (out), with DoRA
    scale: float  # of B A


@dataclass(frozen=True)
class Rounding:
    """Which linear layers of the base were rounded to NF4 when the adapter was trained, and how."""

    nf4: NF4Config
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk. Its values are where they are stored."""

    config: LoRAConfig
    base_model: str | None  # folder or "owner/name" that it was trained on
    layers: dict[str, LoRATensors]  # by module path, "model.layers.0.self_attn.q_proj"
    saved: dict[str, LazyTensor]  # of modules_to_save, by parameter name, "lm_head.weight"
    rounding: Rounding | None  # None: the base had all its bits, or nobody wrote down that it had not
    # Weights of the base that peft writes along where an adapter changes embedding or output projection: by parameter name. They say
    # which base is meant, and are no part of the adapter.
    base: dict[str, LazyTensor] = field(default_factory=dict)


def is_adapter_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter, by the name of its configuration."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """What a folder of PEFT or `save_adapter` holds; the tensors are read when their turn comes.

    Raises:
        CheckpointError: a file is missing or damaged; a setting that is not known here and changes what is computed; a key that is
            no part of a LoRA adapter, a pair that is not complete, a shape that does not fit, or a target without tensors.
    """
    folder = Path(folder)
    values = _read_json(folder / ADAPTER_CONFIG, folder)
    try:
        config = _config(values, folder / ADAPTER_CONFIG)
        tensors = _read_tensors(folder)
        groups, saved, base = _sorted_keys(tensors, config, folder / ADAPTER_WEIGHTS)
        ranks, alphas = _patterns(values, "rank_pattern"), _patterns(values, "alpha_pattern")
        layers = {
            name: _layer(
                name,
                parts,
                config,
                _by_pattern(ranks, name, config.r),
                _by_pattern(alphas, name, config.lora_alpha),
                folder,
            )
            for name, parts in groups.items()
        }
        _check_complete(config, layers, saved, folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}") from error
    base_model = values.get("base_model_name_or_path")
    if base_model is not None and not isinstance(base_model, str):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path must be text, got {shown(base_model)}"
        )
    its_base, rounding = read_base_file(folder)
    return Adapter(config, base_model or its_base, layers, saved, rounding, base)


def read_base_file(folder: Path) -> tuple[str | None, Rounding | None]:
    """What base.json says of the base: its name, and how it was rounded; None and None where there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / BASE_FILE
    if not path.exists():
        return None, None
    try:
        values = read_json_object(path)
        name, rounding = values.get("base_model"), values.get("rounding")
        if values.keys() - {"base_model", "rounding"} or not (name is None or isinstance(name, str)):
            raise ConfigError(f"it must hold 'base_model' (text) and 'rounding', got {shown(values)}")
        if rounding is None:
            return name, None
        if not isinstance(rounding, dict) or rounding.keys() != {"nf4", "modules"}:
            raise ConfigError(f"'rounding' must hold 'nf4' and 'modules', got {shown(rounding)}")
        modules = rounding["modules"]
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise ConfigError(f"'modules' must be a list of layers' names, got {shown(modules)}")
        return name, Rounding(NF4Config.from_dict(rounding["nf4"]), tuple(modules))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; remove the file if the base had all its bits in training") from error


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}")
    try:
        return read_json_object(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _read_tensors(folder: Path) -> dict[str, LazyTensor]:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return read_safetensors(folder / ADAPTER_WEIGHTS)
    if (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} has its weights in adapter_model.bin only, a pickle that can run code when it is opened; write them again as "
            "safetensors: PeftModel.from_pretrained(base, folder).save_pretrained(folder), where you trust it"
        )
    raise CheckpointError(f"{folder} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; copy or download it again")


def _config(values: Mapping[str, Any], path: Path) -> LoRAConfig:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {shown(kind)}; only adapters of the type 'LORA' are read")
    for key, value in values.items():
        if key in _OFF and value not in (None, False, "none", [], {}):
            raise CheckpointError(
                f"{path} sets {key} to {shown(value)}: {_OFF[key]}; merge the adapter with peft, and load what it writes"
            )
        if (
            key not in _OFF
            and key not in {*_IGNORED.split(), *_READ, *_PATTERNS}
            and value not in (None, False, "", [], {})
        ):
            raise CheckpointError(
                f"{path} sets {shown(key)} to {shown(value)}, which is not known here and may change what the adapter computes; merge it "
                "with the program that wrote it"
            )
    init = values.get("init_lora_weights", True)
    if not any(init is plain or (isinstance(plain, str) and init == plain) for plain in _PLAIN_INITS):
        raise CheckpointError(
            f"{path} sets init_lora_weights to {shown(init)}, which changes the base's weights as well; convert it with peft: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    for key in ("r", "lora_alpha", "target_modules"):
        if values.get(key) is None:
            raise CheckpointError(f"{path} has no {key}; it is damaged, or no adapter of PEFT")
    given = {key: values[key] for key in _READ if values.get(key) is not None}
    return LoRAConfig.from_dict(given)


def _sorted_keys(
    tensors: Mapping[str, LazyTensor], config: LoRAConfig, path: Path
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The tensors of each layer by A, B and magnitude, those of modules_to_save, and those of the base."""
    layers: dict[str, dict[str, LazyTensor]] = {}
    saved: dict[str, LazyTensor] = {}
    base: dict[str, LazyTensor] = {}
    strange = []
    for key, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{path}: {shown(key)} is {tensor.dtype}, but adapters are floats")
        name = key.removeprefix(_PREFIX)
        found = _KEY.fullmatch(name)
        if key == name:
            strange.append(key)
        elif found is not None:
            part = _PARTS[found[2] if found[2] in _PARTS else "lora_magnitude_vector"]
            if part in layers.setdefault(found[1], {}):
                raise CheckpointError(f"{path} has two tensors for the {part} of {shown(found[1])}")
            layers[found[1]][part] = tensor
        elif name.rpartition(".")[0].endswith(config.modules_to_save):  # peft's rule, whole parts or not
            saved[name] = tensor
        elif ".base_layer." in name and targets(name.rpartition(".base_layer.")[0], config.target_modules):
            base[name.replace(".base_layer.", ".")] = tensor
        else:
            strange.append(key)
    if strange:
        raise CheckpointError(
            f"{path} has keys that are no part of a LoRA adapter with these settings: {some(strange)}; keys are "
            f"{_PREFIX}<layer>.lora_A.weight and .lora_B.weight, and those of modules_to_save"
        )
    return layers, saved, base


def _layer(
    name: str, parts: Mapping[str, LazyTensor], config: LoRAConfig, r: float, alpha: float, folder: Path
) -> LoRATensors:
    path = folder / ADAPTER_WEIGHTS
    wanted = {"A", "B", *(["magnitude"] if config.use_dora else [])}
    if missing := sorted(wanted - parts.keys()):
        raise CheckpointError(
            f"{path}: {shown(name)} has no {' and no '.join(missing)}; copy or write the adapter again"
        )
    if parts.keys() - wanted:
        raise CheckpointError(f"{path}: {shown(name)} has a magnitude (DoRA), but {ADAPTER_CONFIG} has no use_dora")
    A, B, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != r or B.shape[1] != r or 0 in (*A.shape, *B.shape):
        raise CheckpointError(
            f"{path}: {shown(name)} has A {A.shape} and B {B.shape}, which must be (r, in) and (out, r) with r = {r:g}"
        )
    if magnitude is not None and magnitude.shape != (B.shape[0],):
        raise CheckpointError(f"{path}: the magnitude of {shown(name)} is {magnitude.shape}, must be ({B.shape[0]},)")
    return LoRATensors(A, B, magnitude, alpha / (math.sqrt(r) if config.use_rslora else r))


def _patterns(values: Mapping[str, Any], key: str) -> dict[re.Pattern[str], float]:
    """Ranks or alphas of layers whose names, or the ends of them, match."""
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict) or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9
        for value in patterns.values()
    ):
        raise ConfigError(f"{key} must map names of layers to numbers above 0, got {shown(patterns)}")
    return {compiled(rf"(.*\.)?({pattern})"): value for pattern, value in patterns.items()}


def _by_pattern(patterns: Mapping[re.Pattern[str], float], name: str, default: float) -> float:
    """The value of the first pattern that fits."""
    return next((value for pattern, value in patterns.items() if pattern.fullmatch(name)), default)


def _check_complete(
    config: LoRAConfig, layers: Mapping[str, LoRATensors], saved: Mapping[str, LazyTensor], folder: Path
) -> None:
    path = folder / ADAPTER_WEIGHTS
    if not layers:
        raise CheckpointError(f"{path} has no pair of lora_A and lora_B")
    if outside := [name for name in layers if not targets(name, config.target_modules)]:
        raise CheckpointError(
            f"{path} has tensors for {some(outside)}, which target_modules ({shown(config.target_modules)}) does not name; correct "
            f"{ADAPTER_CONFIG}"
        )
    if isinstance(config.target_modules, tuple):
        empty = [target for target in config.target_modules if not any(targets(name, [target]) for name in layers)]
        if empty:
            raise CheckpointError(f"{path} has no tensors for {some(empty)}, which target_modules names")
    modules = {name.rpartition(".")[0] for name in saved}
    absent = [module for module in config.modules_to_save if not any(name.endswith(module) for name in modules)]
    if absent:
        raise CheckpointError(f"{path} has no tensors for {some(absent)}, which modules_to_save names")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default", base_model: str | None = None
) -> Path:
    """Write an adapter of a model as PEFT reads it, and base.json beside it; the folder appears when it is complete.

    Args:
        folder: replaced if it holds an adapter already; otherwise it must be new or empty.
        base_model: the folder or "owner/name" of the model under the adapter, for those who load it.
    Returns:
        the folder.
    Raises:
        ConfigError: no adapter of that name.
        WriteError: the folder cannot be written.
    """
    folder = Path(folder)
    lora_config(model, name=name)  # before any work
    with atomic_folder(folder, overwrite=is_adapter_folder(folder)) as tmp:
        write_adapter(tmp, model, name=name, base_model=base_model)
    return folder


def write_adapter(folder: Path, model: nn.Module, *, name: str, base_model: str | None) -> None:
    """`save_adapter` into an existing folder, which is not made atomic here."""
    _capture(model, name, base_model, lambda tensor: tensor)(folder)


def _capture(
    model: nn.Module, name: str, base_model: str | None, copy: Callable[[Tensor], Tensor]
) -> Callable[[Path], None]:
    """What writes an adapter as it is now into an existing folder; its tensors are passed through `copy` at once."""
    config = lora_config(model, name=name)
    layers = {path: layer.adapter(name) for path, layer in lora_layers(model).items() if name in layer.adapters}
    tensors: dict[str, LazyTensor] = {}
    for path, adapter in layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = LazyTensor.of(copy(adapter.A))
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = LazyTensor.of(copy(adapter.B))
        if adapter.magnitude is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = LazyTensor.of(copy(adapter.magnitude))
    for parameter_name, parameter in _copies(model, name).items():
        tensors[f"{_PREFIX}{parameter_name}"] = LazyTensor.of(copy(parameter))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": _plain(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        # transformers keeps GPT-2's matrices transposed (Conv1D); A and B are the same.
        "fan_in_fan_out": getattr(getattr(model, "config", None), "FAMILY", None) == "gpt",
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "modules_to_save": list(config.modules_to_save) or None,
        "rank_pattern": {path: each.r for path, each in layers.items() if each.r != config.r},
        "alpha_pattern": {
            path: _plain(each.lora_alpha) for path, each in layers.items() if each.lora_alpha != config.lora_alpha
        },
        "init_lora_weights": True,
        "inference_mode": True,
    }
    rounding = rounding_of(model)
    described = None if rounding is None else {"nf4": rounding.nf4.to_dict(), "modules": list(rounding.modules)}

    def write(folder: Path) -> None:
        write_safetensors(folder, tensors, max_shard_bytes=None)
        (folder / SINGLE_FILE).replace(folder / ADAPTER_WEIGHTS)
        _write_json(folder / ADAPTER_CONFIG, values)
        _write_json(folder / BASE_FILE, {"base_model": base_model, "rounding": described})

    return write


def load_adapter_(model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default") -> list[str]:
    """Give a model the adapter in a folder of PEFT or `save_adapter`; it is active then and alone trains, as after `apply_lora_`.

    Returns:
        the names of the layers, in order, and of the modules of `modules_to_save`.
    Raises:
        CheckpointError: see `read_adapter`; or the adapter does not fit: a layer or module that the model lacks, one that should
            have an adapter and has none in the file, another shape. Nothing is changed then.
        ConfigError: the model has an adapter of that name.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    if name in adapter_names(model):
        raise ConfigError(f"the model has an adapter {name!r} already; give the new one another name")
    _check_fits(model, adapter, folder)
    saved = list(dict.fromkeys(key.rpartition(".")[0] for key in adapter.saved))
    in_order = [path for path in linear_layers(model) if path in adapter.layers]
    settings = {path: _settings(adapter.config, adapter.layers[path]) for path in in_order}
    try:
        names = attach_(model, adapter.config, settings, saved, name=name)
    except ConfigError as error:
        raise CheckpointError(f"{folder} does not fit the model: {error}") from error
    _fill_(model, adapter, name)
    return names


class AdapterFiles:
    """What a checkpoint of a tuning run holds of the model: the adapter alone (`training.ModelFiles`).

    Args:
        base_model: the folder or "owner/name" of the model under the adapter.
        name: of the adapter.
    """

    def __init__(self, base_model: str | None = None, *, name: str = "default") -> None:
        self.base_model, self.name = base_model, name

    def capture(
        self, model: nn.Module, tokenizer: Tokenizer | None, copy: Callable[[Tensor], Tensor]
    ) -> Callable[[Path], None]:
        """What writes PEFT's files and base.json of the adapter as it is now, and the tokenizer if there is one."""
        write_files = _capture(model, self.name, self.base_model, copy)

        def write(folder: Path) -> None:
            write_files(folder)
            if tokenizer is not None:
                tokenizer.save(folder)

        return write

    def load_(self, folder: Path, model: nn.Module) -> None:
        """Put the values of a folder into the adapter that the model has, to the bit.

        Raises:
            CheckpointError: the folder's adapter has other layers, shapes or settings than the model's.
        """
        adapter = read_adapter(folder)
        if self.name not in adapter_names(model):
            raise CheckpointError(f"the model has no adapter {self.name!r} to load {folder} into; apply_lora_ first")
        layers = {
            path: layer.adapter(self.name) for path, layer in lora_layers(model).items() if self.name in layer.adapters
        }
        copies = _copies(model, self.name)
        here = {path: (each.A.shape, each.B.shape, each.magnitude is not None) for path, each in layers.items()}
        there = {
            path: (each.A.shape, each.B.shape, each.magnitude is not None) for path, each in adapter.layers.items()
        }
        own_shapes = {key: tuple(parameter.shape) for key, parameter in copies.items()}
        if different := sorted(
            {path for path in here.keys() | there.keys() if here.get(path) != there.get(path)}
            | (own_shapes.keys() ^ adapter.saved.keys())
            | {key for key in own_shapes.keys() & adapter.saved.keys() if own_shapes[key] != adapter.saved[key].shape}
        ):
            raise CheckpointError(
                f"{folder} holds another adapter than the model has: {some(different)}; resume with the settings that the run began with"
            )
        scales = [
            path for path, each in layers.items() if not _close(each.scale / each.factor, adapter.layers[path].scale)
        ]
        if scales:
            path = scales[0]
            raise CheckpointError(
                f"{folder} has the scale {adapter.layers[path].scale:g} for {path}, the model {layers[path].scale:g}; resume with the "
                "lora_alpha that the run began with"
            )
        _fill_(model, adapter, self.name)


def rounding_of(model: nn.Module) -> Rounding | None:
    """Which layers of a model are rounded to NF4, and how; None where there are none."""
    rounded: dict[str, Linear4bit] = {}
    others = []
    for path, layer in linear_layers(model).items():
        base = layer.base if isinstance(layer, LoRALinear) else layer
        if isinstance(base, Linear4bit):
            rounded[path] = base
        else:
            others.append(path)
    others += list(saved_modules(model))
    if not rounded:
        return None
    first = next(iter(rounded.values()))
    parts = {path.rpartition(".")[2] for path in rounded}
    # As they were given, if it was by last parts.
    skip = {path if path.rpartition(".")[2] in parts else path.rpartition(".")[2] for path in others}
    in_8_bits = any(isinstance(module, (Embedding8bit, Linear8bit)) for module in model.modules())
    nf4 = NF4Config(
        block_size=first.block_size,
        double_quant=first.double_quant,
        skip=tuple(sorted(skip)),
        embedding_bits=8 if in_8_bits else 16,
    )
    return Rounding(nf4, tuple(rounded))


def _copies(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter's copies of modules, by the names that they have in the base."""
    return {
        f"{path}.{key}": parameter
        for path, module in saved_modules(model).items()
        if name in module.copies
        for key, parameter in module.copies[name].named_parameters()
    }


@torch.no_grad()
def _fill_(model: nn.Module, adapter: Adapter, name: str) -> None:
    layers = lora_layers(model)
    for path, tensors in adapter.layers.items():
        own = layers[path].adapter(name)
        own.A.copy_(tensors.A.read())
        own.B.copy_(tensors.B.read())
        if own.magnitude is not None and tensors.magnitude is not None:
            own.magnitude.copy_(tensors.magnitude.read())
    copies = _copies(model, name)
    for key, tensor in adapter.saved.items():
        copies[key].copy_(tensor.read())


def _settings(config: LoRAConfig, tensors: LoRATensors) -> LayerSettings:
    r = tensors.A.shape[0]
    alpha = tensors.scale * (math.sqrt(r) if config.use_rslora else r)
    # What the file said, not what is left of it after a division and a product.
    alpha = next((near for near in (config.lora_alpha, float(round(alpha))) if _close(near, alpha)), alpha)
    return LayerSettings(r, alpha)


def _check_fits(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    def misfit(what: str) -> CheckpointError:
        return CheckpointError(f"{folder} does not fit the model: {what}; load the model that it was trained on")

    layers = linear_layers(model)
    if strange := [path for path in adapter.layers if path not in layers]:
        raise misfit(f"it has tensors for {some(strange)}, and the model no such linear layer")
    try:
        wanted = targeted(model, adapter.config.target_modules)
    except ConfigError as error:
        raise misfit(str(error)) from error
    if missing := [path for path in wanted if path not in adapter.layers]:
        raise misfit(f"target_modules names {some(missing)}, and the file has no tensors for it")
    for path, tensors in adapter.layers.items():
        layer: Any = layers[path]
        shape, own = (tensors.B.shape[0], tensors.A.shape[1]), (layer.out_features, layer.in_features)
        if shape != own:
            raise misfit(f"{path} is {shape} (out, in) there and {own} in the model")
    parameters = {key: tuple(parameter.shape) for key, parameter in base_parameters(model).items()}
    for key, tensor in adapter.saved.items():
        if parameters.get(key) != tensor.shape:
            raise misfit(f"{key} is {tensor.shape} there and {parameters.get(key, 'not')} in the model")
    for key, tensor in adapter.base.items():
        own_values = base_parameters(model).get(key)
        if own_values is not None and not _same(own_values, tensor):
            raise misfit(f"it holds {key} of its base, which differs from the model's")
    modules = {key.rpartition(".")[0] for key in adapter.saved}
    due = {path for path in module_paths(model) if path.endswith(adapter.config.modules_to_save)}
    if missing := [key for key in parameters if key.rpartition(".")[0] in modules | due and key not in adapter.saved]:
        raise misfit(f"it has no {some(missing)}")


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that they have without adapters; shared ones under each name."""
    wrappers = {**lora_layers(model), **saved_modules(model)}
    found = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        path = next((path for path in wrappers if key.startswith(f"{path}.")), None)
        if path is None:
            found[key] = parameter
        elif key.startswith(f"{path}.base."):
            found[f"{path}.{key.removeprefix(f'{path}.base.')}"] = parameter
    return found


def _same(own: torch.Tensor, stored: LazyTensor) -> bool:
    """Equal, in the narrower of their types."""
    if tuple(own.shape) != stored.shape:
        return False
    own, values = own.detach(), stored.read().to(own.device)
    return torch.equal(own, values.to(own.dtype)) or torch.equal(own.to(values.dtype), values)


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9)


def _plain(number: float) -> float:
    """A whole number as an int, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
