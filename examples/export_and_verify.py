"""Write a trained run for transformers and for llama.cpp, and check that both compute what the model computes.

Needs: pip install "llmforge[verify]" transformers

    python examples/export_and_verify.py runs/my-text
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmforge as lf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="a run folder of llmforge train")
parser.add_argument("--out", default="out")
args = parser.parse_args()

model, tokenizer = lf.load(args.run)

lf.export_hf(model, tokenizer, f"{args.out}/hf", overwrite=True)
theirs = AutoModelForCausalLM.from_pretrained(f"{args.out}/hf")
prompt = lf.generate_text(model, tokenizer, "", max_new_tokens=40, seed=0)
ids = AutoTokenizer.from_pretrained(f"{args.out}/hf")(prompt)["input_ids"]
assert ids == tokenizer.encode(prompt)
with torch.no_grad():
    idx = torch.tensor([ids[-model.context_length :]])
    difference = (model(idx) - theirs(idx).logits).abs().max()
print(f"transformers: token ids equal, largest difference of a logit {difference:.1e}")

for file_type in ("F32", "Q8_0"):
    path = f"{args.out}/model-{file_type}.gguf"
    lf.export_gguf(model, tokenizer, path, file_type=file_type)
    print(lf.verify_gguf(path, model, tokenizer))
