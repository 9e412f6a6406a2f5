"""llmforge verify: does llama.cpp compute from the GGUF what torch computes from the model?"""

import argparse
from pathlib import Path

from llmforge.errors import ConvertError, DataError

HELP = "check a GGUF in the real llama.cpp against the model"
DESCRIPTION = """Load a GGUF in llama.cpp and compare it with the model that it was made from: token ids, probabilities, greedy text.
Needs llama-cpp-python: pip install "llmforge[verify]" (compiles llama.cpp; takes some minutes and a C++ compiler)."""
EXAMPLES = """examples:
  llmforge verify quijote.gguf runs/quijote
  llmforge verify quijote.gguf runs/quijote --text quijote.txt         compare the token ids of a whole text
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gguf", help="GGUF file")
    parser.add_argument("model", help="the run, checkpoint or Hugging Face folder that it was made from")
    parser.add_argument("--text", metavar="FILE", help="text to compare on (default: a text that the model writes)")
    parser.add_argument(
        "--greedy-tokens", type=int, default=64, metavar="N", help="length of the greedy text to compare (default: 64)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder with the tokenizer.json, where the model has none"
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="latest (default), best, or a name like step-000500")


def run(args: argparse.Namespace) -> int:
    from llmforge.convert import load
    from llmforge.deploy import verify_gguf
    from llmforge.tokenizers import load_tokenizer

    model, tokenizer = load(args.model, checkpoint=args.checkpoint)
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise ConvertError(
            f"{args.tokenizer or args.model} has no tokenizer.json; name a folder that has one with --tokenizer"
        )
    text = _read_text(args.text) if args.text is not None else None
    report = verify_gguf(args.gguf, model, tokenizer, text=text, greedy_tokens=args.greedy_tokens)
    print(report)
    return 0 if report.passed else 1


def _read_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")  # not read_text: line ends must stay as they are
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error
