"""What a run reports: one record per step, per evaluation and at the end, and the log file they go to."""

import json
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    flops: float | None = None  # of the model in this step, on all devices; None: it does not say
    peak_flops: float | None = None  # FLOP/s that all devices together can do; None: not known

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

    @property
    def flops_per_second(self) -> float | None:
        """FLOPs that the model needs for its tokens, per second: what is computed twice (recomputed blocks) counts once."""
        return None if self.flops is None else self.flops / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, 0..1: `flops_per_second` over the devices' peak (Chowdhery et al. 2022, PaLM, appendix B)."""
        return None if self.flops is None or self.peak_flops is None else self.flops / self.seconds / self.peak_flops


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


class Throughput:
    """Tokens per second of the last steps, without what the run does beside them.

    Wall time from step to step: a GPU works off its queue later than `StepMetrics.seconds` knows.

    Args:
        window_seconds: how far back to look; the last `min_steps` steps count in any case.
    """

    def __init__(self, *, window_seconds: float = 20.0, min_steps: int = 10) -> None:
        self._window_seconds, self._min_steps = window_seconds, min_steps
        self._steps: deque[tuple[float, int, float]] = deque()  # seconds, tokens, FLOPs
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        self._is_first = True
        self._last = self._begun = time.perf_counter()
        self.seconds = 0.0  # of all steps
        self.tokens = 0  # of all steps

    def step(self, num_tokens: int, flops: float | None = None) -> None:
        """A step is done."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.seconds += seconds
        self.tokens += num_tokens
        if self._is_first and self._steps:  # compiling and warming up are in the first step only
            self._is_first = False
            self._steps.clear()
            self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        self._steps.append((seconds, num_tokens, flops or 0.0))
        self._add(self._steps[-1], 1)
        while len(self._steps) > self._min_steps and self._seconds - self._steps[0][0] >= self._window_seconds:
            self._add(self._steps.popleft(), -1)

    def resume(self) -> None:
        """The time since the last step was no step's: an evaluation, a sample, a checkpoint."""
        self._last = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(self._seconds, 1e-9)

    @property
    def flops_per_second(self) -> float:
        return self._flops / max(self._seconds, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """With its share of what the run does beside the steps: what an ETA is made of."""
        overhead = (time.perf_counter() - self._begun) / max(self.seconds, 1e-9)
        return self._seconds / max(1, len(self._steps)) * max(1.0, overhead)

    def _add(self, step: tuple[float, int, float], sign: int) -> None:
        seconds, tokens, flops = step
        self._seconds, self._tokens = self._seconds + sign * seconds, self._tokens + sign * tokens
        self._flops += sign * flops


def flops_per_token(model: nn.Module, seq_len: int) -> float | None:
    """FLOPs of training `model` on one token, as its own `flops_per_token(seq_len)` says; None: it has no such method.

    A frozen weight needs no gradient of its own: 4 FLOPs per token and not 6. What of the model's figure belongs to weights shows in
    that the rest, attention, grows with the length.
    """
    count = getattr(model, "flops_per_token", None)
    if not callable(count):
        return None
    flops = float(count(seq_len))
    weights = 2 * flops - float(count(2 * seq_len))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return flops - weights / 3 * (1 - trained / max(1, num_params(model)))


def num_params(model: nn.Module) -> int:
    """Number of weights: the model's own count (packed weights are no parameters), or that of its parameters."""
    count = getattr(model, "num_params", None)
    return int(count()) if callable(count) else sum(p.numel() for p in model.parameters())


def memory_use(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes in use and bytes there are: of a GPU the most that its tensors have taken so far, of a CPU the process's resident size.

    None: not known (the second of a CPU: other programs want some, too).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.current_allocated_memory(), torch.mps.recommended_max_memory()
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None  # the most it was; bytes on this system
    return None, None


class RunLog:
    """log.jsonl: one JSON object per line, each with its `step`; lines after a resumed step are dropped.

    Args:
        path: the file; None = log nowhere.
        after_step: steps done when logging starts.
    """

    def __init__(self, path: Path | None, *, after_step: int) -> None:
        self._file, self._path, self._lost_lines = None, path, False
        self.last_logged_step = after_step  # by a process that was killed some steps after it had saved, too
        self.tokens, self.seconds = 0, 0.0  # that the kept lines say the run has taken before
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = read_log(path)
            kept = [line for line in lines if line["step"] <= after_step]
            self.last_logged_step = max([after_step, *(line["step"] for line in lines)])
            for line in kept:
                self.tokens, self.seconds = line.get("tokens", self.tokens), line.get("seconds", self.seconds)
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
