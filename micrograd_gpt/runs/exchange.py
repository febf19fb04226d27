"""The two halves of a sum over all ranks: each rank adds up one part, then all parts go to all.

Of flat numbers every rank gets one part, from all ranks; it adds these up, rank 0's first. So the
sum has an order: MPI's own reductions may add in another one whenever the ranks are placed
otherwise, and send no less.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from mpi4py import MPI

from micrograd_gpt.arrays.devices import Array, device_of, to_device

WIDEST = 8  # bytes of a number


class Exchange:
    """Sends flat arrays of at most `most` numbers among the ranks of `comm`.

    An array of N numbers has one part a rank, of ceil(N / size) numbers each; the last parts are
    filled up with zeros. `dtype` is the type on the wire: numbers are rounded to it, and added in
    their own type. What the methods return is on the device of what they are given, and in memory
    that their next call overwrites; a GPU's arrays go through the memory of the host. `wait` waits
    for a request of MPI.
    """

    def __init__(self, comm: MPI.Comm, wait: Callable[[MPI.Request], None], most: int) -> None:
        self._comm, self._wait, self.most = comm, wait, most
        count = -(-most // comm.size)
        whole, part = count * comm.size * WIDEST, count * WIDEST
        # What is sent of numbers, what comes back, and the part that is added up
        self._sent, self._received, self._added = (
            np.empty(size, np.uint8) for size in (whole, whole, part)
        )

    def beside(self, catch_up: bool = True) -> AbstractContextManager[None]:
        """Within this block a GPU's work has a stream of its own; a CPU has none."""
        return nullcontext()

    def catch_up(self) -> None:
        """Nothing goes on beside Python here."""

    def finish(self) -> None:
        """Wait until what was exchanged has arrived, as it has when a method returns."""

    def scatter_sum(self, numbers: Array, dtype: Any = None) -> Array:
        """This rank's part (ceil(N / size),) of the sum of all ranks' `numbers` (N,)."""
        wire, size = np.dtype(dtype or numbers.dtype), self._comm.size
        count = -(-len(numbers) // size)
        sent, received = to_device(numbers, "cpu"), _as(wire, self._received, count * size)
        if sent.dtype != wire or len(sent) < count * size:
            sent = _as(wire, self._sent, count * size)
            sent[: len(numbers)] = to_device(numbers, "cpu")
            sent[len(numbers) :] = 0
        self._wait(self._comm.Ialltoall(as_bytes(sent), as_bytes(received)))
        first, *others = received.reshape(size, count)
        added = _as(numbers.dtype, self._added, count)
        added[:] = first
        for other in others:
            added += other.astype(added.dtype, copy=False)
        return to_device(added, device_of(numbers))

    def gather(self, part: Array, dtype: Any = None) -> Array:
        """The parts (count,) of all ranks, one after another: (size * count,)."""
        wire, size = np.dtype(dtype or part.dtype), self._comm.size
        received = _as(wire, self._received, len(part) * size)
        ours = np.ascontiguousarray(to_device(part, "cpu"), wire)
        self._wait(self._comm.Iallgather(as_bytes(ours), as_bytes(received)))
        return to_device(received.astype(part.dtype, copy=False), device_of(part))


def _as(dtype: np.dtype, buffer: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers of a buffer of bytes."""
    return buffer[: count * dtype.itemsize].view(dtype)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The memory of an array, which MPI moves whatever the type is."""
    return array.view(np.uint8)
