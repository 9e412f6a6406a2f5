"""llmforge export: a trained model as files that other programs read."""

import argparse
from pathlib import Path

from llmforge.errors import ConfigError, ConvertError

HELP = "write a GGUF file or a Hugging Face folder"
DESCRIPTION = "Write a trained model as a GGUF file (LM Studio, Ollama, llama.cpp), as a Hugging Face folder (transformers), or both."
EXAMPLES = """examples:
  llmforge export runs/quijote --gguf quijote.gguf                     16-bit floats
  llmforge export runs/quijote --gguf quijote.gguf --file-type Q8_0    half the size, nearly the same text
  llmforge export runs/quijote --hf out/quijote                        for AutoModelForCausalLM
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, checkpoint, Hugging Face folder, or nanoGPT's ckpt.pt")
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file to write")
    parser.add_argument(
        "--file-type", default="F16", metavar="TYPE", help="of the GGUF: F32, F16, BF16 or Q8_0 (default: F16)"
    )
    parser.add_argument("--hf", metavar="FOLDER", help="Hugging Face folder to write")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the Hugging Face weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a Hugging Face folder that exists")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder with the tokenizer.json, where the model has none"
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="latest (default), best, or a name like step-000500")


def run(args: argparse.Namespace) -> int:
    if args.gguf is None and args.hf is None:
        raise ConfigError("say what to write: --gguf FILE, --hf FOLDER, or both")
    import torch

    from llmforge.convert import export_gguf, export_hf, load
    from llmforge.tokenizers import load_tokenizer

    model, tokenizer = load(args.model, checkpoint=args.checkpoint)
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise ConvertError(
            f"{args.tokenizer or args.model} has no tokenizer.json; name a folder that has one with --tokenizer"
        )
    if args.hf is not None:
        export_hf(model, tokenizer, args.hf, dtype=getattr(torch, args.dtype), overwrite=args.overwrite)
        print(f"wrote {args.hf} (Hugging Face, {args.dtype})")
    if args.gguf is not None:
        report = export_gguf(model, tokenizer, args.gguf, file_type=args.file_type)
        for note in report.notes:
            print(f"note: {note}")
        print(f"wrote {args.gguf} ({report.file_type}, {Path(args.gguf).stat().st_size / 1e6:.1f} MB)")
        print(f"next  llmforge verify {args.gguf} {args.model}")
    return 0
