"""What ternary weights cost: models of the same shape trained on the same tokens, each kind at its own best learning rate.

    python benchmarks/ternary_quality.py tinyshakespeare.txt --name shakespeare-256 --width 256 --keep runs/ternary
    python benchmarks/ternary_quality.py quijote.txt --vocab-size 4096 --name quijote-256 --width 256

    float       the twin: a Llama, linear schedule
    guide       the block of the "1-bit LLM" tutorials: LayerNorm, learned positions, ReLU, BitLinear everywhere (the output projection
                too), float activations, constant learning rate
    canonical   Microsoft's block (norms before o_proj and down_proj), scales in float32, activations rounded per token; its recipe:
                two-stage schedule, weight decay in the first half, ternary from the first step
    ours        BitNet's default block, scales in bfloat16, activations rounded per 256, TrainConfig(recipe="bitnet")

Learning rates are tried with the first seed, by factors of 2 until the best one lies between two that are worse; the other seeds take
it. What the result holds already is not trained again. Losses are means over the whole validation part.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

import llmforge as lf
from llmforge.nn import BitLinear, bit_linears, replace_linear_

LEARNING_RATES = {"float": (1e-3, 2e-3), "guide": (1e-3, 2e-3), "canonical": (2e-3, 4e-3), "ours": (2e-3, 4e-3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--name", required=True, help="of the result: ternary-quality-NAME.json")
    parser.add_argument("--vocab-size", type=int, help="byte-pair encoding of this size; default: characters")
    parser.add_argument("--kinds", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--lr", nargs="+", type=float, help="these alone")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more settings of kind ours")
    parser.add_argument("--keep", help="folder for the trained models, runs that llmforge can export")
    args = parser.parse_args()
    if args.vocab_size:
        tokenizer: Any = lf.BPETokenizer.from_text_file(args.text, vocab_size=args.vocab_size)
    else:
        tokenizer = lf.CharTokenizer.from_text_file(args.text)
    train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
    path = machine.RESULTS / f"ternary-quality-{args.name}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    result = {
        **machine.describe(torch.device("cpu")),
        "text": Path(args.text).name,
        "vocabulary": tokenizer.vocab_size,
        "width": args.width,
        "layers": args.layers,
        "steps": args.steps,
        "tokens": args.steps * args.micro_batch_size * args.seq_len,
        "runs": runs,
        "kinds": {},
    }

    def run(kind: str, lr: float, seed: int) -> float:
        for done in runs:
            if (done["kind"], done["lr"], done["seed"]) == (kind, lr, seed):
                return float(done["val_loss"])
        torch.manual_seed(seed)
        model = build(kind, tokenizer.vocab_size, args)
        settings = dict(max_steps=args.steps, micro_batch_size=args.micro_batch_size, seed=seed, lr=lr, device="cpu")
        settings |= dict(
            warmup_steps=args.steps // 10, eval_batches=None, eval_every_steps=None, sample_every_steps=None
        )
        folder = Path(args.keep) / f"{args.name}-{kind}-{lr:g}-{seed}" if args.keep else None
        if folder is not None:
            settings |= dict(out_dir=str(folder), save_every_steps=None)
        config = lf.TrainConfig.from_dict(
            {**settings, **SETTINGS[kind], **(own_settings(args) if kind == "ours" else {})}
        )
        trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
        start = time.perf_counter()
        loss = trainer.train(progress=False).val_loss
        assert loss is not None
        runs.append({"kind": kind, "lr": lr, "seed": seed, "val_loss": loss, "seconds": time.perf_counter() - start})
        runs[-1] |= {
            "parameters": sum(p.numel() for p in model.parameters()),
            "folder": folder.name if folder else None,
        }
        result["kinds"] = summary(runs)
        machine.RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(runs[-1]), flush=True)
        return loss

    for kind in args.kinds:
        losses = {lr: run(kind, lr, args.seeds[0]) for lr in args.lr or LEARNING_RATES[kind]}
        best = min(losses, key=losses.__getitem__)
        while args.lr is None and best in (min(losses), max(losses)):  # not between two that are worse
            lr = best / 2 if best == min(losses) else best * 2
            losses[lr] = run(kind, lr, args.seeds[0])
            best = min(losses, key=losses.__getitem__)
        for seed in args.seeds[1:]:
            run(kind, best, seed)
    machine.write(f"ternary-quality-{args.name}", {**result, "kinds": summary(runs)})


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "float": dict(schedule="linear", min_lr=0.0),
    "guide": dict(schedule="constant", weight_decay=0.01, grad_clip=None),
    "canonical": dict(recipe="bitnet", schedule="two-stage", weight_decay=0.1, quantize_after_fraction=0.0),
    "ours": dict(recipe="bitnet"),
}


def build(kind: str, vocab_size: int, args: argparse.Namespace) -> nn.Module:
    """A freshly initialised model."""
    if kind == "guide":
        shape = dict(block_size=args.seq_len, n_layer=args.layers, n_head=args.width // 64, n_embd=args.width)
        gpt = lf.GPT(
            lf.GPTConfig(vocab_size=vocab_size, activation_function="relu", tie_word_embeddings=False, **shape)
        )
        replace_linear_(gpt, BitLinear, skip=(), act_quant="none", scale_dtype=torch.float32)
        assert "lm_head" in bit_linears(gpt)
        return gpt
    config = lf.BitNetConfig(
        vocab_size=vocab_size,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        max_position_embeddings=args.seq_len,
        tie_word_embeddings=True,
        act_quant="group",
    )
    if kind == "float":
        return lf.Llama(config.float_twin())
    if kind == "canonical":
        config = config.replace(sub_norm=True, act_quant="token", scale_dtype="float32")
    return lf.BitNet(config)


def own_settings(args: argparse.Namespace) -> dict[str, str]:
    return dict(setting.split("=", 1) for setting in args.set)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each kind, at its best learning rate: the mean over the seeds, and the gap to the float twin seed by seed."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        of_kind = [run for run in runs if run["kind"] == kind]
        best = min(of_kind, key=lambda run: run["val_loss"] if run["seed"] == of_kind[0]["seed"] else float("inf"))[
            "lr"
        ]
        losses = {run["seed"]: run["val_loss"] for run in of_kind if run["lr"] == best}
        values = torch.tensor(list(losses.values()), dtype=torch.float64)
        found[kind] = {
            "lr": best,
            "val_loss": values.mean().item(),
            "losses": losses,
            "parameters": of_kind[0]["parameters"],
        }
        if "float" in found and kind != "float":
            gaps = torch.tensor(
                [losses[s] - found["float"]["losses"][s] for s in losses if s in found["float"]["losses"]]
            )
            found[kind] |= {"gap": gaps.mean().item(), "gap_min": gaps.min().item(), "gap_max": gaps.max().item()}
    return found


if __name__ == "__main__":
    main()
