"""One way in for every kind of model on disk."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmforge.convert.from_gguf import read_gguf
from llmforge.convert.from_hf import read_hf
from llmforge.convert.from_llama2c import read_llama2c_bin
from llmforge.convert.from_torch import read_torch
from llmforge.convert.hub import download
from llmforge.convert.merge import MergeBase, merge
from llmforge.convert.published import FAMILIES, Published, account, assemble, family_of, publish, read_config
from llmforge.errors import CheckpointError, ConfigError, shown
from llmforge.finetune.adapter_files import is_adapter_folder, read_adapter
from llmforge.finetune.quantize import NF4Config
from llmforge.formats.safetensors import INDEX_FILE, SINGLE_FILE, read_safetensors
from llmforge.models import LanguageModel
from llmforge.tokenizers import Tokenizer, load_tokenizer
from llmforge.training import find_checkpoint, list_checkpoints, verify_manifest
from llmforge.training.checkpoint import FAMILY_KEY

_ACCEPTED = (
    "a run folder, one of its step-... folders, a Hugging Face folder or 'owner/name', an adapter folder, a .gguf file, nanoGPT's or "
    "llama2.c's ckpt.pt, or llama2.c's model.bin"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
    merge_base: MergeBase | None = None,
    quantize: NF4Config | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Read a model and its tokenizer, one tensor at a time through memory mapping.

    Args:
        path: a run folder, a checkpoint, a Hugging Face folder, "owner/name" of a model on huggingface.co, a .gguf file, nanoGPT's or
            llama2.c's ckpt.pt, or llama2.c's model.bin; or a folder with an adapter (PEFT's, or that of a tuning run), which is
            the model that it makes of its base: that is looked for where the adapter names it.
        checkpoint: of a run: "latest" (None means that), "best", or a name like "step-000500".
        revision: of "owner/name": a branch, tag or commit; None = main.
        dtype: of the weights; None = float32, whatever the files hold.
        adapter: a folder whose adapter is merged into the weights of `path`, wherever its own base was.
        merge_base: "original" or "nf4": the weights that an adapter is merged onto; None = as it was trained, see `merge`.
        quantize: round the linear layers to NF4 as they are read (`quantize_`), so that no more than some rows of them are floats at
            a time. The values in the file are rounded, whatever `dtype` says; codes that are NF4 already, of the same settings, are
            taken as they are.
    Returns:
        the model in evaluation mode, and the tokenizer, None where there are no tokenizer files beside the model.
    Raises:
        CheckpointError: nothing that can be read, or it is damaged; an adapter without its base, or of another model.
        ConvertError: a model that no family here can express.
    """
    published, tokenizer = open_model(
        path, checkpoint=checkpoint, revision=revision, adapter=adapter, merge_base=merge_base
    )
    return assemble(published, dtype=dtype or torch.float32, device=device, quantize=quantize), tokenizer


def open_model(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    merge_base: MergeBase | None = None,
) -> tuple[Published, Tokenizer | None]:
    """What `load` loads, before any weight is read: the config, and each tensor where it is stored."""
    found = find_model(path, checkpoint=checkpoint, revision=revision)
    if adapter is None and merge_base is not None and not _is_adapter(found):
        raise ConfigError(f"merge_base ({merge_base!r}) is of an adapter, and {path} is none; give one as adapter")
    published, tokenizer = _open(found, merge_base, ())
    if adapter is None:
        return published, tokenizer
    folder = find_adapter(adapter)
    if found.resolve() == folder.resolve():
        raise ConfigError(
            f"{path} is the adapter itself, which would be added twice; give the model that it was trained on"
        )
    published, tokenizer = _with_adapter(published, tokenizer, folder, merge_base)
    if (other := _other_base(found, folder)) is not None:
        note = f"the adapter was trained on {other}, and is merged onto {found}: that must be the same model"
        published = replace(published, notes=[*published.notes, note])
    return published, tokenizer


def _other_base(base: Path, adapter: Path) -> str | None:
    """What an adapter names as its base, where that is a model on this disk, and another one than `base`."""
    name = read_adapter(adapter).base_model
    if not name:
        return None
    try:
        here = next((place for place in (adapter / name, Path(name)) if place.exists()), None)
        return None if here is None or find_model(here).resolve() == base.resolve() else name
    except (CheckpointError, OSError, ValueError):  # as in `_base_of`
        return None


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """The adapter folder that `path` names: the latest checkpoint of a tuning run, what is downloaded, or `path` itself.

    Raises:
        CheckpointError: there is none.
    """
    folder = find_model(path)
    if not _is_adapter(folder):
        raise CheckpointError(f"{folder} holds no adapter: it has no adapter_config.json, or weights of its own")
    return folder


def _open(path: Path, merge_base: MergeBase | None, above: tuple[Path, ...]) -> tuple[Published, Tokenizer | None]:
    """What a folder or file holds; `above` are the adapters whose base it is."""
    if _is_adapter(path):
        if path.resolve() in above:
            raise CheckpointError(f"{path} is an adapter whose base is, by way of others, itself")
        published, tokenizer = _open(_base_of(path), None, (*above, path.resolve()))
        return _with_adapter(published, tokenizer, path, merge_base)
    published, tokenizer = _open_weights(path)
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    return replace(published, files=tuple(files)), tokenizer


def _with_adapter(
    published: Published, tokenizer: Tokenizer | None, folder: Path, merge_base: MergeBase | None
) -> tuple[Published, Tokenizer | None]:
    if (folder / "manifest.json").exists():
        verify_manifest(folder)
    published = merge(published, read_adapter(folder), base=merge_base)
    files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    return replace(published, files=(*published.files, *files)), load_tokenizer(folder) or tokenizer


def _is_adapter(path: Path) -> bool:
    return is_adapter_folder(path) and not any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def _base_of(folder: Path) -> Path:
    """The model that an adapter was trained on, where the adapter says that it is: seen from its folder, from here, on the hub.

    Raises:
        CheckpointError: it is not there.
    """
    name = read_adapter(folder).base_model
    way_out = f"give it: load(BASE, adapter={str(folder)!r}), or on the command line BASE --adapter {folder}"
    if not name:
        raise CheckpointError(f"the adapter {folder} does not say which model it was trained on; {way_out}")
    try:
        near = folder / name
        return find_model(near if near.exists() else name)
    except (CheckpointError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the base of the adapter {folder} is {shown(name)}, which cannot be read ({error}); {way_out}"
        ) from error


def _open_weights(path: Path) -> tuple[Published, Tokenizer | None]:
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
    if (path / "config.json").is_file() or is_adapter_folder(path):
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
