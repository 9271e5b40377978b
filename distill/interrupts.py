"""Signals that ask a run to stop: SIGINT (Ctrl-C), and SIGTERM (kill, a scheduler's end of time)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from distill.errors import Interrupted

Handler = Callable[[int, FrameType | None], None]


@dataclass
class Stop:
    """signal: number of the first signal that came, 0 before any."""

    signal: int = 0


@contextmanager
def handling(handler: Handler, *numbers: int) -> Iterator[None]:
    """Handle signals by `handler`, except those that the process was told to ignore; nothing outside the main
    thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in kept}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


@contextmanager
def noted() -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM instead of stopping; a second SIGINT stops at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if not stop.signal:
            stop.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    with handling(note, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise Interrupted, as SIGINT raises KeyboardInterrupt, so that files are closed and locks given
    back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("", number)

    with handling(stop, signal.SIGTERM):
        yield


def leave_signals_to_parent(worker: int) -> None:
    """For a data loader process: Ctrl-C reaches it too, and it must serve until its parent has finished the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
