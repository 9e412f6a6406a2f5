"""The progress line of a run: a tqdm bar on a terminal, a plain line every few seconds elsewhere. On standard error."""

import shutil
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llmforge.training.metrics import EvalMetrics, StepMetrics, Throughput, memory_use

_SECONDS_BETWEEN_LINES = 10.0  # in logs, notebooks run by machines, CI
_SECONDS_BETWEEN_UPDATES = 0.2  # on a terminal: reading the loss waits for the device, so not at every step
_WIDTH = 80  # of plain lines
_BAR = 24  # columns, where there is room


class Progress:
    """Shows step, loss, tokens/s, MFU, memory and the time left; evaluations and samples scroll by above.

    Args:
        total: steps of the whole run.
        initial: steps done before.
        throughput: of the run; None = this object measures it.
        device: whose memory is shown; None = none.
    """

    def __init__(
        self,
        *,
        total: int,
        initial: int,
        enabled: bool,
        throughput: Throughput | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.total, self.enabled, self.device = total, enabled, device
        # A GPU writes here when it has got so far: to read it never waits, and is a few steps late.
        self._late = torch.zeros(2, pin_memory=True) if device is not None and device.type == "cuda" else None
        self._own = Throughput() if throughput is None else None
        self._throughput = throughput or self._own or Throughput()
        self._updated = time.perf_counter()
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=initial, bar_format="{desc}", dynamic_ncols=True, mininterval=0.1)

    def step(self, metrics: StepMetrics, skipped_steps: Tensor | None = None) -> None:
        """Count a step; show it if the last one shown is old enough.

        Args:
            skipped_steps: number of all steps that were skipped, on the device.
        """
        if self._own is not None:
            self._own.step(metrics.num_tokens, metrics.flops)
        if not self.enabled:
            return
        if self._late is not None:
            self._late[0].copy_(metrics.loss_tensor, non_blocking=True)
            if skipped_steps is not None:
                self._late[1].copy_(skipped_steps, non_blocking=True)
        now = time.perf_counter()
        done = metrics.step == self.total
        if not done and now - self._updated < (_SECONDS_BETWEEN_UPDATES if self._bar else _SECONDS_BETWEEN_LINES):
            return
        self._updated = now
        if self._late is not None and not done:
            loss, skipped = self._late.tolist()
        else:
            loss, skipped = metrics.loss, int(skipped_steps) if skipped_steps is not None else 0
        if self._bar is None:
            self._write(self._line(metrics, loss, int(skipped), _WIDTH))
            return
        # One column stays free: a full line wraps in some terminals.
        width = shutil.get_terminal_size().columns - 1
        line = self._line(metrics, loss, int(skipped), width)
        room = min(_BAR, width - len(line) - 4)
        if room >= 8:
            head, _, rest = line.partition("  ")
            line = f"{head} |{{bar:{room}}}| {rest}"
        self._bar.bar_format = line
        self._bar.n = metrics.step
        self._bar.refresh()

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

    def note(self, text: str) -> None:
        """Show a line of its own."""
        self._write(text)

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, metrics: StepMetrics, loss: float, skipped: int, width: int) -> str:
        """What is known of the run, in at most `width` columns: what matters least is left out first."""
        speed = self._throughput
        parts = [
            f"step {metrics.step}/{self.total}",
            f"loss {loss:.3f}",
            f"{_short(speed.tokens_per_second)} tok/s",
            f"MFU {speed.flops_per_second / metrics.peak_flops:.0%}" if metrics.flops and metrics.peak_flops else "",
            _memory(*memory_use(self.device)) if self.device is not None else "",
            f"ETA {_duration((self.total - metrics.step) * speed.seconds_per_step)}",
            f"{skipped} skipped" if skipped else "",
        ]
        for least in (None, 4, 3, 2, 6, 5, 1):  # memory, MFU, tokens/s, skipped, ETA, loss
            if least is not None:
                parts[least] = ""
            shown = [part for part in parts if part]
            for gap in ("  ", " "):
                if len(gap.join(shown)) <= width:
                    return gap.join(shown)
        return gap.join(shown)[: max(width, 0)]

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
    """Three digits and a unit: 950, 12.3k, 1.24M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 100 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def _memory(used: int | None, total: int | None) -> str:
    if used is None:
        return ""
    return f"{used / 2**30:.1f}/{total / 2**30:.0f} GB" if total is not None else f"{used / 2**30:.1f} GB"


def _duration(seconds: float) -> str:
    """1:05, 2:03:05, 3d 04h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02}h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
