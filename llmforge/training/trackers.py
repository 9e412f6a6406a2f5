"""What a run logs, sent to TensorBoard, Weights & Biases or MLflow as well. Their packages are imported only when they are asked for.

    runs/quijote/
        log.jsonl          always
        trackers.json      under which name a tracker knows this run: a resumed run goes on there
        tensorboard/       TrainConfig(trackers=["tensorboard"]); look at it with: tensorboard --logdir runs
        wandb/             "wandb"; WANDB_PROJECT, WANDB_MODE and so on mean what they always mean
                           "mlflow" writes to MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME

A tracker can be slow or out of reach: one thread speaks to all of them while training goes on, and one that fails is left alone after
one warning. log.jsonl has it all.
"""

import json
import math
import os
import queue
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmforge.errors import ConfigError
from llmforge.formats.atomic import atomic_file

_SECONDS_TO_FINISH = 60.0  # for what is not sent yet when the run ends
_PROJECT = "llmforge"


class Tracker(Protocol):
    """One run in one tracker. Any method may raise what it likes."""

    run_id: str | None  # with which the run is found again; None: it needs none
    place: str  # where to look at it
    forgets: bool  # the numbers of steps that are done again; others cannot take back what they have

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files in the run folder."""

    forgets = True

    def __init__(self, folder: Path, run_id: str | None, settings: Mapping[str, Any], *, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id: str | None = None
        self.place = f"tensorboard --logdir {folder}"
        # The reader forgets what an interrupted process wrote of the steps that are done again.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)  # type: ignore[no-untyped-call]
        if after_step == 0:
            self.text(0, "settings", json.dumps(settings, indent=2))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        # It shows Markdown; four blanks are text as it is.
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def finish(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT, or "llmforge"."""

    forgets = False

    def __init__(self, folder: Path, run_id: str | None, settings: Mapping[str, Any], *, after_step: int) -> None:
        import wandb

        self.run_id: str | None = run_id or secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=folder.name,
                dir=str(folder),
                id=self.run_id,
                resume="allow",
                config=dict(settings),
                # It leaves the terminal to the progress line.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.UsageError as error:  # no key, for one
            raise ConfigError(
                f"tracker 'wandb' cannot start: {error} Log in with: wandb login, or keep the run here with WANDB_MODE=offline"
            ) from error
        self._html = wandb.Html
        self.place = f"wandb sync {folder / 'wandb'}/offline-run-*" if self._run.offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import html

        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def finish(self) -> None:
        self._run.finish()


class MLflow:
    """A run at MLFLOW_TRACKING_URI (without it MLflow's own default), in the experiment MLFLOW_EXPERIMENT_NAME, or "llmforge"."""

    forgets = False

    def __init__(self, folder: Path, run_id: str | None, settings: Mapping[str, Any], *, after_step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = client = MlflowClient()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment is not None else client.create_experiment(name)
            run_id = client.create_run(experiment_id, run_name=folder.name).info.run_id
            params = [Param(key, str(value)) for key, value in _flat(settings).items()]
            for first in range(0, len(params), 100):  # it takes no more at once
                client.log_batch(run_id, params=params[first : first + 100])
        else:
            client.update_run(run_id, status="RUNNING")
        self._id: str = run_id
        self.run_id: str | None = run_id
        self._id = str(run_id)
        self.place = f"run {run_id} in MLflow at {client.tracking_uri}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/step-{step:06d}.txt")

    def finish(self) -> None:
        self._client.set_terminated(self._id)


# Name in TrainConfig -> class, and the package that `pip install llmforge[NAME]` brings.
_TRACKERS: Mapping[str, tuple[Callable[..., Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


class Trackers:
    """All trackers of a run; none of them can stop or slow it.

    Args:
        names: of `TrainConfig.trackers`.
        folder: of the run.
        settings: what the run is made of, plain values.
        after_step: steps done before, by a run that goes on.
        last_step: the last one that was logged before: a process that was killed may have sent more than it saved.
    Raises:
        ConfigError: a package is not installed, or a tracker asks for a login.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None,
        settings: Mapping[str, Any],
        *,
        after_step: int,
        last_step: int,
    ) -> None:
        self._open: dict[str, Tracker] = {}
        self._known_until: dict[str, int] = {}  # steps that the tracker has already, and cannot take back
        self._failed: list[str] = []
        self._jobs: queue.SimpleQueue[tuple[str, int, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if not names or folder is None:
            return
        ids = _read_ids(folder / "trackers.json") if after_step else {}
        for name in dict.fromkeys(names):
            make, package = _TRACKERS[name]
            try:
                self._open[name] = make(folder, ids.get(name), settings, after_step=after_step)
            except ImportError as error:
                raise ConfigError(
                    f"tracker {name!r} needs the package {package}, which cannot be imported here ({error}); "
                    f"pip install 'llmforge[{name}]', or leave it out of trackers"
                ) from error
            except ConfigError:
                raise
            except Exception as error:
                self._fail(name, error)
                continue
            if name in ids or self._open[name].forgets:
                self._known_until[name] = last_step
        self._warn()
        ids |= {name: tracker.run_id for name, tracker in self._open.items() if tracker.run_id is not None}
        if ids:
            with atomic_file(folder / "trackers.json") as tmp:
                tmp.write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
        if self._open:
            self._thread = threading.Thread(target=self._work, name="llmforge-trackers", daemon=True)
            self._thread.start()

    @property
    def places(self) -> list[str]:
        """Where the run can be looked at, one line per tracker."""
        return [f"{name}: {tracker.place}" for name, tracker in self._open.items()]

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among `values`; those that are not finite and all else stay here. Returns at once."""
        numbers = {
            _NAMES.get(name, f"train/{name}"): float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        if numbers:
            self._put("log", step, numbers)

    def text(self, step: int, name: str, text: str) -> None:
        """Send a text. Returns at once."""
        self._put("text", step, name, text)

    def close(self) -> None:
        """Wait until all is sent, but not for ever."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_SECONDS_TO_FINISH)
            if self._thread.is_alive():
                names = ", ".join(self._open)
                warnings.warn(
                    f"{names} did not take all of the run within {_SECONDS_TO_FINISH:.0f} s; log.jsonl has it",
                    stacklevel=2,
                )
            self._thread = None
        self._warn()

    def _put(self, kind: str, step: int, *values: Any) -> None:
        self._warn()
        if self._thread is not None:
            self._jobs.put((kind, step, values))

    def _work(self) -> None:
        """The thread: take one job after the other to every tracker."""
        while True:
            job = self._jobs.get()
            for name, tracker in list(self._open.items()):
                try:
                    if job is None:
                        tracker.finish()
                    elif job[1] > self._known_until.get(name, -1) or (tracker.forgets and job[0] == "log"):
                        getattr(tracker, job[0])(job[1], *job[2])
                except Exception as error:
                    self._fail(name, error)
                    del self._open[name]
            if job is None:
                return

    def _fail(self, name: str, error: Exception) -> None:
        self._failed.append(
            f"tracker {name!r} failed and is left out from here on ({type(error).__name__}: {error}); the run goes on, and log.jsonl has it all"
        )

    def _warn(self) -> None:
        """Say what failed, in the thread of the run."""
        while self._failed:
            warnings.warn(self._failed.pop(0), stacklevel=3)


_NAMES = {"val_loss": "val/loss", "val_perplexity": "val/perplexity", "val_bits_per_byte": "val/bits_per_byte"}


def _read_ids(path: Path) -> dict[str, str]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: the trackers begin new runs
        return {}
    return {str(k): str(v) for k, v in ids.items()} if isinstance(ids, dict) else {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots, as MLflow takes them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + re.sub(r"[^\w./ -]", "_", str(key))
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
