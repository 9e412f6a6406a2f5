"""Signals that ask a run to stop, as a request that the loop looks at after each step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Set by a signal; the loop looks at it after each step."""

    requested: str | None = None  # the signal's name


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP of the block into a request; a second one interrupts at once.

    Signals can only be caught in the main thread: elsewhere (some notebooks) the block runs without.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested is not None:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number).name

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
