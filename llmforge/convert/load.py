"""One way in for every kind of model on disk."""

import os
from pathlib import Path

import torch

from llmforge.convert.hf import load_hf
from llmforge.convert.nanogpt import load_nanogpt
from llmforge.convert.published import FAMILIES, assemble, read_config
from llmforge.errors import CheckpointError, ConfigError
from llmforge.formats.safetensors import read_safetensors
from llmforge.models import LanguageModel
from llmforge.tokenizers import Tokenizer, load_tokenizer
from llmforge.training import find_checkpoint, list_checkpoints, verify_manifest
from llmforge.training.checkpoint import FAMILY_KEY

_ACCEPTED = "a run folder, one of its step-... folders, a Hugging Face folder, or nanoGPT's ckpt.pt"


def load(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Read a model and its tokenizer.

    Args:
        path: a run folder, a checkpoint, a Hugging Face folder, or nanoGPT's ckpt.pt.
        checkpoint: of a run: "latest" (None means that), "best", or a name like "step-000500".
        dtype: of the weights; None = float32, whatever the files hold.
    Returns:
        the model in evaluation mode, and the tokenizer, None where there are no tokenizer files beside the model.
    Raises:
        CheckpointError: nothing that can be read, or it is damaged.
        ConvertError: a Hugging Face or nanoGPT model that no family here can express.
    """
    path, dtype = Path(path), dtype or torch.float32
    is_run = path.is_dir() and bool(list_checkpoints(path))
    if checkpoint is not None and not is_run:
        raise CheckpointError(
            f"checkpoint={checkpoint!r} chooses one of a run, but {path} is no run folder with step-... in it"
        )
    model: LanguageModel
    if is_run:
        path = find_checkpoint(path, checkpoint or "latest")  # verified there
        model = _load_own(path, dtype)
    elif path.is_file() and path.suffix in (".pt", ".pth"):
        model = load_nanogpt(path, dtype=dtype)
        path = path.parent
    elif (path / "config.json").is_file():
        values = read_config(path)
        if FAMILY_KEY in values:
            if (path / "manifest.json").exists():
                verify_manifest(path)
            model = _load_own(path, dtype)
        elif "model_type" in values:
            model = load_hf(path, dtype=dtype)
        else:
            raise CheckpointError(
                f"{path / 'config.json'} names neither {FAMILY_KEY!r} nor 'model_type', so it does not say which model this is"
            )
    else:
        raise CheckpointError(f"{_found(path)}; load takes {_ACCEPTED}")
    return model.to(device), load_tokenizer(path)


def _load_own(folder: Path, dtype: torch.dtype) -> LanguageModel:
    values = read_config(folder)
    name = values.pop(FAMILY_KEY, None)
    family = next((family for family in FAMILIES if name == family.config_class.FAMILY), None)
    if family is None:
        known = ", ".join(family.config_class.FAMILY for family in FAMILIES)
        raise CheckpointError(f"{folder} holds a model of the family {name!r}; this version knows {known}")
    try:
        config = family.config_class.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    with read_safetensors(folder) as tensors:
        return assemble(family, config, tensors, folder, dtype)


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
