"""A process that saves a run whose own process is killed before it can.

Open MPI's mpirun leaves its processes a quarter of a second after Ctrl-C or SIGTERM: less than a
step of a large model takes, or the writing of its checkpoint.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

BETWEEN_LOOKS = 0.05  # seconds


def save_if_killed(save: Callable[[], object]) -> None:
    """Once this process has ended, call `save` in another one, on what it holds in memory now.

    The other is a fork in a session of its own, which is not killed with this one. It reads the
    memory as it is at this moment, has no input or output, and cannot use MPI or a GPU.
    """
    us = os.getpid()
    if os.fork():
        return
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
    finally:
        os._exit(0)
