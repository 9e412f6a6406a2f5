"""Hugging Face folders for transformers: config.json, safetensors, tokenizer.json, generation_config.json, a model card."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.convert.base import Tensors
from llmforge.convert.load import source
from llmforge.convert.published import ExportReport, Published, check_not_its_own, inputs_of, prepare, read_config
from llmforge.errors import ConvertError
from llmforge.formats.atomic import resumable_folder
from llmforge.formats.safetensors import write_safetensors
from llmforge.tokenizers import Tokenizer

_TERNARY = ("bitlinear", "autobitlinear", "latent")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def export_hf(
    model_or_folder: nn.Module | Published | str | os.PathLike[str],
    tokenizer: Tokenizer | None,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    ternary: str = "bitlinear",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load without remote code.

    It appears when it is complete. Where the process is killed, the next one with the same model from disk, options and folder goes on
    with the tensors that are written, which are in `.part-<folder>` beside it until then.

    Args:
        model_or_folder: a model of a known family, which is not changed; or what `load` accepts, or `open_model` gives: that is not
            loaded, but goes from file to file one tensor at a time.
        tokenizer: None = the one in the folder; a folder without tokenizer files where there is none.
        dtype: of the weights: float32, bfloat16 or float16; None = that of the matrices, where they are all
            alike, else float32.
        ternary: the form of ternary weights, with a scale for each matrix: "bitlinear", packed, the scale divides, which most
            programs read; "autobitlinear", packed, the scale multiplies, as Microsoft's files; "latent", the float
            weights of training, which transformers rounds as it runs, to train them there. Other weights are not concerned.
        max_shard_bytes: weights above this go into several files.
        overwrite: replace a Hugging Face folder that is there.
        progress: called with the number of bytes of weights that are written, and of all.
    Raises:
        ConvertError: the model or the tokenizer cannot be expressed; `folder` to be replaced is something else.
        WriteError: the folder exists, cannot be written, or the disk is full.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in _DTYPES:
        raise ConvertError(f"dtype ({dtype}) must be one of {', '.join(map(str, _DTYPES))}")
    if ternary not in _TERNARY:
        raise ConvertError(f"ternary ({ternary!r}) must be one of {', '.join(_TERNARY)}")
    if overwrite and folder.is_dir() and any(folder.iterdir()) and not _is_hf_folder(folder):
        raise ConvertError(f"{folder} is not a Hugging Face folder, so it is not replaced; name another one")
    published, tokenizer = source(model_or_folder, tokenizer)
    check_not_its_own(published, folder)
    published = prepare(published, tokenizer)
    n_params = published.num_params
    if dtype is None:
        stored = {tensor.dtype for tensor in published.tensors.values() if len(tensor.shape) > 1}
        dtype = stored.pop() if len(stored) == 1 and stored <= _DTYPES.keys() else torch.float32
    family_config, tensors, more, notes = published.family.to_hf(published.config, published.tensors, ternary)
    published = replace(published, config=family_config, tensors=tensors, notes=published.notes + notes)
    config = _hf_config(published, tokenizer, dtype) | more
    hf_tensors = _hf_tensors(published, dtype)
    options = dict(dtype=_DTYPES[dtype], ternary=ternary, max_shard_bytes=max_shard_bytes)
    inputs = inputs_of(published, vocab_size=published.config.vocab_size, **options)
    with resumable_folder(folder, inputs, overwrite=overwrite) as unfinished:
        tmp = unfinished.path
        write_safetensors(tmp, hf_tensors, max_shard_bytes=max_shard_bytes, marks=unfinished.marks, progress=progress)
        _write_json(tmp / "config.json", config)
        special: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(tmp / "generation_config.json", {**special, "do_sample": True, "temperature": 0.8, "top_k": 50})
        if tokenizer is not None:
            tokenizer.save(tmp)
        (tmp / "README.md").write_text(_model_card(folder.name, published, n_params), encoding="utf-8")
        size = sum(file.stat().st_size for file in tmp.iterdir())
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in hf_tensors.values())
    return ExportReport(folder, size, _DTYPES[dtype], types, published.notes, n_params)


def _hf_tensors(published: Published, dtype: torch.dtype) -> Tensors:
    def layout(name: str, tensor: Tensor) -> Tensor:
        tensor = published.family.hf_layout(name, tensor).contiguous()
        if not tensor.is_floating_point() or name.endswith("_scale"):
            return tensor  # packed codes and their scales are what they are
        tensor = tensor.to(dtype)
        if dtype == torch.float16 and tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            raise ConvertError(f"{name} has values too large for {_DTYPES[dtype]}; export bfloat16 or float32")
        return tensor

    return {
        name: tensor.then(partial(layout, name), by_row=published.family.hf_keeps_rows(name))
        for name, tensor in published.tensors.items()
    }


def _hf_config(published: Published, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    family, config = published.family, published.config
    values: dict[str, Any] = {"architectures": [family.hf_architecture], "model_type": family.hf_model_type}
    values |= {key: getattr(config, field) for key, (field, _) in family.hf_fields.items()}
    values |= {**family.hf_fixed, **family.config_to_hf(config), "initializer_range": 0.02, "use_cache": True}
    values["torch_dtype"] = _DTYPES[dtype]  # transformers 5 says "dtype", but reads this one, too
    if tokenizer is None:
        return {**values, "bos_token_id": None, "eos_token_id": None}
    bos, ends = tokenizer.bos_token_id, sorted(tokenizer.end_token_ids)
    return {
        **values,
        "bos_token_id": tokenizer.eos_token_id if bos is None else bos,
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_token_id,
    }


def _is_hf_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "model_type" in read_config(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_card(name: str, published: Published, n_params: int) -> str:
    settings = "\n".join(f"| {key} | {value} |" for key, value in published.config.to_dict().items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llmforge]
---
# {name}

A {published.family.hf_model_type} language model of {n_params:,} parameters.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

| setting | value |
|---|---|
{settings}

Exported with llmforge.
"""
