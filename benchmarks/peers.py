"""Who trains beside llmforge: the same tokens in the same order, dtype, threads, optimizer, schedule and clipping; see PEERS.

Each is a loop that somebody else wrote and publishes, driven as its users do, and told by a callback when a step is done: what a loop
costs beside the model is part of what is measured. None of them logs, evaluates or saves. Where a peer runs the same module as llmforge,
its losses must be the same too.
"""

import dataclasses
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Contestant, Turn

from llmforge.data import TokenDataset
from llmforge.models import GPT, BitNet, BitNetConfig, GPTConfig, Llama, LlamaConfig
from llmforge.training import TrainConfig, Trainer, arithmetic_dtype, build_optimizer, learning_rate, pick_device

FAMILIES: dict[str, tuple[Any, Any]] = {
    "gpt": (GPT, GPTConfig),
    "llama": (Llama, LlamaConfig),
    "bitnet": (BitNet, BitNetConfig),
}
ENDLESS = 1_000_000  # steps; a race ends when it is over
KNOWN_STEPS = 500  # the order of the data is known for so many, and begins again
IDS = 2_000_000  # tokens of made-up data; speed does not depend on values


@dataclass(frozen=True)
class Training:
    """A race of training loops: one model, one kind of step.

    preset and changes: of the model's config; train: fields of TrainConfig beside those given here.
    """

    family: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    device_name: str | None = None
    dtype: str = "float32"
    compile: bool = False
    micro_batch_size: int = 1
    grad_accum_steps: int = 1
    seq_len: int | None = None  # None = the model's context
    train: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    gpu_gb: float | None = None

    @property
    def device(self) -> torch.device:
        return pick_device(self.device_name)

    @cached_property
    def model_config(self) -> Any:
        return FAMILIES[self.family][1].preset(self.preset, **self.changes)

    @cached_property
    def config(self) -> TrainConfig:
        # No warm-up: every library has its own first step of one.
        fixed = {"max_steps": ENDLESS, "warmup_steps": 0, "lr": 1e-3, "seq_len": self.tokens_per_row}
        mine = {name: getattr(self, name) for name in ("dtype", "compile", "micro_batch_size", "grad_accum_steps")}
        return TrainConfig(**{**fixed, **mine, "device": self.device_name or str(self.device), **self.train})

    @property
    def tokens_per_row(self) -> int:
        return self.seq_len or int(self.shape["context_length"])

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_size * self.grad_accum_steps

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.tokens_per_row

    @property
    def dropout(self) -> float:
        return getattr(self.model_config, "dropout", 0.0)

    def build(self) -> Any:
        """The model, with the same weights for everyone."""
        torch.manual_seed(0)
        return FAMILIES[self.family][0](self.model_config)

    @cached_property
    def shape(self) -> dict[str, int]:
        """What the model says of itself, without its memory."""
        with torch.device("meta"):
            model = FAMILIES[self.family][0](self.model_config)
        return {
            "context_length": model.context_length,
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops_per_token": model.flops_per_token(self.seq_len or model.context_length),
        }

    def data(self) -> TokenDataset:
        vocab_size = self.model_config.vocab_size
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        # Low ids are more frequent, so that there is something to learn, and losses fall.
        ids = (np.random.default_rng(0).random(IDS) ** 2 * vocab_size).astype(dtype)
        return TokenDataset(ids, vocab_size=vocab_size)

    def places(self) -> "np.ndarray[Any, Any]":
        """Where llmforge's rows begin in the data, in the order in which it reads them: (steps, rows)."""
        counted = TokenDataset(np.arange(IDS, dtype=np.uint32))  # whose ids say where they are
        shape = {"batch_size": self.rows_per_step, "seq_len": self.tokens_per_row, "seed": self.config.seed}
        return np.stack([counted.batch(step, **shape).idx[:, 0].numpy() for step in range(KNOWN_STEPS)])


class Rows(torch.utils.data.Dataset[Any]):
    """llmforge's rows as a map-style dataset: row number i is that of T+1 tokens that `places` says, made by `make`."""

    def __init__(self, race: Training, make: Callable[[Tensor], Any]) -> None:
        self.ids, self.places, self.make = race.data().ids, race.places().ravel(), make
        self.length = race.tokens_per_row + 1

    def __len__(self) -> int:
        return ENDLESS * 10

    def __getitem__(self, index: int) -> Any:
        start = self.places[index % len(self.places)]
        return self.make(torch.from_numpy(self.ids[start : start + self.length].astype(np.int64)))


# The contestants


def llmforge(race: Training, turn: Turn) -> None:
    turn.begin()
    trainer = Trainer(race.build(), race.data(), config=race.config)
    for metrics in trainer:
        if trainer.micro_batch_size != race.micro_batch_size:  # where others give up it goes on with smaller ones
            raise MemoryError(f"a micro-batch of {race.micro_batch_size} does not fit")
        turn(lambda: metrics.loss)  # noqa: B023


def llmforge_compiled(race: Training, turn: Turn) -> None:
    """compile=True in a race of eager ones: what a user may turn on."""
    llmforge(replace(race, compile=True), turn)


def plain_loop(race: Training, turn: Turn, build: Callable[[], nn.Module] | None = None) -> None:
    turn.begin()
    ids, places = race.data().ids, race.places()
    for loss in plain_steps((build or race.build)(), ids, places, race.config, race.tokens_per_row):
        turn(loss.item)


def plain_steps(
    model: nn.Module, ids: "np.ndarray[Any, Any]", places: "np.ndarray[Any, Any]", config: TrainConfig, T: int
) -> Iterator[Tensor]:
    """train.py of nanoGPT: batches from a row of ids, pinned and copied while the GPU works, autocast, GradScaler, clipping, fused AdamW.

    Args:
        ids: (N,) the tokens.
        places: (steps, rows) where rows of T tokens begin in them; at the end they begin again.
    Yields:
        the mean loss of each step, on the device.
    """
    device, accum = pick_device(config.device), config.grad_accum_steps
    model = model.to(device).train()
    optimizer = build_optimizer(model, config)
    dtype = arithmetic_dtype(config.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if config.compile:
        model.compile()

    def get_batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for starts in places.reshape(-1, places.shape[1] // accum):
                x = torch.stack([torch.from_numpy(ids[i : i + T].astype(np.int64)) for i in starts])
                y = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
                if device.type == "cuda":
                    x, y = x.pin_memory(), y.pin_memory()
                yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    batches = get_batches()
    x, y = next(batches)
    for step in itertools.count():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        total = torch.zeros((), device=device)
        for _ in range(accum):
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / accum
            x, y = next(batches)  # while the device computes the forward pass
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield total


class _WithLoss(nn.Module):
    """A model as transformers' Trainer wants it: it computes its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


def transformers_trainer(race: Training, turn: Turn) -> None:
    """The same module."""
    import transformers.trainer  # noqa: F401

    turn.begin()
    _run_trainer(race, turn, _WithLoss(race.build()), lambda row: {"input_ids": row[:-1], "labels": row[1:]})


def transformers_model(race: Training, turn: Turn) -> None:
    """transformers' own model of the same shape, which moves the labels by one itself: the last token of a row is no target."""
    import transformers

    turn.begin()
    c, T = race.model_config, race.tokens_per_row
    torch.manual_seed(0)
    if race.family == "gpt":
        config: Any = transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=T, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "tie_word_embeddings",
        )  # fmt: skip
        config = transformers.LlamaConfig(
            **{name: getattr(c, name) for name in names},
            max_position_embeddings=T,
            use_cache=False,
            attn_implementation="sdpa",
        )
        model = transformers.LlamaForCausalLM(config)
    _run_trainer(race, turn, model, lambda row: {"input_ids": row[:-1], "labels": row[:-1]}, notes=False)


def _run_trainer(
    race: Training, turn: Turn, model: nn.Module, make: Callable[[Tensor], dict[str, Tensor]], *, notes: bool = True
) -> None:
    import transformers

    class WithTurns(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            losses, trainer.losses = trainer.losses, []
            turn((lambda: torch.stack(losses).sum().item()) if notes else None)

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        """Rows in the order of the dataset, and the losses of the step at hand."""

        losses: list[Tensor]

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    config = race.config
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=ENDLESS,
            per_device_train_batch_size=race.micro_batch_size,
            gradient_accumulation_steps=race.grad_accum_steps,
            max_grad_norm=config.grad_clip or 0.0,
            bf16=race.dtype == "bfloat16",
            fp16=race.dtype == "float16",
            torch_compile=race.compile,
            use_cpu=race.device.type == "cpu",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        optimizer = build_optimizer(model.to(race.device), config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, config) / config.lr)
        rows = Rows(race, make)
        trainer = InOrder(
            model, arguments, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=[WithTurns()]
        )
        trainer.losses = []
        trainer.train()


class _InLitgpt(nn.Module):
    """A module as litgpt's loop wants it. Its config serves to count FLOPs."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self.config, self.max_seq_length = model, config, config.block_size

    def forward(self, idx: Tensor) -> Tensor:
        logits: Tensor = self.model(idx)
        return logits


def litgpt_config(race: Training) -> Any:
    """The race's shape for litgpt, which knows rotary positions only: a little more arithmetic than learned ones."""
    from litgpt.config import Config

    c, T = race.model_config, race.tokens_per_row
    shape: dict[str, Any]
    if race.family == "gpt":
        shape = dict(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP",
            gelu_approximate="tanh", bias=c.bias, attn_bias=c.bias,
        )  # fmt: skip
    else:
        shape = dict(
            n_layer=c.num_hidden_layers, n_head=c.num_attention_heads, n_embd=c.hidden_size, n_query_groups=c.num_key_value_heads,
            intermediate_size=c.intermediate_size, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False,
        )  # fmt: skip
    return Config(
        name="race", block_size=T, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, rotary_percentage=1.0,
        parallel_residual=False, **shape,
    )  # fmt: skip


def litgpt_loop(race: Training, turn: Turn) -> None:
    _run_litgpt(race, turn, same_module=True)


def litgpt_model(race: Training, turn: Turn) -> None:
    _run_litgpt(race, turn, same_module=False)


def _run_litgpt(race: Training, turn: Turn, *, same_module: bool) -> None:
    """litgpt.pretrain.fit, set up as litgpt.pretrain.main does, which has no argument for a model or for data in memory."""
    import lightning
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.model import GPT as LitGPT

    class Fabric(lightning.Fabric):  # type: ignore[misc]
        """Keeps the losses of the step at hand."""

        losses: list[Tensor]

        def backward(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.losses.append(tensor.detach())
            super().backward(tensor, *args, **kwargs)

    turn.begin()
    c, lit_config = race.model_config, litgpt_config(race)
    precision = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}[race.dtype]
    fabric = Fabric(accelerator=race.device.type, devices=1, precision=precision)
    fabric.losses = []
    fabric.launch()
    model: Any
    if same_module:
        model = _InLitgpt(race.build(), lit_config)
    else:
        torch.manual_seed(0)
        model = LitGPT(lit_config)
        pretrain.initialize_weights(fabric, model, n_layer=lit_config.n_layer, n_embd=lit_config.n_embd)
        if c.tie_word_embeddings:
            model.transformer.wte.weight = model.lm_head.weight
    plain_optimizer = build_optimizer(model.to(race.device), race.config)
    if race.compile:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(plain_optimizer)

    def done(*_: Any) -> None:
        losses, fabric.losses = fabric.losses, []
        turn((lambda: torch.stack(losses).sum().item()) if same_module else None)

    plain_optimizer.register_step_post_hook(done)
    loader = fabric.setup_dataloaders(
        torch.utils.data.DataLoader(Rows(race, lambda row: row), batch_size=race.micro_batch_size)
    )
    pretrain.fit(
        fabric=fabric,
        devices=1,
        state={"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0},
        train_dataloader=loader,
        val_dataloader=loader,
        out_dir=None,
        tokenizer_dir=None,
        train=TrainArgs(
            save_interval=None,
            log_interval=ENDLESS,
            global_batch_size=race.rows_per_step,
            micro_batch_size=race.micro_batch_size,
            lr_warmup_steps=0,
            max_tokens=ENDLESS * race.tokens_per_step,
            max_norm=race.config.grad_clip,
            min_lr=race.config.lr / 10,
        ),
        eval=EvalArgs(interval=ENDLESS, final_validation=False),
    )


def x_transformers(race: Training, turn: Turn) -> None:
    """x_transformers.TransformerWrapper in the plain loop: the package has no loop of its own."""
    from x_transformers import Decoder, TransformerWrapper

    c, T = race.model_config, race.tokens_per_row

    def build() -> nn.Module:
        torch.manual_seed(0)
        options: dict[str, Any]
        if race.family == "gpt":
            width, options = c.n_embd, dict(depth=c.n_layer, heads=c.n_head, ff_no_bias=not c.bias)
        else:
            width = c.hidden_size
            options = dict(
                depth=c.num_hidden_layers, heads=c.num_attention_heads, attn_kv_heads=c.num_key_value_heads, use_rmsnorm=True,
                rotary_pos_emb=True, ff_glu=True, ff_swish=True, ff_no_bias=True, ff_mult=(c.intermediate_size + 0.5) / width,
            )  # fmt: skip
        decoder = Decoder(
            dim=width, attn_dim_head=width // options["heads"], attn_flash=True, attn_dropout=race.dropout, ff_dropout=race.dropout,
            **options,
        )  # fmt: skip
        model: nn.Module = TransformerWrapper(
            num_tokens=c.vocab_size, max_seq_len=T, attn_layers=decoder, tie_embedding=c.tie_word_embeddings,
            emb_dropout=race.dropout, use_abs_pos_emb=race.family == "gpt",
        )  # fmt: skip
        return model

    plain_loop(race, turn, build)


# Their losses must be those of llmforge: they run the same module.
SAME_MODULE = ("llmforge_compiled", "plain_loop", "transformers_trainer", "litgpt_loop")


@dataclass(frozen=True)
class Peer:
    run: Contestant
    what: str  # what is compared, for the table
    packages: tuple[str, ...] = ()
    families: tuple[str, ...] = ("gpt", "llama", "bitnet")
    has_dropout: bool = True


PEERS = {
    "llmforge": Peer(llmforge, "`for metrics in Trainer(...)`"),
    "llmforge_compiled": Peer(llmforge_compiled, "the same with compile=True"),
    "plain_loop": Peer(plain_loop, "nanoGPT's train.py, the same module"),
    "transformers_trainer": Peer(
        transformers_trainer, "transformers' Trainer, the same module", ("transformers", "accelerate")
    ),
    "transformers_model": Peer(
        transformers_model,
        "transformers' Trainer and its own model with sdpa",
        ("transformers", "accelerate"),
        ("gpt", "llama"),
    ),
    "litgpt_loop": Peer(litgpt_loop, "litgpt's pretrain.fit, the same module", ("litgpt", "lightning")),
    "litgpt_model": Peer(
        litgpt_model,
        "litgpt's pretrain.fit and its own GPT (rotary positions)",
        ("litgpt", "lightning"),
        ("gpt", "llama"),
        has_dropout=False,
    ),
    "x_transformers": Peer(
        x_transformers, "x-transformers' TransformerWrapper in nanoGPT's loop", ("x_transformers",), ("gpt", "llama")
    ),
}


def contestants(race: Training, names: list[str]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those of `names` who can run here, and why others cannot."""
    able: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        missing = [package for package in peer.packages if importlib.util.find_spec(package) is None]
        if race.family not in peer.families:
            skipped[name] = f"has no {race.family} model"
        elif race.dropout and not peer.has_dropout:
            skipped[name] = "its model has no dropout"
        elif missing:
            skipped[name] = f"not installed: {', '.join(missing)}"
        else:
            able[name] = peer.run
    return able, skipped


def describe(race: Training) -> dict[str, Any]:
    """The race for the JSON; what differs from the preset is named."""
    fields = dataclasses.asdict(race)
    fields["device"] = race.device_name or str(race.device)
    for name in ("device_name", "threads", "gpu_gb"):
        fields.pop(name)
    return {
        **fields,
        "parameters": race.shape["parameters"],
        "seq_len": race.tokens_per_row,
        "tokens_per_step": race.tokens_per_step,
        "flops_per_token": race.shape["flops_per_token"],
        "optimizer": race.config.optimizer,
    }
