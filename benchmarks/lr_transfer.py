"""Whether the best learning rate of a narrow model is the best of a wide one: loss against learning rate, width by width.

    python benchmarks/lr_transfer.py tinyshakespeare.txt
    python benchmarks/lr_transfer.py tinyshakespeare.txt --rules standard mup --base-width 32 --name lr-transfer-base-32

    standard    AdamW, the same rate for all weights
    mup         AdamW with TrainConfig.mup_base_width
    muon        the same with Muon for the matrices; its rate is what is varied

Rates are tried by factors of 2 until the best lies between two that are worse; the other seeds take the best and its neighbours. The
valley of a width is at the lowest point of the parabola through log2(lr) and loss at the best rate and its neighbours, so that a shift of
less than a factor of 2 shows. `price` is what taking over the narrowest model's best rate costs the widest, in nats. What the result
holds already is not trained again.

`change_in_first_steps`: how much the first steps change the last block's output and the logits, root mean squares; by muP's promise as
much at any width (the coordinate check of Yang et al. 2022, arXiv:2203.03466, D.1).
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import machine
import torch

import llmforge as lf
from llmforge.training.mup import mup_init_

START = {"standard": 2.0**-7, "mup": 2.0**-7, "muon": 2.0**-5}
HEAD_DIM = 16
COORDINATE_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--rules", nargs="+", default=list(START), choices=list(START))
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--coordinate-widths", nargs="+", type=int, default=[32, 128, 512])
    parser.add_argument("--base-width", type=int, default=128, help="of mup and muon")
    parser.add_argument("--name", default="lr-transfer", help="of the result")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument(
        "--max-seconds", type=float, default=math.inf, help="begin no run after so long; call again to go on"
    )
    parser.add_argument("--plot", metavar="PNG")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = lf.CharTokenizer.from_text_file(args.text)
    train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
    path = machine.RESULTS / f"{args.name}.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs: list[dict[str, Any]] = before.get("runs", [])
    deadline = time.perf_counter() + args.max_seconds
    base = args.base_width
    result = {
        **machine.describe(torch.device("cpu")),
        "text": Path(args.text).name,
        "layers": args.layers,
        "steps": args.steps,
        "tokens_per_step": args.micro_batch_size * args.seq_len,
        "base_width": base,
        "change_in_first_steps": before.get("change_in_first_steps", {}),
        "rules": {},
        "runs": runs,
    }

    def save(news: dict[str, Any]) -> None:
        result["rules"] = summary(runs, args.rules, args.widths)
        machine.RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(news), flush=True)

    def trainer_of(rule: str, width: int, lr: float, seed: int) -> lf.Trainer:
        torch.manual_seed(seed)
        model = lf.Llama(
            lf.LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=width,
                intermediate_size=5 * width // 2,
                num_hidden_layers=args.layers,
                num_attention_heads=width // HEAD_DIM,
                max_position_embeddings=args.seq_len,
                tie_word_embeddings=True,
                qk_norm=True,
            )
        )
        settings: dict[str, Any] = {"lr": lr}
        if rule == "muon":
            settings = {"lr": START["standard"], "optimizer": "muon", "muon_lr": lr}
        if rule != "standard":
            mup_init_(model, base)
            settings["mup_base_width"] = base
        config = lf.TrainConfig(
            max_steps=args.steps,
            micro_batch_size=args.micro_batch_size,
            warmup_steps=args.steps // 10,
            schedule="linear",
            min_lr=0.0,
            eval_batches=40,
            eval_every_steps=None,
            device="cpu",
            seed=seed,
            **settings,
        )
        return lf.Trainer(model, train_data, val_data=val_data, config=config)

    def coordinates(rule: str, width: int) -> dict[str, float]:
        """Root mean square of what the first steps change, on the same text: the last block's output, and the logits."""
        trainer = trainer_of(rule, width, START[rule] / 2, args.seeds[0])
        seen: list[torch.Tensor] = []
        trainer.model.model.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        idx = val_data.batch(0, batch_size=args.micro_batch_size, seq_len=args.seq_len, seed=0)[0]
        outputs = []
        for _ in range(2):
            with torch.no_grad():
                logits = trainer.model(idx)
            outputs.append({"block": seen[-1], "logits": logits})
            if len(outputs) == 1:
                for _ in range(min(COORDINATE_STEPS, args.steps)):
                    next(trainer)
        before, after = outputs
        return {name: round((after[name] - before[name]).square().mean().sqrt().item(), 4) for name in before}

    def loss_of(rule: str, width: int, lr: float, seed: int) -> float:
        for done in runs:
            if (done["rule"], done["width"], done["lr"], done["seed"]) == (rule, width, lr, seed):
                return float("inf") if done["val_loss"] is None else float(done["val_loss"])
        if time.perf_counter() > deadline:
            raise SystemExit(f"{len(runs)} runs done; the same command goes on")
        trainer = trainer_of(rule, width, lr, seed)
        start = time.process_time()
        loss = trainer.train(progress=False).val_loss
        assert loss is not None
        runs.append(
            {
                "rule": rule,
                "width": width,
                "lr": lr,
                "seed": seed,
                "val_loss": round(loss, 4) if math.isfinite(loss) else None,
                "cpu_seconds": round(time.process_time() - start, 1),
            }
        )
        save(runs[-1])
        return loss

    for rule in args.rules:
        if rule not in result["change_in_first_steps"]:
            result["change_in_first_steps"][rule] = {str(w): coordinates(rule, w) for w in args.coordinate_widths}
            save({rule: result["change_in_first_steps"][rule]})
    for rule in args.rules:
        for width in args.widths:
            first = args.seeds[0]
            losses = {START[rule] * 2.0**k: 0.0 for k in (-1, 0, 1)}
            losses = {lr: loss_of(rule, width, lr, first) for lr in losses}
            while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
                lr = best / 2 if best == min(losses) else best * 2
                losses[lr] = loss_of(rule, width, lr, first)
            for seed in args.seeds[1:]:
                for lr in (best / 2, best, best * 2):
                    loss_of(rule, width, lr, seed)
        # The rate that the narrowest model would hand on must have been tried by the widest.
        for seed in args.seeds:
            loss_of(rule, args.widths[-1], best_rate(runs, rule, args.widths[0]), seed)
    result["rules"] = summary(runs, args.rules, args.widths)
    machine.write(args.name, result)
    if args.plot:
        plot(result, Path(args.plot))


def mean_losses(runs: list[dict[str, Any]], rule: str, width: int) -> dict[float, float]:
    """Loss by learning rate, over the seeds."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if run["rule"] == rule and run["width"] == width:
            found.setdefault(run["lr"], []).append(math.inf if run["val_loss"] is None else run["val_loss"])
    return {lr: sum(losses) / len(losses) for lr, losses in sorted(found.items())}


def best_rate(runs: list[dict[str, Any]], rule: str, width: int) -> float:
    losses = mean_losses(runs, rule, width)
    return min(losses, key=losses.__getitem__)


def valley(losses: dict[float, float]) -> float | None:
    """The learning rate at the lowest point of the parabola through the best rate and its neighbours."""
    rates = sorted(losses)
    best = rates.index(min(losses, key=losses.__getitem__))
    if best in (0, len(rates) - 1):
        return None
    left, middle, right = (losses[rates[best + k]] for k in (-1, 0, 1))
    return rates[best] * 2.0 ** ((left - right) / (2 * (left - 2 * middle + right)))


def summary(runs: list[dict[str, Any]], rules: list[str], widths: list[int]) -> dict[str, Any]:
    """For each rule and width the losses and the valley; how far it moves from the narrowest to the widest model, and what that costs."""
    found: dict[str, Any] = {}
    for rule in rules:
        curves = {width: mean_losses(runs, rule, width) for width in widths}
        curves = {width: losses for width, losses in curves.items() if losses}
        found[rule] = {
            "widths": {
                str(width): {
                    "losses": {f"{lr:g}": round(loss, 4) for lr, loss in losses.items()},
                    "valley": valley(losses),
                }
                for width, losses in curves.items()
            }
        }
        if len(curves) == len(widths):
            narrow, wide = curves[widths[0]], curves[widths[-1]]
            ends = [valley(narrow), valley(wide)]
            taken_over = wide.get(min(narrow, key=narrow.__getitem__))
            if all(ends):
                found[rule]["octaves"] = round(math.log2(ends[1] / ends[0]), 2)
            if taken_over is not None:
                found[rule]["price"] = round(taken_over - min(wide.values()), 4)
    return found


def plot(result: dict[str, Any], png: Path) -> None:
    """One field for each rule, one line for each width, a star at its best rate."""
    from matplotlib.figure import Figure

    rules = result["rules"]
    figure = Figure(figsize=(4.2 * len(rules), 3.8), layout="constrained")
    fields = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    titles = {"standard": "AdamW, one rate for all", "mup": "AdamW, mup_base_width", "muon": "Muon"}
    for axes, (rule, found) in zip(fields, rules.items(), strict=True):
        for width, of_width in found["widths"].items():
            points = [(float(lr), loss) for lr, loss in of_width["losses"].items() if math.isfinite(loss)]
            [line] = axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"width {width}")
            axes.plot(*min(points, key=lambda point: point[1]), "*", markersize=13, color=line.get_color())
        axes.set(xlabel="learning rate", title=titles[rule])
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    fields[0].set_ylabel("validation loss")
    figure.savefig(png, dpi=120)


if __name__ == "__main__":
    main()
