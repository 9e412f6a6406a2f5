"""All benchmarks of a machine by one command: training, generation, QLoRA and data preparation, beside other people's programs.

    python benchmarks/run.py --suite rtx4070      # one NVIDIA GPU of 12 GB or more; ends in minutes, needs no download and no text
    python benchmarks/run.py --suite cpu          # two CPU cores, about ten minutes
    python benchmarks/run.py --suite quick        # toy sizes, for the tests

It says beforehand how long it will take, prints tables, and writes one JSON (benchmarks/results/suite-NAME.json), which is what to send
us. Peers that are not installed are named there as skipped; `pip install transformers accelerate litgpt x-transformers peft` brings them.
Data and weights are made up: speed and memory do not depend on them.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import generation
import machine
import numpy as np
import peers
import tables
import torch
import training
import turns

HERE = Path(__file__).parent
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "litgpt",
    "lightning",
    "x-transformers",
    "peft",
    "bitsandbytes",
)
GPU_GB = 11.0  # of a card of 12: CUDA itself and a desktop take the rest
MADE_UP_TEXT = "a made-up text"  # in the arguments of a script: a file of one
ALL = [name for name in peers.PEERS if name != "llmforge_compiled"]
FEW = ["llmforge", "plain_loop", "transformers_trainer"]


@dataclass(frozen=True)
class Part:
    """One measurement of a suite: it has a name, says about how long it takes, and gives what goes into the JSON."""

    kind: str  # the table it belongs to
    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float  # about
    note: str = ""  # what to know when reading it


def train(
    name: str,
    race: peers.Training,
    who: list[str],
    *,
    blocks: int = 5,
    block_seconds: float = 0.7,
    warmup_steps: int = 3,
    together: bool = True,
    note: str = "",
    profiled: bool = True,
) -> Part:
    def run() -> dict[str, Any]:
        return training.measure(
            race,
            who,
            blocks=blocks,
            block_seconds=block_seconds,
            warmup_steps=warmup_steps,
            together=together,
            profiled=profiled,
        )

    seconds = training.expected_seconds(race, who, blocks=blocks, block_seconds=block_seconds, together=together)
    return Part("training", name, run, seconds, note)


def generate(
    name: str,
    race: generation.Generation,
    who: list[str],
    *,
    blocks: int = 5,
    block_seconds: float = 0.5,
    seconds: float = 30,
) -> Part:
    return Part(
        "generation",
        name,
        lambda: generation.measure(race, who, blocks=blocks, block_seconds=block_seconds),
        seconds,
    )


def made_up_text(path: Path, words: int = 500_000) -> Path:
    """Some megabytes of words of random letters, as frequent as words are (Zipf), in paragraphs."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    vocabulary = ["".join(random.choice(letters, size)) for size in random.integers(2, 10, 20_000)]
    chosen = np.minimum(random.zipf(1.3, words), len(vocabulary)) - 1
    lines = [" ".join(vocabulary[i] for i in chosen[at : at + 60]) + "." for at in range(0, words, 60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def script(kind: str, name: str, file: str, arguments: Sequence[Any], seconds: float, note: str = "") -> Part:
    """Another benchmark of this folder, in a process of its own."""

    def run() -> dict[str, Any]:
        if not (HERE / file).exists():
            return {"skipped": {file: "not in this version"}}
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as texts:
            text = made_up_text(Path(texts) / "text.txt") if MADE_UP_TEXT in arguments else None
            done = subprocess.run(
                [sys.executable, str(HERE / file), *(str(text if word == MADE_UP_TEXT else word) for word in arguments)],
                capture_output=True, text=True, check=False, env={**os.environ, "LLMFORGE_BENCHMARK_RESULTS": folder},
            )  # fmt: skip
            results = sorted(Path(folder).glob("*.json"))
            if done.returncode != 0 or not results:
                raise RuntimeError(f"{file} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
            found: dict[str, Any] = json.loads(results[0].read_text(encoding="utf-8"))
            return found

    return Part(kind, name, run, seconds, note)


def preparation(*, megabytes: int, seconds: float) -> Part:
    ways = ["library encode_batch", "library encode_batch_fast", "bpe text", "bpe jsonl", "char text", "nanogpt"]
    arguments = [MADE_UP_TEXT, "--megabytes", megabytes, "--vocab-size", 4096, "--ways", *ways]
    return script("data_preparation", f"{megabytes} MB", "data_preparation.py", arguments, seconds, "a made-up text")


# The suites


def quick(device: str | None, threads: int | None) -> list[Part]:
    """Every path of the others, at toy size."""
    tiny = {"vocab_size": 65, "n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16}
    race = peers.Training(
        "gpt", "char-gpt-cpu", tiny, device, micro_batch_size=2, grad_accum_steps=2, train={"lr": 0.01}, threads=threads
    )
    text = generation.Generation("gpt", "char-gpt-cpu", tiny, device, prompt_tokens=4, new_tokens=6, threads=threads)
    once = {"blocks": 2, "block_seconds": 0.01}
    return [
        train("toy", race, ALL, **once),
        largest("toy", race, ["llmforge"], limit_gb=0.05, seconds=10),
        generate("toy", text, ["llmforge", "llmforge_without_cache", "transformers", "litgpt"], **once, seconds=10),
    ]


def cpu(device: str | None, threads: int | None) -> list[Part]:
    threads = threads or min(2, os.cpu_count() or 1)
    at = {"device_name": "cpu", "threads": threads}
    characters = {"vocab_size": 65}
    tiny = peers.Training(
        "gpt", "char-gpt-cpu", {**characters, "n_layer": 2, "n_embd": 64, "block_size": 32}, micro_batch_size=4, **at
    )
    toy = peers.Training("gpt", "char-gpt-cpu", characters, micro_batch_size=12, **at)
    small = peers.Training("gpt", "char-gpt", {**characters, "dropout": 0.0}, micro_batch_size=4, **at)
    gpt2 = peers.Training("gpt", "gpt2", {"n_layer": 2}, micro_batch_size=1, seq_len=256, **at)
    llama = peers.Training("llama", "llama-110m", {"num_hidden_layers": 2}, micro_batch_size=1, seq_len=256, **at)
    bitnet = peers.Training("bitnet", "bitnet-15m", micro_batch_size=2, train={"quantize_after_fraction": 0.0}, **at)
    texts = {"prompt_tokens": 32, "new_tokens": 64}
    return [
        train("toy", tiny, list(peers.PEERS), blocks=8, note="2 layers, 64 wide, 4 x 32 tokens: what a loop costs beside the arithmetic"),
        train("char-gpt-cpu", toy, list(peers.PEERS), blocks=8, note="nanoGPT's published CPU setting"),
        train(
            "char-gpt-cpu, compiled", replace(toy, compile=True), ["llmforge", "litgpt_model"], profiled=False,
        ),
        train("char-gpt", small, ALL, warmup_steps=2, note="nanoGPT's shakespeare_char, 4 rows instead of 64, without dropout"),
        train("gpt2 width", gpt2, ALL, warmup_steps=2, note="GPT-2's width and vocabulary, 2 of 12 layers, 256 tokens"),
        train("llama-110m width", llama, ALL, warmup_steps=2, note="2 of 12 layers, 256 tokens"),
        train("bitnet-15m", bitnet, FEW, note="ternary weights, 8-bit activations"),
        generate("char-gpt", generation.Generation("gpt", "char-gpt", {**characters, "dropout": 0.0}, **at, **texts), ["llmforge", "llmforge_without_cache", "transformers", "litgpt"]),
        generate("gpt2 width", generation.Generation("gpt", "gpt2", {"n_layer": 2}, **at, **texts), ["llmforge", "llmforge_compiled", "transformers", "litgpt"], seconds=40),
        script("qlora", "llama-110m width", "qlora_step.py", ["--preset", "llama-110m", "--layers", 2, "--tokens", 256, "--device", "cpu", "--repeat", 5], 40, "2 of 12 layers"),
        preparation(megabytes=10, seconds=40),
    ]  # fmt: skip


def rtx4070(device: str | None, threads: int | None) -> list[Part]:
    """GPT-2 as published, on one GPU with the memory of a 12 GB card, and the other models at sizes that suit it."""
    pretend = device == "cpu"  # the same paths on a machine without a GPU, at toy size
    at: dict[str, Any] = {"device_name": device or "cuda", "threads": threads, "gpu_gb": GPU_GB}
    dtype = "bfloat16"
    less: dict[str, dict[str, Any]] = {"gpt": {}, "llama": {}, "char": {}, "bitnet": {}}
    if pretend:
        narrow = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=300, max_position_embeddings=32)  # fmt: skip
        less["gpt"] = less["char"] = dict(n_layer=1, n_embd=32, n_head=2, block_size=32, vocab_size=300)
        less["llama"] = less["bitnet"] = narrow
    gpt2 = peers.Training("gpt", "gpt2", less["gpt"], dtype=dtype, micro_batch_size=4, grad_accum_steps=4, **at)
    compiled = replace(gpt2, compile=not pretend)
    char = peers.Training("gpt", "char-gpt", {"vocab_size": 65, **less["char"]}, dtype=dtype, micro_batch_size=64, **at)
    llama = peers.Training(
        "llama", "llama-110m", less["llama"], dtype=dtype, micro_batch_size=4, compile=not pretend, **at
    )
    bitnet = peers.Training(
        "bitnet", "bitnet-42m", less["bitnet"], dtype=dtype, micro_batch_size=8, compile=not pretend,
        train={"quantize_after_fraction": 0.0}, **at,
    )  # fmt: skip
    texts = {"prompt_tokens": 8, "new_tokens": 8} if pretend else {"prompt_tokens": 64, "new_tokens": 256}
    blocks = 2 if pretend else 6
    apart = {"together": False, "blocks": blocks, "block_seconds": 0.01 if pretend else 1.5}
    side_by_side = {"blocks": blocks, "block_seconds": 0.01 if pretend else 1.0}
    mains = ["llmforge", "plain_loop", "transformers_trainer", "transformers_model", "litgpt_model"]
    qlora = ["--preset", "llama-15m" if pretend else "llama-3.2-1b", "--tokens", 16 if pretend else 2048, "--repeat", 3, "--gpu-gb", GPU_GB]  # fmt: skip
    if device is not None:
        qlora += ["--device", device]
    return [
        train("gpt2", compiled, mains, **apart, note="context 1024, 16 rows a step, compiled, sdpa"),
        train("gpt2, eager", gpt2, FEW, **apart, note="context 1024, 16 rows a step, sdpa"),
        largest("gpt2, largest micro-batch", replace(compiled, grad_accum_steps=1), ["llmforge", "transformers_model"], limit_gb=GPU_GB, seconds=380),
        train("char-gpt", char, ALL, **side_by_side, note="nanoGPT's shakespeare_char as published"),
        train("char-gpt, compiled", replace(char, compile=not pretend), ["llmforge", "transformers_trainer"], **side_by_side),
        train("llama-110m", llama, ["llmforge", "transformers_model", "litgpt_model"], **apart),
        train("bitnet-42m", bitnet, ["llmforge", "plain_loop"], **apart),
        generate("gpt2", generation.Generation("gpt", "gpt2", less["gpt"], dtype=dtype, **at, **texts), list(generation.CONTESTANTS), blocks=blocks, seconds=150),
        *[script("qlora", f"{qlora[1]}, {kind}", "qlora_step.py", [*qlora, "--kinds", kind], 45) for kind in ("nf4", "dense", "peft")],
        preparation(megabytes=10, seconds=40),
    ]  # fmt: skip


def largest(name: str, race: peers.Training, who: list[str], *, limit_gb: float, seconds: float) -> Part:
    """The largest micro-batch that fits, of each, and the speed with it."""

    def run() -> dict[str, Any]:
        able, skipped = peers.contestants(race, who)
        found = {one: largest_micro_batch(race, one, limit_gb * 2**30) for one in able}
        return {**peers.describe(race), "limit_gb": limit_gb, "contestants": found, "skipped": skipped}

    return Part("largest_micro_batch", name, run, seconds)


def largest_micro_batch(race: peers.Training, who: str, limit_bytes: float) -> dict[str, Any]:
    """Memory is a constant and so much per row: measured at two sizes, the largest is reckoned, and then tried."""

    def attempt(rows: int) -> turns.Outcome | str:
        sized = replace(race, micro_batch_size=rows)
        outcomes, failed, _ = turns.take_turns(
            {who: peers.PEERS[who].run}, sized, blocks=3, block_seconds=0.0, warmup_steps=2
        )
        return outcomes[who] if who in outcomes else failed[who]

    tried: dict[int, Any] = {}
    for rows in (1, 2):
        outcome = attempt(rows)
        if isinstance(outcome, str):
            return {"failed": outcome, "micro_batch_size": rows}
        tried[rows] = outcome.memory_bytes
    per_row = max(1, tried[2] - tried[1])
    reckoned = max(2, min(512, int((limit_bytes - tried[1]) / per_row) + 1))
    # Blocks of the allocator that are too small to use cost some percent of the memory.
    for rows in range(reckoned, max(1, reckoned - 6 * (1 + reckoned // 32)), -(1 + reckoned // 32)):
        outcome = attempt(rows)
        if not isinstance(outcome, str):
            seconds = machine.spread(outcome.seconds)["median"]
            return {
                "micro_batch_size": rows,
                "peak_memory_bytes": outcome.memory_bytes,
                "tokens_per_second": round(rows * race.tokens_per_row / seconds),
                "memory_bytes_per_row": per_row,
            }
    return {"failed": str(outcome), "micro_batch_size": rows, "memory_bytes_per_row": per_row}


SUITES = {"quick": quick, "cpu": cpu, "rtx4070": rtx4070}


def hardware(device: torch.device) -> dict[str, Any]:
    """What machine.describe does not say."""
    found: dict[str, Any] = {"cpu": platform.processor() or None, "cpu_cores": os.cpu_count()}
    info, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if info.exists() and (model := re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))):
        found["cpu"] = model.group(1)
    if memory.exists() and (kilobytes := re.search(r"MemTotal:\s+(\d+)", memory.read_text(encoding="utf-8"))):
        found["memory_gb"] = round(int(kilobytes.group(1)) / 2**20, 1)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gb"] = round(properties.total_memory / 2**30, 1)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=list(SUITES))
    parser.add_argument("--device", help="cpu: every path of the GPU suite at toy size")
    parser.add_argument("--threads", type=int, help="of each contestant; default for the cpu suite: 2")
    parser.add_argument("--only", nargs="+", help="kinds or names of parts, for example: training, char-gpt")
    parser.add_argument("--name", help="result file under benchmarks/results (default: suite-NAME)")
    args = parser.parse_args()
    if args.suite == "rtx4070" and args.device is None and not torch.cuda.is_available():
        parser.error(
            "no CUDA device is to be seen; --device cpu tries the paths at toy size, --suite cpu measures this CPU"
        )
    parts = [
        part
        for part in SUITES[args.suite](args.device, args.threads)
        if args.only is None or part.kind in args.only or part.name in args.only
    ]
    minutes = sum(part.seconds for part in parts) / 60
    print(f"{len(parts)} measurements, about {minutes:.0f} minutes", file=sys.stderr)
    began = time.perf_counter()
    result: dict[str, Any] = {"suite": args.suite, "packages": versions()}
    for number, part in enumerate(parts, 1):
        print(f"{number}/{len(parts)} {part.kind}: {part.name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            found = part.run()
        except Exception as error:  # one that fails must not cost the others
            found = {"failed": {part.name: f"{type(error).__name__}: {error}"[:500]}}
        found["measured_in_seconds"] = round(time.perf_counter() - start, 1)
        if part.note:
            found["note"] = part.note
        result.setdefault(part.kind, {})[part.name] = found
    device = torch.device(args.device or ("cuda" if args.suite == "rtx4070" else "cpu"))
    result = {
        **machine.describe(device),
        "hardware": hardware(device),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        **result,
    }
    machine.write(args.name or f"suite-{args.suite}", result)
    print(tables.of_suite(result), file=sys.stderr)


if __name__ == "__main__":
    main()
