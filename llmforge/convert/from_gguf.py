"""GGUF files of the families here: often the only form in which people have a model."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from llmforge.convert.published import FAMILIES, Published, account
from llmforge.errors import CheckpointError, ConfigError, ConvertError, one_line, shown
from llmforge.formats.gguf import read_gguf_header, read_gguf_tensors
from llmforge.tokenizers import Tokenizer, tokenizer_from_gguf

# Keys below `<arch>.` that say how a file came to be, not what the model computes.
_IGNORED = {"expert_count", "expert_used_count", "attention.causal", "rope.scaling.finetuned", "tensor_data_layout"}

# Keys with which llama.cpp computes something else, unless they have this value.
_FIXED = {
    "attention.scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": -1.0,
}


def read_gguf(path: Path) -> tuple[Published, Tokenizer]:
    """The model and the tokenizer of a GGUF file; quantized tensors are decoded to float32 when they are read.

    Raises:
        CheckpointError: the file is damaged, or its tensors do not fit its metadata.
        ConvertError: an architecture, a setting or a tokenizer that is not known here.
    """
    header = read_gguf_header(path)
    arch = header.metadata.get("general.architecture")
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    gguf_tensors = read_gguf_tensors(path, header)
    family = next((family for family in FAMILIES if family.reads_gguf(arch, types, gguf_tensors)), None)
    if family is None:
        known = ", ".join(dict.fromkeys(family.gguf_arch for family in FAMILIES))
        raise ConvertError(f"{path} holds a model of the architecture {shown(arch)}; supported: {known}")
    metadata = {
        key.removeprefix(f"{arch}."): value for key, value in header.metadata.items() if key.startswith(f"{arch}.")
    }
    if lists := sorted(key for key, value in metadata.items() if isinstance(value, list)):
        raise ConvertError(f"{path} has layers of different shape ({', '.join(lists)}), which no family here has")
    metadata = {key: _decimal(value) for key, value in metadata.items()}
    values = {
        field: metadata.pop(key, default) for key, (field, default) in family.gguf_fields.items() if key != "vocab_size"
    }
    tensors = {}
    for name, tensor in gguf_tensors.items():
        try:
            own_name = family.own_gguf_name(name)
        except (KeyError, ValueError):
            own_name = name  # `account` names it as unexpected
        if own_name in tensors:
            raise CheckpointError(f"{path} has two tensors for {own_name}; one of them is {name!r}")
        tensors[own_name] = tensor
    embedding = tensors.get(family.own_gguf_name("token_embd.weight"))
    if embedding is None:
        raise CheckpointError(f"{path} has no token_embd.weight, so it holds no model (a vocabulary alone, perhaps)")
    values["vocab_size"] = metadata.pop("vocab_size", embedding.shape[0])
    try:
        values, tensors = family.from_gguf(values, metadata, tensors)
        config: Any = family.config_class.from_dict({**family.implied, **values})
    except ConfigError as error:
        raise ConvertError(f"{path} describes a model that cannot be built here: {error}") from error
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error
    for key, required in _FIXED.items():
        if (value := metadata.pop(key, required)) != required:
            raise ConvertError(
                f"{path} sets {arch}.{key} to {shown(value)}, which {family.model_class.__name__} does not compute; it must be {required}"
            )
    unknown = sorted(metadata.keys() - _IGNORED)
    if unknown:
        found = f"{path} has settings that are not known here and have no effect: {', '.join(unknown)}"
        warnings.warn(one_line(found), stacklevel=3)
    published = account(family, config, tensors, CheckpointError(f"{path} does not fit its metadata"))
    return published, tokenizer_from_gguf(header.metadata, where=str(path))


def _decimal(value: Any) -> Any:
    """A float32 as the decimal number that was meant: 1e-05, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):  # what only float64 can hold becomes infinite, and is refused as that
        return float(str(np.float32(value))) if isinstance(value, float) else value
