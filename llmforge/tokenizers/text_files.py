"""Text files as pieces of text: strict UTF-8, a few megabytes at a time, and errors that name the byte."""

import codecs
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llmforge.errors import DataError

CHUNK_BYTES = 2**22

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


def read_text(path: str | os.PathLike[str]) -> Iterator[str]:
    """The text of a UTF-8 file, piece by piece and as it stands: CRLF stays CRLF; only a byte order mark at the start is dropped.

    Raises:
        DataError: not readable, empty, not UTF-8, or binary (a NUL byte); with the position in bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            start = position = file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            while chunk := file.read(CHUNK_BYTES):
                yield _decoded(decoder, chunk, position, head, path)
                position += len(chunk)
            _decoded(decoder, b"", position, head, path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
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
