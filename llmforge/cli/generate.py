"""llmforge generate: text from a trained model."""

import argparse
from typing import Any

from llmforge.cli.model import add_device_arguments, add_model_arguments, load_model

HELP = "write text with a trained model"
DESCRIPTION = "Continue a prompt with a trained model, and print the text as it is generated."
EXAMPLES = """examples:
  llmforge generate runs/quijote --prompt "En un lugar"
  llmforge generate runs/quijote --temperature 0.5 --top-k 40 --max-new-tokens 500 --seed 7
  llmforge generate runs/quijote --checkpoint best --temperature 0        always the most probable token
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="", help="beginning of the text (default: none)")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    add_device_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int = 300) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="most tokens to write (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 = always the most probable token, 1 = as learned (default: 0.8)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K most probable tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="choose among the most probable tokens that together reach P"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens less than P times as probable as the best one"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 avoids tokens already used (default: 1)",
    )
    parser.add_argument("--seed", type=int, help="same seed, same text (default: different every time)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the step from token to token: half a minute first, then faster"
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `stream_text` that the arguments name."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "compile")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    from llmforge.generation import stream_text

    model, tokenizer = load_model(args, device=args.device)
    pieces = stream_text(model, tokenizer, args.prompt, stop=args.stop, **sampling_options(args))
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
