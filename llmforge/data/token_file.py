"""The ids of texts in a file: made once, in constant memory, and found again by the content of text and tokenizer."""

import codecs
import hashlib
import json
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmforge.data.near_duplicates import NearDuplicates
from llmforge.errors import DataError
from llmforge.formats.atomic import AppendedFile, WriteError, atomic_file, resumable_file, resumable_folder
from llmforge.tokenizers import Tokenizer, text_files
from llmforge.tokenizers.sources import Document, DocumentFile
from llmforge.tokenizers.text_files import Tick, read_text

_VERSION = "llmforge token file 1"  # part of the key: another one when the ids of the same text change
_SMALL_BYTES = 2**20  # smaller files of a group share a token file


# Of each document: its ids, with the end-of-text id; a hash of its text; the UTF-8 bytes of its text.
DOCUMENTS = np.dtype([("tokens", "<i8"), ("hash", "<u8"), ("bytes", "<i8")])
_PARTS = np.dtype([("tokens", "<i8"), ("documents", "<i8")])  # how much of these a part of the work has

PART_CHARS = 2**22  # short documents are tokenized together up to about this length
_AHEAD = 2  # parts that are read while others are tokenized

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Ids on disk, nothing else in the file."""

    path: Path
    dtype: str  # "uint16" or "uint32"
    num_tokens: int
    text_bytes: int  # of the texts that the ids stand for
    documents: Path | None = None  # a file of DOCUMENTS


def write_token_file(
    texts: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    end_of_text: int | None,
    cache_dir: str | os.PathLike[str] | None,
    progress: Progress | None = None,
) -> TokenFile:
    """The token file of some texts, from the cache where it is there and whole.

    A part at a time is in memory. A process that is killed leaves what it has done, and the next one goes on there.

    Args:
        end_of_text: this id after each text; None = none.
        cache_dir: None = the folder tokens in $LLMFORGE_CACHE or ~/.cache/llmforge.
        progress: called with the bytes that are read and those to read.
    Raises:
        DataError: a text is unreadable, empty, not UTF-8, or has a character that the tokenizer does not know.
        WriteError: the cache folder cannot be written.
    """
    dtype = _dtype(tokenizer)
    path = _folder(cache_dir) / f"{_key(texts, tokenizer, end_of_text)}.bin"
    info_path = path.with_suffix(".json")  # written last: a file without it is not finished
    cached = _read_info(info_path, path, dtype)
    if cached is not None:
        return cached
    tick = _ticks(progress, sum(text.stat().st_size for text in texts))
    documents = (Document(str(text), read_text(text, tick)) for text in texts)
    with _explained(), resumable_file(path, _inputs()) as target:
        notes = None if target.marks is None else target.path.with_name("parts")
        num_tokens = _write(
            documents, tokenizer, end_of_text, dtype, target.path, target.marks, documents_to=None, parts_to=notes
        )
    text_bytes = sum(map(_text_bytes, texts))
    with _explained(), atomic_file(info_path) as tmp:
        tmp.write_text(json.dumps({"num_tokens": num_tokens, "text_bytes": text_bytes}), encoding="utf-8")
    return TokenFile(path=path, dtype=dtype, num_tokens=num_tokens, text_bytes=text_bytes)


def write_document_files(
    groups: Sequence[Sequence[DocumentFile]],
    tokenizer: Tokenizer,
    *,
    near_duplicates: NearDuplicates | None,
    cache_dir: str | os.PathLike[str] | None,
    progress: Progress | None = None,
) -> list[list[TokenFile]]:
    """The token files of some groups of files, with an end-of-text id after each document, where the tokenizer has one.

    Each file has its own in the cache, and small ones of a group share one: what was done before is not done again when files are added.

    Args:
        near_duplicates: what drops lines; then a token file depends on those before it, too.
    See `write_token_file`.
    """
    tick = _ticks(progress, sum(file.size for group in groups for file in group))
    common = hashlib.sha256(f"{_VERSION} {tokenizer.eos_token_id} {near_duplicates is not None}".encode())
    common.update(_tokenizer_digest(tokenizer))
    before = hashlib.sha256()
    skipped: list[DocumentFile] = []  # which the comparing has not seen yet
    found: list[list[TokenFile]] = []
    for group in groups:
        found.append([])
        for unit in _units(group):
            key = common.copy()
            for file in unit:
                key.update(file.digest)
                before.update(file.digest)
            if near_duplicates is not None:
                key.update(before.digest())
            folder = _folder(cache_dir) / key.hexdigest()
            cached = _read_folder(folder, _dtype(tokenizer))
            if cached is None:
                documents: Iterator[Document] = (document for file in unit for document in file.documents(tick))
                if near_duplicates is not None:
                    for document in near_duplicates.filtered(d for file in skipped for d in file.documents()):
                        for _ in document.pieces:
                            pass
                    skipped = []
                    documents = near_duplicates.filtered(documents)
                cached = _write_folder(folder, documents, tokenizer)
            else:
                skipped += unit
                tick(sum(file.size for file in unit))
            found[-1].append(cached)
    return found


def _units(files: Sequence[DocumentFile]) -> list[list[DocumentFile]]:
    """What shares a token file: the small ones; each of the others for itself."""
    small = [file for file in files if file.size < _SMALL_BYTES]
    return [unit for unit in [small, *([file] for file in files if file.size >= _SMALL_BYTES)] if unit]


def _write_folder(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer) -> TokenFile:
    dtype = _dtype(tokenizer)
    with _explained(), resumable_folder(folder, _inputs(), overwrite=True) as target:
        ids, table = target.path / "ids.bin", target.path / "documents.bin"
        num_tokens = _write(
            documents,
            tokenizer,
            tokenizer.eos_token_id,
            dtype,
            ids,
            target.marks,
            documents_to=table,
            parts_to=target.path / "parts.bin",
        )
        text_bytes = int(np.memmap(table, DOCUMENTS, mode="r")["bytes"].sum()) if table.stat().st_size else 0
        info = {"num_tokens": num_tokens, "text_bytes": text_bytes}
        (target.path / "info.json").write_text(json.dumps(info), encoding="utf-8")
    return TokenFile(
        path=folder / "ids.bin",
        dtype=dtype,
        num_tokens=num_tokens,
        text_bytes=text_bytes,
        documents=folder / "documents.bin",
    )


def _write(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    end_of_text: int | None,
    dtype: str,
    ids_to: Path,
    marks: Path | None,
    *,
    documents_to: Path | None,
    parts_to: Path | None,
) -> int:
    """Tokenize documents, but for the parts that a killed process has left; returns the number of tokens."""
    with ExitStack() as stack:
        files = {
            kind: stack.enter_context(AppendedFile(path, marks, b""))
            for kind, path in (("documents", documents_to), ("ids", ids_to), ("parts", parts_to))
            if path is not None
        }
        # All parts whose ids and documents are there. They are marked in the order of `files`, but a file may be damaged.
        known = np.fromfile(parts_to, _PARTS) if parts_to is not None and files["parts"].kept else np.empty(0, _PARTS)
        there = np.cumsum(known["tokens"]) * np.dtype(dtype).itemsize <= files["ids"].kept
        if "documents" in files:
            there &= np.cumsum(known["documents"]) * DOCUMENTS.itemsize <= files["documents"].kept
        known = known[: int(there.argmin()) if not there.all() else len(there)]
        num_tokens = open_tokens = 0  # of the document that goes on in the next part
        for number, part in enumerate(_read_ahead(_parts(documents, tokenizer))):
            if number < len(known):
                tokens = int(known[number]["tokens"])
                sizes = {
                    "ids": tokens * np.dtype(dtype).itemsize,
                    "documents": int(known[number]["documents"]) * DOCUMENTS.itemsize,
                    "parts": _PARTS.itemsize,
                }
                for kind, file in files.items():
                    file.skip(sizes[kind])
            else:
                encoded = part.encode(tokenizer, end_of_text)
                ids = np.concatenate(encoded).astype(dtype)
                tokens = len(ids)
                rows = np.zeros(len(part.hashes), DOCUMENTS)
                if part.last:
                    rows["tokens"], rows["hash"], rows["bytes"] = (
                        part.lengths(encoded, end_of_text),
                        part.hashes,
                        part.sizes,
                    )
                    rows["tokens"][0] += open_tokens
                counts = np.array([(tokens, len(rows))], _PARTS)
                for kind, content in (("documents", rows), ("ids", ids), ("parts", counts)):
                    if kind in files and content.nbytes and not files[kind].skip(content.nbytes):
                        files[kind].write(content.tobytes())
                for file in files.values():
                    file.mark()
            open_tokens = 0 if part.last else open_tokens + tokens
            num_tokens += tokens
    return num_tokens


@dataclass(frozen=True)
class _Part:
    """Some documents, or a part of a long one."""

    texts: list[str]
    places: list[str]
    start: int  # characters of the document that were in parts before
    last: bool  # the documents end here
    hashes: list[int]  # of the documents that end here
    sizes: list[int]

    def encode(self, tokenizer: Tokenizer, end_of_text: int | None) -> list[npt.NDArray[Any]]:
        """The ids of each text, and the end-of-text id after each document."""
        whole = self.last and self.start == 0
        try:
            if whole:
                encoded = tokenizer.encode_batch(self.texts)
            else:
                encoded = [tokenizer.encode_part(self.texts[0], first=self.start == 0)]
        except DataError as error:
            raise self._placed(error, tokenizer) from error
        if not self.last or end_of_text is None:
            return encoded
        end = np.array([end_of_text], dtype=np.uint32)
        return [ids for text_ids in encoded for ids in (text_ids, end)]

    def lengths(self, encoded: list[npt.NDArray[Any]], end_of_text: int | None) -> list[int]:
        lengths = [len(ids) for ids in encoded]
        return lengths if end_of_text is None else [sum(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)]

    def _placed(self, error: DataError, tokenizer: Tokenizer) -> DataError:
        """The error of the first text that has it, with its place."""
        place = self.places[0]
        for text, text_place in zip(self.texts, self.places, strict=True):
            if len(self.texts) == 1:
                break
            try:
                tokenizer.encode_array(text)
            except DataError as its_error:
                error, place = its_error, text_place
                break
        return DataError(f"{place}, from character {self.start:,} on: {error}")


def _parts(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[_Part]:
    """Documents as parts of about the same size: short ones together, long ones cut where the tokenizer says."""
    texts: list[str] = []
    places: list[str] = []
    hashes: list[int] = []
    sizes: list[int] = []
    chars = 0
    for document in documents:
        digest, size, start = hashlib.blake2b(digest_size=8), 0, 0
        held: str | None = None
        for text in tokenizer.cut_pieces(document.pieces):
            if held is not None:
                if texts:
                    yield _Part(texts, places, 0, True, hashes, sizes)
                    texts, places, hashes, sizes, chars = [], [], [], [], 0
                yield _Part([held], [document.place], start, False, [], [])
                start += len(held)
            held = text
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{document.place} has half of a surrogate pair at character {start + error.start:,}, which is no character; write "
                    "the whole one"
                ) from error
            digest.update(data)
            size += len(data)
        if not held:
            continue
        document_hash = int.from_bytes(digest.digest(), "little")
        if start:
            yield _Part([held], [document.place], start, True, [document_hash], [size])
            continue
        texts.append(held)
        places.append(document.place)
        hashes.append(document_hash)
        sizes.append(size)
        chars += len(held)
        if chars >= PART_CHARS:
            yield _Part(texts, places, 0, True, hashes, sizes)
            texts, places, hashes, sizes, chars = [], [], [], [], 0
    if texts:
        yield _Part(texts, places, 0, True, hashes, sizes)


def _read_ahead(items: Iterator[_Part]) -> Iterator[_Part]:
    """The same items, read in a thread while others are worked on."""
    ready: queue.Queue[_Part | BaseException | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: _Part | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=1)  # on Windows Ctrl-C does not end a wait without one
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _ticks(progress: Progress | None, total: int) -> Tick:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress is not None:
            progress(done, total)

    return tick


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error} (token files go to cache_dir, or to the folder in LLMFORGE_CACHE)") from error


def _folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(cache_dir or Path(os.environ.get("LLMFORGE_CACHE") or Path.home() / ".cache" / "llmforge") / "tokens")


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _inputs() -> dict[str, int]:
    """What the parts depend on, beside what the file's name stands for."""
    return {"chunk_bytes": text_files.CHUNK_BYTES, "part_chars": PART_CHARS}


def _text_bytes(text: Path) -> int:
    """Length of a text in bytes, without the byte order mark that `read_text` drops."""
    with open(text, "rb") as file:
        mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return text.stat().st_size - (len(codecs.BOM_UTF8) if mark else 0)


def _key(texts: Sequence[Path], tokenizer: Tokenizer, end_of_text: int | None) -> str:
    """sha256 over all that the ids depend on."""
    key = hashlib.sha256(f"{_VERSION} {end_of_text}".encode())
    key.update(_tokenizer_digest(tokenizer))
    for text in texts:
        key.update(_digest(text))
    return key.hexdigest()


def _tokenizer_digest(tokenizer: Tokenizer) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return _digest(Path(folder) / "tokenizer.json")


def _digest(path: Path) -> bytes:
    content = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                content.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return content.digest()


def _read_folder(folder: Path, dtype: str) -> TokenFile | None:
    """What the cache has of documents."""
    found = _read_info(folder / "info.json", folder / "ids.bin", dtype)
    table = folder / "documents.bin"
    try:
        whole = found is not None and int(np.fromfile(table, DOCUMENTS)["tokens"].sum()) == found.num_tokens
    except OSError:
        return None
    return replace(found, documents=table) if found is not None and whole else None


def _read_info(info_path: Path, path: Path, dtype: str) -> TokenFile | None:
    """What the cache has, if the file is as long as it should be."""
    try:
        info = json.loads(info_path.read_text(encoding="utf-8"))
        found = TokenFile(
            path=path, dtype=dtype, num_tokens=int(info["num_tokens"]), text_bytes=int(info["text_bytes"])
        )
        whole = path.stat().st_size == found.num_tokens * np.dtype(dtype).itemsize
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None
