"""Train a small Llama on a text file, talk to it, and write it for llama.cpp and for transformers.

    python examples/llama_from_scratch.py mybook.txt

About 15 million weights: an hour or two on two CPU cores, minutes on a GPU. A run that was stopped goes on.
"""

import argparse

import torch

import llmforge as lf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help="a UTF-8 text file, or a folder of them")
parser.add_argument("--out", default="runs/llama")
parser.add_argument("--steps", type=int, default=3_000)
parser.add_argument("--vocab-size", type=int, default=8_192)
parser.add_argument(
    "--width", type=int, default=512, help="of the model; a multiple of 256 suits the quantized GGUF types"
)
args = parser.parse_args()

tokenizer = lf.BPETokenizer.from_text_file(args.text, vocab_size=args.vocab_size)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)

torch.manual_seed(0)
model = lf.Llama(
    lf.LlamaConfig.preset(
        "llama-15m", vocab_size=tokenizer.vocab_size, hidden_size=args.width, intermediate_size=5 * args.width // 2
    )
)
print(f"{model.num_params():,} weights, {len(train_data):,} tokens to learn from")
config = lf.TrainConfig(max_steps=args.steps, micro_batch_size=8, lr=1e-3, betas=(0.9, 0.99), out_dir=args.out)
trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
if trainer.resume():
    print(f"going on from step {trainer.step}")
trainer.train()

model.eval()
for text in ("En un lugar", "—Señor —dijo"):
    print(lf.generate_text(model, tokenizer, text, max_new_tokens=60, temperature=0.7, top_k=40, seed=0), end="\n\n")

lf.export_hf(model, tokenizer, f"{args.out}/hf", overwrite=True)  # a LlamaForCausalLM
lf.export_gguf(model, tokenizer, f"{args.out}/model.gguf", file_type="Q8_0")
print(f"wrote {args.out}/hf and {args.out}/model.gguf")
