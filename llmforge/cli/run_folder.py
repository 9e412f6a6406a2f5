"""What a run folder tells without its weights: settings, curves, how far it came. Reads what is there, and names what is damaged."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmforge.errors import LLMForgeError, one_line

_SECONDS_OF_SILENCE = 90.0  # after which a run that logs faster than that has stopped
_NO_RUNS = ("wandb", "tensorboard", "mlruns", "__pycache__")


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    name: str
    settings: Mapping[str, Any]  # config.yaml, or what a checkpoint remembers of it
    lines: Sequence[Mapping[str, Any]]  # log.jsonl
    checkpoints: Sequence[Path]
    modified: float  # seconds since 1970, of the last sign of life
    damage: Sequence[str] = field(default_factory=tuple)  # what could not be read

    def values(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the lines that have a finite number under `key`, in the order of the steps."""
        found = {line["step"]: value for line in self.lines if (value := number(line.get(key))) is not None}
        return sorted(found.items())

    def last(self, key: str) -> float | None:
        """The newest value under `key`."""
        points = self.values(key)
        return points[-1][1] if points else None

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What the trainer wrote of model and device when it began, or went on."""
        known: dict[str, Any] = {}
        for line in self.lines:
            if isinstance(line.get("run"), dict):
                known |= line["run"]
        return known

    @property
    def train(self) -> Mapping[str, Any]:
        """The settings of `TrainConfig`; of a tuning run those that have the same names."""
        train = self.settings.get("train")
        return train if isinstance(train, Mapping) else self.settings

    @property
    def family(self) -> str | None:
        if isinstance(self.settings.get("base_model"), str):
            return str(self.settings.get("adapter") or "full") + " tuning"
        family = self.settings.get("family") or self.about.get("model")
        return str(family).lower() if family is not None else None

    @cached_property
    def parameters(self) -> int | None:
        """Number of weights; of a tuning run without its own word for it, those that its checkpoints hold."""
        if (known := number(self.about.get("parameters"))) is not None:
            return int(known)
        if not self.checkpoints:
            return None
        from llmforge.formats.safetensors import read_safetensors

        try:
            files = sorted(self.checkpoints[-1].glob("*.safetensors"))
            return sum(math.prod(tensor.shape) for file in files for tensor in read_safetensors(file).values()) or None
        except (LLMForgeError, OSError):
            return None

    @property
    def step(self) -> int:
        """Steps done, as far as is known."""
        saved = [int(folder.name.removeprefix("step-")) for folder in self.checkpoints]
        return max([*saved, *(line["step"] for line in self.lines)], default=0)

    @property
    def max_steps(self) -> int | None:
        steps = number(self.about.get("max_steps", self.train.get("max_steps")))
        return int(steps) if steps is not None else None

    @property
    def state(self) -> str:
        """finished, stopped, or running? (it logged a moment ago; nobody asks the process)."""
        if self.max_steps is not None and self.step >= self.max_steps:
            return "finished"
        if self.lines and "stopped_by" in self.lines[-1]:
            return "stopped"
        if not self.lines and not self.checkpoints:
            return "empty"
        seconds = [value for _, value in self.values("seconds")[-2:]]
        pause = seconds[1] - seconds[0] if len(seconds) == 2 else 0.0
        return "running?" if time.time() - self.modified < max(_SECONDS_OF_SILENCE, 3 * pause) else "stopped"

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        return min(self.values("val_loss"), key=lambda point: point[1], default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """The median of the newest lines: one of them may have met an evaluation."""
        speeds = sorted(value for _, value in self.values("tokens_per_second")[-9:])
        return speeds[len(speeds) // 2] if speeds else None

    @property
    def vocab_size(self) -> int | None:
        model = self.settings.get("model")
        size = number(model.get("vocab_size")) if isinstance(model, Mapping) else None
        return int(size) if size is not None else None

    def axis(self, by: str) -> dict[int, float]:
        """Step -> place on the x axis: "step", "tokens" read so far, or "time", hours of training so far."""
        steps = sorted({line["step"] for line in self.lines})
        if by == "step":
            return {step: float(step) for step in steps}
        key, unit = ("tokens", 1.0) if by == "tokens" else ("seconds", 3600.0)
        known = self.values(key)
        if not known and by == "tokens":  # an older log
            sizes = [
                number(self.train.get(name)) or default
                for name, default in (("micro_batch_size", 12), ("grad_accum_steps", 1))
            ]
            model = self.settings.get("model")
            shape = model if isinstance(model, Mapping) else {}
            length = self.train.get("seq_len") or shape.get("block_size") or shape.get("max_position_embeddings")
            if (length := number(length)) is not None:
                known = [(step, step * math.prod(sizes) * length) for step in steps]
        if not known and by == "time":
            tokens, before, spent = self.axis("tokens"), 0.0, 0.0
            for step, speed in self.values("tokens_per_second"):
                if step in tokens and speed > 0:
                    spent, before = spent + (tokens[step] - before) / speed, tokens[step]
                    known.append((step, spent))
        return _interpolated(steps, [(0, 0.0), *known], unit) if known else {}

    @property
    def samples(self) -> list[tuple[int, str]]:
        """(step, text) of the samples while training."""
        return [(line["step"], line["sample"]) for line in self.lines if isinstance(line.get("sample"), str)]


def number(value: object) -> float | None:
    """A finite number, or None: logs may come from anywhere."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def is_run(folder: Path) -> bool:
    """Whether this looks like a run folder: it has a log, or checkpoints."""
    from llmforge.training import list_checkpoints

    return (folder / "log.jsonl").exists() or bool(list_checkpoints(folder))


def read_run(folder: Path, *, name: str | None = None) -> Run:
    """Read a run folder; what cannot be read is in its `damage`."""
    from llmforge.config import read_json_object, read_yaml_mapping
    from llmforge.errors import ConfigError
    from llmforge.training import list_checkpoints, read_log

    damage: list[str] = []
    checkpoints = list_checkpoints(folder)
    settings: Mapping[str, Any] = {}
    try:
        if (folder / "config.yaml").exists():
            settings = read_yaml_mapping(folder / "config.yaml")
        elif checkpoints:
            settings = {"train": read_json_object(checkpoints[-1] / "trainer.json").get("settings", {})}
    except ConfigError as error:
        damage.append(str(error))
    lines: Sequence[Mapping[str, Any]] = []
    log = folder / "log.jsonl"
    try:
        lines = read_log(log)
        if not lines and log.stat().st_size > 0:
            damage.append(f"{log} has no line that can be read")
    except FileNotFoundError:
        damage.append(f"{folder} has no log.jsonl: its curves are lost")
    except OSError as error:
        damage.append(f"cannot read {log}: {error.strerror or error}")
    signs = [path.stat().st_mtime for path in (log, *checkpoints) if path.exists()]
    modified = max(signs, default=folder.stat().st_mtime)
    return Run(folder, name or folder.name, settings, lines, checkpoints, modified, [one_line(text) for text in damage])


def find_runs(folder: Path, *, depth: int = 4) -> Iterator[tuple[Path, bool]]:
    """The run folders in a folder, or the folder itself; and those that hold no run, with False."""
    if is_run(folder):
        yield folder, True
        return
    entries = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    inside = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _NO_RUNS]
    if depth == 0 or not inside:
        yield folder, False
        return
    for entry in inside:
        try:
            yield from find_runs(entry, depth=depth - 1)
        except OSError:  # not ours to read
            yield entry, False


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def differences(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The settings in which runs differ, name -> value of each run: those that all have, and those that only some have (None: not).

    Where and how a run is written down makes no difference.
    """
    all_settings = [flat(run.settings) for run in runs]
    names = list(dict.fromkeys(name for settings in all_settings for name in settings))
    table = {name: [settings.get(name) for settings in all_settings] for name in names}
    no_difference = ("train.out_dir", "output_dir", "train.log_every_steps", "train.trackers", "train.keep_last")
    differing = {
        name: row
        for name, row in table.items()
        if name not in no_difference and any(value != row[0] for value in row[1:])
    }
    of_all = {name: row for name, row in differing.items() if all(name in settings for settings in all_settings)}
    return of_all, {name: row for name, row in differing.items() if name not in of_all}


def _interpolated(steps: Sequence[int], known: Sequence[tuple[int, float]], unit: float) -> dict[int, float]:
    """A value for every step from the values at some of them; beyond the last one as between the last two."""
    import numpy as np

    at, values = [step for step, _ in known], [value for _, value in known]
    slope = (values[-1] - values[-2]) / max(1, at[-1] - at[-2])
    placed = np.interp(steps, at, values)
    return {
        step: float(value + max(0, step - at[-1]) * slope) / unit for step, value in zip(steps, placed, strict=True)
    }
