"""Ternary weights in a module of your own: the same model as floats and with BitLinear, trained on the same batches.

    python examples/bitlinear_in_your_model.py mybook.txt

The model mixes tokens with causal convolutions; nothing in it is llmforge's but the linear layers and the norm.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmforge as lf
from llmforge.nn import BitLinear, RMSNorm, bit_linears, replace_linear_

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help="a UTF-8 text file")
parser.add_argument("--steps", type=int, default=1_000)
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mix = nn.Conv1d(width, width, kernel_size=8, groups=width)  # each channel sees 8 tokens
        self.up, self.gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (B, T, C)
        h = h + self.mix(F.pad(h.transpose(1, 2), (7, 0))).transpose(1, 2)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class ConvolutionalModel(nn.Module):
    context_length = 128  # what the Trainer cuts texts to

    def __init__(self, vocab_size: int, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.blocks(self.embedding(idx))))  # (B, T, V)


tokenizer = lf.CharTokenizer.from_text_file(args.text)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)

losses = {}
for kind, settings in {
    "float": {"lr": 2e-3, "schedule": "linear", "min_lr": 0.0},
    "ternary": {"recipe": "bitnet"},
}.items():
    torch.manual_seed(0)
    model = ConvolutionalModel(tokenizer.vocab_size)
    if kind == "ternary":
        names = replace_linear_(model, BitLinear)  # but for lm_head, which stays as it is
        print(f"{len(names)} layers are ternary: {', '.join(names[:3])} ...")
    config = lf.TrainConfig(max_steps=args.steps, micro_batch_size=16, eval_batches=20, **settings)
    trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
    for metrics in trainer:
        if metrics.step % 100 == 0:
            print(f"{kind}: step {metrics.step}  loss {metrics.loss:.3f}  {metrics.tokens_per_second:,.0f} tok/s")
    losses[kind] = trainer.evaluate().loss

print(f"validation loss: float {losses['float']:.4f}, ternary {losses['ternary']:.4f}")
layer = bit_linears(model)["blocks.0.up"]
codes, scale = layer.codes()  # what a file would hold
shares = {code: f"{(codes == code).float().mean().item():.0%}" for code in (-1, 0, 1)}
print(f"blocks.0.up: {codes.numel():,} weights of {scale.item():.4f} times {shares}")
