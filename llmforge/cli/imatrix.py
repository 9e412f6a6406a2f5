"""llmforge imatrix: which inputs of each matrix matter, measured on a text."""

import argparse
from dataclasses import replace

from llmforge.cli.bar import Bar
from llmforge.cli.model import add_device_arguments, add_model_arguments, load_model
from llmforge.cli.program import program

HELP = "measure on a text which weights matter, for small file types"
DESCRIPTION = """Run a model on a calibration text and write an importance matrix: how large the inputs of each matrix are, column by
column. With it, export and quantize put the rounding errors of small types where they matter least. The file is llama.cpp's:
llama-quantize --imatrix reads it too. Some hundred kilobytes of text like what the model shall write are enough."""
EXAMPLES = """examples:
  llmforge imatrix runs/quijote quijote.txt --out imatrix.gguf
  llmforge imatrix base/ calibration.txt --out imatrix.gguf --max-chunks 100 --dtype bfloat16
  llmforge export runs/quijote --gguf quijote.gguf --file-type Q2_K --imatrix imatrix.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("text", help="UTF-8 text, or a folder with .txt files")
    parser.add_argument("--out", required=True, metavar="FILE", help="imatrix.gguf to write")
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        metavar="N",
        help="the text is read in pieces of so many tokens (default: 512, or the model's context if that is shorter)",
    )
    parser.add_argument("--max-chunks", type=int, metavar="N", help="stop after so many pieces (default: read all)")
    parser.add_argument(
        "--process-output", action="store_true", help="measure the output projection too (llama.cpp leaves it out)"
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from llmforge.convert.imatrix import collect_imatrix, write_imatrix
    from llmforge.data import TokenDataset

    model, tokenizer = load_model(args, device=args.device)
    data = TokenDataset.from_text_file(args.text, tokenizer)
    importance = collect_imatrix(
        model,
        data,
        chunk_tokens=args.chunk_tokens,
        max_chunks=args.max_chunks,
        bos_token_id=tokenizer.bos_token_id if tokenizer.add_bos else None,
        process_output=args.process_output,
        progress=Bar("tokens"),
    )
    write_imatrix(args.out, replace(importance, datasets=[args.text]))
    n_tokens = max(importance.counts.values())
    print(
        f"wrote {args.out} ({len(importance.sums)} matrices; {n_tokens:,} tokens in "
        f"{n_tokens // importance.chunk_tokens:,} pieces of {importance.chunk_tokens})"
    )
    print(f"next  {program()} export {args.model} --gguf model.gguf --file-type Q4_K_M --imatrix {args.out}")
    return 0
