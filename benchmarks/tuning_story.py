"""The whole way at small size: a model trained from scratch learns from examples by QLoRA, is merged, quantized and run in llama.cpp.

    llmforge train wiki.txt --preset llama-15m --vocab-size 4096 --out runs/base ...      any base model will do
    python benchmarks/tuning_story.py runs/base code_alpaca.json --out story

Every step is the command that a user types. Measured: the loss on held-out answers before and after, in torch, and of the Q4_K_M
files in llama.cpp; what merging onto the rounded and onto the original base costs; the answers side by side (story/compare.md).
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("examples", type=Path, help="Alpaca records, .json or .jsonl")
    parser.add_argument("--out", type=Path, default=Path("story"))
    parser.add_argument("--held-out", type=int, default=40, help="examples that no step trains on")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--set", action="append", default=[], help="more settings of llmforge finetune")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    learn, test = split(args.examples, args.held_out, args.out)
    run, gguf, base_gguf = args.out / "run", args.out / "tuned.gguf", args.out / "base.gguf"
    seconds: dict[str, float] = {}

    def step(name: str, *arguments: object) -> str:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "llmforge", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        seconds[name] = time.perf_counter() - start
        print(f"$ llmforge {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}", flush=True)
        if done.returncode != 0:
            raise SystemExit(f"{name} failed")
        return done.stdout

    settings = [word for setting in args.set for word in ("--set", setting)]
    step(
        "finetune", "finetune", args.base, learn, "--qlora", "--out", run, "--seq-len", args.seq_len, "--epochs",
        args.epochs, "--template", "alpaca", *settings,
    )  # fmt: skip
    step("export", "export", run, "--checkpoint", "best", "--gguf", gguf, "--file-type", "Q4_K_M")
    step("export base", "export", args.base, "--gguf", base_gguf, "--file-type", "Q4_K_M")
    step("verify", "verify", gguf, run, "--checkpoint", "best")
    step("merge", "merge", args.base, run, "--out", args.out / "merged", "--compare", test)
    prompts = ["--prompts", test, "--temperature", 0, "--max-new-tokens", 80]
    in_torch = step("compare", "compare", args.base, run, *prompts, "--out", args.out / "compare.md")
    in_llama = step("compare files", "compare", base_gguf, gguf, *prompts, "--engine", "llama.cpp", "--limit", 10)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    machine.write(
        "tuning-story",
        {
            **machine.describe(torch.device("cpu")),
            "examples": args.examples.name,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "train_loss": [[line["step"], line["loss"]] for line in log if "loss" in line],
            "val_loss": [[line["step"], line["val_loss"]] for line in log if "val_loss" in line],
            "held_out": {"torch": losses(in_torch), "llama.cpp": losses(in_llama)},
            "gguf_bytes": gguf.stat().st_size,
        },
    )


def split(path: Path, held_out: int, out: Path) -> tuple[Path, Path]:
    """The records in two files, the same ones every time."""
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    random.Random(0).shuffle(records)
    files = (out / "learn.jsonl", out / "held_out.jsonl")
    for file, part in zip(files, (records[held_out:], records[:held_out]), strict=True):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in part]
        file.write_text("".join(lines), encoding="utf-8")
    return files


def losses(text: str) -> list[Any]:
    """The lines of `llmforge compare` that have the figures."""
    return [line.strip() for line in text.splitlines() if re.search(r"perplexity|loss", line)]


if __name__ == "__main__":
    main()
