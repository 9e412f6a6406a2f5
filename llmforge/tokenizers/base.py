"""What every tokenizer owes the rest of llmforge, and the pieces that all of them share."""

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmforge.config import read_json_object
from llmforge.errors import ConvertError, DataError
from llmforge.formats.atomic import atomic_file
from llmforge.tokenizers.text_files import cut_safely

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

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, after: bool = False
    ) -> list[npt.NDArray[np.uint32]]:
        """Ids of many texts, those that `encode` gives for each; on all cores where the tokenizer can.

        Args:
            special: names of special tokens are these tokens, as in `encode_special`.
            after: each text goes on another one, as an answer goes on its prompt: no space is put before it, where `encode` puts one.
        Raises:
            DataError: as `encode`.
        """
        if special:
            return [np.array(self.encode_special(text), dtype=np.uint32) for text in texts]
        return [self.encode_array(text) for text in texts]

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[npt.NDArray[np.uint32]]:
        """Ids of one long text that comes in pieces, part by part and in memory for some pieces at a time; all parts together are
        `encode` of the whole.

        Raises:
            DataError: as `encode`, with the place in the whole text.
        """
        start = 0  # of the part, in characters
        for part in self.cut_pieces(pieces):
            try:
                yield self.encode_part(part, first=start == 0)
            except DataError as error:
                raise DataError(f"from character {start:,} on: {error}") from error
            start += len(part)

    def cut_pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """The same text in parts that `encode_part` takes one by one."""
        return cut_safely(pieces, self.safe_cut)

    def encode_part(self, part: str, *, first: bool) -> npt.NDArray[np.uint32]:
        """Ids of one part of a long text; those of all parts together are `encode` of the whole.

        Args:
            first: the text begins with this part.
        """
        return self.encode_array(part)

    def safe_cut(self, text: str) -> int:
        """Where a longer text may be cut without a change of its ids.

        Returns:
            the largest i found such that encode(text[:i]) + encode(text[i:] + more) == encode(text + more), whatever `more` is;
            0 if there is none.
        """
        return 0

    # What published models need. A vocabulary of llmforge's own has one special token, and these bodies fit it.

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text; that of `eos_token_id` where one token separates texts; None where there is none."""
        return self.eos_token_id

    @property
    def add_bos(self) -> bool:
        """Whether the model saw `bos_token_id` at the beginning of each text, so that a prompt must begin with it."""
        return False

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of the beginning of a text: `encode`, after `bos_token_id` where the model wants it."""
        bos = self.bos_token_id
        return [bos, *self.encode(text)] if self.add_bos and bos is not None else self.encode(text)

    def encode_special(self, text: str) -> list[int]:
        """Ids of a text in which names of special tokens are these tokens, as in a rendered chat; no `bos_token_id` is added.

        Do not give it text of strangers: who may write "<|im_end|>" can end their turn.
        """
        eos = self.eos_token_id
        if eos is None:
            return self.encode(text)
        first, *others = text.split(self.decode([eos]))
        return self.encode(first) + [i for part in others for i in (eos, *self.encode(part))]

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The ids after which a model has nothing more to say: `eos_token_id`, and special tokens that end a turn."""
        return frozenset() if self.eos_token_id is None else frozenset([self.eos_token_id])

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Names of special tokens by what they are for ("bos_token", "eos_token", "pad_token", ...), as chat templates want them."""
        return {} if self.eos_token_id is None else {"eos_token": self.decode([self.eos_token_id])}

    @property
    def chat_template(self) -> str | None:
        """Jinja template that makes one text of a conversation (see `render_chat`); None if the model has none."""
        return self._chat_template

    _chat_template: str | None = None

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """The same tokenizer with another chat template, which goes where it goes: `save` and `gguf_vocabulary` write it.

        `llmforge.tokenizers.templates.with_chat_template` knows templates by name, and checks them.
        """
        other = copy.copy(self)
        other._chat_template = template
        return other

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


# llama.cpp's llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

NO_MERGE = "ĠĀ Ġ"  # for a vocabulary without merges; it is never applied, since nothing makes "ĠĀ"

# Without a template clients assume ChatML, whose markers are junk for a model that never saw them.
PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class GGUFVocabulary:
    """A vocabulary in llama.cpp's terms: the keys tokenizer.* of a GGUF file."""

    model: str = "gpt2"  # "gpt2": byte-level BPE; "llama": SentencePiece BPE
    tokens: list[
        str
    ]  # by id; in "gpt2" normal ones are in the byte alphabet; special ones are as they are; no two alike
    token_types: list[int]  # NORMAL ... BYTE
    # "gpt2": "left right", first merge first; never empty, since writers drop empty arrays and llama.cpp wants one
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # "llama": the best pair is the one whose result has the highest
    pre: str = "default"  # "gpt2": name of the pre-tokenizer
    bos_token_id: int | None = None  # None = the same as eos_token_id
    eos_token_id: int | None = None
    unk_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
    add_space_prefix: bool | None = None  # "llama" only
    chat_template: str | None = None  # None = one that adds nothing

    def metadata(self, *, rows: int | None = None) -> dict[str, Any]:
        """The metadata of a GGUF file.

        Args:
            rows: of the model's embedding. llama.cpp wants as many tokens; those that are missing get names that no text contains.
        Raises:
            ConvertError: there is no token to stop at, or there are fewer rows than tokens.
        """
        if self.eos_token_id is None:  # llama.cpp would take id 11, some letter
            raise ConvertError(
                "the tokenizer has no <|endoftext|>, and llama.cpp needs a token to stop at; add one as a special token"
            )
        rows = len(self.tokens) if rows is None else rows
        if rows < len(self.tokens):
            raise ConvertError(
                f"the model has {rows:,} rows for {len(self.tokens):,} tokens; give the tokenizer that it was trained with"
            )
        padding = range(len(self.tokens), rows)
        values: dict[str, Any] = {
            "ggml.model": self.model,
            "ggml.pre": self.pre,
            "ggml.tokens": [*self.tokens, *map(padding_token, padding)],
            "ggml.token_type": [*self.token_types, *(UNUSED for _ in padding)],
        }
        if self.model == "llama":
            lowest = min(self.scores, default=0.0)
            values["ggml.scores"] = [*map(float, self.scores), *(lowest for _ in padding)]
        else:
            values["ggml.merges"] = self.merges
        ids = {
            "bos": self.eos_token_id if self.bos_token_id is None else self.bos_token_id,
            "eos": self.eos_token_id,
            "unknown": self.unk_token_id,
            "padding": self.pad_token_id,
        }
        values |= {f"ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
        values["ggml.add_bos_token"] = self.add_bos_token  # some pre-tokenizers default to True
        if self.add_space_prefix is not None:
            values["ggml.add_space_prefix"] = self.add_space_prefix
        values["chat_template"] = PASS_THROUGH if self.chat_template is None else self.chat_template
        return {f"tokenizer.{key}": value for key, value in values.items()}


def padding_token(i: int) -> str:
    """Name of a row of the embedding that stands for no token. No text has it: a space is neither in the byte alphabet nor a piece."""
    return f"[UNUSED {i}]"


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
    # That of a tokenizer that was here before: it would be read instead of the template in tokenizer_config.json.
    (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)


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
        return read_json_object(path, max_bytes=MAX_JSON_BYTES)
    except ValueError as error:
        raise DataError(f"{error}; copy or download the file again") from error
