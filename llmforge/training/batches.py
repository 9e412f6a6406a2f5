"""Batches on their way to the device: on CUDA the next one is made, in pinned memory, while the device works on this one."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# step -> the tensors of its batch
MakeBatch = Callable[[int], Sequence[Tensor]]


class Batches:
    """The batches of the steps of a run, each asked for once, in order. `batch(step)` is a pure function: so the next one can be made ahead.

    On a CPU a thread would take from the arithmetic what it gives (a batch of a TokenDataset takes 50 us there), so nothing is made ahead.

    Args:
        device: where the batches go.
        ahead: whether a thread makes the next one; None = on CUDA.
        pin: copies a tensor to where the device can fetch it by itself; None = page-locked memory on CUDA, else no copy.
    """

    def __init__(
        self, device: torch.device, *, ahead: bool | None = None, pin: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        on_cuda = device.type == "cuda"
        self.device = device
        self._ahead = on_cuda if ahead is None else ahead
        self._pin = pin if pin is not None else (_pinned if on_cuda else None)
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[object, Future[Sequence[Tensor]]] | None = None

    def get(self, step: int, make: MakeBatch, *, source: object, is_last: bool) -> Sequence[Tensor]:
        """The batch of a step.

        Args:
            make: makes the batch of any step, the same one whenever it is called.
            source: what `make` reads; what was made ahead of another source or for another step is not used.
            is_last: no step follows.
        Raises:
            whatever `make(step)` raises, in the thread or not.
        """
        batch = self._made_ahead((step, id(source)))
        if batch is None:
            batch = self._pinned_batch(make, step)
        if self._ahead and not is_last:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmforge-batches")
            self._next = (step + 1, id(source)), self._thread.submit(self._pinned_batch, make, step + 1)
        return batch

    def wait(self) -> None:
        """Until the thread is idle: before others read the same data, which need not be made for two at once."""
        if self._next is not None:
            self._next[1].exception()

    def _made_ahead(self, key: object) -> Sequence[Tensor] | None:
        if self._next is None:
            return None
        (made_for, future), self._next = self._next, None
        if made_for != key:
            future.exception()  # waits; its error, if any, is of a step that nobody asks for
            return None
        return future.result()

    def _pinned_batch(self, make: MakeBatch, step: int) -> Sequence[Tensor]:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        batch = make(step)
        return batch if self._pin is None else [self._pin(part) for part in batch]


def on_device(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on the device, which knows them when its turn comes: the host does not wait.

    Each copy carries the tensor that it was made of, as `on_host`, for who must know values there (`Documents`, `chunked_next_token_loss`).
    """
    copies = []
    for part in parts:
        copy: Any = part.to(device, non_blocking=True)
        if copy is not part:
            copy.on_host = part
        copies.append(copy)
    return copies


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()
