"""GPT-2's vocabulary through OpenAI's tiktoken: what nanoGPT uses for everything but characters."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import cast

import numpy as np
import numpy.typing as npt
import tiktoken

from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers.base import END_OF_TEXT, GGUFVocabulary, Tokenizer, bytes_to_characters, join_pieces
from llmforge.tokenizers.bpe import BPETokenizer, last_cut
from llmforge.tokenizers.fast_bpe import encode_ordinary, in_threads
from llmforge.tokenizers.text_files import cut_safely

_URLS = tuple(
    f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" for name in ("vocab.bpe", "encoder.json")
)

_PART_CHARS = 2**16  # long texts are encoded in parts of about this length, on all cores

# GPT-2's pattern as published, and as tiktoken has sped it up over the years.
_GPT2_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
)


class TiktokenTokenizer(Tokenizer):
    """GPT-2's 50,257 tokens. tiktoken downloads the two files of the vocabulary once and keeps them.

    Args:
        encoding: "gpt2", or a tiktoken.Encoding with GPT-2's pattern and `<|endoftext|>`.
    Raises:
        ConfigError: another name, or an encoding with another pattern.
        DataError: the vocabulary can neither be found nor downloaded.
    """

    def __init__(self, encoding: "str | tiktoken.Encoding" = "gpt2") -> None:
        if isinstance(encoding, str):
            if encoding != "gpt2":
                raise ConfigError(
                    f"TiktokenTokenizer knows 'gpt2' only, not {encoding!r}; BPETokenizer.from_file reads a tokenizer.json"
                )
            encoding = _load_gpt2()
        if encoding._pat_str not in _GPT2_PATTERNS or END_OF_TEXT not in encoding._special_tokens:
            raise ConfigError(
                f"the encoding {encoding.name!r} must have GPT-2's pattern and {END_OF_TEXT}; use BPETokenizer for others"
            )
        self._encoding = encoding
        tokens = {i: token for token, i in encoding._mergeable_ranks.items()}
        tokens |= {i: name.encode() for name, i in encoding._special_tokens.items()}
        self._pieces = [tokens.get(i, b"") for i in range(encoding.n_vocab)]

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    @property
    def eos_token_id(self) -> int:
        return self._encoding.eot_token

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        slices = (text[i : i + _PART_CHARS] for i in range(0, len(text), _PART_CHARS))
        parts = list(cut_safely(slices, last_cut)) or [text]
        return np.concatenate(self._encode_all(parts))

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, after: bool = False
    ) -> list[npt.NDArray[np.uint32]]:
        return super().encode_batch(texts, special=True) if special else self._encode_all(texts)

    def _encode_all(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        found = in_threads(lambda text: encode_ordinary(self._encoding, text), texts)
        return [
            np.array(self._encoding.encode_ordinary(text), dtype=np.uint32) if ids is None else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return join_pieces(self._pieces, ids)

    def safe_cut(self, text: str) -> int:
        return last_cut(text)

    def save(self, folder: str | os.PathLike[str]) -> None:
        self._bpe.save(folder)

    def gguf_vocabulary(self) -> GGUFVocabulary:
        return self._bpe.gguf_vocabulary()

    def with_chat_template(self, template: str | None) -> Tokenizer:
        other = super().with_chat_template(template)
        other.__dict__.pop("_bpe", None)  # it has the old one
        return other

    def to_bpe(self) -> BPETokenizer:
        """The same vocabulary as a BPETokenizer, with the same ids for any text."""
        return self._bpe

    @cached_property
    def _bpe(self) -> BPETokenizer:
        ranks = self._encoding._mergeable_ranks
        vocabulary = {
            bytes_to_characters(token): rank for token, rank in ranks.items()
        } | self._encoding._special_tokens
        merges = [_last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
        pairs = [(bytes_to_characters(left), bytes_to_characters(right)) for left, right in merges]
        tokenizer = BPETokenizer.from_merges(vocabulary, pairs, pre_tokenizer="gpt-2")
        return cast(BPETokenizer, tokenizer.with_chat_template(self.chat_template))


def _load_gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises
        files = " and ".join(f"{url} as {hashlib.sha1(url.encode()).hexdigest()}" for url in _URLS)
        raise DataError(
            f"GPT-2's vocabulary can neither be found nor downloaded ({type(error).__name__}). Save {files} in a folder, and set the "
            "environment variable TIKTOKEN_CACHE_DIR to that folder; or train your own vocabulary with BPETokenizer (--tokenizer bpe)"
        ) from error


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that the last merge joins to `token`: what all merges of lower rank make of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[i] >= ranks[token]:
            raise DataError(f"no merges lead to the token {token!r}; the encoding is not a BPE")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
