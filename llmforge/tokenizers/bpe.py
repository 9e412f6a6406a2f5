"""Byte-level BPE: pieces of words, learnt from a text or read from a tokenizer.json; any text can be encoded."""

import json
import os
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from llmforge.config import did_you_mean
from llmforge.errors import ConfigError, ConvertError, DataError
from llmforge.tokenizers.backend import BackendTokenizer, check_vocab_size, load_backend, state_of
from llmforge.tokenizers.base import (
    END_OF_TEXT,
    NO_MERGE,
    GGUFVocabulary,
    characters_to_bytes,
    tokenizer_config,
)
from llmforge.tokenizers.fast_bpe import MIN_CHARS, FastBPE
from llmforge.tokenizers.sources import Source, training_pieces
from llmforge.tokenizers.text_files import cut_safely

# How a text is cut into words before merging. These four mean the same in llama.cpp under the same name, on any text; the usual
# "(?i:'s|...)" does not, since it lets 's match the long s (U+017F) too.
PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_HF_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": f"{_CONTRACTIONS}|{_WORDS}" % r"\p{N}{1,3}",
    "qwen2": f"{_CONTRACTIONS}|{_WORDS}" % r"\p{N}",
}

# In none of the four does a word reach from a letter over a character of these: there a text can be cut. Before a space is better.
CUT_BEFORE = (" \t\r\n", string.punctuation)

_MIN_VOCAB_SIZE = 257  # every byte, and END_OF_TEXT
_PART_CHARS = 2**16  # texts are encoded in parts of about this length, on all cores


class BPETokenizer(BackendTokenizer):
    """Byte-level BPE with one of the pre-tokenizers that llama.cpp has too.

    >>> tokenizer = BPETokenizer.from_texts(["una olla de algo más vaca que carnero " * 9], vocab_size=280)
    >>> tokenizer.decode(tokenizer.encode("¡Señor! 🙂")), tokenizer.eos_token_id
    ('¡Señor! 🙂', 279)

    Make one with `from_text_file`, `from_texts` or `from_file`.

    Attributes:
        pre_tokenizer: name of the pre-tokenizer; None if it is none of PRE_TOKENIZERS.
    Raises:
        DataError: `backend` is not byte-level BPE.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any] | None = None) -> None:
        state = state_of(backend)
        _check_byte_level(state, backend.get_vocab(with_added_tokens=True))
        if config is None:
            config = tokenizer_config(END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else None)
        super().__init__(backend, config)
        self.pre_tokenizer = _recognise(state)
        self._cut_before = self._find_cut_before()

    @classmethod
    def from_text_file(
        cls,
        sources: Source | Iterable[Source],
        *,
        vocab_size: int = 4_096,
        pre_tokenizer: str = "qwen2",
    ) -> "BPETokenizer":
        """Learn the merges from UTF-8 text files, the .txt files of folders, or other sources (see `TextSource`); see `from_texts`.

        Raises:
            ConfigError: see `from_texts`.
            DataError: no such file, empty, or not UTF-8.
        """
        pieces = training_pieces(sources, last_cut)
        return cls.from_texts(pieces, vocab_size=vocab_size, pre_tokenizer=pre_tokenizer)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], *, vocab_size: int = 4_096, pre_tokenizer: str = "qwen2"
    ) -> "BPETokenizer":
        """Learn the merges from texts: 256 bytes, then the most frequent pairs, and `<|endoftext|>` as the last id.

        Args:
            vocab_size: at most so many tokens; fewer where the texts have no more pairs that occur twice.
            pre_tokenizer: one of PRE_TOKENIZERS; "qwen2" cuts numbers into digits and is exact in llama.cpp in both directions.
        Raises:
            ConfigError: vocab_size is too small or too large, or there is no such pre-tokenizer.
        """
        check_vocab_size(vocab_size, _MIN_VOCAB_SIZE, f"256 bytes and {END_OF_TEXT}")
        backend = _new_backend(pre_tokenizer, {}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # else bytes that these texts lack would be lost for good
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        model = json.loads(backend.to_str())["model"]
        vocabulary = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
        return cls.from_merges(vocabulary, [tuple(pair) for pair in model["merges"]], pre_tokenizer=pre_tokenizer)

    @classmethod
    def from_merges(
        cls, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, pre_tokenizer: str
    ) -> "BPETokenizer":
        """The tokenizer of given ids, END_OF_TEXT among them, and merges, in the byte alphabet."""
        backend = _new_backend(pre_tokenizer, vocabulary, merges)
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return cls(backend)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "BPETokenizer":
        """Read a tokenizer.json, and the tokenizer_config.json beside it if there is one.

        A normalizer in the file (Qwen's NFC) is kept: then `decode(encode(text))` is the normalized text.

        Raises:
            DataError: the file is missing or damaged, or another kind of tokenizer.
        """
        backend, config = load_backend(path)
        try:
            return cls(backend, config=config)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def _bytes_of(self, i: int, token: str) -> bytes:
        return characters_to_bytes(token)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        slices = (text[i : i + _PART_CHARS] for i in range(0, len(text), _PART_CHARS))
        parts = list(cut_safely(slices, self.safe_cut))
        if len(text) < MIN_CHARS or self._fast is None:
            return self._encode_all(self._backend, parts)
        return np.concatenate(self._encode_fast(self._fast, parts))

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, after: bool = False
    ) -> list[npt.NDArray[np.uint32]]:
        if special or sum(map(len, texts)) < MIN_CHARS or self._fast is None:
            return super().encode_batch(texts, special=special, after=after)
        return self._encode_fast(self._fast, texts)

    def _encode_fast(self, fast: FastBPE, parts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        found = fast.encode_all(parts)
        missing = [i for i, ids in enumerate(found) if ids is None]
        for i, ids in zip(missing, super().encode_batch([parts[i] for i in missing]), strict=True):
            found[i] = ids
        return [ids for ids in found if ids is not None]

    @cached_property
    def _fast(self) -> FastBPE | None:
        return FastBPE.of(state_of(self._backend)) if self.pre_tokenizer is not None else None

    def safe_cut(self, text: str) -> int:
        return last_cut(text, self._cut_before)

    def gguf_vocabulary(self) -> GGUFVocabulary:
        if self.pre_tokenizer is None:
            raise ConvertError(
                "llama.cpp has no pre-tokenizer that is known to cut words as this tokenizer.json does, and a wrong one gives other "
                f"ids without a warning; train with a BPETokenizer of {', '.join(PRE_TOKENIZERS)}"
            )
        merges = json.loads(self._backend.to_str())["model"]["merges"]
        tokens, token_types = self._gguf_tokens()
        return GGUFVocabulary(
            tokens=tokens,
            token_types=token_types,
            merges=[" ".join(pair) for pair in merges] or [NO_MERGE],
            pre=self.pre_tokenizer,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            pad_token_id=self._special_ids.get("pad_token"),
            add_bos_token=self.add_bos,
            chat_template=self.chat_template,
        )

    def _find_cut_before(self) -> tuple[str, ...]:
        """The sets of characters before which `safe_cut` may cut: those of CUT_BEFORE that no added token reaches over."""
        plain = self._plain_added()
        if self.pre_tokenizer is None or any(token.rstrip or token.single_word for token in plain):
            return ()
        return tuple(before for before in CUT_BEFORE if not any(last_cut(token.content, (before,)) for token in plain))


def last_cut(text: str, cut_before: Sequence[str] = CUT_BEFORE) -> int:
    """The last place between a letter and a character of the first of `cut_before` that gives any; 0 if none does."""
    for characters in cut_before:
        for i in range(len(text) - 1, 0, -1):
            if text[i] in characters and _is_letter(text[i - 1]):
                return i
    return 0


def _is_letter(character: str) -> bool:
    # A letter since Unicode 3.2 and still one: so for the tokenizers library and llama.cpp too, whatever version theirs is.
    return character.isalpha() and unicodedata.ucd_3_2_0.category(character).startswith("L")


def _new_backend(
    pre_tokenizer: str, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> tokenizers.Tokenizer:
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ConfigError(
            f"unknown pre_tokenizer {pre_tokenizer!r}; {did_you_mean(pre_tokenizer, list(PRE_TOKENIZERS))}"
        )
    # With "llama-bpe", llama.cpp takes a word that is a token as it is, whatever the merges say.
    model = models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=pre_tokenizer == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _build_pre_tokenizer(pre_tokenizer)
    backend.decoder = decoders.ByteLevel()
    return backend


def new_state(pre_tokenizer: str, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The tokenizer.json of such a vocabulary, in which tokens can be added under ids of one's own choice."""
    state: dict[str, Any] = json.loads(_new_backend(pre_tokenizer, {}, []).to_str())
    state["model"] |= {"vocab": dict(vocabulary), "merges": list(merges)}
    return state


def _build_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _PATTERNS:
        words: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated")]
    else:
        words = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    # ByteLevel's own pattern is GPT-2's.
    return pre_tokenizers.Sequence(
        [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _PATTERNS)]
    )


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """The pre-tokenizer of a tokenizer.json as a list of steps, without what does not change the words."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    step = {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    if "Regex" in step.get("pattern", ()):
        step["pattern"] = step["pattern"]["Regex"].replace(_HF_CONTRACTIONS, _CONTRACTIONS)
    return [step]


def _recognise(state: Mapping[str, Any]) -> str | None:
    """Which of PRE_TOKENIZERS a tokenizer.json has."""
    model = state["model"]
    # NFC, as Qwen has it, makes no difference for text that is composed already, which nearly all is.
    if state["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return None
    for name in PRE_TOKENIZERS:
        same_words = _steps(state["pre_tokenizer"]) == _steps(json.loads(_build_pre_tokenizer(name).__getstate__()))
        if same_words and model["ignore_merges"] == (name == "llama-bpe"):
            return name
    return None


def _check_byte_level(state: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    kind = state["model"]["type"]
    way_out = "take a model with byte-level BPE (GPT-2, Llama 3, Qwen), or train a BPETokenizer"
    if kind != "BPE":
        raise DataError(f"a {kind} tokenizer is not supported; {way_out}")
    if not any(step["type"] == "ByteLevel" for step in _steps(state["pre_tokenizer"])):
        raise DataError(f"this BPE works on characters, not on bytes, and is not supported yet; {way_out}")
    # UTF-8 never has the bytes c0, c1, f5 .. ff.
    needed = set(range(0xF5)) - {0xC0, 0xC1}
    missing = needed - {data[0] for data in map(characters_to_bytes, vocabulary) if len(data) == 1}
    if missing:
        raise DataError(
            f"there is no token for byte 0x{min(missing):02x}, so that texts with it would lose it; {way_out}"
        )
