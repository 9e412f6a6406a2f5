"""The ids of texts in a file: made once, in constant memory, and found again by the content of text and tokenizer."""

import codecs
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmforge.errors import DataError
from llmforge.formats.atomic import WriteError, atomic_file
from llmforge.tokenizers import Tokenizer
from llmforge.tokenizers.text_files import read_text

_VERSION = "llmforge token file 1"  # part of the key: another one when the ids of the same text change


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Ids on disk, nothing else in the file."""

    path: Path
    dtype: str  # "uint16" or "uint32"
    num_tokens: int
    text_bytes: int  # of the texts that the ids stand for


def write_token_file(
    texts: Sequence[Path], tokenizer: Tokenizer, *, end_of_text: int | None, cache_dir: str | os.PathLike[str] | None
) -> TokenFile:
    """The token file of some texts, from the cache where it is there and whole.

    Args:
        end_of_text: this id after each text; None = none.
        cache_dir: None = the folder tokens in $LLMFORGE_CACHE or ~/.cache/llmforge.
    Raises:
        DataError: a text is unreadable, empty, not UTF-8, or has a character that the tokenizer does not know.
        WriteError: the cache folder cannot be written.
    """
    folder = Path(cache_dir or Path(os.environ.get("LLMFORGE_CACHE") or Path.home() / ".cache" / "llmforge") / "tokens")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    path = folder / f"{_key(texts, tokenizer, end_of_text)}.bin"
    info_path = path.with_suffix(".json")  # written last: a file without it is not finished
    cached = _read_info(info_path, path, dtype)
    if cached is not None:
        return cached
    num_tokens = text_bytes = 0
    try:
        with atomic_file(path) as tmp, open(tmp, "wb") as file:
            for text in texts:
                for ids in _encoded(text, tokenizer):
                    file.write(ids.astype(dtype).tobytes())
                    num_tokens += len(ids)
                text_bytes += _text_bytes(text)
                if end_of_text is not None:
                    file.write(np.array([end_of_text], dtype=dtype).tobytes())
                    num_tokens += 1
        with atomic_file(info_path) as tmp:
            tmp.write_text(json.dumps({"num_tokens": num_tokens, "text_bytes": text_bytes}), encoding="utf-8")
    except WriteError as error:
        raise WriteError(f"{error} (token files go to cache_dir, or to the folder in LLMFORGE_CACHE)") from error
    return TokenFile(path=path, dtype=dtype, num_tokens=num_tokens, text_bytes=text_bytes)


def _encoded(text: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of a text, part by part."""
    try:
        yield from tokenizer.encode_pieces(read_text(text))
    except DataError as error:
        if str(text) in str(error):  # from read_text: not UTF-8, for example
            raise
        raise DataError(f"{text}, {error}") from error


def _text_bytes(text: Path) -> int:
    """Length of a text in bytes, without the byte order mark that `read_text` drops."""
    with open(text, "rb") as file:
        mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return text.stat().st_size - (len(codecs.BOM_UTF8) if mark else 0)


def _key(texts: Sequence[Path], tokenizer: Tokenizer, end_of_text: int | None) -> str:
    """sha256 over all that the ids depend on."""
    key = hashlib.sha256(f"{_VERSION} {end_of_text}".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        texts = [Path(folder) / "tokenizer.json", *texts]
        for text in texts:
            content = hashlib.sha256()
            try:
                with open(text, "rb") as file:
                    while chunk := file.read(2**20):
                        content.update(chunk)
            except OSError as error:
                raise DataError(f"cannot read {text}: {error.strerror or error}") from error
            key.update(content.digest())
    return key.hexdigest()


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
