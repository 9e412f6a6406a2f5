"""Hugging Face folders: config.json, safetensors, tokenizer.json; written for transformers, and read back."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.convert.base import Family
from llmforge.convert.published import FAMILIES, ExportReport, Published, assemble, publish, read_config
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.formats.atomic import atomic_folder
from llmforge.formats.safetensors import read_safetensors, write_safetensors
from llmforge.models import LanguageModel
from llmforge.tokenizers import Tokenizer

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

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
_FIXED = {"is_encoder_decoder": False, "pruned_heads": {}, "quantization_config": None}


def export_hf(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> ExportReport:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load without remote code.

    Args:
        model: of a known family; it is not changed.
        tokenizer: None = a folder without tokenizer files.
        dtype: of the weights: float32, bfloat16 or float16.
        max_shard_bytes: weights above this go into several files.
        overwrite: replace a Hugging Face folder that is there.
    Raises:
        ConvertError: the model or the tokenizer cannot be expressed; `folder` to be replaced is something else.
        WriteError: the folder exists, cannot be written, or the disk is full.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise ConvertError(f"dtype ({dtype}) must be one of {', '.join(map(str, _DTYPES))}")
    if overwrite and folder.is_dir() and any(folder.iterdir()) and not _is_hf_folder(folder):
        raise ConvertError(f"{folder} is not a Hugging Face folder, so it is not replaced; name another one")
    published = publish(model, tokenizer)
    config = _hf_config(published, tokenizer, dtype)
    with atomic_folder(folder, overwrite=overwrite) as tmp:
        write_safetensors(tmp, _hf_tensors(published, dtype), max_shard_bytes=max_shard_bytes)
        _write_json(tmp / "config.json", config)
        special: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(tmp / "generation_config.json", {**special, "do_sample": True, "temperature": 0.8, "top_k": 50})
        if tokenizer is not None:
            tokenizer.save(tmp)
        n_params = sum(tensor.numel() for tensor in published.tensors.values())
        (tmp / "README.md").write_text(_model_card(folder.name, config, n_params), encoding="utf-8")
        size = sum(file.stat().st_size for file in tmp.iterdir())
    return ExportReport(
        folder, size, _DTYPES[dtype], Counter({_DTYPES[dtype]: len(published.tensors)}), published.notes
    )


def load_hf(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Read a Hugging Face folder of a known family; keys of its config.json that we do not know are named in a warning.

    Raises:
        ConvertError: a model type or a setting that no family here has.
        CheckpointError: files that are missing or damaged, tensors that do not fit the config.
    """
    folder = Path(folder)
    values = read_config(folder)
    family = next((family for family in FAMILIES if family.hf_model_type == values.get("model_type")), None)
    if family is None:
        known = ", ".join(family.hf_model_type for family in FAMILIES)
        raise ConvertError(f"{folder} holds a model of type {values.get('model_type')!r}; supported: {known}")
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has its weights in pytorch_model.bin only, a pickle that can run code when it is opened; write them again "
            "as safetensors: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder), where you trust it"
        )
    config = _own_config(family, values, folder / "config.json")
    with read_safetensors(folder) as stored:
        tensors = {}
        for hf_name in stored:
            name = family.own_name(hf_name)
            if name in tensors:
                raise CheckpointError(f"{folder} has two tensors for {name}; one of them is {hf_name!r}")
            if name is not None:
                tensors[name] = family.hf_layout(name, stored[hf_name])
        return assemble(family, config, tensors, folder, dtype)


def _hf_tensors(published: Published, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in published.tensors.items():
        tensor = published.family.hf_layout(name, tensor.detach()).to(dtype).contiguous()
        if not torch.isfinite(tensor).all():
            raise ConvertError(f"{name} has values too large for {_DTYPES[dtype]}; export bfloat16 or float32")
        yield name, tensor


def _hf_config(published: Published, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    family, config = published.family, published.config
    values: dict[str, Any] = {"architectures": [family.hf_architecture], "model_type": family.hf_model_type}
    values |= {key: getattr(config, field) for key, (field, _) in family.hf_fields.items()}
    values |= {**family.hf_fixed, **family.config_to_hf(config), "initializer_range": 0.02, "use_cache": True}
    values["torch_dtype"] = _DTYPES[dtype]  # transformers 5 says "dtype", but reads this one, too
    eos = None if tokenizer is None else tokenizer.eos_token_id
    return {**values, "bos_token_id": eos, "eos_token_id": eos}


def _own_config(family: Family, values: dict[str, Any], path: Path) -> Any:
    values = family.config_from_hf(values)
    for key, required in {**_FIXED, **family.hf_fixed}.items():
        if values.get(key, required) not in (required, None):
            raise ConvertError(
                f"{path} sets {key} to {values[key]!r}, which {family.model_class.__name__} does not compute; it must be {required!r}"
            )
    known = {*_IGNORED.split(), *family.hf_ignored.split(), *_FIXED, *family.hf_fields, *family.hf_fixed}
    unknown = sorted(key for key in values if key not in known)
    if unknown:
        warnings.warn(
            f"{path} has settings that are not known here and have no effect: {', '.join(unknown)}", stacklevel=3
        )
    try:
        return family.config_class.from_dict(
            {field: values.get(key, default) for key, (field, default) in family.hf_fields.items()}
        )
    except ConfigError as error:
        raise ConvertError(f"{path} describes a model that cannot be built here: {error}") from error


def _is_hf_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "model_type" in read_config(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_card(name: str, config: dict[str, Any], n_params: int) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llmforge]
---
# {name}

A {config["model_type"]} language model of {n_params:,} parameters: {config["n_layer"]} layers, width {config["n_embd"]}, context \
{config["n_positions"]} tokens, vocabulary {config["vocab_size"]:,}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

Trained and exported with llmforge.
"""
