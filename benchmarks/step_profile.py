"""Where the time of a training step goes on a CPU, what the trainer adds to the model's own work, and when the loss in chunks pays.

    python benchmarks/step_profile.py                     # one thread, some minutes
    python benchmarks/step_profile.py --threads 8 --sizes char-gpt --compile

Beside `next(trainer)` runs the bare step: forward, backward and AdamW of one batch that is there already, which no loop over the same
module can be below. The two take turns step by step; times are CPU seconds of all threads, which are less moved by what else the machine
does, and medians. Kinds of operations come from torch.profiler, parts of the step from clocks around them; both make a step a little slower,
so shares are given. How fast other trainers are, `training.py` measures.
"""

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmforge import GPT, GPTConfig, TokenDataset, TrainConfig, Trainer
from llmforge.training import build_optimizer, chunked_next_token_loss, next_token_loss

# size -> (model, micro-batch): nanoGPT's own settings where a CPU can do them in a second, else fewer rows or layers.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "toy": (dict(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=32, bias=False), 4),
    "char-gpt-cpu": (dict(preset="char-gpt-cpu", vocab_size=65), 12),
    "char-gpt": (dict(preset="char-gpt", vocab_size=65), 2),
    "gpt2, 2 layers": (dict(preset="gpt2", n_layer=2, block_size=256), 2),
}
KINDS = {
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": ("scaled_dot_product",),
    "activation": ("gelu",),
    "norms": ("layer_norm",),
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "amax", "gather", "scatter_", "exp_"),
    "optimizer": ("fused_adamw", "Optimizer.step"),
    "gradient norm and clipping": ("linalg_vector_norm", "_foreach_norm", "_foreach_mul"),
    "embeddings": ("embedding",),
    "dropout": ("dropout", "bernoulli"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU time for each size, about")
    parser.add_argument("--vocabularies", nargs="*", type=int, default=[65, 512, 2048, 4096, 8192, 32_000, 50_257])
    parser.add_argument("--compile", action="store_true", help="torch.compile too (needs a C++ compiler, and minutes)")
    parser.add_argument("--name", default="step-profile-cpu", help="result file under benchmarks/results")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    result = {
        **machine.describe(torch.device("cpu")),
        "sizes": {size: measure(size, args.seconds, compile=args.compile) for size in args.sizes},
        "loss_in_chunks": [loss_in_chunks(V) for V in args.vocabularies],
        "largest_allocation_bytes": largest_allocations(compile=args.compile),
    }
    machine.write(args.name, result)


def measure(size: str, seconds: float, *, compile: bool) -> dict[str, Any]:
    shape, rows = SIZES[size]
    shape = dict(shape)
    preset = shape.pop("preset", None)
    model_config = GPTConfig.preset(preset, **shape) if preset else GPTConfig(**shape)
    config = TrainConfig(max_steps=10**6, micro_batch_size=rows, device="cpu", betas=(0.9, 0.99), compile=False)

    def trainer_of(config: TrainConfig) -> Trainer:
        torch.manual_seed(0)
        return Trainer(GPT(model_config), random_data(model_config.vocab_size), config=config)

    trainer = trainer_of(config)
    sides: dict[str, Callable[[], object]] = {
        "llmforge": functools.partial(next, trainer),
        "bare": bare_step(trainer_of(config)),
    }
    if compile:
        sides["llmforge, compiled"] = functools.partial(next, trainer_of(config.replace(compile=True)))
    found = take_turns(sides, seconds)
    return {
        "parameters": trainer.model.num_params(),  # type: ignore[operator]
        "rows_and_tokens": [rows, model_config.block_size],
        "steps": len(found["bare"]),
        "cpu_milliseconds_per_step": {name: in_milliseconds(values) for name, values in found.items()},
        "over_the_bare_step": {
            name: round(statistics.median(values) / statistics.median(found["bare"]), 3)
            for name, values in found.items()
            if name != "bare"
        },
        "parts_of_a_step": parts_of_a_step(trainer, max(3, len(found["bare"]) // 4)),
        "kinds_of_operations": kinds_of_operations(trainer, max(3, min(20, len(found["bare"]) // 4))),
    }


def take_turns(sides: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """CPU seconds of each step of each side."""
    for _ in range(3):
        for step in sides.values():
            step()
    found: dict[str, list[float]] = defaultdict(list)
    begin = time.process_time()
    while len(found) == 0 or len(found["bare"]) < 5 or time.process_time() - begin < seconds:
        for name, step in sides.items():
            start = time.process_time()
            step()
            found[name].append(time.process_time() - start)
    return found


def in_milliseconds(values: list[float]) -> dict[str, float]:
    return {key: value if key == "n" else round(value * 1e3, 3) for key, value in machine.spread(values).items()}


def random_data(vocab_size: int) -> TokenDataset:
    ids = np.random.default_rng(0).integers(0, vocab_size, 1_000_000).astype(np.uint16)
    return TokenDataset(ids, vocab_size=vocab_size)


def bare_step(trainer: Trainer) -> Callable[[], None]:
    model: Any = trainer.model
    optimizer = build_optimizer(model, trainer.config)
    batch = trainer.train_data.batch(0, batch_size=trainer.rows, seq_len=trainer.seq_len, seed=0)
    tokens = batch[0].numel()

    def step() -> None:
        if trainer.loss_fn is next_token_loss:
            F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()  # type: ignore[no-untyped-call]
        else:
            (trainer.loss_fn(model, batch)[0] / tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


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

    class Data:
        batch = staticmethod(clocked("batch", trainer.train_data.batch))

    data, loss_fn, optimizer_step, backward = (
        trainer.train_data, trainer.loss_fn, trainer.optimizer.step, Tensor.backward
    )  # fmt: skip
    trainer.train_data, trainer.loss_fn = Data(), clocked("forward and loss", loss_fn)
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
    return {**shares, "the trainer's own": round(1 - sum(seconds.values()) / whole, 4)}


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


def loss_in_chunks(vocab_size: int) -> dict[str, Any]:
    """CPU time of forward and backward with all logits at once, and with the loss in chunks: 768 tokens of a layer 128 wide."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=1, n_head=4, n_embd=128, bias=False))
    idx = torch.randint(vocab_size, (12, 64))

    def side(loss_fn: Any) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            loss_fn(model, [idx, idx])[0].backward()

        return step

    found = take_turns({"bare": side(next_token_loss), "in chunks": side(chunked_next_token_loss)}, 3.0)
    all_logits, in_chunks = found["bare"], found["in chunks"]
    return {
        "vocab_size": vocab_size,
        "cpu_milliseconds": {
            "all logits": in_milliseconds(all_logits)["median"],
            "in chunks": in_milliseconds(in_chunks)["median"],
        },
        "times_as_fast_in_chunks": round(statistics.median(all_logits) / statistics.median(in_chunks), 3),
    }


def largest_allocations(*, compile: bool) -> dict[str, int]:
    """The largest piece of memory of a step over 2048 tokens of 50,257: all logits in float32 are 412 MB, a chunk of them 134 MB at most."""
    from torch.profiler import ProfilerActivity, profile

    shape = dict(vocab_size=50_257, block_size=256, n_layer=1, n_head=2, n_embd=64)
    sides: list[tuple[str, bool, Any]] = [("all logits", False, next_token_loss), ("in chunks", False, None)]
    if compile:
        sides.append(("in chunks, compiled", True, None))
    found = {}
    for name, compiled, loss_fn in sides:
        config = TrainConfig(max_steps=9, micro_batch_size=8, device="cpu", compile=compiled)
        trainer = Trainer(GPT(GPTConfig(**shape)), random_data(50_257), config=config, loss_fn=loss_fn)
        next(trainer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            next(trainer)
        found[name] = max(event.cpu_memory_usage for event in profiler.events())
    return found


if __name__ == "__main__":
    main()
