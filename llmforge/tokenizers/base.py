"""What every tokenizer owes the rest of llmforge, and the pieces that all of them share."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmforge.config import read_json_object
from llmforge.errors import ConvertError, DataError
from llmforge.formats.atomic import atomic_file

# Ends a document; llama.cpp, LM Studio and Ollama stop at a token of this name by themselves.
END_OF_TEXT = "<|endoftext|>"

MAX_JSON_BYTES = 256 * 2**20  # the largest tokenizer.json in use are about 35 MB


class Tokenizer(Protocol):
    """Text to ids and back. The bodies below are what a tokenizer gets that inherits from this class."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special ones included: ids are 0 .. vocab_size - 1."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a document; None where the vocabulary has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: a literal "<|endoftext|>" is text like any other, so that `decode(encode(text)) == text`.

        Raises:
            DataError: a character that the vocabulary cannot express.
        """
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """The same ids as an array, for long texts."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that form no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 bytes of ids, which may begin or end within a character; special tokens give their name.

        Raises:
            DataError: an id outside the vocabulary.
        """
        ...

    def safe_cut(self, text: str) -> int:
        """Where a longer text may be cut without a change of its ids.

        Returns:
            the largest i found such that encode(text[:i]) + encode(text[i:] + more) == encode(text + more), whatever `more` is;
            0 if there is none.
        """
        return 0

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `load_tokenizer` and transformers' AutoTokenizer read them."""
        ...

    def gguf_vocabulary(self) -> "GGUFVocabulary":
        """The vocabulary as llama.cpp needs it to give the same ids.

        Raises:
            ConvertError: llama.cpp has nothing that would.
        """
        raise ConvertError(
            f"{type(self).__name__} cannot be expressed in a GGUF file; train with CharTokenizer or BPETokenizer"
        )


@dataclass(frozen=True, kw_only=True)
class GGUFVocabulary:
    """A byte-level BPE vocabulary in llama.cpp's terms (`tokenizer.ggml.model` = "gpt2")."""

    tokens: list[str]  # by id; normal tokens in the byte alphabet, special ones as they are; no two alike
    token_types: list[int]  # NORMAL, CONTROL, USER_DEFINED or UNUSED
    # "left right", first merge first; never empty, since writers drop empty arrays and llama.cpp wants one
    merges: list[str]
    pre: str  # name of the pre-tokenizer


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's llama_token_type

# Bytes as printable characters, GPT-2's way: those that print stand for themselves, the other 68 follow from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def bytes_to_characters(data: bytes) -> str:
    """Bytes in GPT-2's byte alphabet.

    >>> bytes_to_characters(" ñ".encode())
    'ĠÃ±'
    """
    return "".join(map(_CHARACTERS.__getitem__, data))


def characters_to_bytes(token: str) -> bytes:
    """The reverse; a token with a character outside the alphabet was never in it and gives its UTF-8.

    >>> characters_to_bytes("ĠÃ±").decode()
    ' ñ'
    """
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return token.encode()


def join_pieces(pieces: Sequence[bytes], ids: Sequence[int]) -> bytes:
    """The bytes of `ids`, where `pieces` are the bytes of each id of the vocabulary."""
    array = np.asarray(ids, dtype=np.int64)
    outside = array[(array < 0) | (array >= len(pieces))]
    if outside.size:
        raise DataError(
            f"id {outside[0]} is outside the vocabulary of {len(pieces):,} tokens; were the ids made with another one?"
        )
    return b"".join([pieces[i] for i in array.tolist()])


def write_tokenizer_files(folder: str | os.PathLike[str], tokenizer_json: str, config: Mapping[str, Any]) -> None:
    """Write the two files of `Tokenizer.save`."""
    for name, content in (
        ("tokenizer.json", tokenizer_json),
        ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
    ):
        with atomic_file(Path(folder) / name) as tmp:
            tmp.write_text(content, encoding="utf-8", newline="\n")


def tokenizer_config(special_token: str | None = END_OF_TEXT) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer with one special token: transformers takes all else from tokenizer.json."""
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), special_token) if special_token else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens, "clean_up_tokenization_spaces": False}


def read_tokenizer_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a JSON file of a tokenizer.

    Raises:
        DataError: it cannot be read, is not a JSON object, or is larger than any tokenizer.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_JSON_BYTES:
            raise DataError(
                f"{path} has {size:,} bytes; a tokenizer file of more than {MAX_JSON_BYTES:,} is damaged or something else"
            )
        return read_json_object(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{error}; copy or download the file again") from error
