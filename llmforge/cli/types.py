"""The arguments with which export and quantize choose types."""

import argparse
from typing import Any

from llmforge.errors import ConfigError

# Spelled out, because convert.mixture, which has them, takes a second to import. A test compares.
FILE_TYPES = (
    "F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q3_K_L, Q3_K_M, "
    "Q3_K_S, Q2_K, Q2_K_S, TQ1_0 or TQ2_0"
)


def add_type_arguments(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    note = f" (default: {default})" if default else ""
    required = default is None
    parser.add_argument(
        "--file-type", default=default, required=required, metavar="TYPE", help=f"of the GGUF: {FILE_TYPES}{note}"
    )
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="type of the tensors whose GGUF name contains PATTERN, a regular expression; may be repeated",
    )
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix, of llmforge imatrix or of llama.cpp")


def type_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those arguments as the keywords of `export_gguf` and `quantize_gguf`."""
    from llmforge.convert.imatrix import read_imatrix

    tensor_types = {}
    for text in args.tensor_type:
        pattern, equals, type_name = text.rpartition("=")
        if not (pattern and equals and type_name):
            raise ConfigError(f"--tensor-type needs PATTERN=TYPE, got {text!r}; for example --tensor-type attn_v=Q8_0")
        tensor_types[pattern] = type_name
    importance = read_imatrix(args.imatrix) if args.imatrix is not None else None
    return {"file_type": args.file_type, "tensor_types": tensor_types, "importance": importance}
