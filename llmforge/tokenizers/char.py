"""Characters as tokens: the smallest vocabulary, nanoGPT's shakespeare_char."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmforge.errors import DataError
from llmforge.tokenizers.base import (
    CONTROL,
    END_OF_TEXT,
    NO_MERGE,
    NORMAL,
    GGUFVocabulary,
    Tokenizer,
    bytes_to_characters,
    join_pieces,
    tokenizer_config,
    write_tokenizer_files,
)
from llmforge.tokenizers.sources import Source, training_pieces

_UNKNOWN = 0xFFFF_FFFF


class CharTokenizer(Tokenizer):
    """One id per character (Unicode code point), sorted by code point as in nanoGPT; the last id is `<|endoftext|>`.

    >>> tokenizer = CharTokenizer.from_text("¡Señor!")
    >>> tokenizer.encode("ñoñeSr"), tokenizer.eos_token_id
    ([6, 3, 6, 2, 1, 4], 7)
    >>> tokenizer.decode([0, 6, 7])
    '!ñ<|endoftext|>'

    Args:
        chars: the characters, in any order.
    Raises:
        DataError: there are none, or one that is no character.
    """

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = tuple(sorted(set(chars)))
        if not self.chars:
            raise DataError("a vocabulary needs at least one character; give the text that the model will learn")
        for char in self.chars:
            if len(char) != 1 or "\ud800" <= char <= "\udfff":
                raise DataError(
                    f"{char!r} is not a single character; CharTokenizer takes characters, and not half of a pair"
                )
        self._pieces = [char.encode() for char in self.chars] + [END_OF_TEXT.encode()]
        code_points = np.array([ord(char) for char in self.chars])
        # From code point to id; the last entry stands for all larger code points.
        self._ids = np.full(code_points[-1] + 2, _UNKNOWN, dtype=np.uint32)
        self._ids[code_points] = np.arange(len(self.chars))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The characters that occur in a text."""
        return cls(text)

    @classmethod
    def from_text_file(cls, sources: Source | Iterable[Source]) -> "CharTokenizer":
        """The characters that occur in a UTF-8 text file, in the .txt files of a folder, or in other sources; see `TextSource`.

        Raises:
            DataError: no such file, empty, or not UTF-8.
        """
        chars: set[str] = set()
        for piece in training_pieces(sources, len):
            chars.update(piece)
        return cls(chars)

    @property
    def vocab_size(self) -> int:
        return len(self.chars) + 1

    @property
    def eos_token_id(self) -> int:
        return len(self.chars)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids: npt.NDArray[np.uint32] = self._ids[np.minimum(code_points, len(self._ids) - 1)]
        unknown = ids == _UNKNOWN
        if unknown.any():
            position = int(unknown.argmax())
            raise DataError(
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position:,} is not one of the "
                f"{len(self.chars)} of this vocabulary; build it from a text that has it, or use BPETokenizer, which encodes any text"
            )
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, after: bool = False
    ) -> list[npt.NDArray[np.uint32]]:
        if special or not texts:
            return super().encode_batch(texts, special=special, after=after)
        ids = self.encode_array("".join(texts))
        return np.split(ids, np.cumsum([len(text) for text in texts[:-1]], dtype=np.int64))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return join_pieces(self._pieces, ids)

    def safe_cut(self, text: str) -> int:
        return len(text)

    def save(self, folder: str | os.PathLike[str]) -> None:
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        write_tokenizer_files(
            folder, json.dumps(self._tokenizer_json(), indent=2, ensure_ascii=False), tokenizer_config() | template
        )

    def _tokenizer_json(self) -> dict[str, Any]:
        # A BPE model that merges nothing sees single characters; Fuse puts them together again without spaces.
        special = {"id": self.eos_token_id, "content": END_OF_TEXT, "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        vocabulary = {token: i for i, token in enumerate([*self.chars, END_OF_TEXT])}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special | flags],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }

    @classmethod
    def from_tokenizer_json(cls, content: Mapping[str, Any]) -> "CharTokenizer | None":
        """The tokenizer whose `save` wrote this tokenizer.json; None if it is another's.

        Raises:
            DataError: its characters are not in order: the file was changed.
        """
        model = content.get("model")
        if content.get("pre_tokenizer") is not None or not isinstance(model, dict) or model.get("merges") != []:
            return None
        vocabulary = model.get("vocab")
        if not isinstance(vocabulary, dict) or END_OF_TEXT not in vocabulary:
            return None
        tokenizer = cls(char for char in vocabulary if char != END_OF_TEXT)
        if tokenizer._tokenizer_json()["model"]["vocab"] != vocabulary:
            raise DataError(
                "the characters of this vocabulary are not numbered by code point; the file was changed after it was saved"
            )
        return tokenizer

    def gguf_vocabulary(self) -> GGUFVocabulary:
        # llama.cpp begins with bytes: each character of several bytes is merged from its prefixes, which need not be tokens.
        # No merge reaches over the end of a character, so the pre-tokenizer cannot matter for the ids; qwen2 is one that old
        # versions know and whose detokenizer leaves spaces alone.
        tokens = [bytes_to_characters(piece) for piece in self._pieces[:-1]]
        merges = {f"{token[:n]} {token[n]}": None for token in tokens for n in range(1, len(token))}
        return GGUFVocabulary(
            tokens=[*tokens, END_OF_TEXT],
            token_types=[NORMAL] * len(tokens) + [CONTROL],
            merges=list(merges) or [NO_MERGE],
            pre="qwen2",
            eos_token_id=self.eos_token_id,
            chat_template=self.chat_template,
        )
