"""Where the time of a training step goes on this machine, and how a step compares with other loops over the same module and data.

    python benchmarks/step_profile.py                            # four sizes, one thread and two, some minutes
    python benchmarks/step_profile.py --sizes char-gpt --threads 8

Sides, which take turns in blocks of steps in one process, so that all meet the same noise; quote the ratios:
    llmforge       `next(trainer)`
    plain_loop     what nanoGPT's train.py does: random crops, clip_grad_norm_, fused AdamW
    transformers   transformers' Trainer with its own defaults (fused AdamW, clipping at 1), around the same module; it is the outer
                   loop, and the others have their turns in a callback of it
    bare           forward, backward and AdamW of one batch that is there already: what no loop over this module can be below

CPU seconds (of all threads) are less moved than wall seconds by what else the machine does. Kinds of operations come from
torch.profiler, parts of the step from clocks around them; both make a step a little slower, so shares are given.
"""

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from peers import plain_steps
from torch import Tensor, nn

from llmforge import GPT, GPTConfig, TokenDataset, TrainConfig, Trainer
from llmforge.training import build_optimizer, chunked_next_token_loss, next_token_loss

# size -> (model, micro-batch): nanoGPT's own settings where the preset has one that a CPU can do, else fewer rows or layers.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "toy": (dict(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=32, bias=False), 4),
    "char-gpt-cpu": (dict(preset="char-gpt-cpu", vocab_size=65), 12),
    "char-gpt": (dict(preset="char-gpt", vocab_size=65), 4),
    "gpt2-2-layers": (dict(preset="gpt2", n_layer=2, block_size=256), 2),
}
KINDS = {
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": ("scaled_dot_product",),
    "activation": ("gelu",),
    "norms": ("layer_norm",),
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "amax", "logsumexp", "gather", "scatter_", "exp_"),
    "optimizer": ("fused_adamw", "Optimizer.step"),
    "gradient norm and clipping": ("linalg_vector_norm", "_foreach_norm", "_foreach_mul"),
    "embeddings": ("embedding",),
    "dropout": ("dropout", "bernoulli"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn, about")
    parser.add_argument("--turns", type=int, default=9, help="of each side; a first one more is for warming up")
    parser.add_argument("--vocabularies", nargs="*", type=int, default=[65, 512, 2048, 4096, 8192, 32_000, 50_257])
    parser.add_argument("--compile", action="store_true", help="a side with torch.compile too (needs a C++ compiler)")
    parser.add_argument("--name", default="step-profile-cpu", help="result file under benchmarks/results")
    args = parser.parse_args()

    sizes = {}
    for size in args.sizes:
        for threads in args.threads:
            torch.set_num_threads(threads)
            sizes[f"{size}, {threads} threads"] = measure(size, args)
    result: dict[str, Any] = {**machine.describe(torch.device("cpu")), "sizes": sizes}
    torch.set_num_threads(1)
    result["loss_in_chunks"] = [loss_in_chunks(V, args.turns) for V in args.vocabularies]
    if args.compile:
        result["largest_allocation_bytes"] = largest_allocations()
    machine.write(args.name, result)


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    shape, rows = SIZES[size]
    shape = dict(shape)
    preset = shape.pop("preset", None)
    model_config = GPTConfig.preset(preset, **shape) if preset else GPTConfig(**shape)
    config = TrainConfig(max_steps=10**6, micro_batch_size=rows, device="cpu", betas=(0.9, 0.99))
    ids = np.random.default_rng(0).integers(0, model_config.vocab_size, 1_000_000).astype(np.uint16)

    def model() -> GPT:
        torch.manual_seed(0)
        return GPT(model_config)

    def data() -> TokenDataset:
        return TokenDataset(ids, vocab_size=model_config.vocab_size)

    T = model_config.block_size
    places = np.random.default_rng(1).integers(0, len(ids) - T - 1, (500, rows))
    trainer = Trainer(model(), data(), config=config)
    sides: dict[str, Callable[[], object]] = {
        "llmforge": functools.partial(next, trainer),
        "plain_loop": functools.partial(next, plain_steps(model(), ids, places, config, T)),
        "bare": bare_step(model(), data(), config),
    }
    if args.compile:
        sides["llmforge_compiled"] = functools.partial(
            next, Trainer(model(), data(), config=config.replace(compile=True))
        )
    for step in sides.values():
        for _ in range(3):
            step()
    steps = max(3, round(args.seconds / seconds_of(sides["llmforge"], 3)[0]))
    turns = Turns(sides, steps, args.turns)
    run_transformers(model(), ids, config, turns)
    seconds = {name: machine.spread([wall for wall, _ in found]) for name, found in turns.found.items()}
    cpu_seconds = {name: machine.spread([cpu for _, cpu in found]) for name, found in turns.found.items()}
    tokens = rows * model_config.block_size

    def over(name: str, which: int) -> dict[str, float]:
        pairs = zip(turns.found[name], turns.found["llmforge"], strict=True)
        return {k: round(v, 3) for k, v in machine.spread([peer[which] / own[which] for peer, own in pairs]).items()}

    return {
        "parameters": trainer.model.num_params(),
        "vocab_size": model_config.vocab_size,
        "rows_and_tokens": [rows, model_config.block_size],
        "steps_per_turn": steps,
        "tokens_per_second": {name: round(tokens / found["median"]) for name, found in seconds.items()},
        "milliseconds_per_step": {n: {k: rounded(v * 1e3, k) for k, v in s.items()} for n, s in seconds.items()},
        "cpu_milliseconds_per_step": {
            n: {k: rounded(v * 1e3, k) for k, v in s.items()} for n, s in cpu_seconds.items()
        },
        "times_as_fast_as": {name: over(name, 0) for name in turns.found if name != "llmforge"},
        "times_as_fast_as_by_cpu_seconds": {name: over(name, 1) for name in turns.found if name != "llmforge"},
        "parts": parts_of_a_step(trainer, steps),
        "kinds_of_operations": kinds_of_operations(trainer, min(steps, 20)),
    }


def loss_in_chunks(vocab_size: int, turns: int) -> dict[str, Any]:
    """CPU time of forward and backward with all logits at once, over that with the loss in chunks: 768 tokens of a layer 128 wide."""
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=1, n_head=4, n_embd=128, bias=False))
    idx = torch.randint(vocab_size, (12, 64))
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns + 1):
        for loss_fn in (next_token_loss, chunked_next_token_loss):
            model.zero_grad()
            start = time.process_time()
            loss_fn(model, [idx, idx])[0].backward()
            if turn:
                found[loss_fn.__name__].append(time.process_time() - start)
    pairs = zip(found["next_token_loss"], found["chunked_next_token_loss"], strict=True)
    return {
        "vocab_size": vocab_size,
        "cpu_milliseconds": {name: round(machine.spread(values)["median"] * 1e3, 2) for name, values in found.items()},
        "times_as_fast_in_chunks": {k: round(v, 3) for k, v in machine.spread([a / b for a, b in pairs]).items()},
    }


def largest_allocations() -> dict[str, int]:
    """The largest piece of memory of a step over 2048 tokens of 50,257: all logits in float32 are 412 MB, a chunk of them 134 MB at most."""
    from torch.profiler import ProfilerActivity, profile

    shape = dict(vocab_size=50_257, block_size=256, n_layer=1, n_head=2, n_embd=64)
    found = {}
    for name, compile, loss_fn in (
        ("all logits", False, next_token_loss),
        ("in chunks", False, chunked_next_token_loss),
        ("in chunks, compiled", True, chunked_next_token_loss),
    ):
        config = TrainConfig(max_steps=9, micro_batch_size=8, device="cpu", compile=compile)
        ids = np.random.default_rng(0).integers(0, 50_257, 10_000).astype(np.uint16)
        trainer = Trainer(GPT(GPTConfig(**shape)), TokenDataset(ids), config=config, loss_fn=loss_fn)
        next(trainer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            next(trainer)
        sizes = [e.nbytes for e in profiler.events() if e.name == "[memory]" and hasattr(e, "nbytes")]
        found[name] = max([*sizes, *(e.cpu_memory_usage for e in profiler.events())])
    return found


def rounded(value: float, key: str) -> float:
    return value / 1e3 if key == "n" else round(value, 4)


def seconds_of(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of each of so many steps, on average."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


class Turns:
    """Lets the sides take turns; the outer loop calls `begin_step` before each of its own steps."""

    def __init__(self, sides: dict[str, Callable[[], object]], steps: int, turns: int) -> None:
        self.sides, self.steps, self.turns = sides, steps, turns
        self.found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._steps_begun = 0
        self._clocks = (0.0, 0.0)

    @property
    def outer_steps(self) -> int:
        return (self.turns + 1) * self.steps + 1

    def begin_step(self) -> None:
        turn, place = divmod(self._steps_begun, self.steps)
        self._steps_begun += 1
        if place:
            return
        if turn > 1:  # the first is for warming up
            now = time.perf_counter(), time.process_time()
            wall, cpu = ((b - a) / self.steps for a, b in zip(self._clocks, now, strict=True))
            self.found["transformers"].append((wall, cpu))
            for name, step in self.sides.items():
                self.found[name].append(seconds_of(step, self.steps))
        self._clocks = time.perf_counter(), time.process_time()


def bare_step(model: GPT, data: TokenDataset, config: TrainConfig) -> Callable[[], None]:
    optimizer = build_optimizer(model, config)
    idx, targets = data.batch(0, batch_size=config.micro_batch_size, seq_len=model.config.block_size)
    targets = targets.flatten()

    def step() -> None:
        F.cross_entropy(model(idx).flatten(0, 1), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class WithLoss(nn.Module):
    """The module as transformers' Trainer wants it."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Windows(torch.utils.data.Dataset):
    """Non-overlapping windows of the ids, as a map-style dataset."""

    def __init__(self, ids: np.ndarray, seq_len: int) -> None:
        self.ids, self.seq_len = ids, seq_len

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.ids[index * self.seq_len :][: self.seq_len + 1].astype(np.int64))
        return {"input_ids": row[:-1], "labels": row[1:]}


def run_transformers(model: GPT, ids: np.ndarray, config: TrainConfig, turns: Turns) -> None:
    import tempfile

    import transformers

    class TakeTurns(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin_step()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=config.micro_batch_size,
            max_steps=turns.outer_steps,
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_steps,
            logging_steps=config.log_every_steps,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=WithLoss(model),
            args=arguments,
            train_dataset=Windows(ids, model.config.block_size),
            callbacks=[TakeTurns()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def parts_of_a_step(trainer: Trainer, steps: int) -> dict[str, float]:
    """Shares of the wall time of a step, by clocks around the calls."""
    seconds: dict[str, float] = defaultdict(float)

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return call

    data, loss_fn, optimizer_step, backward = (
        trainer.train_data, trainer.loss_fn, trainer.optimizer.step, Tensor.backward
    )  # fmt: skip

    class Data:
        batch = staticmethod(clocked("batch", data.batch))

    trainer.train_data, trainer.loss_fn = Data(), clocked("forward", loss_fn)
    trainer.optimizer.step = clocked("optimizer", optimizer_step)  # type: ignore[method-assign]
    Tensor.backward = clocked("backward", backward)  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        for _ in range(steps):
            next(trainer)
        whole = time.perf_counter() - start
    finally:
        trainer.train_data, trainer.loss_fn, Tensor.backward = data, loss_fn, backward  # type: ignore[method-assign]
        trainer.optimizer.step = optimizer_step  # type: ignore[method-assign]
    shares = {name: round(value / whole, 4) for name, value in seconds.items()}
    return {**shares, "the rest": round(1 - sum(seconds.values()) / whole, 4)}


def kinds_of_operations(trainer: Trainer, steps: int) -> dict[str, float]:
    """Shares of the time within torch's operations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            next(trainer)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "other operations")
        seconds[kind] += event.self_cpu_time_total
    whole = sum(seconds.values())
    return {name: round(value / whole, 4) for name, value in sorted(seconds.items(), key=lambda item: -item[1])}


if __name__ == "__main__":
    main()
