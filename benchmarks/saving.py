"""What a checkpoint costs the run: how long a save stops training, at once and in the background.

    python benchmarks/saving.py

A GPT of 30 million weights with AdamW's state, on the CPU or the device named. `stall` is the time that a save takes from training.
A background save goes on beside it and shares the processors with it: so whole runs are timed as well, with a save every few steps
in the background, at once, and without any. Rounds of the three alternate, so that a load that comes and goes hits all of them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import machine
import torch

from llmforge import GPT, GPTConfig, TrainConfig, Trainer
from llmforge.training.checkpoint import list_checkpoints

BATCH, SEQ_LEN, VOCAB_SIZE = 1, 64, 8192


class RandomTokens:
    """Batches of random ids, a function of the step."""

    def batch(self, step: int, *, batch_size: int, seq_len: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(VOCAB_SIZE, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(step))
        return ids[:, :-1], ids[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=5, help="of each kind")
    parser.add_argument("--steps-per-save", type=int, default=8)
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=Path.cwd()) as folder:  # /tmp may be no disk
        config = TrainConfig(
            max_steps=10**6, micro_batch_size=BATCH, out_dir=folder, device=args.device, dtype="float32", keep_last=1
        )
        shape = GPTConfig(vocab_size=VOCAB_SIZE, block_size=SEQ_LEN, n_layer=8, n_head=8, n_embd=512)
        trainer = Trainer(GPT(shape), RandomTokens(), config=config)
        steps(trainer, 3)
        weights = trainer.model.num_params()
        rounds: dict[str, list[float]] = {"without": [], "in_background": [], "at_once": []}
        stalls: dict[str, list[float]] = {"in_background": [], "at_once": []}
        writes = []
        for _ in range(args.saves):
            rounds["without"].append(steps(trainer, args.steps_per_save))

            start = time.perf_counter()
            trainer.save()
            stalls["at_once"].append(time.perf_counter() - start)
            rounds["at_once"].append(stalls["at_once"][-1] + steps(trainer, args.steps_per_save))

            start = time.perf_counter()
            trainer._writer.begin(trainer._snapshot)
            stalls["in_background"].append(time.perf_counter() - start)
            thread = trainer._writer._thread
            training, was_alive = 0.0, 0.0
            for _ in range(args.steps_per_save):
                training += steps(trainer, 1)
                was_alive = training if thread.is_alive() else was_alive
            writes.append(was_alive)
            rounds["in_background"].append(stalls["in_background"][-1] + training)
            trainer._writer.finish()
        (newest,) = list_checkpoints(Path(folder))
        checkpoint_bytes = sum(file.stat().st_size for file in newest.iterdir())
    machine.write(
        "saving",
        {
            **machine.describe(device),
            "weights": weights,
            "checkpoint_bytes": checkpoint_bytes,
            "steps_per_save": args.steps_per_save,
            "stall_seconds": {name: machine.spread(seconds) for name, seconds in stalls.items()},
            "seconds_per_round": {name: machine.spread(seconds) for name, seconds in rounds.items()},
            "seconds_until_it_is_written_beside_training": machine.spread(writes),
        },
    )


def steps(trainer: Trainer, number: int) -> float:
    """Seconds that so many steps take."""
    start = time.perf_counter()
    for _ in range(number):
        next(trainer)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
