"""The sums of exchange.py between GPUs: NCCL moves the numbers, and they never leave the GPUs.

NCCL connects GPUs by NVLink, PCI Express or the network. Its own reductions are not used, since
they add in an order that depends on how the GPUs are connected, and in bfloat16 they round after
every addition. So NCCL only carries each part to its rank, which adds it up as exchange.py does: in
the order of the ranks, in the type of the numbers, to the same bits.

All of this is work for a stream of its own, beside whatever else the GPU has to do. Two streams
know of each other only what events tell them, so `beside` lets each wait for the other: the
exchange for the gradients that it is to send, and whoever uses the sums for these.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array, library_for
from micrograd_gpt.support.errors import UserError

INSTALL_NCCL = "pip install nvidia-nccl-cu13 (or nvidia-nccl-cu12)"


class NCCLFailed(Exception):
    """NCCL cannot go on, for example since a link or another rank is gone."""


def nccl_version() -> int | None:
    """The version of NCCL that CuPy finds, such as 22707 for 2.27.7; None if it finds none."""
    nccl = _bindings()
    return nccl.get_version() if nccl.available else None


def without_nccl() -> str:
    """What to tell the user where there is no NCCL."""
    through = "gradients go through the host's memory"
    if sys.platform != "linux":
        return f"NCCL is for Linux alone: {through}"
    return f"CuPy finds no NCCL: {through}; {INSTALL_NCCL} lets GPUs send them to each other"


def _bindings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy says in ten lines that it finds no NCCL
        from cupy.cuda import nccl
    return nccl


class GPUExchange:
    """What `Exchange` is (exchange.py), for the arrays of the GPU that this rank has chosen.

    The ranks of `comm`, an MPI communicator, have a GPU each. UserError where NCCL cannot connect
    these, NCCLFailed where it fails later. `wait` polls, until it is true, the `Test` of what it is
    given, and meanwhile heeds signals and looks after the other ranks.
    """

    def __init__(self, comm: Any, wait: Callable[[Any], None], most: int) -> None:
        self._size, self._wait, self.most = comm.size, wait, most
        self._cupy, self._nccl = library_for("gpu"), _bindings()
        try:
            name = comm.bcast(self._nccl.get_unique_id() if comm.rank == 0 else None)
            self._ranks = self._nccl.NcclCommunicator(comm.size, name, comm.rank)
        except self._nccl.NcclError as error:
            raise UserError(f"NCCL cannot connect the GPUs of {comm.size} ranks: {error}") from None
        # Not one that the default stream waits for by itself: then neither could work beside it.
        self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self._done: Any = None  # the event after the last block of `beside`

    @contextmanager
    def beside(self, catch_up: bool = True) -> Iterator[None]:
        """Within this block the GPU's work goes to the stream of the exchange.

        It begins after all that the caller's stream was given before. What that stream is given
        after the block begins after the block's work, unless that is left to a call of `catch_up`.
        Python waits for neither.
        """
        outer = self._cupy.cuda.get_current_stream()
        if outer == self._stream:
            yield
            return
        self._stream.wait_event(outer.record())
        with self._stream, self._failures():
            yield
        self._done = self._stream.record()
        if catch_up:
            self.catch_up()

    def catch_up(self) -> None:
        """What the current stream is given from now on begins after what was exchanged."""
        self._cupy.cuda.get_current_stream().wait_event(self._done)

    def scatter_sum(self, numbers: Array, dtype: Any = None) -> Array:
        """This rank's part (ceil(N / size),) of the sum of all ranks' `numbers` (N,)."""
        wire, size = np.dtype(dtype or numbers.dtype), self._size
        count = -(-len(numbers) // size)
        with self.beside():
            sent = self._cupy.zeros((size * count,), wire)
            sent[: len(numbers)] = numbers.astype(wire, copy=False)
            received = self._cupy.empty((size, count), wire)
            self._all_to_all(sent.reshape(size, count), received)
            first, *others = received
            added = first.astype(numbers.dtype)
            for other in others:
                added += other.astype(added.dtype, copy=False)
        return added

    def gather(self, part: Array, dtype: Any = None) -> Array:
        """The parts (count,) of all ranks, one after another: (size * count,)."""
        wire = np.dtype(dtype or part.dtype)
        with self.beside():
            ours = self._cupy.ascontiguousarray(part.astype(wire, copy=False))
            received = self._cupy.empty((self._size * len(part),), wire)
            to, bytes_type = received.data.ptr, self._nccl.NCCL_UINT8
            self._ranks.allGather(ours.data.ptr, to, ours.nbytes, bytes_type, self._stream.ptr)
            return received.astype(part.dtype, copy=False)

    def finish(self) -> None:
        """Wait until what was exchanged has arrived.

        Reading a number would wait for it too, but forever if another rank is gone.
        """
        if self._done is not None:
            self._wait(self)

    def Test(self) -> bool:
        """Whether the exchanges are done; NCCLFailed where they cannot be any more."""
        with self._failures():
            self._ranks.check_async_error()
        return self._done.done

    def _all_to_all(self, sent: Array, received: Array) -> None:
        """Send row r (count,) to rank r, and receive into row r what rank r sends here."""
        self._nccl.groupStart()  # NCCL does all of them at once
        for rank in range(self._size):
            how = sent[rank].nbytes, self._nccl.NCCL_UINT8, rank, self._stream.ptr
            self._ranks.send(sent[rank].data.ptr, *how)
            self._ranks.recv(received[rank].data.ptr, *how)
        self._nccl.groupEnd()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except self._nccl.NcclError as error:
            raise NCCLFailed(f"NCCL cannot reach the other ranks: {error}") from error
