"""A tensor that is still where it is stored: its shape and type are known, its values are read when their turn comes.

So a checkpoint of any size goes from one file to another, or to a device, one tensor at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
