"""SentencePiece BPE with byte fallback, as Llama 2, TinyLlama and Mistral have it: pieces of characters, spaces written as U+2581."""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from llmforge.errors import ConvertError, DataError
from llmforge.formats import sentencepiece as formats
from llmforge.tokenizers.backend import (
    SPECIAL_TOKENS,
    BackendTokenizer,
    backend_of,
    bos_processor,
    load_backend,
    read_config,
    state_of,
    token_name,
)
from llmforge.tokenizers.base import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GGUFVocabulary,
    read_tokenizer_file,
    write_tokenizer_files,
)
from llmforge.tokenizers.text_files import cut_safely

SPACE = "▁"  # U+2581, what a space becomes

_BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
_PART_CHARS = 2**16  # long texts are encoded in parts of about this length

_SEARCHED_CHARS = 2**17  # for a place to cut; more than a part

# How a tokenizer.json puts a space before a text. "each": before each stretch of text between added tokens, whatever it begins
# with (a normalizer; SentencePiece itself does so, and llama.cpp). Metaspace's "always" and "first" leave a text alone that begins
# with a space: "first" only sees the first stretch.
_PREFIXES = ("each", "always", "first", "never")

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


class SentencePieceTokenizer(BackendTokenizer):
    """SentencePiece BPE with byte fallback, running on the `tokenizers` library.

    Any text can be encoded: characters that the vocabulary lacks become their UTF-8 bytes. A space is put before the text (if the
    model was trained so), and `decode` takes it away; `decode_bytes` does not, since its ids may come from the middle of a text. Two
    things do not come back: U+2581 becomes a space, as in SentencePiece; and a text that begins with a space loses it if the
    tokenizer.json has Metaspace's "first" or "always".

    Make one with `from_model_file` or `from_file`.

    Args:
        backend: BPE with byte fallback, and spaces as U+2581.
        config: what tokenizer_config.json holds.
        scores: by id, those of SentencePiece or of a GGUF file; None = derived from the merges when they are needed.
    Raises:
        DataError: `backend` is something else.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any], scores: Sequence[float] | None = None
    ) -> None:
        state = state_of(backend)
        self._prefix = _check(state)
        super().__init__(backend, config)
        self._scores = scores
        vocabulary = state["model"]["vocab"]
        # Metaspace's "split": each space begins a word of its own, whatever pieces there are.
        self._split = state["pre_tokenizer"] is not None and state["pre_tokenizer"]["split"]
        # A text can be cut between two characters that are neighbours in no piece.
        self._neighbours = {left + right for token in vocabulary for left, right in pairwise(token)}
        # Encodes a text whose prefix and spaces are in place already: the parts of a long text, of which only the first has a prefix.
        self._bare = self._without_prefix(state)
        self._inner = self._bare if not self._plain_added() else None

    @classmethod
    def from_model_file(cls, path: str | os.PathLike[str]) -> "SentencePieceTokenizer":
        """Read SentencePiece's tokenizer.model, and the settings and added tokens beside it if there are any.

        Without settings texts begin with BOS, if the model has one, as all of the Llama family do.

        Raises:
            DataError: the file is missing or damaged, or a model that cannot be expressed: Unigram, without byte fallback, or one
                that changes texts.
        """
        path = Path(path)
        model = formats.read_sentencepiece_model(path)
        config = _named_tokens(model) | (read_config(path.parent) or {})
        added_path = path.with_name("added_tokens.json")
        added = read_tokenizer_file(added_path) if added_path.is_file() else {}
        try:
            _check_model(model)
            _declare_tokens_(config, added)
            config["add_bos_token"] = config.get("add_bos_token", True) is True and model.bos_id >= 0
            return cls.from_scores(
                [piece.text for piece in model.pieces],
                [piece.score for piece in model.pieces],
                [piece.type for piece in model.pieces],
                unk_id=model.unk_id,
                add_space_prefix=model.add_dummy_prefix,
                config=config,
            )
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def from_scores(
        cls,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        unk_id: int,
        add_space_prefix: bool,
        config: Mapping[str, Any],
    ) -> "SentencePieceTokenizer":
        """The tokenizer of SentencePiece's pieces, their scores and types, all by id; types are those of GGUF and SentencePiece.

        Raises:
            DataError: two pieces that merge have the same score, so that no order of merges is the same on all texts.
        """
        added = [i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
        mergeable = {
            token: score
            for token, score, kind in zip(tokens, scores, types, strict=True)
            if kind not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
        }
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": tokens[i], **flags, "special": types[i] != USER_DEFINED} for i in added
            ],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [_PREPEND, _REPLACE] if add_space_prefix else [_REPLACE],
            },
            "pre_tokenizer": None,
            "post_processor": bos_processor(tokens, config),
            "decoder": {"type": "Sequence", "decoders": _decoders(strip=add_space_prefix)},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": tokens[unk_id],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": merges_of_scores(mergeable),
            },
        }
        return cls(backend_of(json.dumps(state), "the vocabulary"), config=config, scores=scores)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "SentencePieceTokenizer":
        """Read a tokenizer.json, and the settings beside it.

        The ids are those of the tokenizer.json as it stands. transformers 5 takes only vocabulary and merges from it where
        tokenizer_config.json names the class LlamaTokenizer, and then gives other ids to texts that begin with a space.

        Raises:
            DataError: the file is missing or damaged, or another kind of tokenizer.
        """
        backend, config = load_backend(path)
        try:
            return cls(backend, config=config or {})
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def _bytes_of(self, i: int, token: str) -> bytes:
        return _BYTES.get(token) or token.replace(SPACE, " ").encode()

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        if self._inner is None:
            return self._encode_all(self._backend, [text])
        slices = (text[i : i + _PART_CHARS] for i in range(0, len(text), _PART_CHARS))
        return self._encode_inner(list(cut_safely(slices, self._last_cut)), beginning=True)

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, after: bool = False
    ) -> list[npt.NDArray[np.uint32]]:
        if not after:
            return super().encode_batch(texts, special=special)
        # The prefix is missing only up to the first added token: what follows it is as in any text.
        names = [token.content for token in self._added.values() if special or not token.special]
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        cuts = [found.start() if (found := pattern.search(text)) else len(text) for text in texts]
        firsts = [text[:cut].replace(" ", SPACE) for text, cut in zip(texts, cuts, strict=True)]
        others = super().encode_batch([text[cut:] for text, cut in zip(texts, cuts, strict=True)], special=special)
        return [
            np.concatenate([np.array(first.ids, dtype=np.uint32), other])
            for first, other in zip(self._encodings(self._bare, firsts), others, strict=True)
        ]

    def cut_pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        return iter(["".join(pieces)]) if self._inner is None else cut_safely(pieces, self._last_cut)

    def encode_part(self, part: str, *, first: bool) -> npt.NDArray[np.uint32]:
        if self._inner is None:
            return self.encode_array(part)
        slices = (part[i : i + _PART_CHARS] for i in range(0, len(part), _PART_CHARS))
        return self._encode_inner(list(cut_safely(slices, self._last_cut)), beginning=first)

    def decode(self, ids: Sequence[int]) -> str:
        data = self.decode_bytes(ids)
        return (data if self._prefix == "never" else data.removeprefix(b" ")).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        # With another class transformers would not take the tokenizer.json as it stands (see `from_file`).
        config = self._config | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.setdefault("clean_up_tokenization_spaces", False)
        write_tokenizer_files(folder, self._backend.to_str(pretty=True), config)

    def gguf_vocabulary(self) -> GGUFVocabulary:
        tokens, token_types = self._gguf_tokens()
        for token, kind in zip(tokens, token_types, strict=True):
            if self._split and kind == NORMAL and SPACE in token[1:]:
                raise ConvertError(
                    f"the piece {token!r} has a space inside, and tokenizer.json cuts texts before each space, which llama.cpp does not"
                )
        scores = self._derived_scores(tokens, token_types) if self._scores is None else list(self._scores)
        scores += [min(scores, default=0.0)] * (len(tokens) - len(scores))  # tokens added to those of the model
        return GGUFVocabulary(
            model="llama",
            tokens=tokens,
            token_types=token_types,
            scores=scores,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            unk_token_id=self._unknown_id(),
            pad_token_id=self._special_ids.get("pad_token"),
            add_bos_token=self.add_bos,
            add_space_prefix=self._prefix != "never",
            chat_template=self.chat_template,
        )

    def _unknown_id(self) -> int | None:
        unknown: int | None = self._special_ids.get("unk_token", self._backend.token_to_id("<unk>"))
        return unknown

    def _is_byte(self, i: int) -> bool:
        return self._tokens[i] in _BYTES

    def _encode_inner(self, parts: list[str], *, beginning: bool) -> npt.NDArray[np.uint32]:
        if not parts:
            return np.zeros(0, dtype=np.uint32)
        parts = [part.replace(" ", SPACE) for part in parts]
        if beginning and (self._prefix == "each" or (self._prefix != "never" and not parts[0].startswith(SPACE))):
            parts[0] = SPACE + parts[0]
        assert self._inner is not None
        return self._encode_all(self._inner, parts)

    def _last_cut(self, text: str) -> int:
        """The last place where `text` may be cut whatever follows, the first part encoded with a prefix and the second without."""
        # Only near the end, or a long text without such places would be searched again and again.
        end = text[-_SEARCHED_CHARS:].replace(" ", SPACE)
        for i in range(len(end) - 1, 0, -1):
            if end[i - 1 : i + 1] not in self._neighbours:
                return len(text) - len(end) + i
        return 0

    def _without_prefix(self, state: dict[str, Any]) -> tokenizers.Tokenizer:
        pre_tokenizer = state["pre_tokenizer"]
        if pre_tokenizer is not None:
            pre_tokenizer = pre_tokenizer | {"prepend_scheme": "never"}
        bare = {"normalizer": None, "pre_tokenizer": pre_tokenizer, "added_tokens": [], "post_processor": None}
        return backend_of(json.dumps(state | bare), "the vocabulary")

    def _derived_scores(self, tokens: Sequence[str], token_types: Sequence[int]) -> list[float]:
        """Scores with which llama.cpp merges in the order of the merges of tokenizer.json.

        llama.cpp joins any two neighbours whose text is a token, that of the highest score first and the leftmost of equals. So
        all merges with the same result must come together, and none may be missing.
        """
        model = json.loads(self._backend.to_str())["model"]
        merges = [(left, right) for left, right in model["merges"]]
        added = (UNKNOWN, CONTROL, USER_DEFINED, BYTE, UNUSED)
        known = {token for token, kind in zip(tokens, token_types, strict=True) if kind not in added}
        if missing := {pair for token in known for pair in splits(token, known)}.difference(merges):
            left, right = min(missing)
            raise ConvertError(
                f"tokenizer.json does not merge {left!r} and {right!r}, but llama.cpp would, since {left + right!r} is a token; only "
                "vocabularies that SentencePiece has made can be expressed"
            )
        ranks = _ranks_of_results(merges)
        return [-float(ranks.get(token, len(ranks) + i)) for i, token in enumerate(tokens)]


def splits(token: str, known: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of known pieces that together are `token`, the shortest left one first."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in known and right in known]


def merges_of_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's pieces, first one first: that with the highest score, and of its splits that with the longest
    left part, in the order that transformers gives them.

    Raises:
        DataError: two pieces that merge have the same score. SentencePiece then begins with the leftmost pair, which no order of
            merges does. Runs of one character may: both ways join the longest run to what follows it.
    """
    merges = [(score, left, right) for token, score in scores.items() for left, right in splits(token, scores)]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    results = [(score, left + right) for score, left, right in merges]
    for (score, token), (next_score, next_token) in pairwise(results):
        if score == next_score and token != next_token and not (_is_run(token) and _is_run(next_token)):
            raise DataError(
                f"the pieces {token!r} and {next_token!r} have the same score {score}, so that SentencePiece merges whichever comes first "
                "in a text, and no list of merges says so; take the tokenizer.json of the same model"
            )
    return [(left, right) for _, left, right in merges]


def _is_run(token: str) -> bool:
    return len(set(token)) == 1


def _ranks_of_results(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Rank of each token that merges make, the same for those whose merges are not one after the other.

    Raises:
        ConvertError: such tokens that are not runs of one character; see `merges_of_scores`.
    """
    last = {left + right: position for position, (left, right) in enumerate(merges)}
    ranks: dict[str, int] = {}
    group: list[str] = []
    end = rank = -1
    for position, (left, right) in enumerate(merges):
        token = left + right
        if token in ranks:
            continue
        if position > end:
            group, rank = [], rank + 1
        group.append(token)
        if len(group) > 1 and not all(map(_is_run, group)):
            raise ConvertError(
                f"tokenizer.json has merges that make {group[-1]!r} between those that make {group[-2]!r}, and llama.cpp has one rank for "
                "all merges that make a token; only vocabularies that SentencePiece has made can be expressed"
            )
        ranks[token] = rank
        end = max(end, last[token])
    return ranks


def is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind: BPE with byte fallback."""
    model = content.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and model.get("byte_fallback") is True


def _check(state: Mapping[str, Any]) -> str:
    """Which of _PREFIXES a tokenizer.json has.

    Raises:
        DataError: it is not SentencePiece BPE with byte fallback.
    """
    model, normalizer, pre_tokenizer = state["model"], state["normalizer"], state["pre_tokenizer"]
    if model["type"] != "BPE" or not model["byte_fallback"]:
        raise DataError(f"a {model['type']} tokenizer without byte fallback is not supported; {_WAY_OUT}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model[name]:
            raise DataError(f"{name} is {model[name]!r}; SentencePiece's BPE has none; {_WAY_OUT}")
    if missing := _BYTES.keys() - model["vocab"].keys():
        raise DataError(f"there is no token {min(missing)}, so that texts with this byte would lose it; {_WAY_OUT}")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if pre_tokenizer is None and steps in ([_REPLACE], [_PREPEND, _REPLACE]):
        return "never" if steps == [_REPLACE] else "each"
    if steps in ([None], []) and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        if pre_tokenizer["replacement"] != SPACE:
            raise DataError(f"spaces become {pre_tokenizer['replacement']!r}, not U+2581; {_WAY_OUT}")
        scheme: str = pre_tokenizer["prepend_scheme"]
        return scheme
    kinds = [step["type"] for step in [*steps, pre_tokenizer] if step]
    raise DataError(
        f"the steps {kinds} before the merges are not supported; Prepend and Replace of a space by U+2581, or Metaspace, are"
    )


_WAY_OUT = "take a model of the kind of Llama 2, TinyLlama or Mistral, or one with byte-level BPE"


def _check_model(model: formats.SentencePieceModel) -> None:
    if model.model_type != formats.BPE:
        raise DataError(
            f"a {formats.MODEL_TYPES[model.model_type]} model of SentencePiece is not supported, BPE is; {_WAY_OUT}"
        )
    if not model.byte_fallback:
        raise DataError(
            f"byte_fallback is off, so that characters which the vocabulary lacks would be lost; {_WAY_OUT}"
        )
    if model.precompiled_charsmap:
        raise DataError(
            f"the normalizer {model.name!r} changes texts before they are encoded; 'identity' is supported; {_WAY_OUT}"
        )
    for name, wanted in (
        ("remove_extra_whitespaces", False),
        ("escape_whitespaces", True),
        ("treat_whitespace_as_suffix", False),
    ):
        if getattr(model, name) is not wanted:
            raise DataError(
                f"{name} is {not wanted}, {wanted} is supported: texts must come back as they were; {_WAY_OUT}"
            )
    missing = _BYTES.keys() - {piece.text for piece in model.pieces if piece.type == formats.BYTE}
    if missing:
        raise DataError(
            f"there is no piece {min(missing)} of the type BYTE, so that texts with this byte would lose it; {_WAY_OUT}"
        )
    for i, piece in enumerate(model.pieces):
        if piece.type == formats.UNUSED:
            raise DataError(f"the piece {i} ({piece.text!r}) is of the type UNUSED, which is not supported; {_WAY_OUT}")
        if piece.type == formats.USER_DEFINED and model.add_dummy_prefix:
            raise DataError(
                f"the piece {i} ({piece.text!r}) is of the type USER_DEFINED and add_dummy_prefix is on, which together are not supported: "
                "a space would be put after each; take the tokenizer.json of the same model"
            )


def _named_tokens(model: formats.SentencePieceModel) -> dict[str, Any]:
    """tokenizer_config.json of a model that has none."""
    ids = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
    return {f"{name}_token": model.pieces[i].text for name, i in ids.items() if i >= 0}


def _declare_tokens_(config: dict[str, Any], added: Mapping[str, Any]) -> None:
    """Put the tokens of an added_tokens.json (name -> id) where newer folders have them."""
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict):
        return  # refused where it is read
    for name, i in added.items():
        if type(i) is not int or i < 0:
            raise DataError(
                f"added_tokens.json gives {name[:40]!r} the id {str(i)[:40]!r}; it must be a number from 0 on"
            )
        special = name in {token_name(config.get(key)) for key in SPECIAL_TOKENS}
        config["added_tokens_decoder"] = declared = {str(i): {"content": name, "special": special}} | declared


def _decoders(*, strip: bool) -> list[dict[str, Any]]:
    space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prefix = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else []
    return [space, {"type": "ByteFallback"}, {"type": "Fuse"}, *prefix]
