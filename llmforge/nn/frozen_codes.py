"""What modules share whose matrix is frozen as codes and scales."""

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import Self


class FrozenCodes(nn.Module):
    """A module whose matrix exists as codes and scales, in buffers. They move with the model and are not cast, whatever it is cast to:
    bfloat16 scales would be another matrix."""

    @property
    @abstractmethod
    def num_weights(self) -> int:
        """How many weights the codes stand for."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, was in before.items():
            now = self._buffers[name]
            if was is not None and now is not None and now.dtype != was.dtype:
                self._buffers[name] = was.to(now.device)
        return self
