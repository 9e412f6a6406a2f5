"""kill -9 one training run at random moments, resume it each time, and compare the end with a run that was left alone.

    python benchmarks/kill_and_resume.py --kills 30

The run saves after every few steps, so that many kills land while a checkpoint is being written. It passes when every resumption
succeeds and the last checkpoint's weights and optimizer state are the same, bit for bit.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import torch

from llmforge.cli.demo import write_python_reference
from llmforge.training import find_checkpoint, list_checkpoints

SETTINGS = {"eval_every_steps": 50, "eval_batches": 4, "sample_every_steps": 100, "sample_tokens": 30, "keep_last": 2}
SETTINGS |= {"dropout": 0.1, "grad_accum_steps": 2, "micro_batch_size": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--save-every-steps", type=int, default=5)
    parser.add_argument(
        "--longest-wait", type=float, default=2.0, help="seconds from the first new checkpoint to the kill"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        text = write_python_reference(Path(folder) / "text.txt")
        start = command(text, Path(folder) / "killed", args)
        resume = [sys.executable, "-m", "llmforge", "train", "--resume", str(Path(folder) / "killed")]
        kills, during_save, steps = 0, 0, []
        while kills < args.kills:
            run = subprocess.Popen(resume if kills else start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for_first_step(Path(folder) / "killed", run)
            time.sleep(moments.uniform(0.0, args.longest_wait))
            run.kill()
            assert run.wait() == -9, f"run {kills + 1} ended by itself with {run.returncode}: more --steps are needed"
            kills += 1
            during_save += any((Path(folder) / "killed").glob(".tmp-*"))
            steps.append(newest_step(Path(folder) / "killed"))
            print(f"kill {kills}: newest checkpoint is of step {steps[-1]}", flush=True)
        subprocess.run(resume, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        subprocess.run(
            command(text, Path(folder) / "alone", args),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ends = [final_state(Path(folder) / name, args.steps) for name in ("killed", "alone")]
    machine.write(
        "kill-and-resume",
        {
            **machine.describe(torch.device("cpu")),
            "kills": kills,
            "kills_while_a_checkpoint_was_being_written": during_save,
            "resumptions_that_failed": 0,
            "steps_at_the_kills": steps,
            "same_weights": ends[0]["weights"] == ends[1]["weights"],
            "same_optimizer_state": ends[0]["optimizer"] == ends[1]["optimizer"],
            "sha256_of_the_weights": ends[0]["weights"],
        },
    )
    assert ends[0] == ends[1], "the killed run ended with other bits"


def command(text: Path, out: Path, args: argparse.Namespace) -> list[str]:
    settings = {**SETTINGS, "max_steps": args.steps, "save_every_steps": args.save_every_steps, "out_dir": out}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "llmforge", "train", str(text), "--preset", "char-gpt-cpu", *sets]


def wait_for_first_step(out: Path, run: subprocess.Popen[bytes]) -> None:
    """Until this process has written something new: start-up takes seconds, the interesting moments come after."""
    before = max((folder.name for folder in list_checkpoints(out)), default="") if out.is_dir() else ""
    while run.poll() is None:
        newest = max((folder.name for folder in list_checkpoints(out)), default="") if out.is_dir() else ""
        if newest > before or any(out.glob(f".tmp-{run.pid}-*")):
            return
        time.sleep(0.005)


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
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "optimizer": digest.hexdigest()}


if __name__ == "__main__":
    main()
