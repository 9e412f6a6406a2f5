"""Files and folders that appear under their final name only when they are complete.

The rule is the same everywhere: write beside the target, fsync, rename, fsync the parent. A process that is killed at any
moment leaves the old content or the new one, never a mixture, and at worst a `.tmp-...` entry that the next writer sweeps.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmforge.errors import LLMForgeError

_TMP_PREFIX = ".tmp-"


class WriteError(LLMForgeError, OSError):
    """The target cannot be written: no permission, no space, or something else stands in its place."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block ends without an error.

    Raises:
        WriteError: the folder cannot be created or written, the disk is full, or `path` is a folder.
    """
    path = Path(path)
    with _explained(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; name a file inside it", str(path))
        _make_folder(path.parent)
        sweep_leftovers(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_TMP_PREFIX}{os.getpid()}-", suffix=path.suffix)
        os.close(handle)
        tmp = Path(name)
        try:
            os.chmod(tmp, 0o666 & ~_umask())  # mkstemp makes 0600; the user expects an ordinary file
            yield tmp
            fsync(tmp)
            os.replace(tmp, path)
            fsync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends without an error.

    Args:
        overwrite: replace a folder that is there and not empty; without it that is an error, raised before any work.
    Raises:
        WriteError: `path` exists (see `overwrite`), cannot be written, or the disk is full.
    """
    path = Path(path)
    with _explained(path):
        if path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, "is a file; name a folder", str(path))
        if not overwrite and path.is_dir() and any(path.iterdir()):
            raise FileExistsError(
                errno.EEXIST, "exists and is not empty; name another folder, or overwrite it", str(path)
            )
        _make_folder(path.parent)
        sweep_leftovers(path.parent)
        aside = path.with_name(f".old-{path.name}")
        if aside.exists() and not path.exists():  # killed between the two renames below
            os.rename(aside, path)
        tmp = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_TMP_PREFIX}{os.getpid()}-"))
        try:
            os.chmod(tmp, 0o777 & ~_umask())
            yield tmp
            for file in sorted(tmp.rglob("*")):
                fsync(file)
            fsync(tmp)
            # A folder cannot be renamed over one with content, so the old one steps aside first.
            if path.exists():
                os.rename(path, aside)
            os.rename(tmp, path)
            shutil.rmtree(aside, ignore_errors=True)
            fsync(path.parent)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk; folders only where the system can (not on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what it may write only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed writer left in `folder`; what a living process is writing stays."""
    for entry in folder.glob(f"{_TMP_PREFIX}*"):
        pid = entry.name.removeprefix(_TMP_PREFIX).split("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    if os.name == "nt":  # os.kill(pid, 0) would end the process there: leave the entry alone
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # what stands there is a file
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one that names the target and says what to do."""
    remedies = {
        errno.ENOSPC: "the disk is full; free some space or choose another place",
        errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
        errno.EFBIG: "the file would be larger than this system allows; choose another place",
        errno.EACCES: "no permission to write there; choose a folder of your own",
        errno.EPERM: "no permission to write there; choose a folder of your own",
        errno.EROFS: "that disk is read-only; choose another place",
        errno.ENOTDIR: "a part of that path is a file, not a folder; choose another place",
    }
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        remedy = remedies.get(error.errno or 0, error.strerror or str(error))
        explained = WriteError(f"cannot write {path}: {remedy}")
        explained.errno = error.errno
        raise explained from error
