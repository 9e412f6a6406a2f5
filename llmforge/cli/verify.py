"""llmforge verify: does llama.cpp compute from the GGUF what torch computes from the model?"""

import argparse

from llmforge.cli.model import add_model_arguments, load_model

HELP = "check a GGUF in the real llama.cpp against the model"
DESCRIPTION = """Load a GGUF in llama.cpp and compare it with the model that it was made from: token ids, probabilities, greedy text.
Needs llama-cpp-python: pip install "llmforge[verify]" (compiles llama.cpp; takes some minutes and a C++ compiler)."""
EXAMPLES = """examples:
  llmforge verify quijote.gguf runs/quijote
  llmforge verify quijote.gguf runs/quijote --text quijote.txt         compare the token ids of a whole text
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gguf", help="GGUF file")
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="text to compare on (default: a text that the model writes)")
    parser.add_argument(
        "--greedy-tokens", type=int, default=64, metavar="N", help="length of the greedy text to compare (default: 64)"
    )


def run(args: argparse.Namespace) -> int:
    from llmforge.deploy import verify_gguf
    from llmforge.tokenizers.text_files import read_text

    model, tokenizer = load_model(args)
    text = "".join(read_text(args.text)) if args.text is not None else None
    report = verify_gguf(args.gguf, model, tokenizer, text=text, greedy_tokens=args.greedy_tokens)
    print(report)
    return 0 if report.passed else 1
