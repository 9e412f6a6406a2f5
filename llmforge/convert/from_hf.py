"""Hugging Face folders: config.json and safetensors, of the model types that a family here has."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from llmforge.convert.base import Family, Tensors
from llmforge.convert.bitsandbytes import NF4LazyTensor, is_bitsandbytes_4bit, read_bitsandbytes
from llmforge.convert.published import FAMILIES, Published, account, read_config
from llmforge.errors import CheckpointError, ConfigError, ConvertError, one_line, shown
from llmforge.formats.safetensors import read_safetensors

# Keys of every transformers config that do not change what the model computes.
_IGNORED = """
    architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path
    use_cache gradient_checkpointing initializer_range chunk_size_feed_forward torchscript use_bfloat16
    _attn_implementation attn_implementation _attn_implementation_autoset
    output_attentions output_hidden_states output_past return_dict
    task_specific_params problem_type finetuning_task num_labels _num_labels id2label label2id
    bos_token_id eos_token_id pad_token_id sep_token_id max_length min_length do_sample temperature top_k top_p
    repetition_penalty num_beams early_stopping
"""
# Keys of every transformers config that would.
_FIXED = {"is_encoder_decoder": False, "pruned_heads": {}}


def read_hf(folder: Path) -> Published:
    """A Hugging Face folder of a known family; keys of its config.json that we do not know are named in a warning.

    Raises:
        ConvertError: a model type or a setting that no family here has.
        CheckpointError: files that are missing or damaged, tensors that do not fit the config.
    """
    values = read_config(folder)
    family = next((family for family in FAMILIES if family.reads_hf(values)), None)
    if family is None:
        known = ", ".join(dict.fromkeys(family.hf_model_type for family in FAMILIES))
        raise ConvertError(f"{folder} holds a model of type {shown(values.get('model_type'))}; supported: {known}")
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has its weights in pytorch_model.bin only, a pickle that can run code when it is opened; write them again "
            "as safetensors: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder), where you trust it"
        )
    config = _own_config(family, values, folder / "config.json")
    stored = read_safetensors(folder)
    if is_bitsandbytes_4bit(values):
        stored = read_bitsandbytes(folder, stored)
    tensors: Tensors = {}
    for hf_name, tensor in stored.items():
        name = family.own_name(hf_name)
        if name in tensors:
            raise CheckpointError(f"{folder} has two tensors for {name}; one of them is {hf_name!r}")
        if isinstance(tensor, NF4LazyTensor) and name is not None:
            tensors[name] = tensor  # (out, in), also where the layer was a Conv1D before it was quantized
        elif name is not None:
            tensors[name] = tensor.then(partial(family.hf_layout, name), by_row=family.hf_keeps_rows(name))
    tensors = family.from_hf(values, tensors)
    return account(family, config, tensors, CheckpointError(f"{folder} does not fit its config"))


def _own_config(family: Family, values: dict[str, Any], path: Path) -> Any:
    values = family.config_from_hf(values)
    fixed = {**_FIXED, **family.hf_fixed}
    if not family.hf_quantized and not is_bitsandbytes_4bit(values):
        fixed["quantization_config"] = None
    for key, required in fixed.items():
        if values.get(key, required) not in (required, None):
            raise ConvertError(
                f"{path} sets {key} to {shown(values[key])}, which {family.model_class.__name__} does not compute; it must be {required!r}"
            )
    known = {*_IGNORED.split(), *family.hf_ignored.split(), *fixed, "quantization_config", *family.hf_fields}
    unknown = sorted(key for key in values if key not in known)
    if unknown:
        found = f"{path} has settings that are not known here and have no effect: {', '.join(unknown)}"
        warnings.warn(one_line(found), stacklevel=3)
    try:
        fields = {field: values.get(key, default) for key, (field, default) in family.hf_fields.items()}
        return family.config_class.from_dict({**fields, **family.implied})
    except ConfigError as error:
        raise ConvertError(f"{path} describes a model that cannot be built here: {error}") from error
