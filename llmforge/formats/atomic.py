"""Files and folders that appear under their final name only when they are complete.

The rule is the same everywhere: write beside the target, fsync, rename, fsync the parent. A process that is killed at any
moment leaves the old content or the new one, never a mixture, and at worst a `.tmp-...` entry that the next writer sweeps.

What takes minutes to write is not lost with its process: a resumable target grows in `.part-<its name>` beside it, and the next
writer of the same target from the same inputs goes on with it.

    .part-tutor.gguf/
        inputs.json     what it is made from; another writer's inputs make it start anew
        lock            held by the living writer
        data            becomes the target
        marks/          how far each file of it is whole, with a checksum; see `AppendedFile`
"""

import errno
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llmforge.errors import LLMForgeError

_TMP_PREFIX = ".tmp-"
_PART_PREFIX = ".part-"
_ASIDE_PREFIX = ".old-"
_READ_BYTES = 1 << 24


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
        _check_file(path)
        _discard(_part(path))
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
        _check_folder(path, overwrite)
        _discard(_part(path))
        tmp = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_TMP_PREFIX}{os.getpid()}-"))
        try:
            os.chmod(tmp, 0o777 & ~_umask())
            yield tmp
            _put_folder(tmp, path)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


@dataclass(frozen=True)
class Unfinished:
    """A target that is being written."""

    path: Path  # a file that may exist, or a folder that does; it is renamed to the target when it is complete
    marks: Path | None  # for `AppendedFile`: a folder; None where nothing is kept for another process


@contextmanager
def resumable_file(path: str | os.PathLike[str], inputs: Mapping[str, Any] | None) -> Iterator[Unfinished]:
    """`atomic_file` that keeps what a killed process has written for the next one.

    Args:
        inputs: all that the content depends on, as JSON can say it; what was written from others is thrown away. None = keep nothing.
    An error throws away what was written, too; a signal or Ctrl-C does not.
    """
    path = Path(path)
    with _explained(path):
        _check_file(path)
        with _unfinished(path, inputs) as part:
            if part is not None:
                yield Unfinished(part / "data", part / "marks")
                fsync(part / "data")
                os.replace(part / "data", path)
                fsync(path.parent)
        if part is None:
            with atomic_file(path) as tmp:
                yield Unfinished(tmp, None)


@contextmanager
def resumable_folder(
    path: str | os.PathLike[str], inputs: Mapping[str, Any] | None, *, overwrite: bool = False
) -> Iterator[Unfinished]:
    """`atomic_folder` that keeps what a killed process has written for the next one; see `resumable_file`."""
    path = Path(path)
    with _explained(path):
        try:
            _check_folder(path, overwrite)
        except FileExistsError:
            _discard(_part(path))  # what is there is complete
            raise
        with _unfinished(path, inputs) as part:
            if part is not None:
                (part / "data").mkdir(exist_ok=True)
                yield Unfinished(part / "data", part / "marks")
                _put_folder(part / "data", path)
        if part is None:
            with atomic_folder(path, overwrite=overwrite) as tmp:
                yield Unfinished(tmp, None)


class AppendedFile:
    """A file that is written front to back, and goes on where a killed process has marked that it is whole.

    Args:
        marks: of `Unfinished`; None = begin anew, and remember nothing.
        header: the first bytes; a file that does not begin with them begins anew.
    """

    def __init__(self, file: Path, marks: Path | None, header: bytes) -> None:
        self._journal = None if marks is None else marks / file.name
        self._kept, self._sum = self._whole(file, header)
        self.kept = self._kept  # bytes that are there already
        self.position = len(header)  # of what is written or skipped next
        self._stream: IO[bytes] = file.open("r+b" if self._kept else "wb")
        if self._kept:
            self._stream.truncate(self._kept)
            self._stream.seek(self._kept)
        else:
            self._stream.write(header)
            self._sum = zlib.crc32(header)
            if self._journal is not None:
                self._journal.unlink(missing_ok=True)

    def __enter__(self) -> "AppendedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def skip(self, count: int) -> bool:
        """Whether the next `count` bytes are there already; then they are passed over."""
        if self.position + count > self._kept:
            return False
        self.position += count
        return True

    def write(self, data: Any) -> None:
        """Append bytes."""
        assert self.position >= self._kept, "a part that was not marked as such is not skipped"
        self._stream.write(data)
        self.position += len(data) if isinstance(data, bytes) else data.nbytes
        if self._journal is not None:
            self._sum = zlib.crc32(data, self._sum)

    def mark(self) -> None:
        """Note that the file is whole up to here; the next process goes on here or later."""
        if self._journal is None or self.position <= self._kept:
            return
        self._stream.flush()
        with self._journal.open("a", encoding="ascii") as journal:
            journal.write(f"{self.position} {self._sum} .\n")

    def _whole(self, file: Path, header: bytes) -> tuple[int, int]:
        """How many bytes are as they were marked, and their checksum; (0, 0): none."""
        if self._journal is None or not self._journal.is_file() or not file.is_file():
            return 0, 0
        lines = self._journal.read_text(encoding="ascii", errors="replace").splitlines()
        marks = [line.split() for line in lines if line.endswith(" .")]  # the last one may be cut off
        if not marks or len(marks[-1]) != 3 or not all(word.isdecimal() for word in marks[-1][:2]):
            return 0, 0
        position, expected = int(marks[-1][0]), int(marks[-1][1])
        if not len(header) <= position <= file.stat().st_size:
            return 0, 0
        found, left = 0, position
        with file.open("rb") as stream:
            if stream.read(len(header)) != header:
                return 0, 0
            stream.seek(0)
            while left and (data := stream.read(min(left, _READ_BYTES))):
                found, left = zlib.crc32(data, found), left - len(data)
        return (position, found) if found == expected and not left else (0, 0)


@contextmanager
def _unfinished(path: Path, inputs: Mapping[str, Any] | None) -> Iterator[Path | None]:
    """The `.part-` folder of a target, with what is in it of the same inputs; None where nothing is to be kept, or others write there."""
    part = _part(path)
    if inputs is None or (lock := _lock(part, make=True)) is None:
        yield None
        return
    keep = True
    try:
        text = json.dumps(inputs, sort_keys=True)
        known = part / "inputs.json"
        if not (known.is_file() and known.read_text(encoding="utf-8", errors="replace") == text):
            _empty(part)
            (part / "marks").mkdir()
            known.with_suffix(".tmp").write_text(text, encoding="utf-8")
            os.replace(known.with_suffix(".tmp"), known)  # last, so that it vouches for the rest
        yield part
        keep = False
    except Exception:
        keep = False
        raise
    finally:
        if not keep:
            _empty(part)
        lock.close()
        if not keep:
            shutil.rmtree(part, ignore_errors=True)


def _part(path: Path) -> Path:
    return path.with_name(f"{_PART_PREFIX}{path.name}")


def _discard(part: Path) -> None:
    """Remove what a killed process has kept, but not what a living one writes."""
    if part.is_dir() and (lock := _lock(part, make=False)) is not None:
        _empty(part)
        lock.close()
        shutil.rmtree(part, ignore_errors=True)


def _empty(part: Path) -> None:
    for entry in sorted(part.iterdir(), key=lambda entry: entry.name != "inputs.json"):  # which vouches for the rest
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _lock(part: Path, *, make: bool) -> IO[str] | None:
    """The lock of a `.part-` folder, which ends with this process at the latest; None: another process has it."""
    if make:
        part.mkdir(exist_ok=True)
    try:
        stream = (part / "lock").open("a", encoding="ascii")
    except FileNotFoundError:  # removed by another process since
        return None
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (part / "lock").exists():
            return stream
    except OSError:
        pass
    stream.close()
    return None


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file inside it", str(path))
    _make_folder(path.parent)
    sweep_leftovers(path.parent)


def _check_folder(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "is a file; name a folder", str(path))
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(errno.EEXIST, "exists and is not empty; name another folder, or overwrite it", str(path))
    _make_folder(path.parent)
    sweep_leftovers(path.parent)
    aside = _aside(path)
    if aside.exists():
        _restore(aside, path)


def restore_set_aside(folder: Path) -> None:
    """End what a killed writer of folders in `folder` has begun: the old content gets its name back, unless the new one is in place.

    Only where no living process writes folders of these names.
    """
    for aside in folder.glob(f"{_ASIDE_PREFIX}*"):
        _restore(aside, aside.with_name(aside.name.removeprefix(_ASIDE_PREFIX)))


def _restore(aside: Path, path: Path) -> None:
    if path.exists():  # killed after the two renames of `_put_folder`
        shutil.rmtree(aside, ignore_errors=True)
    else:  # between them
        os.rename(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f"{_ASIDE_PREFIX}{path.name}")


def _put_folder(tmp: Path, path: Path) -> None:
    """Rename a complete folder to its final name."""
    for file in sorted(tmp.rglob("*")):
        fsync(file)
    fsync(tmp)
    # A folder cannot be renamed over one with content, so the old one steps aside first.
    if path.exists():
        os.rename(path, _aside(path))
    os.rename(tmp, path)
    shutil.rmtree(_aside(path), ignore_errors=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk; folders only where the system can (not on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what it may write only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_leftovers(folder: Path, *, own: bool = False) -> None:
    """Remove what a killed writer left in `folder`; what a living process is writing stays.

    Args:
        own: also what has this process's number: nothing here is being written now. In a container the number of a killed process is
            often that of the one that goes on.
    """
    for entry in folder.glob(f"{_TMP_PREFIX}*"):
        pid = entry.name.removeprefix(_TMP_PREFIX).split("-")[0]
        if pid.isdigit() and (own if int(pid) == os.getpid() else not _is_alive(int(pid))):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
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
