"""Ctrl-C and SIGTERM during training: the first lets the step end, the second does not."""

from __future__ import annotations

import signal
from types import FrameType

from micrograd_gpt.support.cli import say


class StopSignals:
    """Remembers that the user asked to stop, so that the loop can do so where nothing is lost.

    The first Ctrl-C or SIGTERM sets `requested`, the signal's number (0 before). A second one ends
    the process at once: KeyboardInterrupt, or SystemExit with status 143.
    """

    def __init__(self) -> None:
        self.requested = 0
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.requested = number
        say("stopping after this step; interrupt again to stop at once")
