"""Ranks that talk through MPI, by way of mpi4py.

How they add numbers up is in runs/exchange.py, how they begin and end in runs/together.py.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from mpi4py import MPI

from micrograd_gpt.arrays.devices import Array, gpu_addresses, use_gpu
from micrograd_gpt.runs.buckets import Bucket, buckets, flat_view, ordered_like, put, taken
from micrograd_gpt.runs.exchange import Exchange, as_bytes
from micrograd_gpt.runs.nccl import GPUExchange, NCCLFailed, nccl_version, without_nccl
from micrograd_gpt.runs.overlap import Overlap
from micrograd_gpt.runs.ranks import Cut, Ranks, T, own_gpu
from micrograd_gpt.runs.unread import read_numbers
from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.machine import usable_cores
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.corpus import Corpus

BUCKET = 1 << 20  # numbers that are added up at a time: 4 MB, which stay in a cache
GPU_BUCKET = 1 << 23  # the same between GPUs: 32 MB, a little more than PyTorch's DDP takes
DURING_BACKWARD = 0.0002  # seconds between tests of a message, which leave it the processor
BETWEEN_TESTS = 0.001  # seconds, in a wait that may be long
BETWEEN_LOOKS = 0.05  # seconds; mpirun ends all ranks about half a second after one has died
BETWEEN_NOTES = 3.0  # seconds of a wait, between looks for ranks that are stopped
FAILED = 1  # the tag of the message that a rank has met an error


class RankDied(Exception):
    """Another rank's process has ended, so that no step can be taken any more."""


LINK_ERRORS = (RankDied, MPI.Exception, NCCLFailed)  # the latter two where a link was cut


class MPIRanks(Ranks):
    """One of several ranks."""

    def __init__(self, launcher: str) -> None:
        self._launcher = launcher
        # After these Open MPI's mpirun kills us within 0.25 s; SIGUSR1 it only passes on.
        self.deadly = (signal.SIGINT, signal.SIGTERM) if launcher == "mpirun" else ()
        self._all = MPI.COMM_WORLD
        self._here = self._all.Split_type(MPI.COMM_TYPE_SHARED)  # those on this machine
        self.rank, self.size = self._all.rank, self._all.size
        self.local_rank, self.local_size = self._here.rank, self._here.size
        self._machines = sum(self._all.allgather(self.local_rank == 0))
        self.overlap = Overlap() if overlaps(self._machines) else None
        wait = partial(self._wait, pause=DURING_BACKWARD if self.overlap else 0)
        self.exchange: Exchange | GPUExchange = Exchange(self._all.Dup(), wait, BUCKET)
        neighbours = self.on_this_machine((self.rank, os.getpid()))
        # Containers on one machine may each number their processes.
        self._watched = {rank: pid for rank, pid in neighbours if is_running(pid)}

    @property
    def description(self) -> str:
        machines, cores = counted(self._machines, "machine"), counted(usable_cores(), "core")
        return f"{self.size} ranks on {machines}, {cores} each"

    def add_up_during(
        self, loss: Tensor, parameters: Sequence[Tensor], dtype: str = "float32"
    ) -> None:
        if self.overlap:
            add_up = partial(self._add_up, parameters, dtype, catch_up=False)
            buckets = self._buckets([parameter.size for parameter in parameters])
            self.overlap.begin(loss, parameters, list(buckets), add_up)

    def add_up(self, parameters: Sequence[Tensor], dtype: str = "float32") -> None:
        if self.overlap and self.overlap.has_begun:
            self.overlap.finish()
            self.exchange.catch_up()
            return
        for bucket in self._buckets([parameter.size for parameter in parameters]):
            self._add_up(parameters, dtype, bucket)

    def _add_up(
        self, parameters: Sequence[Tensor], dtype: str, bucket: Bucket, catch_up: bool = True
    ) -> None:
        """Add up the gradients in a bucket: of all of it, or of this rank's part."""
        parts = []
        for i, start, end in bucket:
            if parameters[i].grad is None:
                raise ValueError(f"parameter {i} has no gradient for ranks to add up: leave it out")
            grad = parameters[i].grad = ordered_like(parameters[i].grad, parameters[i].data)
            parts.append(flat_view(grad)[start:end])
        with self.exchange.beside(catch_up):
            joined = taken(parts, 0, sum(map(len, parts)))
            wire = bfloat16 if dtype == "bfloat16" else joined.dtype
            added = self.exchange.scatter_sum(joined, wire)
            if self.shards:
                put(parts, self.rank * len(added), added)
            else:
                put(parts, 0, self.exchange.gather(added, wire))

    def cut(self, sizes: Sequence[int]) -> Iterator[Cut]:
        for bucket in self._buckets(sizes):
            count, first = self._part_of(bucket), 0
            for i, start, end in bucket:
                places = (start + rank * count - first for rank in range(self.size + 1))
                yield i, [min(max(start, place), end) for place in places]
                first += end - start

    def _buckets(self, sizes: Sequence[int]) -> Iterator[Bucket]:
        return buckets(sizes, self.exchange.most)

    def _part_of(self, bucket: Bucket) -> int:
        """How many numbers of a bucket a rank has, if it is not the last, which may have fewer."""
        return -(-sum(end - start for _, start, end in bucket) // self.size)

    def gather(self, arrays: Sequence[Array]) -> None:
        flat = [flat_view(array) for array in arrays]
        with self.exchange.beside():
            for bucket in self._buckets([array.size for array in arrays]):
                parts = [flat[i][start:end] for i, start, end in bucket]
                count = self._part_of(bucket)
                start, end = self.rank * count, (self.rank + 1) * count
                joined = self.exchange.gather(taken(parts, start, count))
                put(parts, 0, joined[:start])
                put(parts, end, joined[end:])
        self.exchange.finish()

    def to_first(self, numbers: np.ndarray, into: np.ndarray, counts: Sequence[int]) -> None:
        sizes = [int(count) * into.itemsize for count in counts]
        received = [as_bytes(into), (sizes, None), MPI.BYTE] if self.is_first else None
        self._wait(self._all.Igatherv(as_bytes(numbers), received))

    def join(self, values: Sequence[Any]) -> list[float]:
        self.exchange.finish()
        ours = np.array(read_numbers(values))
        joined = np.empty(self.size * len(ours))
        self._wait(self._all.Iallgather(ours, joined))
        return joined.tolist()

    def collect(self, value: T) -> list[T]:
        self.wait_for_all()  # who waits in allgather hears of no signal
        return self._all.allgather(value)

    def agree(self, number: int) -> int:
        ours, largest = np.array(int(number)), np.array(0)
        self._wait(self._all.Iallreduce(ours, largest, MPI.MAX))
        return int(largest)

    def wait_for_all(self) -> None:
        """Go on when all ranks have come here."""
        self._wait(self._all.Ibarrier(), BETWEEN_TESTS)

    def _wait(self, request: MPI.Request, pause: float = 0) -> None:
        """Wait for the other ranks. Signals are heeded meanwhile, as MPI's own wait does not."""
        looked = noted = time.monotonic()
        stopped: set[int] = set()
        named: set[int] = set()
        while not request.Test():
            time.sleep(pause)  # lets other processes use the core
            if time.monotonic() > looked + BETWEEN_LOOKS:
                self.check_alive()
                looked = time.monotonic()
            if looked > noted + BETWEEN_NOTES:
                stopped, named = self._name_stopped(stopped, named)
                noted = looked

    def check_alive(self) -> None:
        dead = [(rank, pid) for rank, pid in self._watched.items() if not is_running(pid)]
        if dead:
            which = ", ".join(f"rank {rank} (process {pid})" for rank, pid in dead)
            raise RankDied(f"{which} on {platform.node()} has ended")

    def _name_stopped(self, before: set[int], named: set[int]) -> tuple[set[int], set[int]]:
        """Say which ranks this wait is in vain for, if they were stopped at the look before too.

        After Ctrl-Z some are stopped a moment longer than others. Returns the ranks that are
        stopped, and those of them that the user knows of, for the next look.
        """
        stopped = {rank for rank, pid in self._watched.items() if is_stopped(pid)}
        lasting = stopped & before
        for rank in sorted(lasting - named):
            pid = self._watched[rank]
            say(
                f"note: rank {rank} (process {pid}) on {platform.node()} is stopped, and the "
                f"others wait for it; kill -CONT {pid} lets it go on"
            )
        return stopped, lasting

    def all_well(self) -> bool:
        alive = all(map(is_running, self._watched.values()))
        return alive and not self._all.Iprobe(tag=FAILED)

    def tell_first(self) -> None:
        """Let rank 0 know, before the launcher ends it, that this rank has met an error."""
        self._all.Isend(b"", 0, FAILED)

    def living_before(self, here: bool) -> int:
        """How many ranks before this one have not ended, of all, or of those on this machine."""
        alive = {rank: is_running(pid) for rank, pid in self._watched.items()}
        return sum(alive.get(rank, not here) for rank in range(self.rank))

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        if self.local_rank:
            self._wait(self._here.Ibarrier(), BETWEEN_TESTS)
        yield
        if not self.local_rank:
            self._wait(self._here.Ibarrier())

    def once_a_machine(self, load: Callable[[], Corpus]) -> Corpus:
        if self.local_rank == 0:
            with self.first_on_machine():
                loaded = load()
            self._here.bcast(loaded if loaded.in_memory else None)
            return loaded
        with self.first_on_machine():  # waits as MPI's own bcast does not
            copy = self._here.bcast(None)
        return load() if copy is None else copy

    def use_device(self, device: str) -> None:
        if device == "gpu":
            use_gpu(own_gpu(self.on_this_machine(gpu_addresses()), self.local_rank))
            version = nccl_version()
            self.check_same({"NCCL": version or "not installed"})
            if version:
                self.exchange = GPUExchange(self._all, self._wait, GPU_BUCKET)
                self.overlap = Overlap(in_thread=False)
            else:
                self.overlap = None  # each copy to the host waits for the backward
                say(without_nccl())

    def on_this_machine(self, value: T) -> list[T]:
        """The values of this machine's ranks."""
        return self._here.allgather(value)

    def check_stdin(self, is_read: bool) -> None:
        if is_read and self._launcher == "mpirun":  # seen with Open MPI 5.0.11
            raise UserError(
                "under Open MPI's mpirun stdin never ends: give a file instead, or start this "
                "without mpirun"
            )

    def check_same(self, facts: dict[str, Any]) -> None:
        first, *others = self._all.allgather(facts)
        for rank, theirs in enumerate(others, 1):
            for what in first | theirs:
                found, expected = (facts.get(what, "not given") for facts in (theirs, first))
                if found != expected:
                    raise UserError(
                        f"rank {rank} has {what} {found}, rank 0 has {expected}: all ranks need "
                        "the same"
                    )


def overlaps(machines: int) -> bool:
    """Whether gradients are added up during the backward, in a thread, which MPI must allow.

    On one machine the ranks keep all cores busy, so that it would not save time.
    """
    return machines > 1 and MPI.Query_thread() == MPI.THREAD_MULTIPLE


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this machine; on Windows that is not asked."""
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, as by SIGSTOP; that is known on Linux alone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in "Tt"
