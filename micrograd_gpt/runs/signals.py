"""Ctrl-C and SIGTERM during training: the first lets the step end, the second does not. So do
SIGUSR1, which batch systems send before a job's time is over, and SIGHUP, which says that the
terminal was closed, or the connection to it lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from micrograd_gpt.support.cli import say

HANG_UP = getattr(signal, "SIGHUP", None)  # neither of these two is there on Windows
BEFORE_THE_END = getattr(signal, "SIGUSR1", None)
STOPPING = [s for s in (signal.SIGINT, signal.SIGTERM, HANG_UP, BEFORE_THE_END) if s is not None]


class StopSignals:
    """Remembers that the user asked to stop, so that the loop can do so where nothing is lost.

    The first signal sets `requested`, its number (0 before). A second one ends the process at once:
    KeyboardInterrupt, or SystemExit with 128 and its number as status. A SIGHUP does not, since
    both the shell and the system send one.

    Python allows this in its main thread only: in another one signals do what they did before. So
    do those that are ignored, as a shell starts programs in the background.

    `first` is called before any of them is heeded.
    """

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self.requested, self._first = 0, first
        for number in heeded():
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._first()
        if self.requested and number == HANG_UP:
            return
        if self.requested:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.requested = number
        say("stopping after this step; interrupt again to stop at once")


def heeded() -> list[signal.Signals]:
    """The signals of STOPPING whose handlers may be changed here, and should be."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def signals_as_before() -> Iterator[None]:
    """After this block signals do again what they did before it, as a notebook needs."""
    before = {number: signal.getsignal(number) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
