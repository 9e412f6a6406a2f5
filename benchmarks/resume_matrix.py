"""Interrupt a run, go on with it in new objects, and compare its end with a run that was left alone: for each combination of precision,
compilation, accumulation, processes (one, DDP, FSDP) and the moment of the interruption.

    python benchmarks/resume_matrix.py                 about three minutes on two CPU cores
    python benchmarks/resume_matrix.py --without-compile

The interruptions are exceptions at three places: between two steps, in a step with half of its gradients made, and while a checkpoint is
being written. (kill -9 of the process is another benchmark, kill_and_resume.py.) `bitwise`: weights and optimizer state are the same to
the bit, on every rank. Of a run that goes on with another number of processes, or another kind, the sums have another order: `eps` is the
largest difference of a weight.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from llmforge import GPT, GPTConfig, LLMForgeError, TokenDataset, TrainConfig, Trainer
from llmforge.formats.safetensors import read_safetensors
from llmforge.training.distributed import own_part

STEPS, SAVED, ROWS = 8, 4, 12
MOMENTS = ("between steps", "in a step", "in a save")
KINDS = ("one", "ddp", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    dtype: str
    compile: bool
    grad_accum_steps: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.dtype}-{'compiled' if self.compile else 'eager'}-{self.grad_accum_steps}"


def cases(kinds: tuple[str, ...], *, with_compile: bool) -> list[Case]:
    plain = [
        Case(kind=kind, dtype=dtype, compile=False, grad_accum_steps=accum)
        for kind, dtype, accum in itertools.product(kinds, ("float32", "bfloat16", "float16"), (1, 3))
    ]
    # Compiling takes seconds for each: not all combinations.
    compiled = [
        Case(kind=kind, dtype=dtype, compile=True, grad_accum_steps=3)
        for kind, dtype in itertools.product(kinds, ("float32", "bfloat16"))
    ]
    return plain + (compiled if with_compile else [])


class Interrupted(LLMForgeError):
    """In the place of kill -9; of the errors that all ranks raise, since the processes here must go on."""


def trainer(case: Case, out_dir: Path, *, seed: int = 0) -> Trainer:
    """A tiny GPT with dropout, and ROWS sequences per step."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
    data = TokenDataset(np.random.RandomState(0).randint(0, 64, 20_000).astype(np.uint16), vocab_size=64)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = TrainConfig(
        max_steps=STEPS,
        micro_batch_size=ROWS // case.grad_accum_steps // world_size,
        grad_accum_steps=case.grad_accum_steps,
        lr=1e-3,
        warmup_steps=2,
        dtype=case.dtype,
        compile=case.compile,
        device="cpu",
        save_every_steps=SAVED,
        keep_last=9,
        eval_every_steps=None,
        sample_every_steps=None,
        distributed="fsdp" if case.kind == "fsdp" else "ddp",
        out_dir=str(out_dir),
    )
    return Trainer(model, data, config=config)


def interrupt_(own: Trainer, moment: str) -> None:
    """Let a trainer end by an exception, a while after the checkpoint of step SAVED; or in the middle of writing a later one."""
    loss_fn, calls = own.loss_fn, 0

    def interrupted(model: Any, batch: Any) -> Any:
        nonlocal calls
        if own.step == SAVED + 1 and moment == "between steps":
            raise Interrupted
        found = loss_fn(model, batch)
        if own.step == SAVED + 1:
            calls += 1
            if calls == own.config.grad_accum_steps:
                raise Interrupted
        return found

    if moment == "in a save":
        tokenizer: Any = HalfWritten(own)
        own.tokenizer = tokenizer
    else:
        own.loss_fn = interrupted


class HalfWritten:
    """In the place of a tokenizer, which is written when the weights have been: from the second checkpoint on it fails."""

    vocab_size = 64

    def __init__(self, own: Trainer) -> None:
        self.own = own

    def save(self, folder: Path) -> None:
        if folder.parent.joinpath(f"step-{SAVED:06d}").exists():
            raise Interrupted


def state(own: Trainer) -> list[torch.Tensor]:
    """What this rank has of weights and optimizer state, copied."""
    found = [own_part(p) for p in own.model.parameters()]
    for values in own.optimizer.state.values():
        found += [own_part(value) for value in values.values()]
    return [tensor.detach().clone() for tensor in found]


def run_case(case: Case, folder: Path) -> list[dict[str, Any]]:
    """One line for each moment."""
    alone = trainer(case, folder / case.name)
    alone.train(progress=False)
    expected, lines = state(alone), []
    # Compiled code is the same for all: one moment shows it.
    for moment in MOMENTS[1:2] if case.compile else MOMENTS:
        out_dir = folder / f"{case.name}-interrupted"
        if alone.ranks.is_first:
            shutil.rmtree(out_dir, ignore_errors=True)
        first = trainer(case, out_dir)
        interrupt_(first, moment)
        interrupted = False
        try:
            first.train(progress=False)
        except Interrupted:
            interrupted = True
        second = trainer(case, out_dir, seed=1)
        second.resume()
        resumed_at = second.step
        for _ in second:
            pass
        found = state(second)
        bitwise = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        eps = max((a.float() - b.float()).abs().max().item() for a, b in zip(expected, found, strict=True) if a.numel())
        lines.append({**dataclasses.asdict(case), "moment": moment, "interrupted": interrupted, "resumed_at": resumed_at,
                      "bitwise": bitwise, "eps": eps})  # fmt: skip
    return lines


def worker(folder: Path, kinds: tuple[str, ...], *, with_compile: bool) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ.get("RANK", "0"))
    lines: list[dict[str, Any]] = []
    for case in cases(kinds, with_compile=with_compile):
        lines += run_case(case, folder)
    if rank == 0 or not all(line["bitwise"] for line in lines):  # a rank that differs has the last word
        (folder / f"lines-{'-'.join(kinds)}-{rank}.json").write_text(json.dumps(lines), encoding="utf-8")


def other_ranks(folder: Path, kinds: tuple[str, ...]) -> None:
    """Go on with the checkpoints of the other numbers of processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = []
    for before, now in itertools.permutations(KINDS, 2):
        if now not in kinds:
            continue
        # Dropout is of each rank, so that other numbers of ranks draw others: none here.
        old = Case(kind=before, dtype="float32", compile=False, grad_accum_steps=1)
        own = trainer(dataclasses.replace(old, kind=now), folder / "unused", seed=1)
        for module in own.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        own.resume(folder / f"{old.name}-no-dropout" / f"step-{SAVED:06d}")
        for _ in own:
            pass
        reference = read_safetensors(folder / f"{old.name}-no-dropout" / f"step-{STEPS:06d}")
        eps = 0.0
        for name, tensor in own.model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if name in reference:
                eps = max(eps, (whole - reference[name].read()).abs().max().item())
        lines.append({"before": before, "now": now, "bitwise": eps == 0.0, "eps": eps})
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / f"other-{'-'.join(kinds)}.json").write_text(json.dumps(lines), encoding="utf-8")


def to_go_on(folder: Path, kinds: tuple[str, ...]) -> None:
    """The runs without dropout that `other_ranks` goes on with."""
    torch.set_num_threads(1)
    for kind in kinds:
        case = Case(kind=kind, dtype="float32", compile=False, grad_accum_steps=1)
        own = trainer(case, folder / f"{case.name}-no-dropout")
        for module in own.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        own.train(progress=False)


def launch(folder: Path, world_size: int, *arguments: str) -> None:
    """Start so many processes of this file, and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    several = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(folder), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **several, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    codes = [process.wait() for process in processes]
    assert codes == [0] * world_size, f"the processes of {arguments} ended with {codes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-compile", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "WHAT", "KINDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        folder, what, kinds = Path(args.worker[0]), args.worker[1], tuple(args.worker[2].split(","))
        if what == "other":
            other_ranks(folder, kinds)
        else:
            worker(folder, kinds, with_compile=not args.without_compile)
            to_go_on(folder, kinds)
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        more = ["--without-compile"] if args.without_compile else []
        launch(folder, 1, "cases", "one", *more)
        launch(folder, 2, "cases", "ddp,fsdp", *more)
        launch(folder, 1, "other", "one")
        launch(folder, 2, "other", "ddp,fsdp")
        # Of the same kind: a rank that differs writes after rank 0, and takes its place.
        lines = {}
        for file in sorted(folder.glob("lines-*.json")):
            for line in json.loads(file.read_text(encoding="utf-8")):
                key = tuple(line[part] for part in ("kind", "dtype", "compile", "grad_accum_steps", "moment"))
                if key not in lines or not line["bitwise"]:
                    lines[key] = line
        others = [line for file in sorted(folder.glob("other-*.json")) for line in json.loads(file.read_text())]
    matrix = list(lines.values())
    machine.write(
        "resume-matrix",
        {
            **machine.describe(torch.device("cpu")),
            "seconds": round(time.perf_counter() - start, 1),
            "steps": STEPS,
            "saved_at": SAVED,
            "combinations": len(matrix),
            "bitwise": sum(line["bitwise"] for line in matrix),
            "matrix": matrix,
            "other_ranks": others,
        },
    )
    assert all(line["interrupted"] and line["resumed_at"] == SAVED for line in matrix), "a run was not interrupted"


if __name__ == "__main__":
    main()
