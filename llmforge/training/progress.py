"""The progress line of a run: a tqdm bar on a terminal, a plain line every few seconds elsewhere. On standard error."""

import sys
import time
from typing import Any

from tqdm import tqdm

from llmforge.training.metrics import EvalMetrics, StepMetrics

_SECONDS_BETWEEN_LINES = 10.0  # in logs, notebooks run by machines, CI
_SECONDS_BETWEEN_UPDATES = 0.2  # on a terminal: reading the loss waits for the device, so not at every step


class Progress:
    """Shows step, loss, tokens/s and the time left; evaluations and samples scroll by above."""

    def __init__(self, *, total: int, initial: int, enabled: bool) -> None:
        self.total, self.initial, self.enabled = total, initial, enabled
        self._started = self._updated = time.perf_counter()
        self._tokens = 0
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            layout = "step {n_fmt}/{total_fmt} |{bar:24}| {percentage:3.0f}% {postfix}  ETA {remaining}"
            self._bar = tqdm(total=total, initial=initial, bar_format=layout, dynamic_ncols=True, mininterval=0.1)

    def step(self, metrics: StepMetrics) -> None:
        """Count a step; show it if the last one shown is old enough."""
        if not self.enabled:
            return
        self._tokens += metrics.num_tokens
        now = time.perf_counter()
        done = metrics.step == self.total
        if not done and now - self._updated < (_SECONDS_BETWEEN_UPDATES if self._bar else _SECONDS_BETWEEN_LINES):
            return
        self._updated = now
        speed = f"{_short(self._tokens / (now - self._started))} tok/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {metrics.loss:.3f}  {speed}", refresh=False)
            self._bar.update(metrics.step - self._bar.n)
        else:
            left = (self.total - metrics.step) * (now - self._started) / (metrics.step - self.initial)
            eta = tqdm.format_interval(left)
            self._write(f"step {metrics.step}/{self.total}  loss {metrics.loss:.3f}  {speed}  ETA {eta}")

    def evaluation(self, metrics: EvalMetrics, improved: bool) -> None:
        """Show a validation loss."""
        bits = f"  {metrics.bits_per_byte:.3f} bits/byte" if metrics.bits_per_byte is not None else ""
        best = "  (best so far)" if improved else ""
        self._write(
            f"step {metrics.step}  val loss {metrics.loss:.4f}  perplexity {metrics.perplexity:.2f}{bits}{best}"
        )

    def sample(self, text: str) -> None:
        """Show a sample, on one indented block."""
        self._write("sample> " + text.strip().replace("\r\n", "\n").replace("\n", "\n        "))

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self._bar is not None:
            self._bar.close()

    def _write(self, text: str) -> None:
        if not self.enabled:
            return
        encoding = sys.stderr.encoding or "utf-8"  # a Windows console may know fewer characters than the model
        text = text.encode(encoding, errors="replace").decode(encoding)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
