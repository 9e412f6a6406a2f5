"""Trainer: an iterator of optimizer steps, and `train()`, that loop with logging, evaluation, samples and checkpoints."""

import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmforge.errors import CheckpointError, ConfigError, DataError, DivergedError, OutOfMemoryError, some
from llmforge.generation import generate_text
from llmforge.nn import bit_linears, constant_weights, set_quantization_
from llmforge.tokenizers import Tokenizer
from llmforge.training.batches import Batches, on_device
from llmforge.training.checkpoint import (
    Copy,
    ModelFiles,
    Snapshot,
    TrainerState,
    WholeModel,
    check_new_run,
    list_checkpoints,
    newest_state,
    read_state,
    take_snapshot,
    the_tensor_itself,
    tidy_run,
    validation_loss,
)
from llmforge.training.compiling import CompiledModel, compiling_pays
from llmforge.training.config import TrainConfig
from llmforge.training.devices import arithmetic, arithmetic_dtype, own_randomness, pick_device
from llmforge.training.loss import LossFunction, default_loss
from llmforge.training.metrics import EvalMetrics, StepMetrics, TrainResult, flops_per_token
from llmforge.training.micro_batch import bytes_per_row, free_bytes, split_rows
from llmforge.training.optim import build_optimizer, load_optimizer_state_
from llmforge.training.out_of_memory import is_out_of_memory, what_would_fit
from llmforge.training.peaks import device_peak_flops
from llmforge.training.recorder import Recorder
from llmforge.training.saving import CheckpointWriter
from llmforge.training.schedule import learning_rate, quantization_strength, weight_decay_applies
from llmforge.training.signals import stop_signals
from llmforge.training.ternary import TernaryDiagnosis


class Dataset(Protocol):
    """What the trainer asks of data: batches that are a pure function of their arguments.

    The tensors of a batch all begin with the batch dimension; the first two are idx and targets, unless `loss_fn` says otherwise.
    Data that has an end says how many sequences it has: `num_sequences(seq_len) -> int`, or its tokens as `len`.
    """

    def batch(self, step: int, *, batch_size: int, seq_len: int, seed: int) -> Sequence[Tensor]: ...


class Trainer:
    """Trains any module with `forward(idx) -> logits`; one `next()` is one optimizer step.

        for metrics in Trainer(model, train_data, config=TrainConfig(max_steps=100)):
            print(metrics.step, metrics.loss)

    Args:
        model: the module; it is moved to the configured device and trained in place.
        train_data: see `Dataset`; a `TokenDataset` as a rule.
        config: the settings.
        val_data: for the validation loss; None = none.
        tokenizer: for samples while training, and saved with each checkpoint.
        loss_fn: (model, micro-batch) -> (sum of losses, number of targets); None = `default_loss`.
        optimizer: instead of AdamW as configured; its learning rate still follows the schedule.
        model_files: what a checkpoint holds of the model; None = all of it.
    Raises:
        ConfigError, DataError: model, data and settings do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Dataset,
        *,
        config: TrainConfig,
        val_data: Dataset | None = None,
        tokenizer: Tokenizer | None = None,
        loss_fn: LossFunction | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        model_files: ModelFiles | None = None,
    ) -> None:
        self.config = config
        self.model_files = model_files
        self.device = pick_device(config.device)
        self.dtype = arithmetic_dtype(config.dtype, self.device)
        self.model = model.to(self.device)
        if config.activation_checkpointing != "none":
            set_checkpointing = getattr(model, "set_activation_checkpointing", None)
            if set_checkpointing is None:
                raise ConfigError(
                    f"activation_checkpointing ({config.activation_checkpointing!r}) needs a model with set_activation_checkpointing, "
                    f"as llmforge's own have; {type(model).__name__} has none: leave it at 'none'"
                )
            set_checkpointing(config.activation_checkpointing)
        self.train_data, self.val_data = train_data, val_data
        self.tokenizer = tokenizer
        self.loss_fn: LossFunction = loss_fn or default_loss(model)
        self.optimizer = optimizer if optimizer is not None else build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        seq_len = config.seq_len or getattr(model, "context_length", None)
        if seq_len is None:
            if loss_fn is None:
                raise ConfigError("seq_len must be set: this model names no context_length of its own")
            seq_len = 1  # data without sequences takes no notice
        self.seq_len: int = seq_len
        # Sequences per step, and per forward pass; None = found out before the first one.
        self.rows, self._micro_batch_size = split_rows(config, seq_len)
        self.out_dir = Path(config.out_dir) if config.out_dir is not None else None
        self._writer = None if self.out_dir is None else CheckpointWriter(self.out_dir, keep_last=config.keep_last)
        self.step = 0  # steps done
        self._is_torn = False  # an optimizer step was begun and not finished
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.device)  # of all steps done
        self._skipped_in_a_row = torch.zeros_like(self.skipped_steps)
        # The device writes here when it has got so far: to read it never waits, and is a few steps late on a GPU.
        self._skipped_as_known = torch.zeros((), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.last_eval: EvalMetrics | None = None
        self._params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._weight_decays = [group.get("weight_decay", 0.0) for group in self.optimizer.param_groups]
        self._has_bit_linears = bool(bit_linears(model))
        self._check()
        self._modules = list(model.modules())
        self._batches = Batches(self.device)
        self._flops_per_token = flops_per_token(model, seq_len)
        self._peak_flops = device_peak_flops(self.device, str(config.dtype or self.dtype).removeprefix("torch."))
        micro_steps = config.max_steps * max(1, self.rows // (self._micro_batch_size or self.rows))
        compile = config.compile if config.compile is not None else compiling_pays(self.device, micro_steps=micro_steps)
        self._compiled = CompiledModel(model, insist=bool(config.compile)) if compile else None

    def _check(self) -> None:
        if not self._has_bit_linears and quantization_strength(0, self.config) < 1:
            raise ConfigError(
                "quantize_after_fraction and quantize_warmup_steps are for models with BitLinear layers, and this one has none"
            )
        context = getattr(self.model, "context_length", self.seq_len)
        if self.seq_len > context:
            raise ConfigError(f"seq_len ({self.seq_len}) exceeds the model's context ({context}); lower it")
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        for name, source in (
            ("tokenizer", self.tokenizer),
            ("train_data", self.train_data),
            ("val_data", self.val_data),
        ):
            needed = getattr(source, "vocab_size", None)
            if vocab_size is not None and needed is not None and needed > vocab_size:
                raise ConfigError(
                    f"{name} has a vocabulary of {needed} tokens, the model only {vocab_size}; build the model with "
                    f"vocab_size={needed}"
                )
        for name, data in (("train_data", self.train_data), ("val_data", self.val_data)):
            if not hasattr(data, "num_sequences") and isinstance(data, Sized) and len(data) <= self.seq_len:
                raise DataError(
                    f"{name} has {len(data)} tokens; one sequence needs {self.seq_len + 1}: use more text, a smaller "
                    f"seq_len (now {self.seq_len}), or another val_fraction"
                )

    # One step

    def __iter__(self) -> Iterator[StepMetrics]:
        return self

    def __next__(self) -> StepMetrics:
        """Do one optimizer step; StopIteration after max_steps."""
        if self.step >= self.config.max_steps:
            raise StopIteration
        with self._arithmetic():
            return self._do_step()

    def _do_step(self) -> StepMetrics:
        start = time.perf_counter()
        config = self.config
        lr = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        if config.decay_weights_fraction < 1:
            decays = weight_decay_applies(self.step, config)
            for group, weight_decay in zip(self.optimizer.param_groups, self._weight_decays, strict=False):
                group["weight_decay"] = weight_decay if decays else 0.0
        self._set_quantization(quantization_strength(self.step, config))
        if not all(module.training for module in self._modules):
            self.model.train()
        batch = self._batches.get(
            self.step, self._batch, source=self.train_data, is_last=self.step + 1 == config.max_steps
        )
        num_tokens = batch[0].numel()
        loss_sum, num_targets = self._gradients_that_fit(batch, num_tokens)
        # The gradient so far is that of loss_sum / num_tokens; what is wanted is the mean over the targets.
        num_targets = num_targets.clamp(min=1)
        grad_norm = self._rescale_and_clip_gradients(num_tokens / num_targets)
        skipped = ~(loss_sum.isfinite() & grad_norm.isfinite())
        try:
            self._is_torn = True
            self._update_weights(skipped)
            self._is_torn = False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(
                error, f"step {self.step + 1}", ", and some weights have changed already: go on from a checkpoint"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._count(skipped)
        return StepMetrics(
            step=self.step,
            lr=lr,
            num_tokens=num_tokens,
            seconds=time.perf_counter() - start,
            loss_tensor=loss_sum / num_targets,
            grad_norm_tensor=grad_norm,
            skipped_tensor=skipped,
            flops=None if self._flops_per_token is None else num_tokens * self._flops_per_token,
            peak_flops=self._peak_flops,
        )

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass, as configured; "auto" and what a step without enough memory made of it included."""
        if self._micro_batch_size is None:
            self._micro_batch_size = self._found_micro_batch_size()
        return self._micro_batch_size

    def _batch(self, step: int) -> Sequence[Tensor]:
        return self.train_data.batch(step, batch_size=self.rows, seq_len=self.seq_len, seed=self.config.seed)

    def _found_micro_batch_size(self) -> int:
        """The largest part of a step, one of equal parts, whose activations fit into the memory that is free."""
        row = self.train_data.batch(0, batch_size=1, seq_len=self.seq_len, seed=self.config.seed)
        with _own_randomness(self.config.seed, 0, self.device), self._autocast():
            needed = bytes_per_row(self.loss_fn, self.model, [part.to(self.device) for part in row])
        trained = sum(p.numel() * p.element_size() for p in self._params)
        coming = (
            trained if self.optimizer.state else 3 * trained
        )  # gradients; and AdamW's two moments, made in the first step
        fitting = max(1, (free_bytes(self.device) - coming) // max(1, needed))
        return max(size for size in range(1, self.rows + 1) if self.rows % size == 0 and size <= fitting)

    def _gradients_that_fit(self, batch: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor]:
        """`_accumulate_gradients`; without enough memory again, in micro-batches of half the size, from then on."""
        as_before = self.micro_batch_size
        while True:
            try:
                with _own_randomness(self.config.seed, self.step, self.device), constant_weights():
                    return self._accumulate_gradients(batch, num_tokens)
            except Exception as error:
                if not is_out_of_memory(error):
                    if self._compiled is None or not self._compiled.give_up(error):
                        raise
                    self._compiled = None
                    self.optimizer.zero_grad(set_to_none=True)
                    continue
                if self.micro_batch_size == 1:
                    failure = self._out_of_memory(error, f"step {self.step + 1}", ", and the step was not done")
                    self._micro_batch_size = as_before  # that of the steps done, which a resumed run repeats to the bit
                    raise failure from error
            # Outside of the except block, whose exception holds what the forward pass had computed.
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._micro_batch_size = -(-self.micro_batch_size // 2)
            warnings.warn(
                f"out of memory in step {self.step + 1} on {self.device}: doing it again, and going on, with micro-batches of "
                f"{self._micro_batch_size} (the same step in more parts)",
                stacklevel=4,
            )

    def _accumulate_gradients(self, batch: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Forward and backward over the micro-batches; returns the step's loss sum and number of targets."""
        loss_sum = torch.zeros((), device=self.device)
        num_targets = torch.zeros((), dtype=torch.int64, device=self.device)
        size = self.micro_batch_size
        for first in range(0, batch[0].shape[0], size):
            micro_batch = on_device([part[first : first + size] for part in batch], self.device)
            with self._autocast(), self._compiled or nullcontext():
                micro_sum, micro_targets = self.loss_fn(self.model, micro_batch)
            # A sum over many tokens would overflow float16 gradients: divide by a count known beforehand.
            self.scaler.scale(micro_sum / num_tokens).backward()  # type: ignore[no-untyped-call]
            loss_sum += micro_sum.detach()
            num_targets += micro_targets
        return loss_sum, num_targets

    def _update_weights(self, skipped: Tensor) -> None:
        """The optimizer's step, unless it is one to be skipped."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # looks at the gradients itself, and halves its scale
            self.scaler.update()
        elif self.device.type == "cuda" and self.optimizer.defaults.get("fused"):
            # The kernel reads this flag, as it does for a GradScaler; to read it here would wait for the device.
            flagged: Any = self.optimizer
            flagged.grad_scale, flagged.found_inf = None, skipped.float()
            self.optimizer.step()
            del flagged.grad_scale, flagged.found_inf
        elif not skipped:
            self.optimizer.step()

    def _count(self, skipped: Tensor) -> None:
        """Keep count of skipped steps.

        Raises:
            DivergedError: max_skipped_steps in a row.
        """
        self.skipped_steps += skipped
        self._skipped_in_a_row = (self._skipped_in_a_row + 1) * skipped
        self._skipped_as_known.copy_(self._skipped_in_a_row, non_blocking=True)
        # A GradScaler begins with 2**16 and halves it until the gradients are finite: that is no divergence.
        limit = self.config.max_skipped_steps + (16 if self.scaler.is_enabled() else 0)
        in_a_row = int(self._skipped_as_known)
        if in_a_row >= limit:
            raise DivergedError(
                f"loss or gradient was not finite in {in_a_row} steps in a row, up to step {self.step}, which were skipped"
                f"{self._where_to_go_on()}; lower lr ({self.config.lr:g}), warm up longer, or look at the data of these steps"
            )

    def _where_to_go_on(self) -> str:
        """The newest checkpoint, for an error's message."""
        if self._writer is not None:
            self._writer.finish()
        folders = list_checkpoints(self.out_dir) if self.out_dir is not None else []
        return f"; {folders[-1]} is the last good checkpoint" if folders else ""

    def _check_weights(self) -> None:
        """Refuse to save weights that are not finite: the checkpoints before are better.

        Raises:
            DivergedError: with the name of one.
        """
        # A tenth of the time of looking at each value, and one look at the device; a sum of 1e38s, which overflows, is looked into.
        if torch.stack([p.detach().sum(dtype=torch.float32) for p in self._params]).isfinite().all():
            return
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if broken:
            raise DivergedError(
                f"{some(broken)} had values that are not finite after step {self.step}, so it was not saved"
                f"{self._where_to_go_on()}; lower lr ({self.config.lr:g}) or warm up longer"
            )

    def _out_of_memory(self, error: BaseException, where: str, outcome: str = "") -> OutOfMemoryError:
        """What to tell the user."""
        self.optimizer.zero_grad(set_to_none=True)
        can_checkpoint = hasattr(self.model, "set_activation_checkpointing")
        ways = what_would_fit(
            self.config,
            rows=self.rows,
            micro_batch_size=self.micro_batch_size,
            seq_len=self.seq_len,
            can_checkpoint=can_checkpoint,
        )
        reason = str(error).partition(". ")[0]
        return OutOfMemoryError(f"out of memory in {where} on {self.device} ({reason}){outcome}; try {ways}")

    def _rescale_and_clip_gradients(self, factor: Tensor) -> Tensor:
        """Multiply all gradients by `factor`, clip their global norm, and return the norm before clipping."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self._params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) * factor
        if self.config.grad_clip is not None:
            factor = factor * (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor)
        return norm

    def _set_quantization(self, strength: float) -> None:
        if self._has_bit_linears:
            set_quantization_(self.model, strength)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def _arithmetic(self) -> AbstractContextManager[None]:
        tf32, num_threads = self.config.dtype == "tf32", self.config.num_threads
        return arithmetic(tf32=tf32, num_threads=num_threads) if tf32 or num_threads else nullcontext()

    # What happens beside the steps

    @torch.no_grad()
    def evaluate(self, data: Dataset | None = None) -> EvalMetrics:
        """Mean loss over `eval_batches` micro-batches of the validation data, the same ones every time; no dropout.

        Args:
            data: other data than val_data.
        Raises:
            ConfigError: there is no data to evaluate on.
        """
        data = data if data is not None else self.val_data
        if data is None:
            raise ConfigError("evaluate needs data: pass val_data to the Trainer, or data to evaluate")
        size = self.config.micro_batch_size if isinstance(self.config.micro_batch_size, int) else self.micro_batch_size
        batches, rows_left = self.config.eval_batches, None
        if batches is None:
            sequences = _num_sequences(data, self.seq_len)
            if sequences is None:
                raise ConfigError("eval_batches must be set: this data does not say how long it is")
            # Examples are counted to the last one; of a long text the windows that fill batches.
            rows_left = sequences if hasattr(data, "num_sequences") else None
            batches = max(1, sequences // size if rows_left is None else -(-sequences // size))
        loss_sum, num_targets, weights = 0.0, 0, constant_weights()
        self._batches.wait()
        was_training = self.model.training
        self.model.eval()
        self._set_quantization(1.0)  # as it will run
        try:
            for number in range(batches):
                batch = data.batch(number, batch_size=size, seq_len=self.seq_len, seed=0)
                if rows_left is not None:
                    batch = [part[: rows_left - number * size] for part in batch]
                for first in range(0, batch[0].shape[0], self.micro_batch_size):
                    part = on_device([rows[first : first + self.micro_batch_size] for rows in batch], self.device)
                    with self._arithmetic(), self._autocast(), weights:
                        micro_sum, micro_targets = self.loss_fn(self.model, part)
                    loss_sum += micro_sum.item()
                    num_targets += int(micro_targets)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(error, f"the evaluation after step {self.step}") from error
        finally:
            self.model.train(was_training)
        self.last_eval = EvalMetrics(
            step=self.step,
            loss=loss_sum / max(1, num_targets),
            num_targets=num_targets,
            bytes_per_token=getattr(data, "bytes_per_token", None),
        )
        return self.last_eval

    def sample(self) -> str:
        """A text of the model as it is now, from its own source of randomness: sampling does not change the run."""
        if self.tokenizer is None:
            raise ConfigError("a sample needs a tokenizer; pass it to the Trainer")
        self._set_quantization(1.0)
        with self._autocast():
            return generate_text(
                self.model,
                self.tokenizer,
                self.config.sample_prompt,
                max_new_tokens=self.config.sample_tokens,
                temperature=0.8,
                top_k=40,
                seed=self.config.seed,
            )

    def save(self) -> Path:
        """Write a checkpoint of this step into out_dir, and delete those that keep_last no longer covers.

        Returns:
            its folder, which is complete; what `train` writes in the background is finished before.
        Raises:
            ConfigError: there is no out_dir.
            WriteError: no permission, no space; older checkpoints stay.
        """
        if self._writer is None:
            raise ConfigError("save needs an out_dir in the TrainConfig")
        return self._writer.write(self._snapshot())

    def _snapshot(self, copy: Copy = the_tensor_itself) -> Snapshot:
        """What a checkpoint of this step holds."""
        evaluated = self.last_eval is not None and self.last_eval.step == self.step
        state = TrainerState(
            step=self.step,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            val_loss=self.last_eval.loss if evaluated and self.last_eval is not None else None,
            settings=self.config.to_dict(),
            micro_batch_size=self._micro_batch_size,
            skipped_steps=int(self.skipped_steps),
            data_fingerprint=getattr(self.train_data, "fingerprint", None),
        )
        return take_snapshot(self.model, self.tokenizer, state, model_files=self.model_files, copy=copy)

    def resume(self, path: str | Path | None = None) -> bool:
        """Go on from a checkpoint: the run continues bit for bit as if it had never stopped (on the CPU; see docs/training.md).

        Args:
            path: a checkpoint folder, or a run folder; None = out_dir. Of a run it is the newest checkpoint that can be read.
        Returns:
            True; False when `path` is None and out_dir holds no checkpoint yet.
        Raises:
            CheckpointError: `path` is not a checkpoint, is damaged, or belongs to a model of another shape.
        """
        if path is None:
            if self.out_dir is None:
                return False
            tidy_run(self.out_dir)
            if not list_checkpoints(self.out_dir):
                return False
            path = self.out_dir
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; name a run or one of its step-... folders")
        path, state = newest_state(path) if list_checkpoints(path) else (path, read_state(path))
        before, now = str(state.settings.get("optimizer", "adamw")), self.config.optimizer
        if ("8bit" in before) != ("8bit" in now):
            raise CheckpointError(
                f"{path} holds the state of the optimizer {before!r}, with which {now!r} cannot go on; resume with the one that the run "
                "began with"
            )
        (self.model_files or WholeModel()).load_(path, self.model)
        self._warn_of_differences(state)
        try:
            load_optimizer_state_(self.optimizer, state.optimizer)
        except ValueError as error:
            raise CheckpointError(f"the optimizer state in {path} does not fit this optimizer: {error}") from error
        if self.scaler.is_enabled() and state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.step = state.step
        self.skipped_steps.fill_(state.skipped_steps)
        if (
            state.settings.get("micro_batch_size") == self.config.micro_batch_size
            and state.micro_batch_size is not None
        ):
            self._micro_batch_size = min(state.micro_batch_size, self.rows)  # the same bits, with the same parts
        return True

    def _warn_of_differences(self, state: TrainerState) -> None:
        own = self.config.to_dict()
        no_effect = {"out_dir", "keep_last", "async_save", "max_seconds", "trackers", "device", "compile"}
        no_effect |= {"activation_checkpointing", "num_threads"}
        no_effect |= {name for name in own if name.startswith(("log_", "eval_", "sample_", "save_", "diagnose_"))}
        if _rows_per_step(state.settings, self.seq_len) == self.rows:  # in how many parts changes no sum
            no_effect |= {"micro_batch_size", "grad_accum_steps", "tokens_per_step"}
        changed = [
            f"{name} {state.settings[name]!r} -> {value!r}"
            for name, value in own.items()
            if name not in no_effect and name in state.settings and state.settings[name] != value
        ]
        if state.data_fingerprint != getattr(self.train_data, "fingerprint", None):
            changed.append("the training data")
        if changed:
            warnings.warn(f"resuming with changed settings, so not the same run: {', '.join(changed)}", stacklevel=3)

    # The whole run

    def train(self, *, progress: bool = True) -> TrainResult:
        """All steps that are left, with log.jsonl, evaluation, samples and checkpoints as configured.

        Ctrl-C, SIGTERM or the end of max_seconds finishes the step, saves and returns with `stopped_by` set; a second Ctrl-C stops at
        once.

        Args:
            progress: show a progress line, evaluations and samples on the screen (standard error).
        Raises:
            CheckpointError: out_dir holds checkpoints of another run and `resume` was not called.
            OutOfMemoryError: a step does not fit, in however small parts; the steps before it are saved.
            DivergedError: max_skipped_steps in a row were not finite, or weights are not; the message names the last good checkpoint.
        """
        self.check_out_dir()
        saved_at = time.monotonic()
        start, first_step, num_tokens = time.perf_counter(), self.step, 0
        slowest = 0.0  # seconds of a step with all that comes with it
        metrics: StepMetrics | None = None
        checkpoint: Path | None = None
        best_loss, best_step = self._best_so_far()
        diagnosis = TernaryDiagnosis(self.model, max_steps=self.config.max_steps) if self._has_bit_linears else None
        recorder = Recorder(
            self.config,
            self.model,
            out_dir=self.out_dir,
            device=self.device,
            dtype=self.dtype,
            step=self.step,
            progress=progress,
        )
        try:
            with stop_signals() as stop:
                began = time.perf_counter()
                for metrics in self:
                    num_tokens += metrics.num_tokens
                    recorder.step(metrics, self.skipped_steps)
                    last = metrics.step == self.config.max_steps
                    if diagnosis is not None and self._due(self.config.diagnose_every_steps):
                        recorder.ternary(self.step, self._diagnose(diagnosis))
                    improved = False
                    if self.val_data is not None and (last or self._due(self.config.eval_every_steps)):
                        evaluation = self.evaluate()
                        improved = math.isfinite(evaluation.loss) and (best_loss is None or evaluation.loss < best_loss)
                        recorder.evaluation(evaluation, improved)
                        if improved:
                            best_loss, best_step = evaluation.loss, self.step
                    if self._sample_is_due(last):
                        recorder.sample(self.step, self.sample())
                    if self.config.max_seconds is not None and stop.requested is None:
                        now = time.perf_counter()
                        slowest, began = max(slowest, now - began), now
                        if now - start + slowest > self.config.max_seconds:
                            stop.requested = "max_seconds"
                    if self._writer is not None:
                        self._writer.check()
                        if last or stop.requested:
                            self._check_weights()
                            checkpoint = self.save()
                        elif improved or self._save_is_due(saved_at):
                            self._check_weights()
                            saved_at = time.monotonic()
                            self._writer.begin(self._snapshot, in_background=self.config.async_save)
                            recorder.resume()
                    if stop.requested:
                        break
        except OutOfMemoryError as error:
            if self.out_dir is None or self.step == first_step or self._is_torn:
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemoryError(f"{error}; {self.save()} holds the steps before it, to go on from") from error
        finally:
            try:
                if self._writer is not None:
                    self._writer.close()
            finally:
                unfinished = self.step < self.config.max_steps
                recorder.close(self.step, stopped_by=(stop.requested or "error") if unfinished else None)
        seconds = time.perf_counter() - start
        return TrainResult(
            step=self.step,
            train_loss=metrics.loss if metrics is not None else None,
            val_loss=self.last_eval.loss if self.last_eval is not None else None,
            best_val_loss=best_loss,
            best_step=best_step,
            seconds=seconds,
            tokens_per_second=num_tokens / seconds if self.step > first_step else 0.0,
            stopped_by=stop.requested if self.step < self.config.max_steps else None,
            skipped_steps=int(self.skipped_steps),
            checkpoint=checkpoint,
        )

    def _diagnose(self, diagnosis: TernaryDiagnosis) -> dict[str, dict[str, float]]:
        """How the ternary layers do on the first sequence of this step's batch."""
        self._batches.wait()
        batch = self.train_data.batch(self.step, batch_size=1, seq_len=self.seq_len, seed=self.config.seed)
        was_training = self.model.training
        self.model.eval()
        self._set_quantization(1.0)
        try:
            with self._autocast():
                return diagnosis.observe(
                    self.step, lambda: self.loss_fn(self.model, [part.to(self.device) for part in batch])
                )
        finally:
            self.model.train(was_training)

    def check_out_dir(self) -> None:
        """Refuse to begin a run in a folder that holds another one's checkpoints, or a model; see `check_new_run`.

        What a killed process of the run has left is put in order before.
        """
        if self.out_dir is not None:
            tidy_run(self.out_dir)
            if self.step == 0:
                check_new_run(self.out_dir)

    def _save_is_due(self, saved_at: float) -> bool:
        seconds = self.config.save_every_seconds
        return self._due(self.config.save_every_steps) or (
            seconds is not None and time.monotonic() - saved_at >= seconds
        )

    def _due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0

    def _sample_is_due(self, last: bool) -> bool:
        every_steps = self.config.sample_every_steps
        return self.tokenizer is not None and every_steps is not None and (last or self._due(every_steps))

    def _best_so_far(self) -> tuple[float | None, int | None]:
        """Lowest validation loss among this run's checkpoints, and its step: what an interrupted run had found."""
        folders = list_checkpoints(self.out_dir) if self.out_dir is not None else []
        scored = [
            (loss, int(f.name.removeprefix("step-"))) for f in folders if (loss := validation_loss(f)) is not None
        ]
        return min(scored, default=(None, None))


def _own_randomness(seed: int, step: int, device: torch.device) -> AbstractContextManager[None]:
    """Make dropout a function of (seed, step): a resumed run needs no generator state, and the caller's generator is not touched."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "little") >> 1
    return own_randomness(mixed, device)


def _rows_per_step(settings: Mapping[str, Any], seq_len: int) -> int:
    """Sequences that a step reads, by the settings of a checkpoint.

    Args:
        seq_len: where they do not say it.
    """
    if settings.get("tokens_per_step") is None:
        rows: int = settings["micro_batch_size"] * settings["grad_accum_steps"]
        return rows
    tokens: int = settings["tokens_per_step"]
    return tokens // (settings["seq_len"] or seq_len)


def _num_sequences(data: Dataset, seq_len: int) -> int | None:
    """How many different sequences there are in the data; None where it does not say so."""
    if hasattr(data, "num_sequences"):
        number: int = data.num_sequences(seq_len)
        return number
    return (len(data) - 1) // seq_len if isinstance(data, Sized) else None
