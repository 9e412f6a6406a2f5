"""The arguments with which generate, export and verify name a model, and how it is loaded."""

import argparse
from typing import TYPE_CHECKING

from llmforge.errors import DataError

if TYPE_CHECKING:
    from llmforge.models import LanguageModel
    from llmforge.tokenizers import Tokenizer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, checkpoint, Hugging Face folder, or nanoGPT's ckpt.pt")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="of a run: latest (default), best, or a name like step-000500"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder with the tokenizer.json, where the model has none"
    )


def load_model(args: argparse.Namespace, *, device: str | None = "cpu") -> "tuple[LanguageModel, Tokenizer]":
    """The model and tokenizer that the arguments name, on a device (None: the best there is).

    Raises:
        DataError: there is no tokenizer.
    """
    from llmforge.convert import load
    from llmforge.tokenizers import load_tokenizer
    from llmforge.training import pick_device

    model, tokenizer = load(args.model, checkpoint=args.checkpoint, device=pick_device(device))
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise DataError(
            f"{args.tokenizer or args.model} has no tokenizer.json; name a folder that has one with --tokenizer"
        )
    return model, tokenizer
