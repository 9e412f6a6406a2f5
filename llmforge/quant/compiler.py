"""C sources of this package through the C compiler of the machine, where there is one.

A source is compiled when first needed (half a second), into a folder that is gone when the library is loaded, so that no stale or
foreign one can be picked up.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-w", "-shared", "-fPIC")
NATIVE = ("-march=native",)

_Kernels = TypeVar("_Kernels")


def compile_source(
    source: bytes,
    accept: Callable[[ctypes.CDLL], _Kernels | None],
    *,
    tunings: Sequence[Sequence[str]] = (NATIVE, ()),
) -> _Kernels | None:
    """The first library that is accepted, of all compilers (CC, cc, gcc, clang) and tunings.

    Args:
        accept: what to make of a library; None where its results are not right.
        tunings: further flags, the best first.
    Returns:
        what `accept` made; None where there is no compiler, or where anything about it fails.
    """
    found = [shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")]
    for compiler in dict.fromkeys(path for path in found if path):
        for tuning in tunings:
            with tempfile.TemporaryDirectory(prefix="llmforge-", ignore_cleanup_errors=True) as folder:
                library = Path(folder, "kernels.so")
                command = [compiler, *FLAGS, *tuning, "-x", "c", "-", "-o", str(library)]
                try:
                    subprocess.run(command, input=source, capture_output=True, check=True, timeout=120)
                    made = accept(ctypes.CDLL(str(library)))
                except (OSError, AttributeError, subprocess.SubprocessError):
                    continue
                if made is not None:
                    return made
    return None
