"""Checkpoints: folders that are complete or absent, each a model folder as well.

    runs/quijote/
        config.yaml                 what the run was started with
        log.jsonl                   loss, learning rate, speed, samples
        step-000500/
            model.safetensors       weights, under the family's published names
            config.json             the family and its fields
            tokenizer.json ...      where the run has a tokenizer
            trainer.pt              optimizer and GradScaler, plain tensors (read with weights_only=True)
            trainer.json            step, validation loss, training settings
            manifest.json           size and sha256 of each of these, written last

A folder is written beside its place, fsynced and renamed, so a killed run leaves whole checkpoints only; the checksums find what
a disk has damaged since.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmforge.config import Config, read_json_object
from llmforge.errors import CheckpointError, ConfigError, some
from llmforge.formats.atomic import atomic_folder
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import read_safetensors, write_safetensors
from llmforge.tokenizers import Tokenizer

MODEL_FILE = "model.safetensors"
FAMILY_KEY = "llmforge_family"  # in config.json: tells our folders from Hugging Face's
_STEP_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What a run needs beside the weights to go on as if it had never stopped.

    The data order and the randomness of dropout are functions of (seed, step), so the step stands for them.
    """

    step: int  # steps done
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    val_loss: float | None  # of these weights, where they were evaluated
    settings: Mapping[str, Any]  # TrainConfig.to_dict()
    micro_batch_size: int | None  # as it was in the end: found, or halved by a step without enough memory
    skipped_steps: int
    data_fingerprint: str | None


class ModelFiles(Protocol):
    """What a checkpoint holds of the model: all weights (`WholeModel`), or only those that are trained (`finetune.AdapterFiles`)."""

    def save(self, folder: Path, model: nn.Module, tokenizer: Tokenizer | None) -> None:
        """Write into an existing folder."""

    def load_(self, folder: Path, model: nn.Module) -> None:
        """Read what `save` wrote into the model, in place.

        Raises:
            CheckpointError: it does not fit the model.
        """


class WholeModel:
    """All weights, the config and the tokenizer."""

    def save(self, folder: Path, model: nn.Module, tokenizer: Tokenizer | None) -> None:
        write_model_folder(folder, model, tokenizer)

    def load_(self, folder: Path, model: nn.Module) -> None:
        load_weights_(model, folder)


def save_checkpoint(
    out_dir: Path,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    state: TrainerState,
    *,
    model_files: ModelFiles | None = None,
) -> Path:
    """Write step-NNNNNN under `out_dir` and return its path."""
    folder = out_dir / f"step-{state.step:06d}"
    with atomic_folder(folder, overwrite=True) as tmp:
        (model_files or WholeModel()).save(tmp, model, tokenizer)
        with (tmp / "trainer.pt").open("wb") as stream:
            torch.save({"optimizer": state.optimizer, "scaler": state.scaler}, stream)
        summary = {
            "step": state.step,
            "val_loss": state.val_loss,
            "data_fingerprint": state.data_fingerprint,
            "settings": state.settings,
            "micro_batch_size": state.micro_batch_size,
            "skipped_steps": state.skipped_steps,
        }
        _write_json(tmp / "trainer.json", summary)
        _write_json(tmp / "manifest.json", {file.name: _checksum(file) for file in sorted(tmp.iterdir())})
    return folder


def write_model_folder(folder: Path, model: nn.Module, tokenizer: Tokenizer | None) -> None:
    """Write weights, config.json and tokenizer files into an existing folder."""
    tensors = {name: LazyTensor.of(tensor) for name, tensor in unique_tensors(model).items()}
    write_safetensors(folder, tensors, max_shard_bytes=None)
    config = getattr(model, "config", None)
    if isinstance(config, Config) and hasattr(config, "FAMILY"):
        _write_json(folder / "config.json", {FAMILY_KEY: config.FAMILY, **config.to_dict()})
    if tokenizer is not None:
        tokenizer.save(folder)


def load_state(folder: Path, model: nn.Module, *, model_files: ModelFiles | None = None) -> TrainerState:
    """Read weights into `model` and return the rest.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of a model of another shape.
    """
    verify_manifest(folder)
    (model_files or WholeModel()).load_(folder, model)
    summary = read_json_object(folder / "trainer.json")
    try:
        tensors = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here, UnpicklingError for code in the file among them
        raise CheckpointError(f"{folder / 'trainer.pt'} cannot be read as plain tensors: {error}") from error
    return TrainerState(
        step=summary["step"],
        optimizer=tensors["optimizer"],
        scaler=tensors["scaler"],
        val_loss=summary["val_loss"],
        settings=summary["settings"],
        micro_batch_size=summary.get("micro_batch_size"),
        skipped_steps=summary.get("skipped_steps", 0),
        data_fingerprint=summary["data_fingerprint"],
    )


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """state_dict() with each shared tensor once, under its first name (tied embeddings)."""
    seen: set[tuple[int, int]] = set()
    unique = {}
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() == 0 or identity not in seen:
            unique[name] = tensor
            seen.add(identity)
    return unique


def load_weights_(model: nn.Module, folder: Path) -> None:
    """Read the model.safetensors of `folder` into `model`, which must have the same names and shapes.

    Raises:
        CheckpointError: what is missing, what is left over, and what has another shape, each by name; the model is untouched.
    """
    own, tensors = unique_tensors(model), read_safetensors(folder)
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    reshaped = [
        f"{name} {tensors[name].shape} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != tuple(own[name].shape)
    ]
    if missing or unexpected or reshaped:
        parts = [("missing", missing), ("not in this model", unexpected), ("of another shape", reshaped)]
        found = "; ".join(f"{what}: {some(names)}" for what, names in parts if names)
        raise CheckpointError(f"{folder} does not fit this model: {found}; build the model from its config.json")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name].read())


def list_checkpoints(run: Path) -> list[Path]:
    """The step folders of a run, oldest first, whole or damaged."""
    folders = [entry for entry in run.glob("step-*") if entry.is_dir() and _STEP_FOLDER.fullmatch(entry.name)]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def check_new_run(out_dir: Path) -> None:
    """Refuse a folder whose content a new run's checkpoints would be mixed with.

    Raises:
        CheckpointError: it holds another run's checkpoints, with the newest of them; or a model, which nobody could load any more: a
            folder with a step-... in it is a run. Or it is a file.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} is a file, and a run is a folder; choose another out_dir")
    if found := list_checkpoints(out_dir):
        raise CheckpointError(
            f"{out_dir} already holds {found[-1].name}; go on with resume() or --resume, or choose another out_dir"
        )
    for name in ("config.json", "adapter_config.json"):
        if (out_dir / name).exists():
            raise CheckpointError(
                f"{out_dir} holds a model ({name}), in whose place its checkpoints would be loaded; choose another out_dir"
            )


def find_checkpoint(run: str | os.PathLike[str], which: str = "latest") -> Path:
    """One good checkpoint of a run.

    Args:
        which: "latest", "best" (lowest validation loss) or a folder's name like "step-000500".
    Raises:
        CheckpointError: there is none that can be read; a damaged newest one is passed over with a warning.
    """
    run = Path(run)
    folders = list_checkpoints(run)
    if not folders:
        raise CheckpointError(
            f"no checkpoint in {run}: it has no step-... folder; name the folder given as out_dir or --out"
        )
    if which == "best":
        scored = [(loss, folder) for folder in folders if (loss := validation_loss(folder)) is not None]
        if not scored:
            raise CheckpointError(f"no checkpoint in {run} was evaluated, so none is the best; use 'latest'")
        folders = [folder for _, folder in sorted(scored, key=lambda item: item[0], reverse=True)]
    elif which != "latest":
        if run / which not in folders:
            raise CheckpointError(f"no checkpoint {which!r} in {run}; there are {some([f.name for f in folders])}")
        verify_manifest(run / which)
        return run / which
    damages = []
    for folder in reversed(folders):
        try:
            verify_manifest(folder)
        except CheckpointError as error:
            damages.append(str(error))
            continue
        if damages:
            warnings.warn(f"{'; '.join(damages)}; using {folder.name} instead", stacklevel=2)
        return folder
    raise CheckpointError(f"every checkpoint in {run} is damaged: {'; '.join(damages)}")


def validation_loss(folder: Path) -> float | None:
    """The validation loss noted in a checkpoint; None where it was not evaluated or cannot be read."""
    try:
        loss = read_json_object(folder / "trainer.json").get("val_loss")
    except ConfigError:
        return None
    return loss if isinstance(loss, float) else None


def prune_checkpoints(run: Path, *, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one with the best validation loss."""
    folders = list_checkpoints(run)
    scored = [(loss, folder) for folder in folders if (loss := validation_loss(folder)) is not None]
    best = min(scored, default=(None, None), key=lambda item: item[0])[1]
    for folder in folders[:-keep_last]:
        if folder != best:
            # Renamed first: a kill in the middle must not leave half a checkpoint under a checkpoint's name.
            doomed = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def verify_manifest(folder: Path) -> None:
    """Check every file of a checkpoint against its size and sha256.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = read_json_object(folder / "manifest.json")
    except ConfigError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    for name, expected in manifest.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if not isinstance(expected, dict) or file.stat().st_size != expected.get("bytes"):
            raise CheckpointError(f"{folder} is damaged: {name} has {file.stat().st_size} bytes, not as written")
        if _checksum(file) != expected:
            raise CheckpointError(f"{folder} is damaged: {name} has other content than was written (sha256 differs)")


def _checksum(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": _sha256(stream)}


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
