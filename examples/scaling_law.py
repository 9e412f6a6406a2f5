"""What would a larger model reach, and how large should it be? A law fitted to small runs answers before the large one is trained.

    python examples/scaling_law.py mybook.txt

Twelve runs, some minutes on a CPU. What is done is not done again: stop it with Ctrl-C, and go on with the same command.
"""

import argparse

import torch

import llmforge as lf
from llmforge.training import fit_scaling_law, mup_init_, sweep

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help="a UTF-8 text file, or a folder of them")
parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64, 96], help="multiples of 16")
parser.add_argument("--steps", type=int, nargs="+", default=[150, 300, 600])
parser.add_argument("--out", default="runs/scaling-law")
args = parser.parse_args()

tokenizer = lf.CharTokenizer.from_text_file(args.text)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)


def measure(settings, folder):
    """One run. Its schedule ends with it: the loss halfway through a longer run is not the same."""
    width, steps = settings["width"], settings["steps"]
    torch.manual_seed(settings["seed"])
    model = lf.Llama(
        lf.LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            intermediate_size=5 * width // 2,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            qk_norm=True,
        )
    )
    mup_init_(model, 128)  # one learning rate for all widths
    config = lf.TrainConfig(
        max_steps=steps,
        micro_batch_size=8,
        lr=2**-8,
        min_lr=0.0,
        mup_base_width=128,
        schedule="linear",
        warmup_steps=steps // 10,
        eval_every_steps=None,
        seed=settings["seed"],
    )
    trainer = lf.Trainer(model, train_data, val_data=val_data, config=config)
    loss = trainer.train(progress=False).val_loss
    print(f"width {width}, {steps} steps: loss {loss:.4f}", flush=True)
    return {"loss": loss, "num_params": model.num_params(), "num_tokens": steps * 8 * 64}


result = sweep(measure, {"width": args.widths, "steps": args.steps}, out_dir=args.out, inputs={"text": args.text})
runs = [run.values for run in result.runs]
law = fit_scaling_law([r["num_params"] for r in runs], [r["num_tokens"] for r in runs], [r["loss"] for r in runs])
print(
    f"loss(N, D) = {law.E:.3f} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}, off by {law.residual:.1%}"
)
params, tokens = max(r["num_params"] for r in runs), max(r["num_tokens"] for r in runs)
print(f"twice the size and the tokens of the largest run: loss {law.loss(2 * params, 2 * tokens):.3f}")
best_params, best_tokens = law.optimal(4 * 6 * params * tokens)
print(f"four times its FLOPs are best spent on {best_params:,.0f} weights and {best_tokens:,.0f} tokens")
