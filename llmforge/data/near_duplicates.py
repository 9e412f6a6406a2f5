"""Lines that are nearly the same as an earlier one, found in one pass and constant memory.

MinHash (Broder 1997) with banding: two lines whose sets of 5-character pieces have a Jaccard similarity s share one of the 14 bands of 8
hashes with probability 1 - (1 - s**8)**14: 0.56 for s = 0.7, 0.92 for 0.8, 0.9996 for 0.9 (the setting of FineWeb, arXiv:2406.17557,
there for documents).
"""

import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from llmforge.tokenizers.fast_bpe import in_threads, num_threads
from llmforge.tokenizers.sources import Document

SHINGLE = 5  # characters
BANDS, ROWS = 14, 8
MIN_CHARS = 32  # a shorter line (a heading, a blank one, "-Yes.") is never dropped
MAX_LINE_CHARS = 2**24  # a longer line is not compared
SLOTS = 2**22  # of the table of each band: what is remembered

_BLOCK = 2**15  # shingles that are hashed at once: what fits a core's cache


class NearDuplicates:
    """Drops a line that is nearly the same as an earlier one, whether that was kept or not; of all documents given to it, in turn.

    Case, spaces and the composition of accents do not count. Memory: BANDS tables of SLOTS numbers of 4 bytes, 235 MB, of which the
    system gives only what is used. Beyond some 4 million lines older ones are forgotten bit by bit: after 12 million more, half of the
    exact copies are still found. With full tables one unlike line in 150 million is taken for a copy.
    """

    def __init__(self) -> None:
        self._tables = np.zeros((BANDS, SLOTS), dtype=np.uint32)
        random = np.random.RandomState(20)
        self._masks = random.randint(0, 2**32, size=BANDS * ROWS, dtype=np.uint32)
        self._factors = random.randint(0, 2**31, size=BANDS * ROWS, dtype=np.uint32) * 2 + 1
        self.num_lines = self.num_dropped = self.dropped_bytes = 0

    def filtered(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents without such lines."""
        for document in documents:
            yield Document(document.place, self._kept(document.pieces))

    def _kept(self, pieces: Iterable[str]) -> Iterator[str]:
        held = ""
        for piece in pieces:
            *lines, held = (held + piece).split("\n")
            if lines and (text := self._without([line + "\n" for line in lines])):
                yield text
            if len(held) > MAX_LINE_CHARS:
                yield held
                held = ""
        if held and (text := self._without([held])):
            yield text

    def _without(self, lines: list[str]) -> str:
        drop = self.is_near_duplicate(lines)
        self.num_lines += len(lines)
        self.num_dropped += int(drop.sum())
        self.dropped_bytes += sum(len(lines[i].encode(errors="replace")) for i in np.flatnonzero(drop))
        return "".join(line for line, dropped in zip(lines, drop.tolist(), strict=True) if not dropped)

    def is_near_duplicate(self, lines: list[str]) -> npt.NDArray[np.bool_]:
        """(len(lines),) which ones are nearly the same as an earlier one, of these or of those of calls before."""
        dropped = np.zeros(len(lines), dtype=np.bool_)
        normal = [_normal(line) for line in lines]
        long = [i for i, line in enumerate(normal) if len(line) >= MIN_CHARS]
        if not long:
            return dropped
        bands = self._bands([normal[i] for i in long])
        seen = np.zeros(len(long), dtype=np.bool_)
        for table, keys in zip(self._tables, bands, strict=True):
            slots, marks = (keys & np.uint64(SLOTS - 1)).astype(np.int64), (keys >> np.uint64(32)).astype(np.uint32)
            marks |= np.uint32(1)  # 0 is an empty slot
            again = np.ones(len(long), dtype=np.bool_)
            again[np.unique(keys, return_index=True)[1]] = False  # the first of each
            seen |= again | (table[slots] == marks)
            table[slots] = marks
        dropped[long] = seen
        return dropped

    def _bands(self, lines: list[str]) -> npt.NDArray[np.uint64]:
        """(BANDS, len(lines)) a hash of each band's rows."""
        groups = [list(group) for group in np.array_split(np.arange(len(lines)), min(num_threads(), len(lines)))]
        found = in_threads(lambda group: self._bands_of([lines[i] for i in group]), groups)
        return np.concatenate(found, axis=1)

    def _bands_of(self, lines: list[str]) -> npt.NDArray[np.uint64]:
        parts, part, size = [], [], 0
        for line in lines:
            part.append(line)
            size += len(line)
            if size >= _BLOCK:
                parts.append(self._bands_of_block(part))
                part, size = [], 0
        if part:
            parts.append(self._bands_of_block(part))
        return np.concatenate(parts, axis=1)

    def _bands_of_block(self, lines: list[str]) -> npt.NDArray[np.uint64]:
        codes = np.frombuffer("".join(lines).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
        count = len(codes) - SHINGLE + 1
        hashes = np.zeros(count, dtype=np.uint64)
        for i in range(SHINGLE):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + count]
        short = (_mixed(hashes) >> np.uint64(32)).astype(np.uint32)
        lengths = np.array([len(line) for line in lines])
        starts = np.cumsum(lengths) - lengths
        # Of each line the shingles that end within it: reduceat takes from one index to the next, and every other of these is a gap.
        bounds = np.stack([starts, starts + lengths - SHINGLE + 1], axis=1).reshape(-1)
        short = np.append(short, np.uint32(0))  # the last bound is an index, too
        scratch = np.empty_like(short)
        keys = np.zeros((BANDS, len(lines)), dtype=np.uint64)
        for number, (mask, factor) in enumerate(zip(self._masks, self._factors, strict=True)):
            np.bitwise_xor(short, mask, out=scratch)
            np.multiply(scratch, factor, out=scratch)
            row = np.minimum.reduceat(scratch, bounds)[::2]
            keys[number // ROWS] = _mixed(keys[number // ROWS] + row)
        return keys


def _normal(line: str) -> str:
    line = " ".join(line.lower().split())
    return line if line.isascii() else unicodedata.normalize("NFC", line)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer: every bit of x in every bit of the result."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
