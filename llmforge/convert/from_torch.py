"""Files of torch.save, read without running anything in them: nanoGPT's ckpt.pt, and llama2.c's, which was nanoGPT's once."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmforge.convert.from_llama2c import read_llama2c
from llmforge.convert.from_nanogpt import read_nanogpt
from llmforge.convert.published import Published
from llmforge.errors import CheckpointError


def read_torch(path: Path) -> Published:
    """The model of a checkpoint.

    Raises:
        CheckpointError: not such a file, damaged, with content that is more than tensors and plain values, or tensors that do not
            fit its model_args.
        ConvertError: model_args that are not known.
    """
    checkpoint = _load(path)
    args, state = checkpoint.get("model_args"), checkpoint.get("model")
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is neither nanoGPT's nor llama2.c's: it has no 'model' and 'model_args', but {_keys(checkpoint)}"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise CheckpointError(f"{path} has something else than a tensor in 'model': {name!r}")
        tensors[name.removeprefix("_orig_mod.")] = tensor  # of a compiled model
    return (read_llama2c if "dim" in args else read_nanogpt)(path, args, tensors)


def _load(path: Path) -> dict[Any, Any]:
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
        found = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))  # before it torch advises to run the code
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not read because it could run code "
            f"({found.group(1) if found else type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is no checkpoint of nanoGPT or llama2.c: it holds a {type(checkpoint).__name__}")
    return checkpoint


def _is_plain(tensor: Tensor) -> bool:
    """Its values are in the file; a stride of 0 would let a small file announce a huge tensor."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()


def _keys(values: dict[Any, Any]) -> str:
    return ", ".join(repr(key)[:40] for key in list(values)[:6]) or "nothing"
