"""nanoGPT's published CPU setting: the trainer beside nanoGPT's own loop, same model, same text, same evaluation.

    python benchmarks/nanogpt_cpu.py tinyshakespeare.txt --seeds 3

The setting is the CPU line of nanoGPT's README: 4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps, lr 1e-3 to 1e-4,
100 warm-up steps, beta2 0.99, dropout 0, the first 90 % of the text for training; it reports a validation loss of 1.88. Evaluated
as there (the mean of 20 random batches of 12, here repeated 20 times to know its spread) and on the whole validation text.

Sides: `nanogpt_loop`, a plain torch loop with random crops and the cosine schedule; `llmforge_cosine`, the trainer with the same
settings; `llmforge_preset`, the preset char-gpt-cpu as it is.
"""

import argparse
import statistics
import time

import machine
import numpy as np
import torch
import torch.nn.functional as F

from llmforge import GPT, CharTokenizer, GPTConfig, TokenDataset, TrainConfig, Trainer
from llmforge.training import build_optimizer, learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare's input.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--sides", nargs="+", default=["nanogpt_loop", "llmforge_cosine", "llmforge_preset"])
    parser.add_argument("--threads", type=int, help="of torch; one each lets several of these run side by side")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tokenizer = CharTokenizer.from_text_file(args.text)
    train_data, val_data = TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
    sides: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
    for seed in range(args.seeds):
        for side, results in sides.items():
            schedule = {} if side == "llmforge_preset" else {"schedule": "cosine"}
            config = TrainConfig.preset(
                "char-gpt-cpu", max_steps=args.steps, seed=seed, device="cpu", eval_batches=None, **schedule
            )
            torch.manual_seed(seed)
            model = GPT(GPTConfig.preset("char-gpt-cpu", vocab_size=tokenizer.vocab_size, activation_function="gelu"))
            trainer = Trainer(model, train_data, val_data=val_data, config=config)
            start = time.perf_counter()
            if side == "nanogpt_loop":
                nanogpt_loop(model, train_data, config)
            else:
                for _ in trainer:
                    pass
            seconds = time.perf_counter() - start
            estimates = nanogpt_estimates(model.eval(), val_data)
            results.append(
                {
                    "seed": seed,
                    "val_loss_of_the_whole_text": trainer.evaluate().loss,
                    "val_loss_as_nanogpt_mean": statistics.mean(estimates),
                    "val_loss_as_nanogpt_stdev": statistics.stdev(estimates),
                    "seconds": seconds,
                }
            )
            print(side, results[-1], flush=True)
    means = {
        side: {key: statistics.mean(result[key] for result in results) for key in results[0] if key != "seed"}
        for side, results in sides.items()
    }
    machine.write(
        "nanogpt-cpu",
        {**machine.describe(torch.device("cpu")), "steps": args.steps, "published": 1.88, "mean": means, "runs": sides},
    )


def random_crops(data: TokenDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """nanoGPT's get_batch: 12 crops of 64 tokens from anywhere."""
    starts = torch.randint(len(data) - 64, (12,)).tolist()
    rows = torch.from_numpy(np.stack([data.ids[s : s + 65] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def nanogpt_loop(model: GPT, data: TokenDataset, config: TrainConfig) -> None:
    """nanoGPT's training loop."""
    optimizer = build_optimizer(model, config)
    for step in range(config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = cross_entropy(model, *random_crops(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def nanogpt_estimates(model: GPT, data: TokenDataset, repetitions: int = 20) -> list[float]:
    """nanoGPT's estimate_loss with eval_iters=20, several times."""
    torch.manual_seed(0)
    return [
        statistics.mean(cross_entropy(model, *random_crops(data)).item() for _ in range(20)) for _ in range(repetitions)
    ]


def cross_entropy(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


if __name__ == "__main__":
    main()
