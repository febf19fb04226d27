"""Running NumPy on all cores: it releases the interpreter's lock while it computes, so that plain
threads run side by side.

BLAS, the library behind NumPy's matrix product, has threads of its own, which keep spinning for a
while after each product and would take the cores from ours. So within `parallel`, BLAS runs on a
single thread in each of our threads; outside, it uses all of its own.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue

from threadpoolctl import ThreadpoolController

Task = Callable[[int], object]

_WITHIN = threading.local()  # .a_task is true in a thread that is running a task
_MAKING_POOL = threading.Lock()


def parallel(task: Task, count: int) -> None:
    """Call task(0) … task(count - 1) on all cores, and return when all are done.

    Which thread runs which task is left to chance. Each task must therefore write to places of its
    own, so that results do not depend on it. An exception in a task is raised here once all threads
    have stopped. Called within a task, this runs its tasks one after another.
    """
    if getattr(_WITHIN, "a_task", False):
        for i in range(count):
            task(i)
    else:
        _pool(os.getpid()).run(task, count)


def cores() -> int:
    """How many tasks `parallel` runs side by side."""
    return _pool(os.getpid()).size


class _Pool:
    """`size` threads that share work: size - 1 that wait for it, and the caller's own."""

    def __init__(self) -> None:
        self.blas = ThreadpoolController().select(user_api="blas").lib_controllers
        # As many as BLAS would use, so that OMP_NUM_THREADS and the like count for us too.
        self.size = max([b.num_threads for b in self.blas], default=os.cpu_count() or 1)
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.lock = threading.RLock()
        for _ in range(self.size - 1):
            threading.Thread(target=self._wait, daemon=True, name="micrograd-gpt").start()

    def _wait(self) -> None:
        while True:
            self.work.get()()

    def run(self, task: Task, count: int) -> None:
        if count == 1:  # nothing to share, which decoding meets a hundred times a token
            with self.lock, self._one_blas_thread():
                task(0)
            return
        counter = itertools.count()
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def share() -> None:
            """Do tasks until none is left, then report the failure, or None."""
            _WITHIN.a_task = True
            try:
                while (i := next(counter)) < count:
                    task(i)
                ended.put(None)
            except BaseException as failure:  # raised again below, in the caller's thread
                ended.put(failure)
            finally:
                _WITHIN.a_task = False

        shares = max(1, min(self.size, count))
        with self.lock, self._one_blas_thread():
            for _ in range(shares - 1):
                self.work.put(share)
            share()
            failures = list(filter(None, [ended.get() for _ in range(shares)]))
        if failures:
            try:
                raise failures[0]
            finally:
                failures.clear()  # the exception refers to this frame: leave no cycle

    @contextmanager
    def _one_blas_thread(self) -> Iterator[None]:
        before = [library.num_threads for library in self.blas]
        for library in self.blas:
            library.set_num_threads(1)
        try:
            yield
        finally:
            for library, threads in zip(self.blas, before, strict=True):
                library.set_num_threads(threads)


def _pool(process: int) -> _Pool:
    """The threads of this process; a forked child inherits none and makes its own."""
    with _MAKING_POOL:  # two pools made at once would each read the 1 that the other set in BLAS
        return _make_pool(process)


@cache
def _make_pool(process: int) -> _Pool:
    return _Pool()
