"""Take an open model (Llama, TinyLlama, SmolLM, Mistral, Qwen2, Qwen3) as it is published, let it write, and make a GGUF of it.

python examples/open_model.py HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Why is the sky blue?"
python examples/open_model.py path/to/folder --gguf model.gguf
python examples/open_model.py model.gguf --prompt "Once upon a time"
"""

import argparse

import torch

import llmforge as lf
from llmforge.tokenizers import chat_ids

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="owner/name on huggingface.co, a folder, or a .gguf file")
parser.add_argument("--prompt", default="Why is the sky blue?")
parser.add_argument("--max-new-tokens", type=int, default=100)
parser.add_argument("--gguf", help="write the model there, in BF16")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = lf.load(args.model, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
print(f"{type(model).__name__} of {model.num_params():,} weights, context {model.context_length:,}, on {device}")

# A model that was tuned for conversation has a template for it; the others continue the text.
prompt = args.prompt
if tokenizer.chat_template is not None:
    prompt = chat_ids(tokenizer, [{"role": "user", "content": args.prompt}])
for piece in lf.stream_text(model, tokenizer, prompt, max_new_tokens=args.max_new_tokens, temperature=0.7, seed=0):
    print(piece, end="", flush=True)
print()

# Several prompts of different length at once.
prompts = [tokenizer.prompt_ids(text) for text in ("Madrid is", "The capital of France, as everybody knows, is")]
for ids in lf.generate_batch(model, prompts, max_new_tokens=10, temperature=0.0):
    print(repr(tokenizer.decode(ids)))

if args.gguf is not None:  # from file to file, one tensor at a time; the model above is not needed for it
    report = lf.export_gguf(args.model, None, args.gguf, file_type="BF16")
    print(f"wrote {args.gguf}, {report.bytes / 1e6:.1f} MB")
