"""How much of what quantization costs does quantization-aware training win back?

    python benchmarks/quantize_aware.py runs/quijote --text quijote.txt

A trained run goes on for some steps in several ways from the same weights, on the same batches, with the same learning rates: as a
float model, and as the matrices that the GGUF file of each type will have. Losses are means over the whole validation part, over the
same tokens everywhere. The gap of a file type is what plain export costs; two gaps are given:

    before      the start's file against the start
    same_steps  the file of the float model that was trained as long against that model: what more training wins is in both

closed = (loss of plain export - loss of the trained file) / gap. The trained file's loss is that of the file, read back.
"""

import argparse
import copy
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmforge as lf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder, or anything that llmforge.load reads")
    parser.add_argument("--text", required=True, help="the UTF-8 text that it was trained on")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="as in the run: its last part is for validation"
    )
    parser.add_argument("--file-types", nargs="+", default=["Q4_0", "Q4_K_S", "Q4_K_M"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument(
        "--lr", type=float, default=3e-4, help="after a warm-up of a tenth of the steps; then cosine to 0"
    )
    parser.add_argument("--seed", type=int, default=2_024, help="of the batches")
    parser.add_argument("--eval-windows", type=int, help="of the validation part; default: all")
    args = parser.parse_args()
    start, tokenizer = lf.load(args.run)
    assert tokenizer is not None
    train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=args.val_fraction)
    config = lf.TrainConfig(
        max_steps=args.steps,
        micro_batch_size=args.micro_batch_size,
        seq_len=args.seq_len,
        lr=args.lr,
        min_lr=0.0,
        warmup_steps=args.steps // 10,
        betas=(0.9, 0.99),
        seed=args.seed,
        device="cpu",
    )

    def trained(model: nn.Module) -> float:
        """Train; returns the median time of a step in seconds."""
        return machine.spread([m.seconds for m in lf.Trainer(model, train_data, config=config)])["median"]

    def losses(model: nn.Module) -> Tensor:
        return losses_of(model, val_data, args.seq_len, args.eval_windows)

    before = losses(start)
    longer = copy.deepcopy(start)
    float_seconds = trained(longer)
    after = losses(longer)
    result: dict[str, Any] = {
        **machine.describe(torch.device("cpu")),
        "parameters": start.num_params(),
        "text": Path(args.text).name,
        "validation_tokens": before.numel(),
        "steps": args.steps,
        "tokens_per_step": args.micro_batch_size * args.seq_len,
        "lr": args.lr,
        "loss_start": mean(before),
        "loss_float_same_steps": mean(after),
        "seconds_per_step_float": round(float_seconds, 3),
        "file_types": {},
    }
    for file_type in args.file_types:
        export_before, export_after = losses(rounded(start, file_type)), losses(rounded(longer, file_type))
        model = copy.deepcopy(start)
        types = lf.quantize_aware_(model, file_type)
        seconds = trained(model)
        in_training = losses(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            lf.export_gguf(model, tokenizer, path, file_type=file_type)
            from_file, _ = lf.load(path)
            in_file = losses(from_file)
            text = tokenizer.decode(val_data.ids[:4_096].tolist())
            report = lf.verify_gguf(path, model, tokenizer, text=text, max_tokens=4_096)
        result["file_types"][file_type] = {
            "types": {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))},
            "seconds_per_step": round(seconds, 3),
            "loss_file_of_start": mean(export_before),
            "loss_file_of_float_same_steps": mean(export_after),
            "loss_in_training": mean(in_training),
            "loss_file": mean(in_file),
            "file_computes_the_same_losses": torch.equal(in_training, in_file),
            "before": gap(before, export_before, in_file),
            "same_steps": gap(after, export_after, in_file),
            "llama_cpp": {
                key: value for key, value in dataclasses.asdict(report).items() if key.startswith(("kl", "perplexity"))
            },
        }
    machine.write("quantize-aware", result)


def rounded(model: nn.Module, file_type: str) -> nn.Module:
    """The model as its file of that type has it, without training."""
    model = copy.deepcopy(model)
    lf.quantize_aware_(model, file_type)
    return model


@torch.no_grad()
def losses_of(model: nn.Module, data: lf.TokenDataset, seq_len: int, windows: int | None) -> Tensor:
    """Losses in nats (windows, seq_len), each of another token of the data, in their order."""
    model.eval()
    count = (len(data) - 1) // seq_len
    rows = []
    for first in range(0, min(count, windows or count)):
        ids = torch.from_numpy(data.ids[first * seq_len : (first + 1) * seq_len + 1].astype("int64"))
        rows.append(F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none"))
    return torch.stack(rows)


def mean(losses: Tensor) -> float:
    return round(losses.double().mean().item(), 5)


def gap(reference: Tensor, exported: Tensor, trained: Tensor) -> dict[str, float]:
    """What export costs, what training wins back of it, and the standard error of that over the windows (paired)."""
    cost = (exported - reference).double().mean(1)
    won = (exported - trained).double().mean(1)
    share = (won.mean() / cost.mean()).item()
    error = ((won - share * cost).std() / math.sqrt(len(cost)) / cost.mean().abs()).item()  # of a ratio of means
    return {
        "gap": round(cost.mean().item(), 5),
        "gap_perplexity": round(math.exp(exported.mean().item()) - math.exp(reference.mean().item()), 4),
        "won_back": round(won.mean().item(), 5),
        "closed": round(share, 3),
        "closed_standard_error": round(error, 3),
    }


if __name__ == "__main__":
    main()
