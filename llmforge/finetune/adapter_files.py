"""Adapters on disk, as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors, and our base.json beside them.

    base_model.model.<module>.lora_A.weight            (r, in)
    base_model.model.<module>.lora_B.weight            (out, r)
    base_model.model.<module>.lora_magnitude_vector    (out), with DoRA
    base_model.model.<parameter>                       of modules_to_save, whole

PEFT ignores keys that it does not expect and leaves out layers whose keys are missing. Here either is an error: an adapter is read
in full, or not at all.

Source: peft 0.21's LoraConfig and the files it writes.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge.config import read_json_object
from llmforge.errors import CheckpointError, ConfigError, shown, some
from llmforge.finetune.lora import ALL_LINEAR, LoRAConfig, compiled, targets
from llmforge.finetune.quantize import NF4Config
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import read_safetensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"

_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")

# Keys of adapter_config.json that do not change what the adapter computes.
_IGNORED = """
    peft_type base_model_name_or_path task_type inference_mode revision auto_mapping peft_version init_lora_weights fan_in_fan_out
    base_model_class parent_library megatron_core loftq_config qalora_group_size runtime_config layers_pattern exclude_modules
"""
_READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "modules_to_save"}
_PATTERNS = {"rank_pattern", "alpha_pattern"}
# Keys that must be off, and why. What is not known at all must be off, too.
_OFF = {
    "bias": "trained biases are no part of LoRALinear",
    "lora_bias": "biases of lora_B are no part of LoRALinear",
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
        groups, saved = _sorted_keys(tensors, config, folder / ADAPTER_WEIGHTS)
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
    return Adapter(config, base_model or its_base, layers, saved, rounding)


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
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """The tensors of each layer by A, B and magnitude, and those of modules_to_save."""
    layers: dict[str, dict[str, LazyTensor]] = {}
    saved: dict[str, LazyTensor] = {}
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
        elif targets(name.rpartition(".")[0], config.modules_to_save):
            saved[name] = tensor
        else:
            strange.append(key)
    if strange:
        raise CheckpointError(
            f"{path} has keys that are no part of a LoRA adapter with these settings: {some(strange)}; keys are "
            f"{_PREFIX}<layer>.lora_A.weight and .lora_B.weight, and those of modules_to_save"
        )
    return layers, saved


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
    absent = [module for module in config.modules_to_save if not any(targets(name, [module]) for name in modules)]
    if absent:
        raise CheckpointError(f"{path} has no tensors for {some(absent)}, which modules_to_save names")


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "ALL_LINEAR",
    "BASE_FILE",
    "Adapter",
    "LoRATensors",
    "Rounding",
    "is_adapter_folder",
    "read_adapter",
]
