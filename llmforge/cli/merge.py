"""llmforge merge: an adapter into the weights of its base."""

import argparse
from pathlib import Path

from llmforge.cli.bar import Bar
from llmforge.cli.model import MODEL_HELP, add_merge_base_argument
from llmforge.cli.program import program

HELP = "write an adapter into the weights of its base"
DESCRIPTION = """Merge a LoRA adapter into its base, as a Hugging Face folder: a model like any other, which needs no adapter any more.
It goes from file to file some rows of a tensor at a time, so that half a gigabyte of memory is enough for any model, and goes on
where it stopped when it was killed. What a QLoRA trained is reproduced on the base rounded as it was then (--merge-base nf4, the
default where the adapter says so); embeddings and output projection are never rounded."""
EXAMPLES = """examples:
  llmforge merge base/ runs/tutor --out merged/
  llmforge merge base/ runs/tutor --out merged/ --merge-base original       onto the 16-bit weights
  llmforge merge base/ runs/tutor --out merged/ --compare held_out.jsonl    how far either is from the trained model
  llmforge export base/ --adapter runs/tutor --gguf tutor.gguf --file-type Q4_K_M   without the folder in between
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help=MODEL_HELP)
    parser.add_argument("adapter", help="adapter folder of PEFT or of a tuning run, that run, or owner/name")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="Hugging Face folder to write")
    add_merge_base_argument(parser)
    parser.add_argument("--revision", metavar="NAME", help="of owner/name of the base: a branch, tag or commit")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as those of the base)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a Hugging Face folder that exists")
    parser.add_argument(
        "--compare",
        metavar="FILE",
        help="first measure how far both ways to merge are from the trained model, on this text or these JSON lines of prompts and "
        "answers, which it was not trained on; takes memory for the model in float32",
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from llmforge.convert import export_hf, open_model

    model, tokenizer = open_model(args.base, revision=args.revision, adapter=args.adapter, merge_base=args.merge_base)
    if args.compare is not None:
        _compare(args)
    dtype = getattr(torch, args.dtype) if args.dtype is not None else None
    report = export_hf(model, tokenizer, args.out, dtype=dtype, overwrite=args.overwrite, progress=Bar("bytes"))
    for note in report.notes:
        print(f"note: {note}")
    print(f"wrote {args.out} (Hugging Face, {report.file_type}, {report.bytes / 1e6:,.1f} MB)")
    print(f"next  {program()} export {args.out} --gguf {Path(args.out).name}.gguf --file-type Q4_K_M")
    return 0


def _compare(args: argparse.Namespace) -> None:
    """Print the divergence of both merges from the trained model."""
    import torch

    from llmforge.convert import open_model
    from llmforge.convert.merge_check import merge_divergence
    from llmforge.deploy.prompts import read_prompts
    from llmforge.errors import DataError
    from llmforge.tokenizers.text_files import read_text

    _, tokenizer = open_model(args.base, revision=args.revision, adapter=args.adapter)
    if tokenizer is None:
        raise DataError(f"{args.base} has no tokenizer.json, without which --compare cannot read a text")
    if Path(args.compare).suffix in (".jsonl", ".json"):
        prompts = read_prompts(args.compare)
        text = "\n\n".join(part for prompt in prompts for part in (prompt.text, prompt.answer) if part)
    else:
        text = "".join(read_text(args.compare))
    ids = torch.tensor(tokenizer.encode(text[:100_000]))
    for way, nats in merge_divergence(args.base, args.adapter, ids, revision=args.revision).items():
        print(f"KL(trained || merged onto {way})  {max(nats, 0.0):.6f} nats per token")
