"""Byte-level BPE for long texts: the same ids as the `tokenizers` library's, from tiktoken, which is several times as fast.

The two agree on a vocabulary and a text only under conditions; each is checked here, and where one fails the library does the work:

- every merged token is what the merges make of its own bytes. Then a pair of neighbours that forms a token is the pair that the merges
  name: else the token by itself would have stopped at that pair. tiktoken looks for the former, the library for the latter.
- a merge comes after those that make its parts, so that both go from the lowest rank to the highest, leftmost first.
- both have the same pattern, and the text has only characters that are a letter, a number, a space or none of these in every version of
  Unicode since 3.2: the libraries bring their own tables.
"""

import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import models

from llmforge.tokenizers.base import characters_to_bytes

MIN_CHARS = 2**20  # a shorter text is done before the checks are
MAX_PART_CHARS = (
    2**20
)  # tiktoken's pattern backtracks on the stack; longer parts, which cannot be cut, are left to the library

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
_KNOWN = 0x30000  # code points from here on are rare; none of them counts as known


class FastBPE:
    """`encode` of a backend, part by part and on all cores.

    Args:
        encoding: tiktoken's form of the vocabulary.
        ids: (ranks,) the backend's id of each rank.
    """

    def __init__(self, encoding: tiktoken.Encoding, ids: npt.NDArray[np.uint32]) -> None:
        self._encoding = encoding
        self._ids = ids

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "FastBPE | None":
        """The fast form of a byte-level BPE that has no normalizer and no added tokens in ordinary text; None where there is none.

        Args:
            state: its tokenizer.json.
        """
        pattern = _pattern(state)
        model = state["model"]
        plain = [token for token in state["added_tokens"] if not token["special"]]
        if pattern is None or plain or state["normalizer"] is not None or model["dropout"] or model["byte_fallback"]:
            return None
        if model["unk_token"] is not None or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
            return None
        vocabulary: dict[str, int] = model["vocab"]
        ranks = {
            token: i for i, token in enumerate(token for token in vocabulary if len(characters_to_bytes(token)) == 1)
        }
        if len(ranks) != 256:
            return None
        for left, right in model["merges"]:
            if left not in ranks or right not in ranks or left + right in ranks or left + right not in vocabulary:
                return None
            ranks[left + right] = len(ranks)
        special = {token["content"] for token in state["added_tokens"]}
        if model["ignore_merges"] and vocabulary.keys() - ranks.keys() - special:
            return None  # a token that words are compared with, but that no merge makes
        if not _each_makes_itself(ranks, model["merges"]):
            return None
        mergeable = {characters_to_bytes(token): rank for token, rank in ranks.items()}
        if len(mergeable) != len(ranks):
            return None
        encoding = tiktoken.Encoding("llmforge", pat_str=pattern, mergeable_ranks=mergeable, special_tokens={})
        return cls(encoding, np.array([vocabulary[token] for token in ranks], dtype=np.uint32))

    def encode(self, part: str) -> npt.NDArray[np.uint32] | None:
        """The ids of a part; None where only the library can say them."""
        if not encodable(part):
            return None
        ranks = encode_ordinary(self._encoding, part)
        return None if ranks is None else self._ids[ranks]

    def encode_all(self, parts: Sequence[str]) -> list[npt.NDArray[np.uint32] | None]:
        """`encode` of each, on all cores."""
        return in_threads(self.encode, parts)


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> npt.NDArray[np.uint32] | None:
    """`encoding.encode_ordinary` as an array; None where the pattern needs more stack than there is."""
    try:
        if hasattr(encoding, "encode_to_numpy"):  # tiktoken 0.10; it makes no Python integers
            ids: npt.NDArray[np.uint32] = encoding.encode_to_numpy(text, disallowed_special=())
            return ids
        return np.array(encoding.encode_ordinary(text), dtype=np.uint32)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # of Rust: not even an Exception
            return None
        raise


def in_threads(function: Any, items: Sequence[Any]) -> list[Any]:
    """`map` with as many threads as the `tokenizers` library would have; for functions that release the interpreter's lock."""
    threads = min(num_threads(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def num_threads() -> int:
    """Threads for tokenization: one per core that this process may use; the `tokenizers` library's own settings count here, too."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("off", "false", "f", "no", "n", "0"):
        return 1
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def encodable(text: str) -> bool:
    """Whether all characters of a text are the same to every version of Unicode since 3.2, and it is not too long in one part."""
    if len(text) > MAX_PART_CHARS:
        return False
    if text.isascii():
        return True
    try:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return bool(_known_characters()[np.minimum(code_points, _KNOWN)].all())


@cache
def _known_characters() -> npt.NDArray[np.bool_]:
    """(_KNOWN + 1,) by code point: its kind has not changed since Unicode 3.2, as far as this Python knows."""
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    kinds = {"L": "L", "N": "N", "Z": "Z"}
    known = [
        (now := new(character)) != "Cn" and kinds.get(now[0]) == kinds.get(old(character)[0])
        for character in map(chr, range(_KNOWN))
    ]
    for code_point in (0x17F, 0x180E, 0x200B):  # the long s, which (?i:'s) matches; two that were spaces once
        known[code_point] = False
    return np.array([*known, False])


def _pattern(state: Mapping[str, Any]) -> str | None:
    """How the tokenizer.json cuts words, as one pattern."""
    pre_tokenizer = state["pre_tokenizer"] or {"type": None}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    last = steps[-1] if steps else {"type": None}
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return _GPT2_PATTERN
    if len(steps) == 2 and not last.get("use_regex", True) and steps[0]["type"] == "Split":
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            pattern: str = split["pattern"]["Regex"]
            return pattern
    return None


def _each_makes_itself(ranks: Mapping[str, int], merges: Sequence[Sequence[str]]) -> bool:
    """Whether the merges make each token of its own characters."""
    model = models.BPE(vocab=dict(ranks), merges=[(left, right) for left, right in merges])
    encodings = tokenizers.Tokenizer(model).encode_batch_fast(list(ranks), add_special_tokens=False)
    return all(encoding.ids == [rank] for encoding, rank in zip(encodings, ranks.values(), strict=True))
