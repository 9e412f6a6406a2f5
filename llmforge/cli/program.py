"""How the user calls this program: what is printed to be typed next must work when it is."""

import os
import shutil
import sys
import warnings
from pathlib import Path


def first_speaks() -> str:
    """Of several processes (torchrun) the first one speaks: the others are silent but for their errors.

    Returns:
        what their messages begin with; nothing of the first.
    """
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1" or rank == "0":
        return ""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the process lives)
    warnings.simplefilter("ignore")
    return f"rank {rank}: "


def program() -> str:
    """`llmforge` where the PATH has it, else the path it was called by (`.venv/bin/llmforge`), else `python -m llmforge`."""
    if shutil.which("llmforge") is not None:
        return "llmforge"
    called = Path(sys.argv[0])
    return str(called) if called.stem == "llmforge" else "python -m llmforge"
