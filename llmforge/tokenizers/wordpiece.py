"""WordPiece: whole words, and pieces of words that begin with ##; BERT's kind of vocabulary, for models that stay in transformers."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from llmforge.errors import ConvertError, DataError
from llmforge.tokenizers.backend import BackendTokenizer, check_vocab_size, load_backend, state_of
from llmforge.tokenizers.base import END_OF_TEXT, GGUFVocabulary, tokenizer_config
from llmforge.tokenizers.sources import Source, text_sources, training_pieces
from llmforge.tokenizers.text_files import cut_safely

UNKNOWN_TOKEN = "[UNK]"

_PREFIX = "##"  # of a piece that stands right after the one before it
# BERT cuts each punctuation mark off, and then nobody knows where spaces were: "¿Qué?" would come back as "¿ Qué ?". Here both sides
# of the cut are a word, and the right one begins with the prefix, as if it were a piece: "¿ ##Qué ##?". A # of the text is cut off
# like all punctuation, so no other word begins with two of them.
_CUTS = r"(?<=[\p{P}\p{S}])(?=\S)|(?<=\S)(?=[\p{P}\p{S}])"
_MAX_WORD_CHARS = 100  # BERT's; the time for a word grows with the square of its length
_PART_CHARS = 2**16  # texts are encoded in parts of about this length, on all cores
_CUT_BEFORE = " \t\r\n"  # white space in every version of Unicode


class WordPieceTokenizer(BackendTokenizer):
    """BERT's WordPiece with upper case, accents, and the place of punctuation kept, for a model that writes.

    Text is cut at white space and punctuation; a word becomes the longest pieces that the vocabulary has, from left to right. A piece
    that begins with ## stands right after the one before it, any other one after a space.

    >>> tokenizer = WordPieceTokenizer.from_texts(["¡Vivía un hidalgo! ¿Un hidalgo?"], vocab_size=60)
    >>> tokenizer.decode(tokenizer.encode("¿Vivía   un\\nhidalgo?")), tokenizer.eos_token_id
    ('¿Vivía un hidalgo?', 44)

    Two things do not come back from `decode(encode(text))`; BPETokenizer loses nothing:

    - white space: any of it becomes one space, and none is left at the beginning and the end; lines and paragraphs are lost;
    - a word with a character that the training text had not, or of some 100 characters and more: it becomes `[UNK]`.

    `decode_bytes` gives the first id its space too, since its ids may come from the middle of a text.

    Make one with `from_text_file`, `from_texts` or `from_file`. There is no GGUF of it.

    Raises:
        DataError: `backend` is something else, BERT's own files among it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any] | None = None) -> None:
        _check(state_of(backend))
        if config is None:
            config = tokenizer_config() | {"unk_token": UNKNOWN_TOKEN}
        super().__init__(backend, config)
        # Special tokens are words, too: the library's decoder puts a space before each.
        self._pieces = [b"" if token is None else self._bytes_of(i, token) for i, token in enumerate(self._tokens)]

    @classmethod
    def from_text_file(cls, sources: Source | Iterable[Source], *, vocab_size: int = 4_096) -> "WordPieceTokenizer":
        """Learn the pieces from UTF-8 text files, the .txt files of folders, or other sources (see `TextSource`), which are read twice;
        see `from_texts`.

        Raises:
            ConfigError: see `from_texts`.
            DataError: no such file, empty, or not UTF-8.
        """
        named = text_sources(sources)
        return cls._train(lambda: training_pieces(named, _last_cut), vocab_size)

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, vocab_size: int = 4_096) -> "WordPieceTokenizer":
        """Learn the pieces from texts: `[UNK]`, each character as a beginning and within words, then what occurs most often, and
        `<|endoftext|>` as the last id.

        Args:
            vocab_size: at most so many tokens (BERT has 30,000); fewer where the texts have no more pairs that occur twice.
        Raises:
            ConfigError: vocab_size is too small for the characters of the texts, or too large.
            DataError: the texts have nothing but white space.
        """
        texts = list(texts)
        return cls._train(lambda: texts, vocab_size)

    @classmethod
    def _train(cls, texts: Callable[[], Iterable[str]], vocab_size: int) -> "WordPieceTokenizer":
        backend = _new_backend({})
        characters: set[str] = set()
        for text in texts():
            characters.update(text)
        characters = {c for c in characters if backend.pre_tokenizer.pre_tokenize_str(c)}  # without white space
        if not characters:
            raise DataError("a vocabulary needs at least one word; give the text that the model will learn")
        # Numbered before the training: else the library numbers pieces, and breaks ties, in another order every time.
        characters |= set(_PREFIX)
        alphabet = [prefix + character for prefix in ("", _PREFIX) for character in sorted(characters)]
        check_vocab_size(
            vocab_size,
            len(alphabet) + 2,
            f"two for each of the {len(characters):,} characters of this text, {UNKNOWN_TOKEN} and {END_OF_TEXT}; BPETokenizer needs 257 "
            "for any text",
        )
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            special_tokens=[UNKNOWN_TOKEN, *alphabet],
            continuing_subword_prefix=_PREFIX,
            show_progress=False,
        )
        backend.train_from_iterator(texts(), trainer)
        vocabulary = backend.get_vocab()
        # A new one, in which characters are not special; the two that are follow from the settings.
        return cls(_new_backend({**vocabulary, END_OF_TEXT: len(vocabulary)}))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "WordPieceTokenizer":
        """Read a tokenizer.json that `save` wrote, and the tokenizer_config.json beside it if there is one.

        Raises:
            DataError: the file is missing or damaged, or another kind of tokenizer.
        """
        backend, config = load_backend(path)
        try:
            return cls(backend, config=config)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def _bytes_of(self, i: int, token: str) -> bytes:
        return (token[len(_PREFIX) :] if token.startswith(_PREFIX) else f" {token}").encode()

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        slices = (text[i : i + _PART_CHARS] for i in range(0, len(text), _PART_CHARS))
        return self._encode_all(self._backend, list(cut_safely(slices, self.safe_cut)))

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids).removeprefix(" ")

    def prompt_ids(self, text: str) -> list[int]:
        # White space has no ids, and a model needs one to begin with.
        ids, eos = super().prompt_ids(text), self.eos_token_id
        return [eos] if not ids and eos is not None else ids

    def safe_cut(self, text: str) -> int:
        return 0 if self._plain_added() else _last_cut(text)  # an added token may have white space within

    def gguf_vocabulary(self) -> GGUFVocabulary:
        raise ConvertError(
            "a GGUF file can hold WordPiece only as BERT's: llama.cpp cuts words at each punctuation mark without a note of the spaces, and "
            "in most versions lower-cases them, so that a model would get other ids than it learnt and write broken text; train with "
            "byte-level BPE (BPETokenizer, --tokenizer bpe), or export for transformers (export_hf, --hf)"
        )


def is_wordpiece(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = content.get("model")
    return isinstance(model, dict) and model.get("type") == "WordPiece"


def _last_cut(text: str) -> int:
    return max(0, *(text.rfind(character) for character in _CUT_BEFORE))


def _new_backend(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    model = models.WordPiece(
        vocab=vocabulary,
        unk_token=UNKNOWN_TOKEN,
        max_input_chars_per_word=_MAX_WORD_CHARS,
        continuing_subword_prefix=_PREFIX,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(Regex(_CUTS), f" {_PREFIX}")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix=_PREFIX, cleanup=False)
    return backend


def _check(state: Mapping[str, Any]) -> None:
    way_out = "train a WordPieceTokenizer or a BPETokenizer on your text"
    own = state_of(_new_backend({}))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if state[part] != own[part]:
            raise DataError(
                f"the {part} of this {state['model']['type']} tokenizer is not WordPieceTokenizer's, and text would not come back as it was "
                f"(BERT lower-cases it, for example): {str(state[part])[:80]}; {way_out}"
            )
    for setting, value in own["model"].items():
        if setting != "vocab" and state["model"].get(setting) != value:
            raise DataError(f"{setting} is {state['model'].get(setting)!r}, {value!r} is supported; {way_out}")
    if UNKNOWN_TOKEN not in state["model"]["vocab"]:
        raise DataError(f"there is no token {UNKNOWN_TOKEN} for words that the vocabulary lacks; {way_out}")
