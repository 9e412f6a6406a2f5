"""A BitNet of your own: trained with ternary weights, exported as it was trained, and checked in llama.cpp and transformers.

    python examples/ternary_from_scratch.py mybook.txt

Or without a script: llmforge train mybook.txt --preset bitnet-15m --twin, which trains the same model as floats, too, and reports
what the ternary one loses. With the packages of llmforge[verify] both other programs are asked; without, the files are written.
"""

import argparse
import importlib.util

import torch

import llmforge as lf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help="a UTF-8 text file")
parser.add_argument("--steps", type=int, default=2_000)
parser.add_argument("--vocab-size", type=int, default=4_096)
parser.add_argument("--width", type=int, default=512, help="a multiple of 256, the block of ternary weights")
parser.add_argument("--out", default="runs/bitnet")
args = parser.parse_args()

tokenizer = lf.BPETokenizer.from_text_file(args.text, vocab_size=args.vocab_size)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
torch.manual_seed(0)
model = lf.BitNet(
    lf.BitNetConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=4,
        num_attention_heads=args.width // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        act_quant="group",  # activations as llama.cpp rounds them: what it computes is what was trained
    )
)
config = lf.TrainConfig(max_steps=args.steps, micro_batch_size=8, recipe="bitnet", out_dir=args.out)
trainer = lf.Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
if trainer.resume():
    print(f"going on from step {trainer.step}")
trainer.train()

lf.export_hf(model, tokenizer, f"{args.out}/hf", overwrite=True)  # packed: two bits per weight
report = lf.export_gguf(model, tokenizer, f"{args.out}/model.gguf", file_type="TQ2_0")
print(
    f"wrote {args.out}/hf and {report.path}: {report.bits_per_weight:.2f} bits per weight with all that is in the file"
)
if importlib.util.find_spec("llama_cpp") is not None:
    print(lf.verify_gguf(report.path, model, tokenizer))
