"""A process that saves a run whose own process is killed before it can.

Open MPI's mpirun leaves its processes a quarter of a second after Ctrl-C or SIGTERM: less than a
step of a large model takes, or the writing of its checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

BETWEEN_LOOKS = 0.05  # seconds


def at_signal(numbers: Sequence[signal.Signals], action: Callable[[], object]) -> None:
    """Call `action` in a thread of its own when one of the signals comes for the first time.

    Their handlers still run, in the main thread. That may be in a kernel meanwhile, and takes
    notice only after it. To be called in the main thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # any signal's number goes there

    def wait() -> None:
        while os.read(reading, 1)[0] not in numbers:
            pass
        action()

    threading.Thread(target=wait, daemon=True).start()


def save_if_killed(save: Callable[[], object]) -> int:
    """Once this process has ended, call `save` in another one, on what it holds in memory now.

    The other, whose number is returned, is a fork in a session of its own, which is not killed with
    this one. It has the memory as it is at this moment, no input or output, and neither MPI nor a
    GPU.
    """
    us = os.getpid()
    if saver := os.fork():
        return saver
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # or the launcher would wait for us to close them
            os.dup2(nowhere, stream)
        while os.getppid() == us:
            time.sleep(BETWEEN_LOOKS)
        save()
    finally:  # there is nobody left to whom an error could be told
        os._exit(0)
