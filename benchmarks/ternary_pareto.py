"""Bytes against loss: what a file of a given size is best made of.

    python benchmarks/ternary_pareto.py tinyshakespeare.txt runs/ternary/shakespeare-256-float-0.001-0 runs/ternary/shakespeare-256-ours-... ...

Each run (of ternary_quality.py --keep, or any other on the same text) is written as GGUF: a float model as F16, Q8_0 and Q4_K_M, a
ternary one as TQ2_0. The loss is that of the file's weights over the whole validation part, the size that of the whole file.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch

import llmforge as lf
from llmforge.nn import bit_linears


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="that the runs were trained on")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--name", default="ternary-pareto")
    parser.add_argument("--plot", help="PNG to write")
    args = parser.parse_args()
    points: list[dict[str, Any]] = []
    for run in args.runs:
        model, tokenizer = lf.load(run)
        assert tokenizer is not None
        train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
        ternary = bool(bit_linears(model))
        for file_type in ["TQ2_0"] if ternary else ["F16", "Q8_0", "Q4_K_M"]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.gguf"
                report = lf.export_gguf(model, tokenizer, path, file_type=file_type)
                in_file, _ = lf.load(path)
                config = lf.TrainConfig(max_steps=1, micro_batch_size=8, eval_batches=None, device="cpu")
                loss = lf.Trainer(in_file, train_data, val_data=val_data, config=config).evaluate().loss
            point = {"run": Path(run).name, "ternary": ternary, "file_type": file_type, "bytes": report.bytes}
            point |= {"parameters": model.num_params(), "layers": model.config.num_hidden_layers, "val_loss": loss}
            points.append(point | {"bits_per_weight": report.bits_per_weight})
    for point in points:
        point["on_the_front"] = not any(
            other["bytes"] <= point["bytes"] and other["val_loss"] < point["val_loss"] for other in points
        )
    if args.plot:
        plot(points, args.plot)
    machine.write(args.name, {**machine.describe(torch.device("cpu")), "text": Path(args.text).name, "points": points})


def plot(points: list[dict[str, Any]], path: str) -> None:
    """Bytes and loss of all files; the ternary ones and those of each float type joined."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for file_type in dict.fromkeys(point["file_type"] for point in points):
        of_type = sorted((p for p in points if p["file_type"] == file_type), key=lambda p: p["bytes"])
        label = f"ternary, {file_type}" if of_type[0]["ternary"] else f"float, {file_type}"
        sizes, losses = [p["bytes"] / 1e6 for p in of_type], [p["val_loss"] for p in of_type]
        axes.plot(sizes, losses, marker="o", linewidth=2 if of_type[0]["ternary"] else 1, label=label)
        for p in of_type:
            axes.annotate(
                f"{p['layers']} layers",
                (p["bytes"] / 1e6, p["val_loss"]),
                fontsize=7,
                xytext=(3, 4),
                textcoords="offset points",
            )
    axes.set(xscale="log", xlabel="whole file, MB", ylabel="validation loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
