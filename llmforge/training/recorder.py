"""What `Trainer.train` shows and writes down: the screen, log.jsonl and the trackers hear the same, each step's loss as late as it must."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.config import Config
from llmforge.training.config import TrainConfig
from llmforge.training.metrics import EvalMetrics, RunLog, StepMetrics, Throughput, memory_use, num_params
from llmforge.training.progress import Progress
from llmforge.training.trackers import Trackers


class Recorder:
    """The records of one `train()`.

    Args:
        model: its name, size and config are told to the trackers.
        dtype: of the arithmetic.
        step: steps done before.
        progress: whether there is a screen.
    Raises:
        ConfigError: a tracker is not installed, or asks for a login.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        *,
        out_dir: Path | None,
        device: torch.device,
        dtype: torch.dtype,
        step: int,
        progress: bool,
    ) -> None:
        self._config, self._device = config, device
        self._late: tuple[StepMetrics, dict[str, Any]] | None = None  # due in the log, and still being computed
        about = {
            "model": type(model).__name__,
            "parameters": num_params(model),
            "max_steps": config.max_steps,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(config.dtype or dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }
        shape = getattr(model, "config", None)
        settings = {**about, "train": config.to_dict(), "config": shape.to_dict() if isinstance(shape, Config) else {}}
        self._log = RunLog(out_dir / "log.jsonl" if out_dir is not None else None, after_step=step)
        self._trackers = Trackers(
            config.trackers, out_dir, settings, after_step=step, last_step=self._log.last_logged_step
        )
        self._throughput = Throughput()
        self._screen = Progress(
            total=config.max_steps, initial=step, enabled=progress, throughput=self._throughput, device=device
        )
        for place in self._trackers.places:
            self._screen.note(place)
        self._log.write(step=step, run=about)

    def step(self, metrics: StepMetrics, skipped_steps: Tensor) -> None:
        """A step was done, or is being done by a GPU.

        Args:
            skipped_steps: number of all steps that were skipped, on the device.
        """
        self._throughput.step(metrics.num_tokens, metrics.flops)
        self._screen.step(metrics, skipped_steps)
        self._write_late()
        last = metrics.step == self._config.max_steps
        if last or metrics.step % self._config.log_every_steps == 0:
            self._late = metrics, self._known(metrics)
            if last or self._device.type == "cpu":  # a GPU would have to be waited for
                self._write_late()

    def evaluation(self, metrics: EvalMetrics, improved: bool) -> None:
        """A validation loss."""
        values = {
            "val_loss": metrics.loss,
            "val_perplexity": metrics.perplexity,
            "val_bits_per_byte": metrics.bits_per_byte,
        }
        self._log.write(step=metrics.step, **values)
        self._trackers.log(metrics.step, values)
        self._screen.evaluation(metrics, improved)
        self.resume()

    def sample(self, step: int, text: str) -> None:
        """A text of the model."""
        self._log.write(step=step, sample=text)
        self._trackers.text(step, "sample", text)
        self._screen.sample(text)
        self.resume()

    def ternary(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """What the codes of ternary layers do."""
        self._log.write(step=step, ternary=layers)
        self.resume()

    def resume(self) -> None:
        """The next step begins now: what was done since the last one, a checkpoint for example, was no training."""
        self._throughput.resume()

    def close(self, step: int, *, stopped_by: str | None) -> None:
        """The end.

        Args:
            stopped_by: what ended the run before its last step: a signal, "max_seconds", "error"; None = nothing did.
        """
        self._screen.close()
        with contextlib.suppress(
            OSError, RuntimeError
        ):  # of a full disk, a broken device: what is raised already says more
            self._write_late()
            if stopped_by is not None:
                self._log.write(step=step, stopped_by=stopped_by)
            self._log.close()
        self._trackers.close()

    def _known(self, metrics: StepMetrics) -> dict[str, Any]:
        """What is known of a step without waiting for the device."""
        speed = self._throughput
        flops = speed.flops_per_second if metrics.flops is not None else None
        values: dict[str, Any] = {
            "tokens": self._log.tokens + speed.tokens,
            "seconds": round(self._log.seconds + speed.seconds, 3),
            "tokens_per_second": round(speed.tokens_per_second, 1),
            "flops_per_second": float(f"{flops:.4g}") if flops is not None else None,
            "mfu": round(flops / metrics.peak_flops, 4) if flops is not None and metrics.peak_flops else None,
            "memory_bytes": memory_use(self._device)[0],
        }
        return {name: value for name, value in values.items() if value is not None}

    def _write_late(self) -> None:
        if self._late is None:
            return
        metrics, known = self._late
        self._late = None
        values = {"loss": metrics.loss, "lr": metrics.lr, "grad_norm": metrics.grad_norm, **known}
        if metrics.skipped:
            values["skipped"] = True
        self._log.write(step=metrics.step, **values)
        self._trackers.log(metrics.step, values)
