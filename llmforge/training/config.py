"""TrainConfig: what a training run is made of, beside the model and the data."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from llmforge.config import Config
from llmforge.errors import ConfigError

# Other defaults for models of another kind. bitnet: a learning rate above the float model's that falls to 0, more weight decay, and none
# in the second half, in which the codes must settle ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", microsoft/unilm); floats for the
# first part (arXiv:2502.11895). Its two-stage schedule is for long runs: over some hundred steps it costs 0.014 nats (docs/ternary.md).
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {},
    "bitnet": dict(
        lr=2e-3,
        min_lr=0.0,
        schedule="linear",
        weight_decay=0.3,
        decay_weights_fraction=0.5,
        quantize_after_fraction=0.3,
    ),
}

_Class = TypeVar("_Class", bound=type)


def _with_recipes(cls: _Class) -> _Class:
    """Fields that are not given come from the recipe."""
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def with_recipe(self: Any, **values: Any) -> None:
        init(self, **{**RECIPES.get(values.get("recipe", "standard"), {}), **values})

    cls.__init__ = with_recipe  # type: ignore[misc]
    return cls


@_with_recipes
@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Settings of one run. A step is one optimizer update; it reads micro_batch_size * grad_accum_steps sequences.

    Raises:
        ConfigError: a value out of range.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # nanoGPT's config/train_shakespeare_char.py.
        "char-gpt": dict(max_steps=5_000, micro_batch_size=64, lr=1e-3, min_lr=1e-4, betas=(0.9, 0.99)),
        # The CPU line of nanoGPT's README, but with wsd for the cosine: lower in benchmarks/results/nanogpt-cpu.json.
        "char-gpt-cpu": dict(
            max_steps=2_000,
            micro_batch_size=12,
            lr=1e-3,
            min_lr=1e-4,
            schedule="wsd",
            betas=(0.9, 0.99),
            eval_batches=20,
        ),
        # A fifth of those tokens for the same loss: benchmarks/results/loss-per-token.json.
        "modern": dict(
            max_steps=400,
            micro_batch_size=12,
            lr=3e-3,
            min_lr=0.0,
            schedule="linear",
            warmup_steps=20,
            optimizer="muon",
            betas=(0.9, 0.99),
            eval_every_steps=100,
            eval_batches=20,
        ),
        # nanoGPT's config/train_gpt2.py: 12 x 1024 tokens per micro-step, about half a million tokens per step.
        **{
            name: dict(
                max_steps=600_000, micro_batch_size=12, grad_accum_steps=40, lr=6e-4, min_lr=6e-5, warmup_steps=2_000
            )
            for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        },
        # The smallest learns a book: few tokens per step, some epochs. The others want gigabytes of text and a GPU; learning rates
        # fall with the width as in GPT-3's table 2.1 (arXiv:2005.14165), half a million tokens per step.
        "llama-15m": dict(max_steps=3_000, micro_batch_size=8, lr=1e-3, betas=(0.9, 0.99)),
        # With thousands of tokens the best rate is the float model's; the recipe's is for characters.
        "bitnet-15m": dict(max_steps=3_000, micro_batch_size=8, lr=1e-3, betas=(0.9, 0.99), recipe="bitnet"),
        "bit-gpt": dict(max_steps=5_000, micro_batch_size=8, lr=1e-3, betas=(0.9, 0.99), recipe="bitnet"),
        "bitnet-42m": dict(
            max_steps=20_000, micro_batch_size=16, grad_accum_steps=8, lr=1e-3, warmup_steps=500, recipe="bitnet"
        ),
        **{
            name: dict(
                max_steps=100_000,
                micro_batch_size=8,
                grad_accum_steps=accum,
                lr=lr,
                warmup_steps=2_000,
                schedule="two-stage",
                recipe="bitnet",
            )
            for name, accum, lr in (
                ("bitnet-110m", 64, 2.4e-3),
                ("bitnet-350m", 32, 1.5e-3),
                ("bitnet-2b-4t", 16, 1.2e-3),  # the rates of the tips' table 2 from here on
            )
        },
        "llama-42m": dict(max_steps=20_000, micro_batch_size=16, grad_accum_steps=8, lr=1e-3, warmup_steps=500),
        **{
            name: dict(max_steps=100_000, micro_batch_size=8, grad_accum_steps=accum, lr=lr, warmup_steps=2_000)
            for name, accum, lr in (
                ("llama-110m", 64, 6e-4),
                ("llama-350m", 32, 3e-4),
            )
        },
        **{
            name: dict(
                max_steps=100_000, micro_batch_size=1, grad_accum_steps=128, seq_len=4096, lr=2e-4, warmup_steps=2_000
            )
            for name in ("llama-3.2-1b", "llama-3-8b")
        },
    }

    max_steps: int  # optimizer steps
    micro_batch_size: int | Literal["auto"] = (
        12  # sequences per forward pass; "auto" = as many as fit, with tokens_per_step
    )
    grad_accum_steps: int = 1  # micro-steps per step; the gradient does not depend on the split
    tokens_per_step: int | None = None  # in place of grad_accum_steps, which then follows
    seq_len: int | None = None  # tokens per sequence; None = the model's context length

    # Other defaults of the fields below, where they are not given: "bitnet" for ternary models.
    recipe: Literal["standard", "bitnet"] = "standard"
    lr: float = 1e-3  # learning rate after the warm-up; bitnet: 2e-3
    min_lr: float | None = None  # learning rate at the end; None = lr / 10
    warmup_steps: int = 100  # linear, 0 -> lr
    # After the warm-up, lr -> min_lr; bitnet: linear. "two-stage": straight down, from half of the steps on by a lower line.
    schedule: Literal["cosine", "linear", "wsd", "constant", "two-stage"] = "cosine"
    decay_fraction: float = 0.2  # wsd only: the last part of the steps, in which lr falls
    second_stage_fraction: float = 2 / 3  # two-stage only: the lower line, as a part of the upper one
    weight_decay: float = 0.1  # on matrices only; norms and biases never decay; bitnet: 0.3
    decay_weights_fraction: float = 1.0  # the first part of the steps, in which weights decay; bitnet: 0.5
    # BitLinear: the first part of the steps, in which it is a float layer; bitnet: 0.3.
    quantize_after_fraction: float = 0.0
    quantize_warmup_steps: int = (
        0  # BitLinear: steps after that over which the rounding grows, for models trained as floats
    )
    # muon: orthogonal updates for the matrices of hidden layers, AdamW for the rest. adamw8bit: its state in 8 bits, from bitsandbytes where that is installed and the model on a GPU, else plain torch.
    # paged_adamw8bit (bitsandbytes and CUDA only): the state moves to the host's memory when the GPU's is full.
    optimizer: Literal["adamw", "muon", "adamw8bit", "paged_adamw8bit"] = "adamw"
    muon_lr: float = (
        0.02  # muon only: learning rate of the matrices after the warm-up; it follows the schedule as lr does
    )
    # muP: lr is that of a model of this width, and this one, wider or narrower, takes it over; see docs/sweeps.md. None = off.
    mup_base_width: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW; 0.99 for the second when a step has few tokens
    grad_clip: float | None = 1.0  # largest global L2 norm of the gradient; None = never clip

    device: str | None = None  # "cpu", "cuda", "cuda:1", "mps"; None = the best one there is
    # Of the arithmetic (AMP); weights stay float32. None = bfloat16 or else float16 on CUDA, float32 elsewhere. float16 brings a
    # GradScaler; tf32 is float32 with faster matrix products (CUDA).
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] | None = None
    num_threads: int | None = None  # of operations on the CPU, during steps and evaluations; None = torch's own number
    # "blocks": each block's activations are computed again in the backward pass, not kept. "offload": and the blocks' inputs wait in the
    # host's memory. The gradient is the same.
    activation_checkpointing: Literal["none", "blocks", "offload"] = "none"
    # torch.compile in the steps; needs a C++ compiler (CPU) or Triton (GPU), and does without, with a warning, where there is none.
    # None = on CUDA with Triton, in runs of 1000 micro-steps or more.
    compile: bool | None = None
    # With several processes (torchrun): "ddp", the whole model on each; "fsdp", a part of weights, gradients and optimizer state on each.
    distributed: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 1337  # of the data order and dropout; the initial weights come from whoever built the model

    log_every_steps: int = 10  # lines in log.jsonl
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # get the same; each is an extra of its name
    eval_every_steps: int | None = 250  # validation loss; None = only at the end
    eval_batches: int | None = 50  # micro-batches per evaluation, always the same ones; None = the whole validation set
    sample_every_steps: int | None = 250  # a text sample, where there is a tokenizer; None = never
    sample_prompt: str = ""  # beginning of the samples
    sample_tokens: int = 150  # length of the samples
    diagnose_every_steps: int | None = 100  # BitLinear: what the codes do, into log.jsonl, with warnings; None = never
    save_every_steps: int | None = 500  # checkpoints; None = only the last, and those of save_every_seconds
    save_every_seconds: float | None = None  # wall time from one checkpoint to the next, at the end of a step
    async_save: bool = True  # train() goes on while they are written, from a copy of the state in the host's memory
    max_seconds: float | None = None  # wall time of train(), after which it saves and stops; None = as long as it takes
    # Steps in a row whose loss or gradient is not finite, each of them skipped, after which a run ends.
    max_skipped_steps: int = 10
    keep_last: int = 2  # newest checkpoints to keep, beside the one with the best validation loss
    out_dir: str | None = None  # run folder; None = nothing is written

    def __post_init__(self) -> None:
        at_least_one = ["max_steps", "micro_batch_size", "grad_accum_steps", "seq_len", "log_every_steps", "keep_last"]
        at_least_one += ["eval_every_steps", "eval_batches", "sample_every_steps", "sample_tokens", "save_every_steps"]
        at_least_one += ["diagnose_every_steps", "num_threads", "tokens_per_step", "max_skipped_steps"]
        for name in at_least_one:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1")
        if not isinstance(self.micro_batch_size, int) and (
            self.micro_batch_size != "auto" or self.tokens_per_step is None
        ):
            raise ConfigError(
                f"micro_batch_size ({self.micro_batch_size!r}) must be a whole number, or 'auto' together with tokens_per_step"
            )
        if self.tokens_per_step is not None and self.grad_accum_steps != 1:
            raise ConfigError(
                f"tokens_per_step ({self.tokens_per_step}) and grad_accum_steps ({self.grad_accum_steps}) say the same thing; leave one out"
            )
        if self.max_seconds is not None and self.max_seconds <= 0.0:
            raise ConfigError(f"max_seconds ({self.max_seconds}) must be above 0; null is no limit")
        for name in ("warmup_steps", "quantize_warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be 0 (no warm-up) or more")
        if self.save_every_seconds is not None and not self.save_every_seconds > 0.0:
            raise ConfigError(
                f"save_every_seconds ({self.save_every_seconds}) must be above 0; null saves by steps only"
            )
        if self.recipe not in RECIPES:
            raise ConfigError(f"recipe ({self.recipe!r}) must be one of {', '.join(map(repr, RECIPES))}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed ({self.seed}) must be between 0 and {2**32 - 1}")
        if not 0.0 < self.lr < 10.0:
            raise ConfigError(f"lr ({self.lr}) must be above 0 and below 10; 1e-3 suits small models")
        if self.min_lr is not None and not 0.0 <= self.min_lr <= self.lr:
            raise ConfigError(f"min_lr ({self.min_lr}) must be between 0 and lr ({self.lr})")
        if self.schedule not in ("cosine", "linear", "wsd", "constant", "two-stage"):
            raise ConfigError(
                f"schedule ({self.schedule!r}) must be 'cosine', 'linear', 'wsd', 'constant' or 'two-stage'"
            )
        for name in ("decay_fraction", "second_stage_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be above 0 and at most 1")
        if not 0.0 <= self.decay_weights_fraction <= 1.0:
            raise ConfigError(f"decay_weights_fraction ({self.decay_weights_fraction}) must be between 0 and 1")
        if not 0.0 <= self.quantize_after_fraction < 1.0:
            raise ConfigError(
                f"quantize_after_fraction ({self.quantize_after_fraction}) must be at least 0 and below 1: the model must "
                "train with what it will run with"
            )
        ramp = round(self.quantize_after_fraction * self.max_steps) + self.quantize_warmup_steps
        if self.quantize_warmup_steps and ramp >= self.max_steps:
            raise ConfigError(
                f"quantize_warmup_steps ({self.quantize_warmup_steps}) end at step {ramp}, not before max_steps "
                f"({self.max_steps}): the model would never train as it will run"
            )
        if self.weight_decay < 0.0:
            raise ConfigError(f"weight_decay ({self.weight_decay}) must be 0 (off) or more")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas ({self.betas}) must be two numbers, each at least 0 and below 1")
        if self.grad_clip is not None and self.grad_clip <= 0.0:
            raise ConfigError(f"grad_clip ({self.grad_clip}) must be above 0; null never clips")
        if self.optimizer not in ("adamw", "muon", "adamw8bit", "paged_adamw8bit"):
            raise ConfigError(
                f"optimizer ({self.optimizer!r}) must be 'adamw', 'muon', 'adamw8bit' or 'paged_adamw8bit'"
            )
        if not 0.0 < self.muon_lr < 10.0:
            raise ConfigError(f"muon_lr ({self.muon_lr}) must be above 0 and below 10; 0.02 suits most models")
        if self.activation_checkpointing not in ("none", "blocks", "offload"):
            raise ConfigError(
                f"activation_checkpointing ({self.activation_checkpointing!r}) must be 'none', 'blocks' or 'offload'"
            )
        for name in self.trackers:
            if name not in ("tensorboard", "wandb", "mlflow"):
                raise ConfigError(f"trackers ({name!r}) must be of 'tensorboard', 'wandb' and 'mlflow'")
        if self.trackers and self.out_dir is None:
            raise ConfigError(
                f"trackers ({', '.join(self.trackers)}) need a run folder, where a resumed run finds them again; set out_dir"
            )
        if self.distributed not in ("ddp", "fsdp"):
            raise ConfigError(f"distributed ({self.distributed!r}) must be 'ddp' or 'fsdp'")
        if self.dtype not in ("float32", "tf32", "bfloat16", "float16", None):
            raise ConfigError(
                f"dtype ({self.dtype!r}) must be 'float32', 'tf32', 'bfloat16', 'float16' or null (automatic)"
            )
