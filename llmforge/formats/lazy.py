"""A tensor that is still where it is stored: its shape and type are known, its values are read when their turn comes.

So a checkpoint of any size goes from one file to another, or to a device, one tensor at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmforge.errors import CheckpointError


@dataclass(frozen=True)
class LazyTensor:
    """Shape, type, and how to read the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]  # (shape), dtype; maybe a view into a mapped file, which must not be written to

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory already."""
        detached = tensor.detach()
        return cls(tuple(tensor.shape), tensor.dtype, lambda: detached)

    def then(self, change: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """The tensor that `change` makes of this one when it is read; shape and type are found without reading."""
        after = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return LazyTensor(tuple(after.shape), after.dtype, lambda: change(self.read()))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


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
