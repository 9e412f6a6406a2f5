"""Train on texts from several places: books, folders, tables, JSON Lines; mixed by weights, without lines that are nearly the same.

python examples/many_sources.py quijote.txt articles.csv --field body --weights 1 2
"""

import argparse

import llmforge as lf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("texts", nargs="+", help="text files, folders, .jsonl, .csv, .parquet, hf:owner/name")
parser.add_argument("--field", help="of records: the one with the text")
parser.add_argument("--weights", nargs="+", type=float, help="one for each text: how many rows of a batch come from it")
parser.add_argument("--steps", type=int, default=2_000)
parser.add_argument("--vocab-size", type=int, default=2_048)
args = parser.parse_args()

sources = [{"path": path} for path in args.texts]
for source in sources:
    if args.field is not None and not source["path"].endswith(".txt"):
        source["field"] = args.field
for source, weight in zip(sources, args.weights or [], strict=False):
    source["weight"] = weight

tokenizer = lf.BPETokenizer.from_text_file(sources, vocab_size=args.vocab_size)
data = lf.TokenDataset.from_sources(sources, tokenizer, drop_near_duplicates=True)
train_data, val_data = data.split(val_fraction=0.1)
print(f"{len(train_data):,} tokens to learn from, {len(val_data):,} to test on")
if args.weights is not None:  # then it is a MixedDataset
    for name, share, part in zip(data.names, data.shares, data.parts, strict=True):
        print(f"{share:.0%} of the rows from the {len(part):,} tokens of {name}")

model = lf.GPT(
    lf.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=256, dropout=0.1)
)
config = lf.TrainConfig(max_steps=args.steps, micro_batch_size=16, lr=2e-3, out_dir="runs/many-sources")
trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
if trainer.resume():  # tokenization goes on after an interruption, too
    print(f"going on from step {trainer.step}")
print(f"validation loss {trainer.train().val_loss}")
