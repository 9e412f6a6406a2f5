"""What a run reports: one record per step, per evaluation and at the end, and the log file they go to."""

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmforge.formats.atomic import atomic_file


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step. `loss`, `grad_norm` and `skipped` are read from the device when asked for, not before."""

    step: int  # steps done, this one included
    lr: float
    num_tokens: int  # positions read in this step
    seconds: float  # wall time of this step
    loss_tensor: Tensor  # mean over the targets of the step, nats
    grad_norm_tensor: Tensor  # global L2 norm before clipping
    skipped_tensor: Tensor  # bool

    @property
    def loss(self) -> float:
        """Mean training loss of the step in nats per target."""
        return self.loss_tensor.item()

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the gradient before clipping."""
        return self.grad_norm_tensor.item()

    @property
    def skipped(self) -> bool:
        """Whether the weights were left as they are, because the loss or the gradient was not finite."""
        return bool(self.skipped_tensor)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """One pass over validation batches."""

    step: int  # steps done before it
    loss: float  # mean over all targets, nats
    num_targets: int
    bytes_per_token: float | None = None  # of the data, where it knows

    @property
    def bits_per_byte(self) -> float | None:
        """loss in bits per byte of text: comparable between tokenizers, as the loss per token is not."""
        return None if self.bytes_per_token is None else self.loss / math.log(2) / self.bytes_per_token

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally likely tokens that would be as hard to guess."""
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a double


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How `Trainer.train` ended."""

    step: int  # steps done
    train_loss: float | None  # of the last step; None when there was none to do
    val_loss: float | None  # of the last evaluation
    best_val_loss: float | None
    best_step: int | None
    seconds: float
    tokens_per_second: float
    stopped_by: (
        str | None
    )  # "SIGINT" or "SIGTERM" when a signal ended the run early, "max_seconds" when its time was up
    skipped_steps: int  # whose loss or gradient was not finite
    checkpoint: Path | None  # the last one written


class RunLog:
    """log.jsonl: one JSON object per line, each with its `step`; lines after a resumed step are dropped.

    Args:
        path: the file; None = log nowhere.
        after_step: steps done when logging starts.
    """

    def __init__(self, path: Path | None, *, after_step: int) -> None:
        self._file, self._path, self._lost_lines = None, path, False
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_log(path) if line["step"] <= after_step]
            with atomic_file(path) as tmp:
                tmp.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, **values: Any) -> None:
        """Append one line and hand it to the system, so that a killed run has its log.

        A disk that is full costs lines, with one warning, and not the run.
        """
        if self._file is not None:
            # JSON has no NaN or infinity; a diverged loss is null.
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with self._losses_announced():
                self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with self._losses_announced():
                self._file.close()

    @contextmanager
    def _losses_announced(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._lost_lines:
                warnings.warn(f"{self._path} loses lines: {error.strerror or error}; training goes on", stacklevel=4)
            self._lost_lines = True


def read_log(path: str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    """The lines of a log.jsonl; a last line that a killed run left unfinished is skipped."""
    lines: list[Mapping[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    return lines
