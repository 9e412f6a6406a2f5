"""The trainer with a module of your own, a loop of your own, and llmforge's layers.

A recurrent network learns the text; any module that maps (B, T) ids to (B, T, V) logits would do.

    python examples/your_own_model.py mybook.txt
"""

import argparse

from torch import Tensor, nn

import llmforge as lf
from llmforge.nn import LayerNorm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help="a UTF-8 text file")
parser.add_argument("--steps", type=int, default=1_000)
args = parser.parse_args()


class RecurrentModel(nn.Module):
    def __init__(self, vocab_size: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.norm = LayerNorm(width)
        self.output = nn.Linear(width, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        states, _ = self.recurrence(self.embedding(idx))
        return self.output(self.norm(states))  # (B, T, V)


tokenizer = lf.CharTokenizer.from_text_file(args.text)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
model = RecurrentModel(tokenizer.vocab_size)
config = lf.TrainConfig(max_steps=args.steps, micro_batch_size=32, seq_len=64, lr=3e-3, schedule="linear")
trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)

for metrics in trainer:  # hooks are ordinary code in an ordinary loop
    if metrics.step % 100 == 0:
        evaluation = trainer.evaluate()
        print(
            f"step {metrics.step}  loss {metrics.loss:.3f}  val {evaluation.loss:.3f}  {metrics.tokens_per_second:,.0f} tok/s"
        )

print(lf.generate_text(model, tokenizer, "", max_new_tokens=200, temperature=0.8, seed=0))
