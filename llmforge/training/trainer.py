"""Trainer: an iterator of optimizer steps, and `train()`, that loop with logging, evaluation, samples and checkpoints."""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmforge.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LostRankError,
    OutOfMemoryError,
    some,
)
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
from llmforge.training.devices import arithmetic, arithmetic_dtype, own_randomness
from llmforge.training.distributed import (
    Replicas,
    Wishes,
    gathering,
    how_to_go_on,
    join,
    own_part,
    rebind_,
    scattered,
)
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
        self.ranks = join(config.device)
        self.device = self.ranks.device(config.device)
        self.dtype = arithmetic_dtype(config.dtype, self.device)
        self.model = model
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
        self._has_bit_linears = bool(bit_linears(model))
        self._replicas = self._replicated(optimizer)
        self.optimizer = optimizer if optimizer is not None else build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        seq_len = config.seq_len or getattr(model, "context_length", None)
        if seq_len is None:
            if loss_fn is None:
                raise ConfigError("seq_len must be set: this model names no context_length of its own")
            seq_len = 1  # data without sequences takes no notice
        self.seq_len: int = seq_len
        # Sequences per step, of all ranks, and per forward pass; None = found out before the first one.
        self.rows, self._micro_batch_size = split_rows(config, seq_len, self.ranks.world_size)
        self.out_dir = Path(config.out_dir) if config.out_dir is not None else None
        self._writer = None if self.out_dir is None else CheckpointWriter(self.out_dir, keep_last=config.keep_last)
        self.step = 0  # steps done
        self._is_torn = False  # an optimizer step was begun and not finished
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.device)  # of all steps done
        self._skipped_in_a_row = torch.zeros_like(self.skipped_steps)
        # The device writes here when it has got so far: to read it never waits, and is a few steps late on a GPU.
        self._skipped_as_known = torch.zeros((), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._wishes = Wishes(self.device) if self.ranks.are_several else None
        self.last_eval: EvalMetrics | None = None
        self._params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._weight_decays = [group.get("weight_decay", 0.0) for group in self.optimizer.param_groups]
        self._check()
        self._modules = list(model.modules())
        self._batches = Batches(self.device)
        self._flops_per_token = flops_per_token(model, seq_len)
        peak_flops = device_peak_flops(self.device, str(config.dtype or self.dtype).removeprefix("torch."))
        self._peak_flops = None if peak_flops is None else peak_flops * self.ranks.world_size
        micro_steps = config.max_steps * max(1, self.rows // (self._micro_batch_size or self.rows))
        compile = config.compile if config.compile is not None else compiling_pays(self.device, micro_steps=micro_steps)
        to_compile = self._replicas.to_compile() if compile else []
        self._compiled = CompiledModel(*to_compile, insist=bool(config.compile)) if to_compile else None

    def _replicated(self, optimizer: torch.optim.Optimizer | None) -> Replicas:
        """The model on all ranks; an optimizer that was made for it goes with it."""
        config = self.config
        if self.ranks.are_several and config.distributed == "fsdp":
            if config.optimizer != "adamw":
                raise ConfigError(
                    f"optimizer {config.optimizer!r} needs whole weights, and distributed='fsdp' divides them; use 'adamw', whose state is "
                    "divided as well, or distributed='ddp'"
                )
            if not isinstance(self.model_files, (WholeModel, type(None))):
                raise ConfigError("distributed='fsdp' is for all weights of a model, not for adapters; use 'ddp'")
            if config.micro_batch_size == "auto":
                raise ConfigError("micro_batch_size 'auto' is not for distributed='fsdp'; set a number")
        names = {id(p): name for name, p in self.model.named_parameters()}
        # Ternary layers round the float32 weights: of rounded ones they would make other codes than an export does.
        half = self.dtype if self.dtype is not torch.float32 and self.device.type == "cuda" else None
        replicas = Replicas(
            self.model,
            self.ranks,
            self.device,
            kind=config.distributed,
            blocks_dtype=None if self._has_bit_linears else half,
        )
        if optimizer is not None and replicas.is_sharded:
            rebind_(optimizer, names, self.model)
        return replicas

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
        with self.ranks.explained(lambda: f"in step {self.step + 1}"), self._arithmetic():
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
        num_tokens = batch[0].numel() * self.ranks.world_size
        loss_sum, num_targets = self._over_ranks(*self._gradients_that_fit(batch))
        # The gradient so far is that of loss_sum / num_tokens, of all ranks; what is wanted is the mean over the targets.
        num_targets = num_targets.clamp(min=1)
        grad_norm = self._rescale_and_clip_gradients(num_tokens / num_targets)
        skipped = ~(loss_sum + grad_norm).isfinite()
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

    def _own_rows(self, batch: Sequence[Tensor], step: int) -> Sequence[Tensor]:
        """This rank's rows of a step's batch. All ranks read the same batch: so any number of them sees the same data."""
        if not self.ranks.are_several:
            return batch
        rows = self.rows // self.ranks.world_size
        if len(batch[0]) != self.rows:
            raise DataError(
                f"train_data gave {len(batch[0])} sequences for step {step + 1} instead of {self.rows}, which cannot be divided over "
                f"{self.ranks.world_size} processes"
            )
        return [part[self.ranks.rank * rows :][:rows] for part in batch]

    def _over_ranks(self, loss_sum: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over all ranks of what they found in a step, and with them, what they wish."""
        if self._wishes is None:
            return loss_sum, num_targets
        found = torch.stack([loss_sum.double(), num_targets.double()])
        message = self.ranks.sum_(torch.cat([found, self._wishes.sent()]))
        self._wishes.receive(message[2:])
        return message[0].float(), message[1].long()

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass, as configured; "auto" and what a step without enough memory made of it included."""
        if self._micro_batch_size is None:
            self._micro_batch_size = self._found_micro_batch_size()
        return self._micro_batch_size

    def _batch(self, step: int) -> Sequence[Tensor]:
        batch = self.train_data.batch(step, batch_size=self.rows, seq_len=self.seq_len, seed=self.config.seed)
        return self._own_rows(batch, step)

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
        rows = self.rows // self.ranks.world_size
        found = max(size for size in range(1, rows + 1) if rows % size == 0 and size <= fitting)
        return self.ranks.smallest(found)

    def _gradients_that_fit(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`_accumulate_gradients`; without enough memory again, in micro-batches of half the size, from then on."""
        as_before = self.micro_batch_size
        while True:
            try:
                randomness = _own_randomness(self.config.seed, self.step, self.device, self.ranks.rank)
                with randomness, self._constant_weights():
                    return self._accumulate_gradients(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    if self._compiled is None or not self._compiled.give_up(error):
                        raise
                    if self._replicas.is_sharded:  # which an error in the middle of a pass leaves between two states
                        raise ConfigError(f"the blocks could not be compiled ({error}); set compile=false") from error
                    self._compiled = None
                    self.optimizer.zero_grad(set_to_none=True)
                    continue
                # Of several ranks the others would not do it again, and wait for this one.
                if self.micro_batch_size == 1 or self.ranks.are_several:
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

    def _accumulate_gradients(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forward and backward over the micro-batches; returns the step's loss sum and number of targets."""
        loss_sum = torch.zeros((), device=self.device)
        num_targets = torch.zeros((), dtype=torch.int64, device=self.device)
        num_tokens = batch[0].numel()
        size, rows = self.micro_batch_size, batch[0].shape[0]
        for first in range(0, rows, size):
            micro_batch = on_device([part[first : first + size] for part in batch], self.device)
            with self._replicas.micro_step(is_last=first + size >= rows):
                with self._autocast(), self._compiled or nullcontext():
                    micro_sum, micro_targets = self._replicas.loss(self.loss_fn, micro_batch)
                # A sum over many tokens would overflow float16 gradients: divide by a count known beforehand. It is that of this rank
                # alone, because gradients are averaged over the ranks.
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
        if self.device.type == "cpu" and not skipped and not self._skipped_as_known:
            return  # nothing to count, as a rule; on other devices to look would be to wait
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
        # A tenth of the time of looking at each value, and one look at the device; a sum that overflows is looked into.
        broken: list[str] = []
        if not torch.stack([own_part(p).detach().sum().isfinite() for p in self._params]).all():
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            broken = [name for name, p in named if not own_part(p).isfinite().all()]
        if self.ranks.smallest(-len(broken)) < 0:
            broken = broken or ["parts of other ranks"]
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
            rows=self.rows // self.ranks.world_size,
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
        grads = [own_part(p.grad) for p in self._params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self._replicas.is_sharded:
            norm = self.ranks.sum_(norm.square()).sqrt()
        norm = norm * factor
        if self.config.grad_clip is not None:
            factor = factor * (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor)
        return norm

    def _constant_weights(self) -> AbstractContextManager[None]:
        """`constant_weights`; but of sharded ones nothing is kept: that would be all of them, on every rank."""
        return nullcontext() if self._replicas.is_sharded else constant_weights()

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
        loss_sum, num_targets, weights = 0.0, 0, self._constant_weights()
        self._batches.wait()
        was_training = self.model.training
        self.model.eval()
        self._set_quantization(1.0)  # as it will run
        try:
            for turn in range(-(-batches // self.ranks.world_size)):
                number = turn * self.ranks.world_size + self.ranks.rank
                counts = number < batches  # the last turn may have none for this rank
                number %= batches
                batch = data.batch(number, batch_size=size, seq_len=self.seq_len, seed=0)
                if rows_left is not None:
                    batch = [part[: rows_left - number * size] for part in batch]
                for first in range(0, size, self.micro_batch_size):
                    part = [rows[first : first + self.micro_batch_size] for rows in batch]
                    is_own = counts and len(part[0]) > 0
                    if not is_own:
                        if not self._replicas.is_sharded:
                            break
                        part = [rows[:1] for rows in batch]  # the others need this rank's parts of the weights
                    with self._arithmetic(), self._autocast(), weights:
                        micro_sum, micro_targets = self._replicas.loss(self.loss_fn, on_device(part, self.device))
                    if is_own:
                        loss_sum += micro_sum.item()
                        num_targets += int(micro_targets)
            if self.ranks.are_several:
                sums = torch.tensor([loss_sum, num_targets], dtype=torch.float64, device=self.device)
                loss_sum, num_targets = self.ranks.sum_(sums)[0].item(), int(sums[1])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(error, f"the evaluation after step {self.step}") from error
        finally:
            self._replicas.reshard()
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
        with self._autocast(), self._replicas.generating():
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
        Of several ranks all must call it.
        """
        if self._writer is None:
            raise ConfigError("save needs an out_dir in the TrainConfig")
        writer, take = self._writer, self._to_write()

        def write() -> Path:
            assert take is not None  # on rank 0
            return writer.write(take(the_tensor_itself))

        return self.ranks.first_decides(write)

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
            world_size=self.ranks.world_size,
            data_fingerprint=getattr(self.train_data, "fingerprint", None),
        )
        return take_snapshot(self.model, self.tokenizer, state, model_files=self.model_files, copy=copy)

    def _to_write(self) -> Callable[[Copy], Snapshot] | None:
        """What takes a checkpoint of this step, where it is written: on rank 0. Divided weights are put together now, by all ranks."""
        if self._replicas.is_sharded:
            snapshot = self._snapshot(gathering(keep=self.ranks.is_first))
            return (lambda copy: snapshot) if self.ranks.is_first else None
        return self._snapshot if self.ranks.is_first else None

    def resume(self, path: str | Path | None = None) -> bool:
        """Go on from a checkpoint: the run continues bit for bit as if it had never stopped (on the CPU; see docs/training.md).

        Args:
            path: a checkpoint folder, or a run folder; None = out_dir. Of a run it is the newest checkpoint that can be read.
        Returns:
            True; False when `path` is None and out_dir holds no checkpoint yet.
        Raises:
            CheckpointError: `path` is not a checkpoint, is damaged, or belongs to a model of another shape.
        """

        states: dict[Path, TrainerState] = {}

        def find() -> Path | None:
            folder = self.out_dir if path is None else Path(path)
            if folder is None:
                return None
            if path is None:
                tidy_run(folder)
                if not list_checkpoints(folder):
                    return None
            if not folder.is_dir():
                raise CheckpointError(f"{folder} is not a folder; name a run or one of its step-... folders")
            if list_checkpoints(folder):
                folder, states[folder] = newest_state(folder)
            return folder

        found = self.ranks.first_decides(find)  # the same one for all ranks
        if found is None:
            return False
        path, state = found, states.get(found) or read_state(found, mapped=self._replicas.is_sharded)
        before, now = str(state.settings.get("optimizer", "adamw")), self.config.optimizer
        if ("8bit" in before) != ("8bit" in now):
            raise CheckpointError(
                f"{path} holds the state of the optimizer {before!r}, with which {now!r} cannot go on; resume with the one that the run "
                "began with"
            )
        (self.model_files or WholeModel()).load_(path, self.model)
        self._warn_of_differences(state)
        try:
            load_optimizer_state_(self.optimizer, scattered(self.optimizer, state.optimizer))
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
            self._micro_batch_size = min(
                state.micro_batch_size, self.rows // self.ranks.world_size
            )  # the same bits, with the same parts
        return True

    def _warn_of_differences(self, state: TrainerState) -> None:
        own = self.config.to_dict()
        no_effect = {"out_dir", "keep_last", "async_save", "max_seconds", "trackers", "device", "compile"}
        no_effect |= {"activation_checkpointing", "num_threads", "distributed"}
        no_effect |= {name for name in own if name.startswith(("log_", "eval_", "sample_", "save_", "diagnose_"))}
        if (
            _rows_per_step(state.settings, self.seq_len, state.world_size) == self.rows
        ):  # in how many parts changes no sum
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
        stopped_by: str | None = None
        checkpoint: Path | None = None
        best_loss, best_step = self.ranks.first_decides(self._best_so_far)
        diagnosis = TernaryDiagnosis(self.model, max_steps=self.config.max_steps) if self._has_bit_linears else None
        # Of several ranks the first one keeps the records.
        recorder = Recorder(
            self.config if self.ranks.is_first else self.config.replace(trackers=()),
            self.model,
            out_dir=self.out_dir if self.ranks.is_first else None,
            device=self.device,
            dtype=self.dtype,
            step=self.step,
            progress=progress and self.ranks.is_first,
        )
        try:
            with stop_signals() as stop, self._reported(first_step):
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
                        if now - start + slowest * self._steps_to_agree > self.config.max_seconds:
                            stop.requested = "max_seconds"
                    stopped_by = self._agreed_stop(stop.requested)
                    if self._writer is not None:
                        self._writer.check()
                        if last or stopped_by:
                            self._check_weights()
                            checkpoint = self.save()
                        elif self._save_is_due(saved_at) or improved:
                            self._check_weights()
                            saved_at = time.monotonic()
                            if (take := self._to_write()) is not None:
                                self._writer.begin(take, in_background=self.config.async_save)
                            recorder.resume()
                    if stopped_by:
                        break
        except OutOfMemoryError as error:
            if self.ranks.are_several or self.out_dir is None or self.step == first_step or self._is_torn:
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
                recorder.close(self.step, stopped_by=(stopped_by or stop.requested or "error") if unfinished else None)
        seconds = time.perf_counter() - start
        return TrainResult(
            step=self.step,
            train_loss=metrics.loss if metrics is not None else None,
            val_loss=self.last_eval.loss if self.last_eval is not None else None,
            best_val_loss=best_loss,
            best_step=best_step,
            seconds=seconds,
            tokens_per_second=num_tokens / seconds if self.step > first_step else 0.0,
            stopped_by=stopped_by if self.step < self.config.max_steps else None,
            skipped_steps=int(self.skipped_steps),
            checkpoint=self.ranks.first_decides(lambda: checkpoint),
        )

    @property
    def _steps_to_agree(self) -> int:
        """Steps from a wish to stop until the run stops, the next one included."""
        return 1 if self._wishes is None else 2 + self._wishes.steps_late

    def _agreed_stop(self, wish: str | None) -> str | None:
        """What ends the run after this step: the wish, or of several ranks the one that all of them know by now."""
        if self._wishes is None:
            return wish
        if wish is not None:
            self._wishes.wish(wish)
        return next((name for name in self._wishes.NAMES if name in self._wishes.agreed() and name != "save"), None)

    @contextmanager
    def _reported(self, first_step: int) -> Iterator[None]:
        """A lost process ends the block with what to do now. In the block signals are only noted: torchrun sends SIGTERM to those left."""
        try:
            with self.ranks.explained(lambda: f"after step {self.step}"):
                yield
        except LostRankError as error:
            raise LostRankError(f"{error}{self._how_to_go_on(first_step)}") from error

    def _how_to_go_on(self, first_step: int) -> str:
        """What is left when another process was lost; where this one can save the steps before alone, it does."""
        if self.out_dir is None:
            return ""
        can_save = self.ranks.is_first and not self._replicas.is_sharded and not self._is_torn
        if self._writer is not None and can_save and self.step > first_step:
            self._writer.write(self._snapshot())
        newest = list_checkpoints(self.out_dir)
        return how_to_go_on(str(newest[-1]) if newest else None)

    def _diagnose(self, diagnosis: TernaryDiagnosis) -> dict[str, dict[str, float]]:
        """How the ternary layers do on the first sequence of this step's batch."""
        self._batches.wait()
        batch = self.train_data.batch(self.step, batch_size=1, seq_len=self.seq_len, seed=self.config.seed)
        was_training = self.model.training
        self.model.eval()
        self._set_quantization(1.0)
        try:
            with self._autocast(), self._replicas.whole():
                return diagnosis.observe(
                    self.step, lambda: self._replicas.loss(self.loss_fn, [part.to(self.device) for part in batch])
                )
        finally:
            self.model.train(was_training)

    def check_out_dir(self) -> None:
        """Refuse to begin a run in a folder that holds another one's checkpoints, or a model; see `check_new_run`.

        What a killed process of the run has left is put in order before.
        """

        def check() -> None:
            if self.out_dir is not None:
                tidy_run(self.out_dir)
                if self.step == 0:
                    check_new_run(self.out_dir)

        self.ranks.first_decides(check)

    def _save_is_due(self, saved_at: float) -> bool:
        seconds = self.config.save_every_seconds
        in_time = seconds is not None and time.monotonic() - saved_at >= seconds
        if self._wishes is not None:  # the clock of rank 0
            if in_time and self.ranks.is_first:
                self._wishes.wish("save")
            in_time = "save" in self._wishes.agreed()
        return self._due(self.config.save_every_steps) or in_time

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


def _own_randomness(seed: int, step: int, device: torch.device, rank: int = 0) -> AbstractContextManager[None]:
    """Make dropout a function of (seed, step, rank): a resumed run needs no generator state, and the caller's is not touched."""
    key = f"{seed}:{step}:{rank}" if rank else f"{seed}:{step}"
    mixed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return own_randomness(mixed, device)


def _rows_per_step(settings: Mapping[str, Any], seq_len: int, world_size: int) -> int:
    """Sequences that a step reads, by the settings of a checkpoint.

    Args:
        seq_len: where they do not say it.
    """
    if settings.get("tokens_per_step") is None:
        rows: int = settings["micro_batch_size"] * settings["grad_accum_steps"] * world_size
        return rows
    tokens: int = settings["tokens_per_step"]
    return tokens // (settings["seq_len"] or seq_len)


def _num_sequences(data: Dataset, seq_len: int) -> int | None:
    """How many different sequences there are in the data; None where it does not say so."""
    if hasattr(data, "num_sequences"):
        number: int = data.num_sequences(seq_len)
        return number
    return (len(data) - 1) // seq_len if isinstance(data, Sized) else None
