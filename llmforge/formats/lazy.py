"""A tensor that is still where it is stored: its shape and type are known, its values are read when their turn comes.

So a checkpoint of any size goes from one file to another, or to a device, one tensor at a time, and from file to file some rows
at a time: an embedding of a gigabyte is never whole in memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmforge.errors import CheckpointError

BLOCK_BYTES = 1 << 24  # of a tensor in memory at a time, where it can be read by rows


@dataclass(frozen=True)
class LazyTensor:
    """Shape, type, and how to read the values.

    Its rows are those of the matrix (numel / n, n), n the size of the last dimension: a vector is one row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]  # (shape), dtype; maybe a view into a mapped file, which must not be written to
    read_rows: Callable[[int, int], Tensor] | None = (
        None  # rows start to stop, (stop - start, n); None = only as a whole
    )

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory already."""
        detached = tensor.detach()
        row_length = tensor.shape[-1] if tensor.ndim else 1

        def read_rows(start: int, stop: int) -> Tensor:
            return detached.reshape(-1, row_length)[start:stop]

        return cls(tuple(tensor.shape), tensor.dtype, lambda: detached, read_rows if tensor.numel() else None)

    @classmethod
    def in_file(cls, file: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> "LazyTensor":
        """The tensor whose bytes begin at `offset` of a file. As a whole it is mapped, rows are read into memory of their own."""
        row_bytes = (shape[-1] if shape else 1) * dtype.itemsize

        def read_rows(start: int, stop: int) -> Tensor:
            data = read_bytes(file, offset + start * row_bytes, (stop - start) * row_bytes)
            return data.view(dtype).view(stop - start, -1)

        by_row = read_rows if 0 not in shape else None
        return cls(shape, dtype, lambda: map_tensor(file, dtype, shape, offset), by_row)

    def then(self, change: Callable[[Tensor], Tensor], *, by_row: bool = False) -> "LazyTensor":
        """The tensor that `change` makes of this one when it is read; shape and type are found without reading.

        Args:
            by_row: what it makes of a row depends on that row alone, so that some rows (k, n) can be changed without the others.
        """
        after = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        read_rows = self.read_rows
        if by_row and read_rows is not None:
            rows_before = read_rows  # for the type checker: not None inside
            return LazyTensor(
                tuple(after.shape),
                after.dtype,
                lambda: change(self.read()),
                lambda start, stop: change(rows_before(start, stop)),
            )
        return LazyTensor(tuple(after.shape), after.dtype, lambda: change(self.read()))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, (stop - start, n); the whole tensor is read for them where it has no `read_rows`."""
        if self.read_rows is not None:
            return self.read_rows(start, stop)
        return self.read().reshape(-1, self.row_length)[start:stop]

    def blocks(self, *, max_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        """All rows in order, some at a time: (k, n) each, at most `max_bytes` or one row; none of a tensor without values.

        Memory: one block; the tensor itself where it has no `read_rows`.
        """
        if not self.numel:
            return
        whole = self if self.read_rows is not None else LazyTensor.of(self.read())
        step = max(1, max_bytes // (self.row_length * self.dtype.itemsize))
        for start in range(0, self.num_rows, step):
            yield whole.rows(start, min(start + step, self.num_rows))

    @property
    def row_length(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        return self.numel // self.row_length if self.row_length else 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_bytes(file: Path, offset: int, count: int) -> Tensor:
    """Bytes of a file, (count) uint8, in memory of their own: unlike a mapping they leave with the tensor.

    Raises:
        CheckpointError: the file is gone, or too short.
    """
    data = torch.empty(count, dtype=torch.uint8)
    target, done = data.numpy().data, 0
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while done < count and (got := stream.readinto(target[done:])):  # one call reads 2 GB at most
                done += got
    except OSError as error:  # since the header was read
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    if done < count:
        raise CheckpointError(f"cannot read {file}: it ends at byte {offset + done:,}, {offset + count:,} are needed")
    return data


def map_tensor(file: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """A tensor in a file, mapped privately: nothing is read before it is used.

    Raises:
        CheckpointError: the file is gone, or shorter than the tensor needs.
    """
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    try:
        data = np.memmap(file, np.uint8, "c", offset, (math.prod(shape) * dtype.itemsize,))
    except (OSError, ValueError) as error:  # since the header was read
        raise CheckpointError(f"cannot read {file}: {error}") from error
    values = torch.from_numpy(data)
    if offset % dtype.itemsize:  # some files do not align
        values = values.clone()
    return values.view(dtype).view(shape)
