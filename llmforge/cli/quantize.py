"""llmforge quantize: a GGUF file in another type."""

import argparse
from pathlib import Path

from llmforge.cli.bar import Bar
from llmforge.cli.types import add_type_arguments, type_options

HELP = "write a GGUF file in another type"
DESCRIPTION = """Quantize a GGUF file: the bytes that llama.cpp's quantize writes, without compiling it.
It goes from file to file; memory for the largest tensor is enough."""
EXAMPLES = """examples:
  llmforge quantize model-bf16.gguf model-q4.gguf --file-type Q4_K_M
  llmforge quantize model-bf16.gguf model.gguf --file-type Q4_K_M --tensor-type attn_v=Q8_0
  llmforge quantize model-bf16.gguf model.gguf --file-type Q2_K --imatrix imatrix.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="in.gguf", help="GGUF file of floats: F32, BF16 or F16")
    parser.add_argument("target", metavar="out.gguf", help="GGUF file to write")
    add_type_arguments(parser)
    parser.add_argument(
        "--requantize", action="store_true", help="allow tensors that are quantized already; their errors add up"
    )


def run(args: argparse.Namespace) -> int:
    from llmforge.convert import quantize_gguf

    report = quantize_gguf(
        args.source, args.target, requantize=args.requantize, progress=Bar("weights"), **type_options(args)
    )
    for note in report.notes:
        print(f"note: {note}")
    before = Path(args.source).stat().st_size
    types = ", ".join(f"{count} {name}" for name, count in report.tensors.most_common())
    print(f"wrote {args.target} ({report.file_type}, {report.bytes / 1e6:.1f} MB of {before / 1e6:.1f} MB; {types})")
    return 0
