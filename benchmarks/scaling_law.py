"""Whether a law fitted to small runs predicts a larger one: loss over weights and tokens, and the loss of a run that the fit has not seen.

    python benchmarks/scaling_law.py tinyshakespeare.txt --plot docs/scaling-law.png

Models of characters, 2 layers, one learning rate for all widths by muP. The runs to predict are larger than all others in both weights and
tokens. What the folder of --out holds already is not trained again.
"""

import argparse
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
import torch

import llmforge as lf
from llmforge.training import ScalingLaw, SweepRun, fit_scaling_law, mup_init_, sweep

ROWS, SEQ_LEN, BASE_WIDTH = 8, 64, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 48, 64])
    parser.add_argument("--steps", nargs="+", type=int, default=[150, 300, 600])
    parser.add_argument("--held-out", nargs=2, type=int, default=[96, 1200], metavar=("WIDTH", "STEPS"))
    parser.add_argument("--lr", type=float, default=2**-8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", default="runs/scaling-law-benchmark")
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--max-seconds", type=float, help="begin no run after so long; call again to go on")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = lf.CharTokenizer.from_text_file(args.text)
    train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
    begin = time.perf_counter()

    def measure(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        if args.max_seconds is not None and time.perf_counter() - begin > args.max_seconds:
            raise SystemExit("the same command goes on")
        torch.manual_seed(settings["seed"])
        width, steps = settings["width"], settings["steps"]
        model = lf.Llama(
            lf.LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=width,
                intermediate_size=5 * width // 2,
                num_hidden_layers=2,
                num_attention_heads=width // 16,
                max_position_embeddings=SEQ_LEN,
                tie_word_embeddings=True,
                qk_norm=True,
            )
        )
        mup_init_(model, BASE_WIDTH)
        config = lf.TrainConfig(
            max_steps=steps,
            micro_batch_size=ROWS,
            lr=args.lr,
            min_lr=0.0,
            mup_base_width=BASE_WIDTH,
            schedule="linear",
            warmup_steps=steps // 10,
            eval_batches=80,
            eval_every_steps=None,
            device="cpu",
            seed=settings["seed"],
        )
        start = time.process_time()
        loss = lf.Trainer(model, train_data, val_data=val_data, config=config).train(progress=False).val_loss
        seconds = round(time.process_time() - start, 1)
        return {
            "loss": loss,
            "num_params": model.num_params(),
            "num_tokens": steps * ROWS * SEQ_LEN,
            "cpu_seconds": seconds,
        }

    def show(run: SweepRun) -> None:
        print(run.folder, run.values, flush=True)

    inputs = {"text": Path(args.text).name, "lr": args.lr}
    grid = {"width": args.widths, "steps": args.steps}
    runs = sweep(measure, grid, out_dir=Path(args.out) / "fitted", seeds=args.seeds, inputs=inputs, on_run=show).runs
    width, steps = args.held_out
    grid = {"width": [width], "steps": [steps]}
    held_out = sweep(
        measure, grid, out_dir=Path(args.out) / "held-out", seeds=args.seeds, inputs=inputs, on_run=show
    ).runs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        law = fit_scaling_law(*columns(runs))
    n, d, losses = columns(held_out)
    measured, predicted = sum(losses) / len(losses), law.loss(n[0], d[0])
    # What one would have guessed without a law: the best loss of the runs that were fitted.
    naive = min(sum(p.loss for p in runs if p.settings == r.settings) / len(args.seeds) for r in runs)
    result = {
        **machine.describe(torch.device("cpu")),
        "text": Path(args.text).name,
        "lr": args.lr,
        "seeds": args.seeds,
        "law": {name: getattr(law, name) for name in ("E", "A", "alpha", "B", "beta")},
        "standard_errors": {name: error if math.isfinite(error) else None for name, error in law.errors.items()},
        "residual": law.residual,
        "warnings": [str(warning.message) for warning in caught],
        "held_out": {
            "num_params": n[0],
            "num_tokens": d[0],
            "measured": measured,
            "predicted": predicted,
            "error": predicted - measured,
            "best_of_the_fitted": naive,
        },
        "runs": [{**run.settings, "seed": run.seed, **run.values} for run in [*runs, *held_out]],
    }
    machine.write("scaling-law", result)
    if args.plot:
        plot(result, law, Path(args.plot))


def columns(runs: Any) -> tuple[list[float], list[float], list[float]]:
    return tuple([run.values[name] for run in runs] for name in ("num_params", "num_tokens", "loss"))  # type: ignore[return-value]


def plot(result: dict[str, Any], law: ScalingLaw, png: Path) -> None:
    """Points as measured, lines as the law has them, one for each number of tokens; the run to predict apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    held_out = result["held_out"]
    tokens = sorted({run["num_tokens"] for run in result["runs"]})
    sizes = sorted({run["num_params"] for run in result["runs"]})
    grid = [sizes[0] * (sizes[-1] / sizes[0]) ** (k / 50) for k in range(51)]
    for number, count in enumerate(tokens):
        color, is_held_out = f"C{number}", count == held_out["num_tokens"]
        points = [(run["num_params"], run["loss"]) for run in result["runs"] if run["num_tokens"] == count]
        label = f"{count / 1e3:.0f}k tokens" + (" (not fitted)" if is_held_out else "")
        axes.plot(
            *zip(*points, strict=True),
            "*" if is_held_out else "o",
            color=color,
            markersize=12 if is_held_out else 5,
            label=label,
        )
        axes.plot(grid, [law.loss(n, count) for n in grid], "--" if is_held_out else "-", color=color, linewidth=1)
    axes.set(xscale="log", xlabel="weights", ylabel="validation loss (nats per character)")
    axes.set_title("loss(N, D) = E + A/N^alpha + B/D^beta: lines fitted to the dots", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(png, dpi=120)


if __name__ == "__main__":
    main()
