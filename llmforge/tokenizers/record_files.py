"""Files of records: JSON Lines, a JSON list, CSV, Parquet; one record after the other, with the place of each."""

import codecs
import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llmforge.errors import DataError, shown
from llmforge.tokenizers.text_files import Tick, not_utf8, open_binary, read_text

MAX_LINE_BYTES = 100_000_000  # of one record in JSONL or CSV; the longest in published sets have a few megabytes
MAX_JSON_BYTES = 2**31  # of a JSON file, which is held in memory as a whole; JSONL has no limit
_ROWS = 256  # of a Parquet file that are in memory at once, beside its pages


class Place(NamedTuple):
    """Where a record begins."""

    line: int  # 0: in no file
    record: int = 0  # of a list; 0: in no list

    def __str__(self) -> str:
        if not self.line:
            return f"record {self.record:,}"
        return f"line {self.line:,}" + (f" (record {self.record:,})" if self.record else "")


def read_records(path: str | os.PathLike[str], tick: Tick | None = None) -> Iterator[tuple[Place, Any]]:
    """The records of a file one after the other: one JSON value per line, or the elements of one JSON list.

    Args:
        tick: see `open_binary`, which decompresses .gz and .zst.
    Yields:
        where the record is, and its value; or the DataError that says what is wrong with it, and reading goes on.
    Raises:
        DataError: the file cannot be read, or not any further.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name its .jsonl or .json files")
    with open_binary(path) as file:
        head = file.read(64)
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        is_list = (head[start:].lstrip()[:1] or _first_byte(file)) == b"["
    with open_binary(path, tick) as file:
        if is_list:
            yield from _elements(path, file, head)
        else:
            file.read(start)
            yield from _lines(path, file, head, start)


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte that is not white space; empty where there is none."""
    while chunk := file.read(2**16):
        if rest := chunk.lstrip():
            return rest[:1]
    return b""


def _lines(path: Path, file: BinaryIO, head: bytes, position: int) -> Iterator[tuple[Place, Any]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where, length = Place(number), len(line)
        if length > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(2**20)):
                length += len(line)
            yield where, DataError(f"it has {length:,} bytes; at most {MAX_LINE_BYTES:,} are allowed for one record")
        elif line.strip():
            try:
                text = line.decode("utf-8")
                if (zero := line.find(0)) >= 0:
                    raise DataError(not_utf8(path.name, 0, position + zero, head))
                yield where, _parse(text)
            except UnicodeDecodeError as error:
                yield where, DataError(not_utf8(path.name, line[error.start], position + error.start, head))
            except DataError as error:
                yield where, error
        position += length


def _parse(line: str) -> Any:
    try:
        return _DECODER.decode(line.strip())
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON from column {error.pos + 1:,} on, {shown(error.doc[error.pos : error.pos + 40])}: {error.msg}; "
            "a file has one record per line, or is one list of them"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; brackets in brackets in brackets
        raise DataError(f"not valid JSON: {error}") from error


def _elements(path: Path, file: BinaryIO, head: bytes) -> Iterator[tuple[Place, Any]]:
    size = path.stat().st_size
    content = file.read(MAX_JSON_BYTES + 1) if size <= MAX_JSON_BYTES else b""
    if max(size, len(content)) > MAX_JSON_BYTES:
        size = max(size, len(content))
        raise DataError(
            f"{path} has {size:,} bytes, and a JSON list is read as a whole, up to {MAX_JSON_BYTES:,}; make it JSONL, one record per "
            "line, which has no limit"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.start + (len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        raise DataError(f"{path} is {not_utf8(path.name, content[place], place, head)}") from error
    if (zero := content.find(0)) >= 0:
        raise DataError(f"{path} is {not_utf8(path.name, 0, zero, head)}")
    del content
    at = _skip_space(text, text.index("[") + 1)
    number, line, counted = 0, 1, 0
    if text[at : at + 1] == "]":
        at = _skip_space(text, at + 1)
    else:
        while True:
            number += 1
            line, counted = line + text.count("\n", counted, at), at
            where = Place(line, number)
            try:
                value, at = _DECODER.raw_decode(text, at)
                yield where, value
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {error.lineno:,}, column {error.colno:,} is not valid JSON (record {number:,}), "
                    f"{shown(text[error.pos : error.pos + 40])}: {error.msg}; what follows in a list cannot be read: correct it there"
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, {where} is not valid JSON: {error}") from error
            at = _skip_space(text, at)
            mark = text[at : at + 1]
            if mark not in (",", "]"):
                found = shown(text[at : at + 40]) if mark else "the end of the file: it is cut off"
                line += text.count("\n", counted, at)
                raise DataError(
                    f"{path}, line {line:,}: after record {number:,} comes {found}, where ',' or ']' must be"
                )
            at = _skip_space(text, at + 1)
            if mark == "]":
                break
    if at < len(text):
        line += text.count("\n", counted, at)
        raise DataError(f"{path}, line {line:,}: after the list comes {shown(text[at : at + 40])}; a file has one list")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        values[TWICE] = twice
    return values


TWICE = "\0twice"  # no JSON that is read here has a NUL as it stands
_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def read_table(path: str | os.PathLike[str], field: str, tick: Tick | None = None) -> Iterator[tuple[Place, str]]:
    """The cells of one column of a CSV file whose first row names the columns; `table_columns` says which there are.

    The separator is the comma, the semicolon or the tab, whichever the first row has most of.

    Yields:
        where the row begins, and the cell.
    Raises:
        DataError: as `read_text` and `table_columns`; a row without that cell; a quotation mark that is never closed.
    """
    path = Path(path)
    lines, rows, columns = _table(path, tick)
    column, number = columns.index(field), 0
    while True:
        line = lines.number + 1
        row = _next_row(rows, path, line)
        if row is None:
            return
        if row:
            number += 1
            if len(row) <= column:
                raise DataError(
                    f"{path}, line {line:,} has {len(row)} of {len(columns)} cells, and {field!r} is none of them"
                )
            yield Place(line, number), row[column]


def table_columns(path: str | os.PathLike[str]) -> list[str]:
    """The columns of a CSV file.

    Raises:
        DataError: as `read_text`; there are none, or two of one name.
    """
    return _table(Path(path), None)[2]


def _table(path: Path, tick: Tick | None) -> tuple["_CountedLines", Any, list[str]]:
    """Lines, rows after the first, names of the columns."""
    lines = _CountedLines(_text_lines(path, tick))
    first = next(lines, "")
    lines.back(first)
    separators = "\t,;" if any(suffix.lower() == ".tsv" for suffix in path.suffixes) else ",;\t"
    rows = csv.reader(lines, delimiter=max(separators, key=first.count))
    columns = _next_row(rows, path, 1) or []
    if not any(columns):
        raise DataError(f"{path} has no names of columns in its first line: {shown(first)}")
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise DataError(f"{path} has two columns {shown(twice)}; rename one of them")
    return lines, rows, columns


def _next_row(rows: Any, path: Path, line: int) -> list[str] | None:
    limit = csv.field_size_limit(MAX_LINE_BYTES)  # a setting of the whole process: it is put back at once
    try:
        row: list[str] | None = next(rows, None)
        return row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line:,} is no row of a table: {error}; is a quotation mark not closed, or not doubled within a cell?"
        ) from error
    finally:
        csv.field_size_limit(limit)


class _CountedLines(Iterator[str]):
    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._held: list[str] = []
        self.number = 0

    def back(self, line: str) -> None:
        self._held.append(line)
        self.number -= 1

    def __next__(self) -> str:
        self.number += 1
        return self._held.pop() if self._held else next(self._lines)


def _text_lines(path: Path, tick: Tick | None) -> Iterator[str]:
    """Lines with their ends; only "\\n" ends one."""
    held: list[str] = []
    size = number = 0
    for piece in read_text(path, tick):
        *whole, rest = piece.split("\n")
        for line in whole:
            number += 1
            yield "".join([*held, line, "\n"])
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > MAX_LINE_BYTES:
            raise DataError(f"{path}, line {number + 1:,} has more than {MAX_LINE_BYTES:,} characters; is it a table?")
    if any(held):
        yield "".join(held)


def read_parquet(path: str | os.PathLike[str], field: str, tick: Tick | None = None) -> Iterator[tuple[Place, Any]]:
    """The values of one column of a Parquet file, a few hundred at a time; `parquet_columns` says which there are.

    Yields:
        the number of the row, from 1 on, and its value.
    Raises:
        DataError: the file is damaged, or pyarrow is not installed.
    """
    with _parquet(path) as file:
        number, total, size = 0, max(1, file.metadata.num_rows), Path(path).stat().st_size
        ticked = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
            for value in batch.column(0):
                number += 1
                yield Place(0, number), value.as_py()
            if tick is not None:
                tick(size * number // total - ticked)
                ticked = size * number // total


def parquet_columns(path: str | os.PathLike[str]) -> list[str]:
    """The columns of a Parquet file; raises as `read_parquet`."""
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


@contextmanager
def _parquet(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} is a Parquet file, which needs pyarrow: pip install 'llmforge[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {error}; copy or download it again") from error
