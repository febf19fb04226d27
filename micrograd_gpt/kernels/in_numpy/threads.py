"""Running NumPy on all cores: it releases the interpreter's lock while it computes, so that plain
threads run side by side.

BLAS, the library behind NumPy's matrix product, has threads of its own, which keep spinning for a
while after each product and would take the cores from ours. So within `parallel`, BLAS runs on a
single thread in each of our threads; outside, it uses all of its own again, whatever happens.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from queue import SimpleQueue

from threadpoolctl import ThreadpoolController

from micrograd_gpt.support.machine import usable_cores

Task = Callable[[int], object]

_WITHIN = threading.local()  # .a_task is true in the threads that run tasks
_MAKING_POOL = threading.Lock()


def _after_fork() -> None:
    """A child has only the thread that forked: none that would release the lock."""
    global _MAKING_POOL
    _MAKING_POOL = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


def parallel(task: Task, count: int) -> None:
    """Call task(0) … task(count - 1) on all cores, and return when all are done.

    Which thread runs which task is left to chance. Each task must therefore write to places of its
    own, so that results do not depend on it. An exception in a task is raised here once all threads
    have stopped, and KeyboardInterrupt (Ctrl-C) once all tasks are done; a second one at once.

    A single task runs in the caller's thread, with BLAS as it is: waking another one for it takes
    longer than most such tasks do. So do all tasks, one after another, where there is one core or
    this is called within a task.
    """
    pool = _pool(os.getpid())
    if count <= 1 or pool.size == 1 or getattr(_WITHIN, "a_task", False):
        for i in range(count):
            task(i)
    else:
        pool.run(task, count)


def cores() -> int:
    """How many tasks `parallel` runs side by side."""
    return _pool(os.getpid()).size


class _Job:
    """`count` tasks for several threads. Each sees the caller's context variables, np.errstate's
    among them."""

    def __init__(self, task: Task, count: int) -> None:
        self.task, self.count, self.counter = task, count, itertools.count()
        self.context = copy_context()
        self.failures: list[BaseException] = []
        self.shares_ended: SimpleQueue[None] = SimpleQueue()
        self.ended: SimpleQueue[None] = SimpleQueue()

    def share(self) -> None:
        """Do tasks until none is left."""
        try:
            self.context.copy().run(self._do_tasks)
        except BaseException as failure:  # raised again in the caller's thread
            self.failures.append(failure)
        finally:
            self.shares_ended.put(None)

    def _do_tasks(self) -> None:
        while (i := next(self.counter)) < self.count:
            self.task(i)


class _Pool:
    """`size` threads that do one job after another. One leads: it shares each job with the others.

    The caller only waits. In the main thread KeyboardInterrupt can be raised at any moment, in the
    middle of a `finally` too, but in no other. So what changes the number of BLAS's threads here
    surely changes it back.
    """

    def __init__(self) -> None:
        try:
            self.blas = ThreadpoolController().select(user_api="blas").lib_controllers
        except UnicodeDecodeError:  # some loaded library's path is not UTF-8
            self.blas = []
        # BLAS counts the machine's cores, of which a container may have a few only. Where it would
        # use fewer, as OPENBLAS_NUM_THREADS says, so do we.
        usable = usable_cores()
        for library in self.blas:
            if library.num_threads > usable:
                library.set_num_threads(usable)
        self.size = max([library.num_threads for library in self.blas], default=usable)
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for loop in (self._lead, *[self._follow] * (self.size - 1)):
            threading.Thread(target=loop, daemon=True, name="micrograd-gpt").start()

    def run(self, task: Task, count: int) -> None:
        job = _Job(task, count)
        try:
            self.jobs.put(job)
            job.ended.get()
        except BaseException:  # an interrupt: tasks must not go on behind the caller's back
            last = _Job(task, 0)  # jobs are done in turn: when this one has ended, so has the other
            self.jobs.put(last)
            last.ended.get()
            raise
        if job.failures:
            try:
                raise job.failures[0]
            finally:
                job.failures.clear()  # the exception refers to this frame: leave no cycle

    def _lead(self) -> None:
        _WITHIN.a_task = True
        while True:
            self._do(self.jobs.get())

    def _follow(self) -> None:
        _WITHIN.a_task = True
        while True:
            self.work.get()()

    def _do(self, job: _Job) -> None:
        """Do a job with as many threads as it has tasks, then tell its caller."""
        shares = max(1, min(self.size, job.count))
        with self._one_blas_thread():
            for _ in range(shares - 1):
                self.work.put(job.share)
            job.share()
            for _ in range(shares):
                job.shares_ended.get()
        job.ended.put(None)

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
