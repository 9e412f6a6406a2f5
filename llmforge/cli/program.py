"""How the user calls this program: what is printed to be typed next must work when it is."""

import shutil
import sys
from pathlib import Path


def program() -> str:
    """`llmforge` where the PATH has it, else the path it was called by (`.venv/bin/llmforge`), else `python -m llmforge`."""
    if shutil.which("llmforge") is not None:
        return "llmforge"
    called = Path(sys.argv[0])
    return str(called) if called.stem == "llmforge" else "python -m llmforge"
