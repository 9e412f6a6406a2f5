"""kill -9 one training run a hundred times, resume it each time, and compare the end with a run that was left alone.

    python benchmarks/kill_and_resume.py --kills 100

The run saves every few steps, in the background. A third of the kills comes at any moment; a third while a checkpoint is being
written, seen from outside; a third exactly before one of the file operations (open, mkdir, rename, remove, ...) of the thread that
writes, chosen by chance. It passes when after each kill the newest checkpoint is whole, is not older than before, and lies at most
two saves behind the steps that were done; when every resumption succeeds; and when the end is the same, bit for bit: weights,
optimizer state, and the losses in the log.

Each life of the run is a fork of this process, which has imported torch and has never computed: so a kill costs some tenths of a
second, and the whole a few minutes. Needs a system with fork.
"""

import argparse
import hashlib
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads would not survive a fork

import machine
import numpy as np
import torch
import torch._dynamo  # noqa: F401 - every optimizer imports it at its first step, for seconds

from llmforge import GPT, CharTokenizer, GPTConfig, TokenDataset, TrainConfig, Trainer
from llmforge.training import find_checkpoint, list_checkpoints
from llmforge.training.metrics import read_log

MOMENTS = ("at any moment", "while a checkpoint is written", "before a file operation of a write")
TEXT = (
    "El fruto de cada verdadero intento es haber intentado otra vez, y otra vez más, hasta que el intento fue obra.\n"
    * 40
)


class Watched:
    """Data that notes in memory shared with the parent which step reads it."""

    def __init__(self, data: TokenDataset, steps_done: mmap.mmap) -> None:
        self.data, self.steps_done = data, steps_done

    def num_sequences(self, seq_len: int) -> int:
        return (len(self.data) - 1) // seq_len

    def batch(self, step: int, **sizes: int) -> Any:
        self.steps_done[:8] = struct.pack("q", step)
        return self.data.batch(step, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--save-every-steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("error")  # no checkpoint may be found damaged, no save may fail
    chance, start = random.Random(args.seed), time.perf_counter()
    steps_done = mmap.mmap(-1, 8)
    kills: Counter[str] = Counter()
    left: Counter[str] = Counter()
    steps, repeated = [0], []
    with tempfile.TemporaryDirectory() as folder:
        killed, alone = Path(folder) / "killed", Path(folder) / "alone"
        while len(steps) <= args.kills:
            moment = MOMENTS[len(steps) % len(MOMENTS)]
            # A write of this run has about 45 operations, and the deletion of an old checkpoint 20.
            operation = chance.randrange(200) if moment == MOMENTS[2] else None
            steps_done[:8] = struct.pack("q", -1)
            pid = fork(
                lambda number=operation: train(
                    killed, args, steps_done, save_every_steps=args.save_every_steps, die_at=number
                )
            )
            if moment == MOMENTS[0]:
                wait_for(
                    lambda: struct.unpack("q", steps_done[:8])[0] >= 0
                )  # what precedes the first step writes nothing
                time.sleep(chance.uniform(0.0, 0.6))
            elif moment == MOMENTS[1]:
                wait_for_a_write(killed, pid, number=chance.randint(1, 4))
                time.sleep(chance.uniform(0.0, 0.03))
            if moment != MOMENTS[2]:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status == -signal.SIGKILL, (
                f"life {len(steps)} ended by itself with {status}: more --steps are needed"
            )
            kills[moment] += 1
            left[what_was_left(killed, pid)] += 1
            done = struct.unpack("q", steps_done[:8])[0]
            newest = newest_step(killed)
            assert newest >= steps[-1], f"the checkpoint of step {steps[-1]} is lost, {newest} is the newest"
            assert done - newest <= 2 * args.save_every_steps, f"{done} steps were done, {newest} is the newest"
            repeated.append(done - newest)
            steps.append(newest)
        assert os.waitpid(fork(lambda: train(killed, args, steps_done)), 0)[1] == 0, "the last resumption failed"
        assert os.waitpid(fork(lambda: train(alone, args, steps_done)), 0)[1] == 0
        ends = [final_state(run, args.steps) for run in (killed, alone)]
        rubbish = [entry.name for entry in killed.iterdir() if entry.name.startswith(".")]
    machine.write(
        "kill-and-resume",
        {
            **machine.describe(torch.device("cpu")),
            "seconds": round(time.perf_counter() - start, 1),
            "settings": {"steps": args.steps, "save_every_steps": args.save_every_steps, "async_save": True},
            "kills": sum(kills.values()),
            "moments": dict(kills),
            "found_after_the_kills": dict(left),
            "resumptions_that_failed": 0,
            "checkpoints_lost": 0,
            "most_steps_repeated": max(repeated),
            "steps_at_the_kills": steps[1:],
            "same_weights": ends[0]["weights"] == ends[1]["weights"],
            "same_optimizer_state": ends[0]["optimizer"] == ends[1]["optimizer"],
            "same_log": ends[0]["log"] == ends[1]["log"],
            "left_in_the_folder": rubbish,
            "sha256_of_the_weights": ends[0]["weights"],
        },
    )
    assert ends[0] == ends[1], "the killed run ended with other bits"
    assert not rubbish, f"{rubbish} was not swept"


def fork(work: Callable[[], None]) -> int:
    """Process number of a child that does the work."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def train(
    out: Path,
    args: argparse.Namespace,
    steps_done: mmap.mmap,
    *,
    save_every_steps: int | None = None,
    die_at: int | None = None,
) -> None:
    """Go on with the run, or begin it.

    Args:
        save_every_steps: None = at the end, and where the validation loss is the best so far.
        die_at: before so many file operations of the thread that writes the process kills itself; None = never.
    """
    torch.manual_seed(0)
    tokenizer = CharTokenizer.from_text(TEXT)
    data = TokenDataset(np.array(tokenizer.encode(TEXT), dtype=np.uint16), vocab_size=tokenizer.vocab_size)
    train_data, val_data = data.split(val_fraction=0.1)
    shape = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    config = TrainConfig(
        max_steps=args.steps,
        micro_batch_size=4,
        grad_accum_steps=2,
        save_every_steps=save_every_steps,
        eval_every_steps=50,
        eval_batches=2,
        sample_every_steps=None,
        keep_last=2,
        device="cpu",
        out_dir=str(out),
    )
    watched = Watched(train_data, steps_done)
    trainer = Trainer(GPT(shape), watched, val_data=val_data, tokenizer=tokenizer, config=config)
    trainer.resume()
    steps_done[:8] = struct.pack("q", trainer.step)
    if die_at is not None:
        left = die_at

        def die(event: str, _: Any) -> None:
            nonlocal left
            of_files = event.partition(".")[0] in ("open", "os", "shutil", "tempfile")
            if of_files and threading.current_thread().name == "checkpoint":
                left -= 1
                if left == -1:  # once: this call is such an event as well
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
    trainer.train(progress=False)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the run does not get on"


def wait_for_a_write(out: Path, pid: int, *, number: int) -> None:
    """Until a process has begun to write its checkpoint of this number."""
    seen: set[str] = set()

    def has_begun() -> bool:
        if out.is_dir():
            seen.update(name for name in os.listdir(out) if name.startswith(f".tmp-{pid}-") and "-step-" not in name)
        return len(seen) >= number

    wait_for(has_begun)


def what_was_left(out: Path, pid: int) -> str:
    """What a killed process had been doing in its run folder."""
    names = [name for name in (os.listdir(out) if out.is_dir() else []) if name.startswith(f".tmp-{pid}-")]
    if any("-step-" in name for name in names):
        return "an old checkpoint half deleted"
    if not names:
        return "whole checkpoints only"
    files = os.listdir(out / names[0]) if (out / names[0]).is_dir() else []
    return "a checkpoint with all files, not in place" if "manifest.json" in files else "half a checkpoint"


def newest_step(out: Path) -> int:
    """Step of the newest checkpoint, which must be whole; 0 if the kill came before the first was finished."""
    return int(find_checkpoint(out).name.removeprefix("step-")) if list_checkpoints(out) else 0


def final_state(out: Path, step: int) -> dict[str, str]:
    folder = out / f"step-{step:06d}"
    state = torch.load(folder / "trainer.pt", weights_only=True)["optimizer"]["state"]
    digest = hashlib.sha256()
    for index in sorted(state):
        for key in sorted(state[index]):
            digest.update(state[index][key].numpy().tobytes())
    kept = ("step", "loss", "val_loss", "lr", "grad_norm")
    lines = [
        line for line in read_log(out / "log.jsonl") if "loss" in line or "val_loss" in line
    ]  # not those of beginnings
    log = [[line[key] for key in kept if key in line] for line in lines]
    return {
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": digest.hexdigest(),
        "log": hashlib.sha256(repr(log).encode()).hexdigest(),
    }


if __name__ == "__main__":
    main()
