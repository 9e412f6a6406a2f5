"""JoinedIds: pieces of several arrays as one row, without a copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class JoinedIds:
    """One row made of pieces of arrays; a slice of it is an array.

    >>> ids = JoinedIds.of([np.arange(4, dtype=np.uint16), np.arange(10, 13, dtype=np.uint16)])
    >>> len(ids), ids[2:6].tolist()
    (7, [2, 3, 10, 11])

    Args:
        arrays: of one dtype.
        which: (S,) the array of each piece.
        starts, lengths: (S,) where it is in its array; no length is 0.
    """

    def __init__(
        self,
        arrays: Sequence[npt.NDArray[Any]],
        which: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        self.arrays = list(arrays)
        self._which, self._starts, self._lengths = which, starts, lengths
        self._ends = np.cumsum(lengths)  # in this row
        self._shifts = starts - (self._ends - lengths)  # from a place in this row to the place in the array
        self.dtype: np.dtype[Any] = self.arrays[0].dtype
        self.ndim = 1

    @classmethod
    def of(cls, rows: "Sequence[npt.NDArray[Any] | JoinedIds]") -> "JoinedIds":
        """Whole rows, one after the other."""
        joined = [row if isinstance(row, JoinedIds) else cls._of_array(row) for row in rows]
        firsts = np.cumsum([0, *(len(row.arrays) for row in joined)])
        return cls(
            [array for row in joined for array in row.arrays],
            np.concatenate([row._which + first for row, first in zip(joined, firsts[:-1], strict=True)]),
            np.concatenate([row._starts for row in joined]),
            np.concatenate([row._lengths for row in joined]),
        )

    @classmethod
    def _of_array(cls, array: npt.NDArray[Any]) -> "JoinedIds":
        zero = np.zeros(1, dtype=np.int64)
        return cls([array], zero, zero, np.array([len(array)], dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise IndexError("a row of joined ids is sliced without a step")
        pieces = []
        i = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end, shift = min(stop, int(self._ends[i])), int(self._shifts[i])
            pieces.append(self.arrays[int(self._which[i])][start + shift : end + shift])
            start, i = end, i + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)
