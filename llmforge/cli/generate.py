"""llmforge generate: text from a trained model."""

import argparse

from llmforge.cli.model import add_model_arguments, load_model

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
    parser.add_argument(
        "--max-new-tokens", type=int, default=300, metavar="N", help="length of the continuation (default: 300)"
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
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--seed", type=int, help="same seed, same text (default: different every time)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")


def run(args: argparse.Namespace) -> int:
    from llmforge.generation import stream_text

    model, tokenizer = load_model(args, device=args.device)
    pieces = stream_text(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
