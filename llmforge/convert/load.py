"""One way in for every kind of model on disk."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmforge.convert.from_gguf import read_gguf
from llmforge.convert.from_hf import read_hf
from llmforge.convert.from_llama2c import read_llama2c_bin
from llmforge.convert.from_torch import read_torch
from llmforge.convert.hub import download
from llmforge.convert.published import FAMILIES, Published, account, assemble, family_of, publish, read_config
from llmforge.errors import CheckpointError, ConfigError, shown
from llmforge.finetune.quantize import NF4Config
from llmforge.formats.safetensors import read_safetensors
from llmforge.models import LanguageModel
from llmforge.tokenizers import Tokenizer, load_tokenizer
from llmforge.training import find_checkpoint, list_checkpoints, verify_manifest
from llmforge.training.checkpoint import FAMILY_KEY

_ACCEPTED = (
    "a run folder, one of its step-... folders, a Hugging Face folder or 'owner/name', a .gguf file, nanoGPT's or llama2.c's ckpt.pt, "
    "or llama2.c's model.bin"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: NF4Config | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Read a model and its tokenizer, one tensor at a time through memory mapping.

    Args:
        path: a run folder, a checkpoint, a Hugging Face folder, "owner/name" of a model on huggingface.co, a .gguf file, nanoGPT's or
            llama2.c's ckpt.pt, or llama2.c's model.bin.
        checkpoint: of a run: "latest" (None means that), "best", or a name like "step-000500".
        revision: of "owner/name": a branch, tag or commit; None = main.
        dtype: of the weights; None = float32, whatever the files hold.
        quantize: round the linear layers to NF4 as they are read (`quantize_`), so that no more than some rows of them are floats at
            a time. The values in the file are rounded, whatever `dtype` says; codes that are NF4 already, of the same settings, are
            taken as they are.
    Returns:
        the model in evaluation mode, and the tokenizer, None where there are no tokenizer files beside the model.
    Raises:
        CheckpointError: nothing that can be read, or it is damaged.
        ConvertError: a model that no family here can express.
    """
    published, tokenizer = open_model(path, checkpoint=checkpoint, revision=revision)
    return assemble(published, dtype=dtype or torch.float32, device=device, quantize=quantize), tokenizer


def open_model(
    path: str | os.PathLike[str], *, checkpoint: str | None = None, revision: str | None = None
) -> tuple[Published, Tokenizer | None]:
    """What `load` loads, before any weight is read: the config, and each tensor where it is stored."""
    path = find_model(path, checkpoint=checkpoint, revision=revision)
    if path.is_file():
        if path.suffix == ".gguf":
            return read_gguf(path)
        read = read_llama2c_bin if path.suffix == ".bin" else read_torch
        return read(path), load_tokenizer(path.parent)
    values = read_config(path)
    if FAMILY_KEY in values:
        return _read_own(path, values), load_tokenizer(path)
    if "model_type" in values:
        return read_hf(path), load_tokenizer(path)
    raise CheckpointError(
        f"{path / 'config.json'} names neither {FAMILY_KEY!r} nor 'model_type', so it does not say which model this is"
    )


def find_model(path: str | os.PathLike[str], *, checkpoint: str | None = None, revision: str | None = None) -> Path:
    """The model folder or file that `path` names: the checkpoint of a run, what is downloaded of a repository, or `path` itself.

    Raises:
        CheckpointError: there is no model.
    """
    name, path = os.fspath(path), Path(path)
    try:
        path.exists()
    except OSError as error:  # no permission, or a name that is too long
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    is_run = path.is_dir() and bool(list_checkpoints(path))
    if checkpoint is not None and not is_run:
        raise CheckpointError(
            f"checkpoint={checkpoint!r} chooses one of a run, but {path} is no run folder with step-... in it"
        )
    is_repository = not path.exists() and _REPOSITORY.fullmatch(name) is not None
    if revision is not None and not is_repository:
        raise CheckpointError(f"revision={revision!r} is of a model on huggingface.co, but {path} is not 'owner/name'")
    if is_run:
        return find_checkpoint(path, checkpoint or "latest")  # verified there
    if is_repository:
        return download(name, revision=revision)
    if path.is_file() and path.suffix in (".pt", ".pth", ".gguf", ".bin"):
        return path
    if (path / "config.json").is_file():
        return path
    raise CheckpointError(f"{_found(path)}; load takes {_ACCEPTED}")


def source(
    model: nn.Module | Published | str | os.PathLike[str], tokenizer: Tokenizer | None
) -> tuple[Published, Tokenizer | None]:
    """What an exporter was given: a model in memory, or one on disk with its own tokenizer where no other is given."""
    if isinstance(model, Published):
        return model, tokenizer
    if isinstance(model, nn.Module):
        return publish(model), tokenizer
    published, its_tokenizer = open_model(model)
    return published, tokenizer or its_tokenizer


def _read_own(folder: Path, values: dict[str, Any]) -> Published:
    if (folder / "manifest.json").exists():
        verify_manifest(folder)
    name = values.pop(FAMILY_KEY)
    config_class = next((f.config_class for f in FAMILIES if name == f.config_class.FAMILY), None)
    if config_class is None:
        known = ", ".join(dict.fromkeys(family.config_class.FAMILY for family in FAMILIES))
        raise CheckpointError(f"{folder} holds a model of the family {shown(name)}; this version knows {known}")
    try:
        config: Any = config_class.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    misfit = CheckpointError(f"{folder} does not fit its config")
    return account(family_of(config), config, read_safetensors(folder), misfit)


def _found(path: Path) -> str:
    if path.is_file():
        return f"{path} is a {path.suffix or 'plain'} file"
    if not path.is_dir():
        return f"{path} does not exist"
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if not names:
        return f"{path} is empty"
    return f"{path} holds no model, but {', '.join(names[:5])}" + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
