"""Train on several GPUs, or several processes of a CPU, from a script of your own; with one process it is the same script.

    torchrun --nproc-per-node 2 examples/torchrun_script.py mybook.txt
    torchrun --nproc-per-node 4 --max-restarts 3 examples/torchrun_script.py mybook.txt --distributed fsdp

A step reads as many sequences, whatever the number of processes. A run that was stopped goes on, with any number of them; after one has
died, torchrun --max-restarts starts all of them again, and `resume` does the rest.
"""

import argparse

import torch

import llmforge as lf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help="a UTF-8 text file")
parser.add_argument("--out", default="runs/torchrun")
parser.add_argument("--steps", type=int, default=3_000)
parser.add_argument("--tokens-per-step", type=int, default=16_384, help="over all processes")
parser.add_argument("--distributed", choices=["ddp", "fsdp"], default="ddp")
args = parser.parse_args()

tokenizer = lf.CharTokenizer.from_text_file(args.text)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)

torch.manual_seed(0)
model = lf.GPT(lf.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=128))
config = lf.TrainConfig(
    max_steps=args.steps,
    micro_batch_size=2,
    tokens_per_step=args.tokens_per_step,
    distributed=args.distributed,
    out_dir=args.out,
)
trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
if trainer.resume() and trainer.ranks.is_first:
    print(f"going on after step {trainer.step}")
result = trainer.train()  # the first process alone prints, logs and writes

if trainer.ranks.is_first:  # the checkpoint is a model like any other, whole and in one file
    model, tokenizer = lf.load(result.checkpoint or args.out)
    print(lf.generate_text(model, tokenizer, "En un lugar", max_new_tokens=60, temperature=0.7, top_k=40, seed=0))
