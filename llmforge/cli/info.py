"""llmforge info: what a run, model folder or GGUF file holds."""

import argparse
import os
from pathlib import Path

from llmforge.cli.model import MODEL_HELP
from llmforge.errors import CheckpointError, one_line

HELP = "say what a run, model folder or GGUF file holds"
DESCRIPTION = "Describe a run folder, a checkpoint, a Hugging Face folder or owner/name, a ckpt.pt or a GGUF file; reads no weights."
EXAMPLES = """examples:
  llmforge info runs/quijote
  llmforge info quijote.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=MODEL_HELP)


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if path.suffix == ".gguf":
        _print_gguf(path)
    else:
        _print_run(path)
        _print_model(path)
    return 0


def _print_run(path: Path) -> None:
    from llmforge.training import list_checkpoints, validation_loss, verify_manifest

    folders = list_checkpoints(path) if os.path.isdir(path) else []  # False for a name that is too long, too
    losses = {folder: validation_loss(folder) for folder in folders}
    best = min((loss for loss in losses.values() if loss is not None), default=None)
    for folder, loss in losses.items():
        try:
            verify_manifest(folder)
            state = "" if loss is None else f"val loss {loss:.4f}" + ("  best" if loss == best else "")
        except CheckpointError as error:
            state = f"damaged: {error}"
        print(f"{folder.name:14} {state}")


def _print_model(path: Path) -> None:
    from llmforge.convert import open_model

    published, tokenizer = open_model(path)
    print(f"{published.family.model_class.__name__:14} {published.num_params:,} weights")
    for name, value in published.config.to_dict().items():
        print(f"  {name:22} {value}")
    if tokenizer is None:
        print("tokenizer      none")
    else:
        print(f"tokenizer      {type(tokenizer).__name__}, vocabulary of {tokenizer.vocab_size:,}")


def _print_gguf(path: Path) -> None:
    from llmforge.formats.gguf import read_gguf_header

    header = read_gguf_header(path)
    for key, value in header.metadata.items():
        shown = f"{len(value):,} items" if isinstance(value, list) else repr(value) if isinstance(value, str) else value
        print(f"{one_line(key):42} {shown if len(str(shown)) <= 100 else str(shown)[:97] + '...'}")
    types: dict[str, int] = {}
    for tensor in header.tensors:
        types[tensor.type_name] = types.get(tensor.type_name, 0) + 1
    counts = ", ".join(f"{count} {name}" for name, count in types.items())
    print(f"{len(header.tensors)} tensors ({counts}), {path.stat().st_size:,} bytes")
