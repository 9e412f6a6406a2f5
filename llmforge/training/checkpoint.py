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
a disk has damaged since. What is written is a `Snapshot`, which training may have left behind meanwhile; see saving.py.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmforge.config import Config, read_json_object
from llmforge.errors import CheckpointError, ConfigError, some
from llmforge.formats.atomic import atomic_folder, restore_set_aside, sweep_leftovers
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import read_safetensors, write_safetensors
from llmforge.tokenizers import Tokenizer
from llmforge.training.distributed import copy_whole_, is_divided, own_part

MODEL_FILE = "model.safetensors"
FAMILY_KEY = "llmforge_family"  # in config.json: tells our folders from Hugging Face's
_STEP_FOLDER = re.compile(r"step-(\d{6,})")

Copy = Callable[[Tensor], Tensor]  # what becomes of each tensor that will be written: itself, or a copy on the host


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
    # As it was in the end: found, or halved by a step without enough memory; None = not known.
    micro_batch_size: int | None = None
    skipped_steps: int = 0
    world_size: int = 1  # processes, each of which read its part of a step
    data_fingerprint: str | None


class ModelFiles(Protocol):
    """What a checkpoint holds of the model: all weights (`WholeModel`), or only those that are trained (`finetune.AdapterFiles`)."""

    def capture(self, model: nn.Module, tokenizer: Tokenizer | None, copy: Copy) -> Callable[[Path], None]:
        """Take what will be written of the model as it is now.

        Args:
            copy: to be called with each tensor that will be written, before this returns; what it gives is written in its place.
        Returns:
            what writes into an existing folder; maybe called in another thread, while the model is trained on.
        """

    def load_(self, folder: Path, model: nn.Module) -> None:
        """Read what was written into the model, in place.

        Raises:
            CheckpointError: it does not fit the model.
        """


class WholeModel:
    """All weights, the config and the tokenizer."""

    def capture(self, model: nn.Module, tokenizer: Tokenizer | None, copy: Copy) -> Callable[[Path], None]:
        tensors = {name: LazyTensor.of(copy(tensor)) for name, tensor in unique_tensors(model).items()}
        config = getattr(model, "config", None)

        def write(folder: Path) -> None:
            write_safetensors(folder, tensors, max_shard_bytes=None)
            if isinstance(config, Config) and hasattr(config, "FAMILY"):
                _write_json(folder / "config.json", {FAMILY_KEY: config.FAMILY, **config.to_dict()})
            if tokenizer is not None:
                tokenizer.save(folder)

        return write

    def load_(self, folder: Path, model: nn.Module) -> None:
        load_weights_(model, folder)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checkpoint that is not on the disk yet."""

    write_model: Callable[[Path], None]
    state: TrainerState

    def write(self, out_dir: Path) -> Path:
        """Write step-NNNNNN under `out_dir` and return its path.

        Raises:
            WriteError: no permission, no space; nothing is left of the attempt, and a folder of that name stays as it was.
        """
        state, folder = self.state, out_dir / f"step-{self.state.step:06d}"
        with atomic_folder(folder, overwrite=True) as tmp:
            self.write_model(tmp)
            with (tmp / "trainer.pt").open("wb") as stream:
                torch.save({"optimizer": state.optimizer, "scaler": state.scaler}, stream)
            summary = {
                "step": state.step,
                "val_loss": state.val_loss,
                "data_fingerprint": state.data_fingerprint,
                "settings": state.settings,
                "micro_batch_size": state.micro_batch_size,
                "skipped_steps": state.skipped_steps,
                "world_size": state.world_size,
            }
            _write_json(tmp / "trainer.json", summary)
            _write_json(tmp / "manifest.json", {file.name: _checksum(file) for file in sorted(tmp.iterdir())})
        return folder


def the_tensor_itself(tensor: Tensor) -> Tensor:
    """The `Copy` of what is written at once."""
    return tensor


def take_snapshot(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    state: TrainerState,
    *,
    model_files: ModelFiles | None = None,
    copy: Copy = the_tensor_itself,
) -> Snapshot:
    """Model and state as they are now, each tensor passed through `copy`."""
    write_model = (model_files or WholeModel()).capture(model, tokenizer, copy)
    optimizer, scaler = (_with_copies(part, copy) for part in (state.optimizer, state.scaler))
    return Snapshot(write_model=write_model, state=replace(state, optimizer=optimizer, scaler=scaler))


def save_checkpoint(
    out_dir: Path,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    state: TrainerState,
    *,
    model_files: ModelFiles | None = None,
) -> Path:
    """Write step-NNNNNN under `out_dir` and return its path."""
    return take_snapshot(model, tokenizer, state, model_files=model_files).write(out_dir)


def write_model_folder(folder: Path, model: nn.Module, tokenizer: Tokenizer | None) -> None:
    """Write weights, config.json and tokenizer files into an existing folder."""
    WholeModel().capture(model, tokenizer, the_tensor_itself)(folder)


def read_state(folder: Path, *, mapped: bool = False) -> TrainerState:
    """Check a checkpoint's files and read all but the weights.

    Args:
        mapped: leave the optimizer's state in the file until it is used: for ranks that need a part of it.
    Raises:
        CheckpointError: a file is missing or damaged, or holds something else than a trainer's state.
    """
    verify_manifest(folder)
    try:
        summary = read_json_object(folder / "trainer.json")
    except ConfigError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    try:
        tensors = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen kinds here, UnpicklingError for code in the file among them
        raise CheckpointError(f"{folder / 'trainer.pt'} cannot be read as plain tensors: {error}") from error
    try:
        return TrainerState(
            step=summary["step"],
            optimizer=tensors["optimizer"],
            scaler=tensors["scaler"],
            val_loss=summary["val_loss"],
            settings=summary["settings"],
            micro_batch_size=summary.get("micro_batch_size"),
            skipped_steps=summary.get("skipped_steps", 0),
            world_size=summary.get("world_size", 1),
            data_fingerprint=summary["data_fingerprint"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: trainer.json or trainer.pt lacks {error}") from error


def newest_state(run: Path) -> tuple[Path, TrainerState]:
    """The checkpoint from which a run goes on, and its state: the newest one that can be read.

    Raises:
        CheckpointError: as `find_checkpoint`.
    """
    states = {}

    def read(folder: Path) -> None:
        states[folder] = read_state(folder)

    folder = find_checkpoint(run, check=read)
    return folder, states[folder]


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """state_dict() with each shared tensor once, under its first name (tied embeddings)."""
    seen: set[tuple[int, int]] = set()
    unique = {}
    for name, tensor in model.state_dict().items():
        # Of a tensor that is divided over ranks some have nothing, but a place for it.
        place = own_part(tensor).untyped_storage() if is_divided(tensor) else tensor
        identity = (place.data_ptr(), tensor.numel())
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
            copy_whole_(tensor, tensors[name].read())


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


def tidy_run(run: Path) -> None:
    """Put in order what killed processes of a run have left: half a checkpoint goes, one that was to be replaced comes back.

    Only for the process that trains the run, before it writes: what is left under its own process number is an older process's, too.
    """
    sweep_leftovers(run, own=True)
    restore_set_aside(run)


def find_checkpoint(
    run: str | os.PathLike[str], which: str = "latest", *, check: Callable[[Path], None] | None = None
) -> Path:
    """One good checkpoint of a run.

    Args:
        which: "latest", "best" (lowest validation loss) or a folder's name like "step-000500".
        check: raises a CheckpointError for a folder that is not good; None = `verify_manifest`.
    Raises:
        CheckpointError: there is none that can be read; a damaged newest one is passed over with a warning.
    """
    run, check = Path(run), check or verify_manifest
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
        check(run / which)
        return run / which
    damages = []
    for folder in reversed(folders):
        try:
            check(folder)
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


def prune_checkpoints(run: Path, *, keep_last: int, newest: Path) -> None:
    """Delete all but the last `keep_last` checkpoints up to `newest`, and the one with the best validation loss.

    What is newer stays and does not count: it is damaged, or the run went on from an older one by the user's wish.
    """
    folders = list_checkpoints(run)
    scored = [(loss, folder) for folder in folders if (loss := validation_loss(folder)) is not None]
    best = min(scored, default=(None, None), key=lambda item: item[0])[1]
    for folder in folders[: folders.index(newest) + 1][:-keep_last]:
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


def _with_copies(value: Any, copy: Copy) -> Any:
    """A state_dict with new containers, and what `copy` makes of its tensors."""
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, dict):
        return {key: _with_copies(each, copy) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_copies(each, copy) for each in value)
    return value


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
