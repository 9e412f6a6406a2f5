"""Text files as pieces of text: strict UTF-8, a few megabytes at a time, and errors that name the byte."""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmforge.errors import DataError

CHUNK_BYTES = 2**22
_BUFFER_BYTES = 2**18

Tick = Callable[[int], None]

# First bytes of files that are not UTF-8 text -> what they are, and the name that iconv has for them if they are text.
_SIGNATURES = {
    b"\xff\xfe\x00\x00": ("UTF-32 text", "UTF-32"),
    b"\xff\xfe": ("UTF-16 text", "UTF-16"),
    b"\xfe\xff": ("UTF-16 text", "UTF-16"),
    b"%PDF": ("a PDF", ""),
    b"PK\x03\x04": ("a zip archive or office document", ""),
    b"\x1f\x8b": ("a gzip archive", ""),
    b"PAR1": ("a Parquet file", ""),
}


def find_texts(path: str | os.PathLike[str], pattern: str = "**/*.txt") -> list[Path]:
    """The file `path` itself, or the files of the folder `path` that match `pattern`, by name; empty ones are left out.

    Raises:
        DataError: there is no such file or folder, or nothing in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}; check the spelling, seen from {Path.cwd()}")
    texts = [file for file in path.glob(pattern) if file.is_file() and file.stat().st_size > 0]
    if not texts:
        raise DataError(
            f"{path} has no file with text that matches {pattern!r}; put UTF-8 .txt files there, or give a pattern"
        )
    return sorted(texts, key=lambda file: file.relative_to(path).as_posix())


@contextmanager
def open_binary(path: str | os.PathLike[str], tick: Tick | None = None) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where its name ends in .gz or .zst.

    Args:
        tick: told how many bytes of the file, as it lies there, each reading took.
    Raises:
        DataError: not readable, damaged, or .zst without a library for it.
    """
    suffix = Path(path).suffix.lower()
    damages: tuple[type[Exception], ...] = (EOFError, zlib.error)
    try:
        with open(path, "rb") as raw:
            file: Any = raw if tick is None else io.BufferedReader(_Ticking(raw, tick), _BUFFER_BYTES)
            if suffix == ".gz":
                file = gzip.GzipFile(fileobj=file, mode="rb")
            elif suffix == ".zst":
                file, error_of_zstd = _zstd(path, file)
                damages = (*damages, error_of_zstd)
            yield file if file is raw else io.BufferedReader(file, _BUFFER_BYTES)
    except damages as error:
        raise DataError(f"{path} is damaged: {error}; copy or download it again") from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; check the spelling, seen from {Path.cwd()}"
        ) from error


class _Ticking(io.RawIOBase):
    def __init__(self, raw: BinaryIO, tick: Tick) -> None:
        self._raw, self._tick = raw, tick

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self._tick(len(data))
        return len(data)


def _zstd(path: str | os.PathLike[str], file: BinaryIO) -> tuple[Any, type[Exception]]:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14

        return zstd.ZstdFile(file, "rb"), zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), zstandard.ZstdError
    except ImportError as error:
        raise DataError(
            f"{path} is compressed with Zstandard, which needs a package that is not installed: pip install zstandard; or decompress "
            "it with zstd -d"
        ) from error


def read_text(path: str | os.PathLike[str], tick: Tick | None = None) -> Iterator[str]:
    """The text of a UTF-8 file, piece by piece and as it stands: CRLF stays CRLF; only a byte order mark at the start is dropped.

    Args:
        tick: see `open_binary`, which decompresses .gz and .zst.
    Raises:
        DataError: not readable, empty, not UTF-8, or binary (a NUL byte); with the position in bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_binary(path, tick) as file:
        head = file.read(64)
        start = position = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        chunk = head[start:] + file.read(max(0, CHUNK_BYTES - len(head)))
        while chunk:
            for i in range(0, len(chunk), CHUNK_BYTES):
                yield _decoded(decoder, chunk[i : i + CHUNK_BYTES], position, head, path)
                position += len(chunk[i : i + CHUNK_BYTES])
            chunk = file.read(CHUNK_BYTES)
        _decoded(decoder, b"", position, head, path)
    if position == start:
        raise DataError(f"{path} is empty; name a file with text")


def cut_safely(pieces: Iterable[str], safe_cut: Callable[[str], int]) -> Iterator[str]:
    """The same text in pieces that can be encoded one by one; `safe_cut` is a tokenizer's."""
    held = ""
    for piece in pieces:
        held += piece
        if cut := safe_cut(held):
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _decoded(
    decoder: codecs.IncrementalDecoder, chunk: bytes, position: int, head: bytes, path: str | os.PathLike[str]
) -> str:
    """The text of the chunk at `position`; an empty chunk ends the file."""
    pending = len(decoder.getstate()[0])  # of a character that the last chunk cut
    try:
        text = decoder.decode(chunk, final=not chunk)
        if "\0" not in text:
            return text
        byte, place = 0, position + chunk.index(0)
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], position - pending + error.start
    raise DataError(f"{path} is {not_utf8(Path(path).name, byte, place, head)}")


def not_utf8(name: str, byte: int, place: int, head: bytes) -> str:
    """What an error says about a byte at a place of the file `name`, which begins with `head`."""
    kind, encoding = _guess(head, byte)
    command = f", for example: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}" if encoding else ""
    return (
        f"not UTF-8 text: byte 0x{byte:02x} at position {place:,}. It looks like {kind}; save it as UTF-8 text{command}"
    )


def _guess(head: bytes, byte: int) -> tuple[str, str]:
    """What a file with this beginning and this byte may be, and the encoding's name in iconv if it is text."""
    for signature, guess in _SIGNATURES.items():
        if head.startswith(signature):
            return guess
    if byte == 0 or 0 in head:
        return "a binary file, or UTF-16 text without a byte order mark", ""
    return f"Windows-1252 text, where this byte is {bytes([byte]).decode('cp1252', 'replace')!r}", "WINDOWS-1252"
