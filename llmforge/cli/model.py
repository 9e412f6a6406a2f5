"""The arguments with which generate, chat, export and verify name a model, and how it is loaded."""

import argparse
from typing import TYPE_CHECKING

from llmforge.errors import DataError

if TYPE_CHECKING:
    from llmforge.models import LanguageModel
    from llmforge.tokenizers import Tokenizer


MODEL_HELP = "run folder, checkpoint, Hugging Face folder or owner/name, adapter folder, .gguf, or nanoGPT's or llama2.c's ckpt.pt"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="of a run: latest (default), best, or a name like step-000500"
    )
    parser.add_argument("--revision", metavar="NAME", help="of owner/name: a branch, tag or commit (default: main)")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder with the tokenizer.json, where the model has none"
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="LoRA (PEFT's, or a tuning run) to merge into the model's weights"
    )
    add_merge_base_argument(parser)


def add_merge_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge-base",
        choices=("original", "nf4"),
        help="weights that an adapter is merged onto: as they are, or rounded to 4 bits as a QLoRA saw them (default: as the adapter "
        "was trained)",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights in memory; the 16-bit types need half of it (default: float32)",
    )


def load_model(args: argparse.Namespace, *, device: str | None = "cpu") -> "tuple[LanguageModel, Tokenizer]":
    """The model and tokenizer that the arguments name, on a device (None: the best there is).

    Raises:
        DataError: there is no tokenizer.
    """
    import torch

    from llmforge.convert import load
    from llmforge.training import pick_device

    dtype = getattr(torch, getattr(args, "dtype", None) or "float32")
    model, tokenizer = load(
        args.model,
        checkpoint=args.checkpoint,
        revision=args.revision,
        device=pick_device(device),
        dtype=dtype,
        adapter=args.adapter,
        merge_base=args.merge_base,
    )
    return model, find_tokenizer(args, tokenizer)


def find_tokenizer(args: argparse.Namespace, tokenizer: "Tokenizer | None") -> "Tokenizer":
    """The tokenizer of --tokenizer, or else the model's own.

    Raises:
        DataError: there is neither.
    """
    from llmforge.tokenizers import load_tokenizer

    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise DataError(
            f"{args.tokenizer or args.model} has no tokenizer.json; name a folder that has one with --tokenizer"
        )
    return tokenizer
