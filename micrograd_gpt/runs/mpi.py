"""Ranks that talk through MPI, by way of mpi4py.

Their sums have an order. Of each bucket of gradients every rank gets one part, from all ranks; it
adds these up, rank 0's first, and sends the sum to all. MPI's own all-reduce may add in another
order whenever the ranks are placed otherwise, and needs no less traffic.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO

import numpy as np
from mpi4py import MPI

from micrograd_gpt.arrays.devices import Array, array_module, to_device, use_gpu
from micrograd_gpt.runs.ranks import Ranks, T, said_once, versions
from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.machine import usable_cores
from micrograd_gpt.tensor import Tensor

BUCKET = 1 << 22  # numbers that are added up at a time: 16 MB
PATIENCE = 1.0  # seconds in which rank 0 says what it has met too, before another rank does


class MPIRanks(Ranks):
    """One of several ranks."""

    def __init__(self) -> None:
        self._all = MPI.COMM_WORLD
        self._here = self._all.Split_type(MPI.COMM_TYPE_SHARED)  # those on this machine
        self.rank, self.size = self._all.rank, self._all.size
        self.local_rank, self.local_size = self._here.rank, self._here.size
        self._buffers: tuple[np.ndarray, np.ndarray] | None = None

    def add_up(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = ordered_like(parameter.grad, parameter.data)
        flat = [flat_view(parameter.grad) for parameter in parameters]
        for bucket in buckets([len(grad) for grad in flat], BUCKET):
            parts = [flat[i][start:end] for i, start, end in bucket]
            joined = self._sum(to_device(array_module(parts[0]).concatenate(parts), "cpu"))
            places = np.cumsum([len(part) for part in parts])
            for part, end in zip(parts, places, strict=True):
                part[:] = array_module(part).asarray(joined[end - len(part) : end])

    def _sum(self, numbers: np.ndarray) -> np.ndarray:
        """The sum of all ranks' `numbers` (N,), in a buffer that the next call overwrites."""
        count = -(-len(numbers) // self.size)  # of a part
        if self._buffers is None or self._buffers[0].dtype != numbers.dtype:
            most = -(-BUCKET // self.size) * self.size
            self._buffers = np.zeros(most, numbers.dtype), np.zeros(most, numbers.dtype)
        ours, received = (buffer[: count * self.size] for buffer in self._buffers)
        ours[: len(numbers)] = numbers
        self._all.Alltoall(ours, received)
        part, *others = received.reshape(self.size, count)
        for other in others:
            part += other
        self._all.Allgather(part, ours)
        return ours[: len(numbers)]

    def join(self, values: list[T]) -> list[T]:
        return [value for part in self._all.allgather(values) for value in part]

    def use_device(self, device: str) -> None:
        if device == "gpu":
            use_gpu(self.local_rank, self.local_size)

    def agree(self, number: int) -> int:
        return self._all.allreduce(number, MPI.MAX)

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        if self.local_rank:
            self._here.Barrier()
        yield
        if not self.local_rank:
            self._here.Barrier()

    def wait_for_all(self) -> None:
        """Go on when all ranks have come here."""
        self._all.Barrier()

    def on_this_machine(self, value: T) -> list[T]:
        """The values of this machine's ranks."""
        return self._here.allgather(value)

    def check_same(self, facts: dict[str, Any]) -> None:
        first, *others = self._all.allgather(facts)
        for rank, theirs in enumerate(others, 1):
            for what, value in first.items():
                if theirs.get(what) != value:
                    raise UserError(
                        f"rank {rank} has {what} {theirs.get(what)}, rank 0 has {value}: all ranks "
                        "need the same"
                    )


def ordered_like(grad: Array, data: Array) -> Array:
    """The gradient with its numbers in memory in the order of the parameter's, on every rank."""
    by_columns = data.flags.f_contiguous and not data.flags.c_contiguous
    return array_module(grad).asarray(grad, order="F" if by_columns else "C")


def flat_view(array: Array) -> Array:
    """All numbers of a contiguous array as they lie in memory, (N,)."""
    return (array if array.flags.c_contiguous else array.T).reshape(-1)


def buckets(sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Arrays of these sizes, one after another, in buckets of `most` numbers: a bucket is the
    pieces in it, each (array, start, end)."""
    bucket, room = [], most
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            end = min(size, start + room)
            bucket.append((i, start, end))
            room, start = room - (end - start), end
            if not room:
                yield bucket
                bucket, room = [], most
    if bucket:
        yield bucket


# ------------------------------------------------------------------------- starting and ending


@contextmanager
def mpi_ranks(launcher: str, size: int, rank: int) -> Iterator[Ranks]:
    """The ranks that a launcher started, as started_ranks says."""
    if MPI.COMM_WORLD.size != size:
        library = MPI.Get_library_version().split(",")[0].strip()
        raise said_once(
            rank,
            f"{launcher} started {size} processes, of which mpi4py's {library} knows "
            f"{MPI.COMM_WORLD.size}: use the {launcher} of that MPI",
        )
    ranks, stderr = MPIRanks(), sys.stderr
    try:
        with printing(ranks.is_first):
            ranks.check_same(versions())
            share_cores(ranks)
            machines = ranks.join([platform.node()] * (ranks.local_rank == 0))
            say(
                f"{size} ranks on {counted(len(machines), 'machine')}, "
                f"{counted(usable_cores(), 'core')} each"
            )
            yield ranks
            ranks.wait_for_all()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:  # as after --help
            raise
        end_all(ranks, error, stderr)


@contextmanager
def printing(allowed: bool) -> Iterator[None]:
    """Within this block Python prints only if it is allowed to."""
    if allowed:
        yield
        return
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # closed below
    with nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def share_cores(ranks: MPIRanks) -> None:
    """Leave to each of a machine's ranks its share of the cores, unless OMP_NUM_THREADS says more.

    Some launchers bind each rank to cores of its own, others let all of them run on all cores.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    ours = bound_to()
    cores = set().union(*ranks.on_this_machine(ours))
    paid_for = usable_cores()  # fewer than we are bound to, if the control group has a quota
    shared = min(len(cores), paid_for if paid_for < len(ours) else len(cores))
    count = min(len(ours), max(1, shared // ranks.local_size))
    os.environ["OMP_NUM_THREADS"] = str(count)  # which the kernels read, and processes of ours


def bound_to() -> set[int]:
    """The numbers of the cores that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def end_all(ranks: MPIRanks, error: BaseException, stderr: TextIO) -> NoReturn:
    """End the processes of all ranks, after one message that says why."""
    if not ranks.is_first:  # which has often met the same, and is about to say it
        time.sleep(PATIENCE)
    who = "" if ranks.is_first else f"rank {ranks.rank} on {MPI.Get_processor_name()}: "
    status = 1
    with redirect_stderr(stderr):
        if isinstance(error, UserError):
            status = 2
            say(f"error: {who}{error}")
        elif isinstance(error, KeyboardInterrupt):
            status = 130
        elif isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        else:
            say(f"error: {who}{type(error).__name__}, a bug:")
            traceback.print_exception(error)
    sys.stdout.flush()
    MPI.COMM_WORLD.Abort(status)
    raise error  # where Abort returns
