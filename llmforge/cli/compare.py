"""llmforge compare: two models on the same prompts, side by side."""

import argparse
import shutil
from pathlib import Path

from llmforge.cli.bar import Bar
from llmforge.cli.model import MODEL_HELP, add_device_arguments
from llmforge.config import did_you_mean
from llmforge.errors import ConfigError

HELP = "two models' answers to the same prompts, side by side"
DESCRIPTION = """Let two models answer the same prompts, and show the answers side by side. Where the prompts come with answers, both models' loss
and perplexity on these are measured too: on the answers alone, given the prompts."""
EXAMPLES = """examples:
  llmforge compare base/ runs/tutor --prompts prompts.jsonl --temperature 0
  llmforge compare base/ tutor.gguf --prompts held_out.jsonl --limit 20 --out compare.html
  llmforge compare base.gguf tutor.gguf --prompts prompts.txt --engine llama.cpp
"""
_PAGES = (".md", ".markdown", ".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help=MODEL_HELP)
    parser.add_argument("tuned", help="the other model: the same kinds, or an adapter's folder")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSON lines of prompt, instruction/input/output or messages; or a .txt with one prompt per line",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts")
    parser.add_argument("--raw", action="store_true", help="give the prompts as they are, without a chat template")
    parser.add_argument("--answers", action="store_true", help="show the answers of the prompts' file too")
    parser.add_argument("--out", metavar="FILE", help="page to write: .md or .html")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    parser.add_argument(
        "--engine", default="torch", metavar="NAME", help="torch (default), or llama.cpp for .gguf files"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="most tokens of an answer (default: 200)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) = always the most probable token, 1 = as learned"
    )
    parser.add_argument("--seed", type=int, default=0, help="of both models, for a temperature above 0 (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text; may be repeated"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="folder with the tokenizer.json, for a model without one")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out) if args.out is not None else None
    if out is not None and out.suffix.lower() not in _PAGES:
        raise ConfigError(f"--out is {args.out!r}; name a .md or .html file")
    if out is not None and out.exists() and not args.overwrite:  # before the models work for minutes
        raise ConfigError(f"{out} exists; name another file, or replace it with --overwrite")
    if args.engine not in ("torch", "llama.cpp"):
        raise ConfigError(f"unknown engine {args.engine!r}; {did_you_mean(args.engine, ['torch', 'llama.cpp'])}")
    import torch

    from llmforge.deploy.compare import compare_models
    from llmforge.formats.atomic import atomic_file
    from llmforge.tokenizers import load_tokenizer
    from llmforge.training import pick_device

    comparison = compare_models(
        args.base,
        args.tuned,
        args.prompts,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        seed=args.seed,
        raw=args.raw,
        engine=args.engine,
        limit=args.limit,
        tokenizer=load_tokenizer(args.tokenizer) if args.tokenizer is not None else None,
        device=pick_device(args.device),
        dtype=getattr(torch, args.dtype),
        progress=Bar("answers"),
    )
    print(comparison.to_text(shutil.get_terminal_size().columns, references=args.answers))
    if out is not None:
        page = comparison.to_html() if out.suffix.lower() in (".html", ".htm") else comparison.to_markdown()
        with atomic_file(out) as tmp:
            tmp.write_text(page, encoding="utf-8", newline="\n")
        print(f"wrote {out}")
    return 0
