"""nanoGPT's ckpt.pt, read without running anything in it."""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmforge.convert.gpt2 import GPT2
from llmforge.convert.published import assemble
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.models import GPT, GPTConfig

_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # of nanoGPT's train.py
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # the causal mask, where it does not use flash attention


def load_nanogpt(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> GPT:
    """Read the model of a checkpoint that nanoGPT's train.py wrote; its GELU is the erf form.

    Raises:
        CheckpointError: not such a file, damaged, with content that is more than tensors and plain values, or tensors that do not
            fit its model_args.
        ConvertError: model_args that nanoGPT's train.py does not write.
    """
    path = Path(path)
    checkpoint = _read(path)
    args, state = checkpoint.get("model_args"), checkpoint.get("model")
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} is not nanoGPT's: it has no 'model' and 'model_args', but {_keys(checkpoint)}")
    unknown = [str(key) for key in args if key not in _MODEL_ARGS]
    if unknown:
        raise ConvertError(f"{path} has model_args that nanoGPT's GPT does not: {', '.join(unknown)}")
    try:
        config = GPTConfig.from_dict({**args, "activation_function": "gelu"})
    except ConfigError as error:
        raise ConvertError(f"{path} describes a model that cannot be built: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise CheckpointError(f"{path} has something else than a tensor in 'model': {name!r}")
        name = name.removeprefix("_orig_mod.")  # of a compiled model
        if not _MASK_BUFFER.fullmatch(name):
            tensors[name] = tensor
    model = assemble(GPT2(), config, tensors, path, dtype)
    assert isinstance(model, GPT)
    return model


def _read(path: Path) -> dict[Any, Any]:
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is cut off or not a file of torch.save (since torch 1.6): {error}") from error
    # torch.save stores without compression, so the parts cannot be larger than the file.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path} was not written by torch.save: its parts are compressed or larger than the file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no one class for what can be wrong with a file
        found = re.search(r"Unsupported (?:global|operand|class)[^\n]*|^[^\n]*", str(error))
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not read because it could run code "
            f"({found.group() if found else type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is not nanoGPT's: it holds a {type(checkpoint).__name__}")
    return checkpoint


def _is_plain(tensor: Tensor) -> bool:
    """Its values are in the file; a stride of 0 would let a small file announce a huge tensor."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()


def _keys(values: dict[Any, Any]) -> str:
    return ", ".join(repr(key)[:40] for key in list(values)[:6]) or "nothing"
