"""What each part of the modern recipe is worth: validation loss after as many tokens, part by part, three seeds.

    python benchmarks/loss_per_token.py tinyshakespeare.txt

Model and data are nanoGPT's published CPU setting: characters, 0.8 million weights, context 64, 12 x 64 tokens per step, the last
tenth of the text for validation, all of which is evaluated. nanoGPT itself reports 1.88 after 2,000 steps. Each variant is the one
that it is compared with (`against`) and one change. After the preset `modern` comes what could be in it
beside or instead, and what else explains it.

Variants that the result already has are skipped, so the script goes on where it was stopped; `--variants` runs some of them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import machine
import torch
from torch import nn

from llmforge import GPT, CharTokenizer, GPTConfig, Llama, LlamaConfig, TokenDataset, TrainConfig, Trainer
from llmforge.models.gpt import MLP, CausalSelfAttention
from llmforge.nn import LayerNorm, RMSNorm

STEPS = 400
NANOGPT_STEPS = 2_000
PUBLISHED = 1.8857  # its train.py with the CPU line of its README; the README says 1.88

Build = Callable[[int], nn.Module]


def gpt(**changes: Any) -> Build:
    """nanoGPT's model, with its GELU."""
    return lambda vocab_size: GPT(
        GPTConfig.preset("char-gpt-cpu", vocab_size=vocab_size, activation_function="gelu", **changes)
    )


def modern(**changes: Any) -> Build:
    return lambda vocab_size: Llama(LlamaConfig.preset("modern", vocab_size=vocab_size, **changes))


def rope(*, rms_norm: bool) -> Build:
    """nanoGPT's block with rotary positions: a Llama whose feed-forward is GPT's, and its norms too without rms_norm."""

    def build(vocab_size: int) -> nn.Module:
        model: Any = modern(**PLAIN)(vocab_size)
        sizes = GPTConfig.preset("char-gpt-cpu", vocab_size=vocab_size, activation_function="gelu")
        for layer in model.model.layers:
            layer.mlp = MLP(sizes)
            for linear, std in ((layer.mlp.c_fc, 0.02), (layer.mlp.c_proj, 0.02 / (2 * sizes.n_layer) ** 0.5)):
                nn.init.normal_(linear.weight, std=std)
        if not rms_norm:
            for parent in list(model.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, RMSNorm):
                        setattr(parent, name, LayerNorm(sizes.n_embd, bias=False))
        return model

    return build


class Whole(CausalSelfAttention):
    """q, k and v as one matrix for Muon."""

    matrices_of: ClassVar = {"c_attn": 1}


def gpt_whole(vocab_size: int) -> nn.Module:
    model = gpt()(vocab_size)
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.__class__ = Whole
    return model


PLAIN: dict[str, Any] = dict(qk_norm=False, residual_init="scaled")
RELU2: dict[str, Any] = dict(hidden_act="relu2", intermediate_size=512)
COSINE: dict[str, Any] = dict(optimizer="adamw", schedule="cosine", lr=1e-3, min_lr=1e-4)
ADAMW: dict[str, Any] = dict(optimizer="adamw")  # and the preset's lr of 3e-3, linear to 0

# Name -> what it is compared with, the model, what differs from the preset's training.
VARIANTS: dict[str, tuple[str | None, Build, dict[str, Any]]] = {
    "nanoGPT block, AdamW 1e-3, cosine": (None, gpt(), COSINE),
    "+ AdamW 3e-3": ("nanoGPT block, AdamW 1e-3, cosine", gpt(), {**COSINE, "lr": 3e-3, "min_lr": 3e-4}),
    "+ linear to 0": ("+ AdamW 3e-3", gpt(), ADAMW),
    "+ RoPE": ("+ linear to 0", rope(rms_norm=False), ADAMW),
    "+ RMSNorm": ("+ RoPE", rope(rms_norm=True), ADAMW),
    "+ SwiGLU": ("+ RMSNorm", modern(**PLAIN), ADAMW),
    "+ QK-norm": ("+ SwiGLU", modern(residual_init="scaled"), ADAMW),
    "+ zero-initialised projections": ("+ QK-norm", modern(), ADAMW),
    "+ Muon 0.02: the preset modern": ("+ zero-initialised projections", modern(), {}),
    "modern, squared ReLU for SwiGLU": ("+ Muon 0.02: the preset modern", modern(**RELU2), {}),
    "modern, squared ReLU, no QK-norm (Arcee)": ("+ Muon 0.02: the preset modern", modern(**RELU2, qk_norm=False), {}),
    "modern, untied head": ("+ Muon 0.02: the preset modern", modern(tie_word_embeddings=False), {}),
    "modern, logits capped at 15": ("+ Muon 0.02: the preset modern", modern(final_logit_softcapping=15.0), {}),
    "nanoGPT block, Muon": ("+ linear to 0", gpt(), {}),
    "nanoGPT block, Muon, q, k, v as one matrix": ("nanoGPT block, Muon", gpt_whole, {}),
    "nanoGPT block, AdamW 3e-3, cosine to 0": ("+ linear to 0", gpt(), {**ADAMW, "schedule": "cosine"}),
    "nanoGPT block, AdamW 3e-3, WSD to 0": ("+ linear to 0", gpt(), {**ADAMW, "schedule": "wsd"}),
}
# After nanoGPT's tokens, which is the anchor.
ANCHOR = "nanoGPT block, AdamW 1e-3, cosine, 2,000 steps"
ANCHOR_TRAINING = {**COSINE, "max_steps": NANOGPT_STEPS, "warmup_steps": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="UTF-8 text file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, ANCHOR], default=[*VARIANTS, ANCHOR])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--table", action="store_true", help="print the result that is there as docs/training.md has it"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = CharTokenizer.from_text_file(args.text)
    data = TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
    name = f"loss-per-token-{Path(args.text).stem}"
    path = machine.RESULTS / f"{name}.json"
    if args.table:
        print(table(json.loads(path.read_text())["summary"]))
        return
    runs: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for seed in range(args.seeds):
        for variant in args.variants:
            if all(run["seed"] != seed for run in runs.get(variant, [])):
                runs.setdefault(variant, []).append(train(variant, seed, tokenizer.vocab_size, *data))
                write(name, args.text, runs)


def train(variant: str, seed: int, vocab_size: int, train_data: TokenDataset, val_data: TokenDataset) -> dict[str, Any]:
    _, build, changes = (None, gpt(), ANCHOR_TRAINING) if variant == ANCHOR else VARIANTS[variant]
    settings = {"max_steps": STEPS, "seed": seed, "device": "cpu", "eval_batches": None, **changes}
    config = TrainConfig.preset("modern", **settings)
    torch.manual_seed(seed)
    model = build(vocab_size)
    trainer = Trainer(model, train_data, config=config, val_data=val_data)
    start = time.process_time()
    for _ in trainer:
        pass
    return {
        "seed": seed,
        "val_loss": round(trainer.evaluate().loss, 4),
        "steps": config.max_steps,
        "weights": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| variant | compared with | weights | steps | validation loss (lowest to highest of the seeds) | gain |",
        "|---|---|---|---|---|---|",
    ]
    for variant, row in summary.items():
        gain = "" if row["gain"] is None else f"{row['gain']:+.3f}"
        losses = f"{row['val_loss']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
        against = "" if row["against"] is None else row["against"].removeprefix("+ ")
        lines.append(f"| {variant} | {against} | {row['weights']:,} | {row['steps']:,} | {losses} | {gain} |")
    return "\n".join(lines)


def write(name: str, text: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """The runs so far, in the order of the variants, with each one's gain over what it is compared with."""
    order = [variant for variant in [*VARIANTS, ANCHOR] if variant in runs]
    means = {v: statistics.mean(run["val_loss"] for run in runs[v]) for v in order}
    summary = {}
    for variant in order:
        losses = [run["val_loss"] for run in runs[variant]]
        against = VARIANTS[variant][0] if variant in VARIANTS else None
        summary[variant] = {
            "against": against,
            "val_loss": round(means[variant], 4),
            "lowest": min(losses),
            "highest": max(losses),
            "gain": round(means[against] - means[variant], 4) if against in means else None,
            "steps": runs[variant][0]["steps"],
            "weights": runs[variant][0]["weights"],
        }
    described = machine.describe(torch.device("cpu"))
    result = {**described, "text": Path(text).name, "tokens_per_step": 12 * 64, "published_by_nanogpt": PUBLISHED}
    machine.write(name, {**result, "summary": summary, "runs": {variant: runs[variant] for variant in order}})


if __name__ == "__main__":
    main()
