"""Which documents share a row: first-fit-decreasing, found once for their lengths; each epoch fills the places anew."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt


def first_fit_decreasing(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """Put each of the lengths, longest first, into the first row that has room for it.

    At most 11/9 of the fewest possible rows, and 6/9 of one (Dósa 2007); their number depends on the lengths alone.

    Args:
        lengths: (S,) from the longest to the shortest, 1 .. capacity.
        capacity: of a row.
    Returns:
        (S,) the row of each.

    >>> first_fit_decreasing([5, 4, 4, 3, 2, 1], 8).tolist()
    [0, 1, 1, 0, 2, 2]
    """
    sizes = np.asarray(lengths, dtype=np.int64).tolist()
    rows = np.empty(len(sizes), dtype=np.int64)
    # A tree over the rows whose nodes have the most room below them: the first row with room is found by walking down.
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    at = 0
    while at < len(sizes):
        size = sizes[at]
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < size
        end = at  # as many of this size as fit here: for all of them, this is the first row with room
        while end < len(sizes) and sizes[end] == size and room[node] >= size:
            room[node] -= size
            end += 1
        rows[at:end] = node - leaves
        at = end
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


class RowPlan:
    """The rows that documents make: how many, and by (seed, epoch) which documents are in which.

    Args:
        lengths: (S,) of the documents, 1 .. capacity.
        capacity: tokens of a row.
        packing: several documents in a row; else one.
    Attributes:
        num_rows: of every epoch.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], capacity: int, *, packing: bool) -> None:
        self.lengths = lengths
        self.packing = packing
        self._sorted = np.sort(lengths)[::-1]
        self._rows = first_fit_decreasing(self._sorted, capacity) if packing else np.arange(len(lengths))
        self.num_rows = int(self._rows.max(initial=-1)) + 1
        # Places of the sorted lengths, row by row.
        self._places = np.argsort(self._rows, kind="stable")
        self._ends = np.cumsum(np.bincount(self._rows, minlength=self.num_rows))

    def row(self, number: int, *, seed: int) -> npt.NDArray[np.int64]:
        """The documents of a row of the endless sequence of epochs; in each epoch each document is in one row."""
        epoch, place = divmod(number, self.num_rows)
        documents, order = _epoch(self, seed, epoch)
        row = int(order[place])
        start = int(self._ends[row - 1]) if row else 0
        return documents[self._places[start : int(self._ends[row])]]

    def most_in_a_row(self, counts: npt.NDArray[np.int64]) -> int:
        """An upper bound, for all seeds and epochs, of what the counts of a row's documents add up to.

        Args:
            counts: (S,) by document.
        """
        if not self.packing:
            return int(counts.max(initial=0))
        highest = np.zeros(int(self.lengths.max(initial=0)) + 1, dtype=np.int64)
        np.maximum.at(highest, self.lengths, counts)
        return int(np.bincount(self._rows, weights=highest[self._sorted]).max(initial=0))


@lru_cache(maxsize=4)  # those at work: a step may end one epoch and begin the next, in training and in validation data
def _epoch(plan: RowPlan, seed: int, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The documents by length, longest first, those of one length in random order; and the order of the rows."""
    # numpy froze the stream of RandomState: the same batches with any version, now and when a run is resumed next year.
    random = np.random.RandomState([seed, epoch])
    documents = random.permutation(len(plan.lengths))
    if plan.packing:
        documents = documents[np.argsort(-plan.lengths[documents], kind="stable")]
    return documents, random.permutation(plan.num_rows)
