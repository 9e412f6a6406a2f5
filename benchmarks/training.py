"""Tokens per second, peak memory and MFU of training, beside a plain torch loop in the same run.

    python benchmarks/training.py                                  # what suits the device at hand
    python benchmarks/training.py --preset gpt2 --dtype bfloat16 --micro-batch-size 4 --compile      # an RTX 4070

The peer is the loop that nanoGPT's train.py makes of the same model: random crops, autocast, clip_grad_norm_, fused AdamW.
The two take turns in blocks of steps, so that both meet the same noise; quote the ratio. MFU is model FLOPs (the family's
flops_per_token) over the speed of a large matrix product measured here in the same precision, and over the maker's figure
where it is known.
"""

import argparse
import resource
import time
from collections.abc import Callable

import machine
import numpy as np
import torch
import torch.nn.functional as F

from llmforge import GPT, GPTConfig, TokenDataset, TrainConfig, Trainer
from llmforge.training import build_optimizer
from llmforge.training.peaks import device_peak_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="char-gpt" if cuda else "char-gpt-cpu", choices=list(GPTConfig.PRESETS))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--blocks", type=int, default=9, help="turns of each side; the first is a warm-up")
    parser.add_argument("--steps-per-block", type=int, default=20)
    parser.add_argument("--name", help="result file under benchmarks/results (default: training-DEVICE-PRESET)")
    args = parser.parse_args()

    steps = args.blocks * args.steps_per_block
    model_config = GPTConfig.preset(args.preset, **({} if args.preset.startswith("gpt2") else {"vocab_size": 65}))
    settings = {"max_steps": steps, "device": args.device, "dtype": args.dtype, "compile": args.compile}
    settings["grad_accum_steps"] = args.grad_accum_steps
    if args.micro_batch_size is not None:
        settings["micro_batch_size"] = args.micro_batch_size
    config = TrainConfig.preset(args.preset, **settings)
    ids = np.random.default_rng(0).integers(0, model_config.vocab_size, 2_000_000).astype(np.uint16)
    model = GPT(model_config)
    trainer = Trainer(model, TokenDataset(ids, vocab_size=model_config.vocab_size), config=config)
    device = trainer.device
    peer_step = plain_loop(GPT(model_config).to(device), ids, config, trainer.dtype, device)

    seconds: dict[str, list[float]] = {"llmforge": [], "plain_loop": []}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peak_memory = 0
    for block in range(args.blocks):
        for name, step in (("llmforge", lambda: next(trainer)), ("plain_loop", peer_step)):
            elapsed = time_block(step, args.steps_per_block, device)
            if block > 0:
                seconds[name].append(elapsed / args.steps_per_block)
        if block == 0:
            peak_memory = peak_memory_bytes(device)
    tokens = config.micro_batch_size * config.grad_accum_steps * model_config.block_size
    ours, plain = machine.spread(seconds["llmforge"]), machine.spread(seconds["plain_loop"])
    flops_per_second = model.flops_per_token() * tokens / ours["median"]
    peak = matmul_flops_per_second(device, trainer.dtype)
    published = device_peak_flops(device, str(trainer.dtype).removeprefix("torch."))
    ratios = machine.spread([p / o for o, p in zip(seconds["llmforge"], seconds["plain_loop"], strict=True)])
    machine.write(
        args.name or f"training-{device.type}-{args.preset}",
        {
            **machine.describe(device),
            "preset": args.preset,
            "parameters": model.num_params(),
            "dtype": str(trainer.dtype).removeprefix("torch."),
            "compile": args.compile,
            "tokens_per_step": tokens,
            "tokens_per_second": {
                "llmforge": round(tokens / ours["median"]),
                "plain_loop": round(tokens / plain["median"]),
            },
            "speed_over_plain_loop": {key: round(value, 3) for key, value in ratios.items()},
            "seconds_per_step": {"llmforge": ours, "plain_loop": plain},
            "peak_memory_bytes": peak_memory,
            "model_tflops": round(flops_per_second / 1e12, 4),
            "matmul_tflops": round(peak / 1e12, 4),
            "mfu_of_measured_matmul": round(flops_per_second / peak, 3),
            "mfu_of_published_peak": round(flops_per_second / published, 3) if published else None,
        },
    )


def plain_loop(
    model: GPT, ids: np.ndarray, config: TrainConfig, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """One step of the classic loop, as a closure."""
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    size, T = config.micro_batch_size, model.config.block_size
    if config.compile:
        model.compile()

    def step() -> None:
        for _ in range(config.grad_accum_steps):
            starts = torch.randint(len(ids) - T - 1, (size,)).tolist()
            x = torch.stack([torch.from_numpy(ids[s : s + T].astype(np.int64)) for s in starts]).to(device)
            y = torch.stack([torch.from_numpy(ids[s + 1 : s + 1 + T].astype(np.int64)) for s in starts]).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / config.grad_accum_steps
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_block(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds for `steps` calls, the device's queue drained before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator; on a CPU the process's largest resident size (both sides and torch itself included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a large square matrix product: what this device can do at most, here and now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    a @ b
    return 2 * n**3 / min(time_block(lambda: a @ b, 3, device) / 3 for _ in range(5))


if __name__ == "__main__":
    main()
