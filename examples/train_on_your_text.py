"""Train a small GPT on a text file, and write it for llama.cpp.

python examples/train_on_your_text.py mybook.txt
"""

import argparse

import llmforge as lf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help="a UTF-8 text file, or a folder of them")
parser.add_argument("--out", default="runs/my-text")
parser.add_argument("--steps", type=int, default=2_000)
parser.add_argument("--vocab-size", type=int, default=2_048)
args = parser.parse_args()

tokenizer = lf.BPETokenizer.from_text_file(args.text, vocab_size=args.vocab_size)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
print(f"{len(train_data):,} tokens to learn from, {len(val_data):,} to test on")

model = lf.GPT(
    lf.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=256, dropout=0.1)
)
config = lf.TrainConfig(max_steps=args.steps, micro_batch_size=16, lr=2e-3, out_dir=args.out)
trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
if trainer.resume():  # the script may be started again after any interruption
    print(f"going on from step {trainer.step}")
result = trainer.train()
print(f"validation loss {result.val_loss} after {result.step} steps")

print(lf.generate_text(model, tokenizer, "", max_new_tokens=200, temperature=0.8, top_k=40, seed=0))
report = lf.export_gguf(model, tokenizer, f"{args.out}/model.gguf", file_type="Q8_0")
print(f"wrote {report.path}")
