"""Checkpoints that are written while training goes on.

Training stops for as long as it takes to copy the state to the host's memory. A thread writes, checksums, fsyncs and renames the copy
(`Snapshot.write`) and then deletes what is no longer kept. There is one copy at a time: a next save first waits for the thread.
"""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmforge.training.checkpoint import Copy, Snapshot, prune_checkpoints, the_tensor_itself
from llmforge.training.out_of_memory import is_out_of_memory


class HostCopies:
    """A `Copy`: tensors as they are now, in the host's memory, whatever happens to them afterwards; until `start` is called again.

    The memory is kept for the next time, when as a rule the same tensors come in the same order: to get new memory from the system
    takes five times as long as to copy into it.

    From CUDA the copies arrive later, in pinned memory, without stopping the thread that asks; the device makes them before it does
    what it is told next. `sent` and `wait` are for the thread that asks and for the one that reads.
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self.start()

    def start(self) -> None:
        """Begin with the first tensor again; what was copied before may be overwritten."""
        self._used = 0
        self._devices: set[torch.device] = set()
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor, on_cuda = tensor.detach(), tensor.device.type == "cuda"
        kept = self._memory[self._used] if self._used < len(self._memory) else None
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            del self._memory[self._used :]
            # Strides as well, so that it is one transfer.
            self._memory.append(kept := torch.empty_like(tensor, device="cpu", pin_memory=on_cuda))
        self._used += 1
        if on_cuda:
            self._devices.add(tensor.device)
        return kept.copy_(tensor, non_blocking=on_cuda)

    def sent(self) -> None:
        """All copies are asked for: mark this moment on the streams that make them."""
        for device in self._devices:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._events.append((device, event))

    def wait(self) -> None:
        """Until all copies have arrived."""
        for device, event in self._events:
            # Without this a new thread opens a context on the first GPU, of hundreds of megabytes.
            with torch.cuda.device(device):
                event.synchronize()


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time.

    Args:
        run: the run's folder.
        keep_last: newest checkpoints that stay, beside the best.
    """

    def __init__(self, run: Path, *, keep_last: int) -> None:
        self.run, self.keep_last = run, keep_last
        self._copies: HostCopies | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._warned_of: tuple[object, ...] | None = None  # the kind of the last failure, while saves fail

    def write(self, snapshot: Snapshot) -> Path:
        """Write now, after what is being written.

        Raises:
            WriteError: it cannot be written.
        """
        self.finish()
        folder = snapshot.write(self.run)
        prune_checkpoints(self.run, keep_last=self.keep_last, newest=folder)
        return folder

    def begin(self, take: Callable[[Copy], Snapshot], *, in_background: bool = True) -> None:
        """Write what `take` gives, in the background if wished; that it cannot be written is a warning, in this call or a later one.

        The snapshot is written at once, without a copy, if there is no memory for one.
        """
        self.finish()
        if in_background:
            self._copies = self._copies or HostCopies()
            self._copies.start()
            try:
                snapshot = take(self._copies)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._copies = None
            else:
                self._copies.sent()
                # A daemon: what is half written does not keep a process alive that the user ends by force.
                self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
                self._thread.start()
                return
        self._run(take(the_tensor_itself))
        self._settle()

    def check(self) -> None:
        """Warn if the thread has failed; costs nothing while it is at work."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            Exception: what went wrong in the thread, unless it is the disk's fault: that is a warning.
        """
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(0.2)  # Windows handles no Ctrl-C during a longer wait
        self._thread = None
        self._settle()

    def close(self) -> None:
        """`finish`, and give back the memory of the copies."""
        try:
            self.finish()
        finally:
            self._copies = None

    def _run(self, snapshot: Snapshot) -> None:
        try:
            if self._copies is not None:
                self._copies.wait()
            folder = snapshot.write(self.run)
            prune_checkpoints(self.run, keep_last=self.keep_last, newest=folder)
        except BaseException as error:
            self._error = error

    def _settle(self) -> None:
        error, self._error = self._error, None
        if error is not None and not isinstance(error, OSError):
            raise error
        kind = None if error is None else (type(error), error.errno)
        if kind is not None and kind != self._warned_of:  # a disk that stays full would be announced at each save
            warnings.warn(f"{error}; training goes on, older checkpoints stay, the next save tries again", stacklevel=3)
        self._warned_of = kind
