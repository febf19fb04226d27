"""Processes that work on pieces of text in parallel and never outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.pieces import Piece

MOST_PROCESSES = 6  # some 80 MB of memory each

ParallelMap = Callable[[Callable[[Piece], Any], Iterable[Piece]], Iterator[Any]]


@contextmanager
def worker_pool(processes: int | None = None) -> Iterator[ParallelMap]:
    """Give a function like `map` that computes its results in `processes` processes, in order.

    It draws from the pieces only a little ahead of the results. Raises what the mapped function
    raises, and UserError if a process is killed from outside.
    """
    count = processes or min(os.cpu_count() or 1, MOST_PROCESSES)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_worker)

    def parallel_map(function: Callable[[Piece], Any], pieces: Iterable[Piece]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        for piece in pieces:
            waiting.append(pool.submit(function, piece))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        with _ctrl_c_blocked():  # a process that is still starting would print a traceback
            for _ in range(count):
                pool.submit(os.getpid)
        yield parallel_map
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes was killed (out of memory?); run this again to continue"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Delay Ctrl-C until the block ends. Processes started in the block never receive it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed, since it would otherwise wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
