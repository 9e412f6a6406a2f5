"""Tokens per second, peak memory and MFU of training, beside other people's loops in the same run.

    python benchmarks/training.py                                  # what suits the device at hand, all peers that are installed
    python benchmarks/training.py --preset gpt2 --dtype bfloat16 --micro-batch-size 4 --compile      # an RTX 4070

The peers are in `peers.py`; they take turns in blocks of steps (`turns.py`), so that all meet the same noise: quote the ratio. MFU is
model FLOPs (the family's flops_per_token) over the speed of a large matrix product measured here in the same precision, and over the
maker's figure where it is known.
"""

import argparse
from typing import Any

import machine
import peers
import torch
import turns

from llmforge.training.peaks import device_peak_flops, peak_flops


def measure(
    race: peers.Training,
    names: list[str],
    *,
    blocks: int,
    block_seconds: float,
    warmup_steps: int = 3,
    together: bool = True,
    profiled: bool = False,
) -> dict[str, Any]:
    """Let `names` take turns at one kind of step."""
    able, skipped = peers.contestants(race, names)
    outcomes, failed, steps = turns.take_turns(
        able, race, blocks=blocks, block_seconds=block_seconds, warmup_steps=warmup_steps, together=together,
        profiled=["llmforge"] if profiled else [],
    )  # fmt: skip
    shape = peers.describe(race)
    tokens = race.tokens_per_step
    seconds = {name: machine.spread(outcome.seconds) for name, outcome in outcomes.items()}
    flops = {name: shape["flops_per_token"] * tokens / spread["median"] for name, spread in seconds.items()}
    peak = matmul_flops_per_second(race)
    published = device_peak_flops(race.device, race.dtype)
    result = {
        **shape,
        "steps_per_block": steps,
        "tokens_per_second": {name: round(tokens / spread["median"]) for name, spread in seconds.items()},
        "times_as_fast_as": turns.compared(outcomes),
        "compiled_times_as_fast_as": turns.compared(outcomes, "llmforge_compiled"),
        "times_as_fast_as_by_cpu_time": turns.compared(outcomes, by="cpu_seconds") if race.device.type == "cpu" else {},
        "seconds_per_step": {name: turns.rounded(spread, 6) for name, spread in seconds.items()},
        "cpu_seconds_per_step": {
            name: turns.rounded(machine.spread(outcome.cpu_seconds), 6) for name, outcome in outcomes.items()
        },
        "peak_memory_bytes": {name: outcome.memory_bytes for name, outcome in outcomes.items()},
        "matmul_tflops": round(peak / 1e12, 4) if peak else None,
        "mfu_of_measured_matmul": {name: round(value / peak, 3) for name, value in flops.items()} if peak else {},
        "mfu_of_published_peak": {name: round(value / published, 3) for name, value in flops.items()}
        if published
        else {},
        "losses": {name: outcome.notes for name, outcome in outcomes.items() if outcome.notes},
        "largest_loss_difference": loss_differences(outcomes) if race.dropout == 0 else {},
        "skipped": skipped,
        "failed": failed,
        "load_average": machine.describe(torch.device("cpu"))["load_average"],
    }
    if "llmforge" in outcomes and outcomes["llmforge"].profile:
        result["time_by_operator"] = outcomes["llmforge"].profile
    return result


def loss_differences(outcomes: dict[str, turns.Outcome]) -> dict[str, float]:
    """Of the first steps, between llmforge and those who run the same module: nothing else than rounding."""
    ours = outcomes["llmforge"].notes if "llmforge" in outcomes else []
    return {
        name: max(abs(a - b) for a, b in zip(ours, outcomes[name].notes, strict=False))
        for name in peers.SAME_MODULE
        if name in outcomes and ours
    }


def _matmul_size(race: peers.Training) -> int:
    return 8192 if race.device.type == "cuda" else 1024  # some CPUs multiply bfloat16 fifty times slower than float32


def _matmul(race: peers.Training, turn: turns.Turn) -> None:
    n = _matmul_size(race)
    a, b = (torch.randn(n, n, device=race.device, dtype=getattr(torch, race.dtype)) for _ in range(2))
    while True:
        a @ b
        turn()


_matmul_speeds: dict[tuple[str, str, int | None], float] = {}


def matmul_flops_per_second(race: peers.Training) -> float:
    """Speed of a large square matrix product: what this device can do at most, here and now."""
    key = (str(race.device), race.dtype, race.threads)
    if key not in _matmul_speeds:
        outcomes, _, _ = turns.take_turns({"matmul": _matmul}, race, blocks=5, block_seconds=0.1, warmup_steps=1)
        _matmul_speeds[key] = 2 * _matmul_size(race) ** 3 / min(outcomes["matmul"].seconds) if outcomes else 0.0
    return _matmul_speeds[key]


def expected_seconds(
    race: peers.Training, names: list[str], *, blocks: int, block_seconds: float, warmup_steps: int = 3, together: bool = True
) -> float:  # fmt: skip
    """About how long `measure` takes: FLOPs over what such a device reaches, and starting, importing and compiling."""
    on_gpu = (race.device_name or race.device.type).startswith("cuda")
    known = device_peak_flops(race.device, race.dtype) if on_gpu and torch.cuda.is_available() else None
    gpu = known or peak_flops("NVIDIA GeForce RTX 4070", race.dtype) or 29e12
    peak = gpu if on_gpu else 50e9 * (race.threads or 1)
    shape = peers.describe(race)
    step = shape["flops_per_token"] * race.tokens_per_step / (peak * (0.35 if on_gpu else 0.6))
    start = 8 if on_gpu else 2.5
    compilers = len(names) if race.compile else names.count("llmforge_compiled")
    compiling = 40 if together else 52  # for the second time torch finds what it compiled
    starts = 1 if together else 2
    of_one = starts * (start + (warmup_steps + 1) * step) + blocks * max(step, block_seconds)
    return compilers * compiling + len(names) * of_one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    presets = {name: family for family, (_, config) in peers.FAMILIES.items() for name in config.PRESETS}
    parser.add_argument("--preset", default="char-gpt" if cuda else "char-gpt-cpu", choices=list(presets))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--micro-batch-size", type=int, help="default: the preset's")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--seq-len", type=int, help="default: the model's context")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--blocks", type=int, default=8, help="turns of each side")
    parser.add_argument("--block-seconds", type=float, default=1.0)
    parser.add_argument("--peers", nargs="+", default=list(peers.PEERS), choices=list(peers.PEERS))
    parser.add_argument("--name", help="result file under benchmarks/results (default: training-DEVICE-PRESET)")
    args = parser.parse_args()
    published = peers.TrainConfig.PRESETS.get(args.preset, {})
    race = peers.Training(
        presets[args.preset], args.preset, {"vocab_size": 65} if args.preset.startswith("char") else {}, args.device, args.dtype,
        args.compile, args.micro_batch_size or published.get("micro_batch_size", 1), args.grad_accum_steps, args.seq_len,
        threads=args.threads,
    )  # fmt: skip
    names = ["llmforge", *(name for name in args.peers if name != "llmforge")]
    result = measure(race, names, blocks=args.blocks, block_seconds=args.block_seconds, profiled=True)
    machine.write(
        args.name or f"training-{race.device.type}-{args.preset}", {**machine.describe(race.device), **result}
    )


if __name__ == "__main__":
    main()
