"""The cores of this machine, put to work from Python: NumPy lets go of the interpreter's lock while
it computes, so plain threads run NumPy side by side.

BLAS, the library behind NumPy's matrix product, has threads of its own, which after each product
spin for a while and would take the cores from ours. So within `parallel` BLAS runs on one thread in
each of our threads; outside it keeps all of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue

from threadpoolctl import ThreadpoolController

Task = Callable[[int], object]


def parallel(task: Task, count: int) -> None:
    """Call task(0) … task(count - 1), on all cores, and return when all are done.

    Which thread runs which task is left to chance, so a task must write to places of its own, and
    then results do not depend on it. An exception in a task is raised here once all have ended.
    """
    pool = _pool(os.getpid())
    if count == 1 or pool.size == 1:
        for i in range(count):
            task(i)
        return
    pool.run(task, count)


def cores() -> int:
    """How many tasks `parallel` runs side by side."""
    return _pool(os.getpid()).size


class _Pool:
    """Threads that wait for work: size - 1 of them, the caller being the last."""

    def __init__(self) -> None:
        self.blas = ThreadpoolController().select(user_api="blas").lib_controllers
        # As many as BLAS would use, so that OMP_NUM_THREADS and the like count for us too.
        self.size = max([b.num_threads for b in self.blas], default=os.cpu_count() or 1)
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()
        self.lock = threading.Lock()
        for _ in range(self.size - 1):
            threading.Thread(target=self._wait, daemon=True, name="micrograd-gpt").start()

    def _wait(self) -> None:
        while True:
            self.done.put(_outcome(self.work.get()))

    def run(self, task: Task, count: int) -> None:
        counter = itertools.count()

        def share() -> None:
            while (i := next(counter)) < count:
                task(i)

        with self.lock:
            before = [b.num_threads for b in self.blas]
            for library in self.blas:
                library.set_num_threads(1)
            helpers = min(self.size, count) - 1
            for _ in range(helpers):
                self.work.put(share)
            outcomes = [_outcome(share), *(self.done.get() for _ in range(helpers))]
            for library, threads in zip(self.blas, before, strict=True):
                library.set_num_threads(threads)
        for failure in outcomes:
            if failure is not None:
                raise failure


def _outcome(share: Callable[[], None]) -> BaseException | None:
    """Run a share of the work; the exception it raised, for the caller of `parallel`, or None."""
    try:
        share()
    except BaseException as failure:  # handed over, and raised there
        return failure
    return None


@cache
def _pool(process: int) -> _Pool:
    """The threads of this process; a forked child has none of its parent's and makes its own."""
    return _Pool()


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next array instead of giving it back to the system.

    A training step allocates and frees the same large arrays again and again, and fetching their
    pages anew each time took a quarter of it. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h: M_TRIM_THRESHOLD, …
    libc.mallopt(trim_threshold, 2**31 - 1)  # never shrink the heap
    libc.mallopt(top_pad, 64 * 2**20)  # grow it in steps of 64 MB
    libc.mallopt(mmap_max, 0)  # large arrays come from the heap too, not from the system
    libc.mallopt(arena_max, 1)  # one heap for all threads
