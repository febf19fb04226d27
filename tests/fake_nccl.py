"""Streams, events and NCCL for fake_cupy.py: several ranks, and a GPU for each that does not exist.

What a stream is given is computed at once, so a wait that was forgotten would change no number. It
is found in another way, by vector clocks: each stream counts the arrays that it has used, and
learns from the events that it waits for how far the other streams have come. MissingWait is raised
where a stream uses an array before it knows that the one which used it last is done with it.

    with fake_nccl.installed(MPI.COMM_WORLD): ...      # a rank's GPU, and NCCL between all of them

NCCL's functions have the signatures of CuPy 14.2. Like NCCL they take addresses; unlike NCCL they
know the array at an address, and whether it is as large as they are told.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_cupy
import numpy as np
import pytest

ERROR = (  # what NCCL says of a network that fails
    "NCCL_ERROR_SYSTEM_ERROR: unhandled system error (run with NCCL_DEBUG=INFO for details)"
)


# ------------------------------------------------------------------------------------- streams


class MissingWait(Exception):
    """An array is used on a stream that does not wait for the one that used it before."""


class Event:
    """What was done on a stream when it was recorded, and on those that it had waited for."""

    done = True

    def __init__(self, seen: Counter[Stream]) -> None:
        self.seen = seen


class Stream(fake_cupy.Stream):
    addresses = itertools.count(1)
    current: list[Stream]  # the last one is; the first one is the default stream
    at: dict[int, Stream]

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        super().__init__(null, non_blocking, ptds)
        self.ptr = next(self.addresses)
        self.at[self.ptr] = self
        self.by_itself = non_blocking  # it does not wait for the default stream, nor that for it
        self.seen: Counter[Stream] = Counter()  # uses of arrays, before whatever comes next here

    def __enter__(self) -> Stream:
        self.current.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.current.pop()
        super().__exit__(*error)

    def record(self, event: None = None) -> Event:
        return Event(self.seen.copy())

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def uses(self, array: fake_cupy.ndarray) -> None:
        for other in self.at.values():
            if self.current[0] in (self, other) and not (self.by_itself or other.by_itself):
                self.seen |= other.seen
        whole = fake_cupy.whole(array)
        last, count = getattr(whole, "last_use", (self, 0))
        if self.seen[last] < count:
            raise MissingWait(f"stream {self.ptr} uses {array} before stream {last.ptr} is done")
        self.seen[self] += 1
        whole.last_use = self, self.seen[self]


def used_on_current_stream(array: fake_cupy.ndarray) -> None:
    Stream.current[-1].uses(array)


# ---------------------------------------------------------------------------------------- NCCL


class NcclError(RuntimeError):
    pass


class Address(int):
    """Where an array lies, and which one it is."""

    array: fake_cupy.ndarray


def address_of(array: fake_cupy.ndarray) -> SimpleNamespace:
    address = Address(array._numbers.ctypes.data)
    address.array = array
    return SimpleNamespace(ptr=address)


def memory(address: Address, count: int, datatype: int, stream: int) -> np.ndarray:
    """The first bytes of an array, for NCCL's work on a stream."""
    assert datatype == nccl.NCCL_UINT8
    array = address.array
    assert array.flags.c_contiguous and count <= array.nbytes
    Stream.at[stream].uses(array)
    return array._numbers.reshape(-1).view(np.uint8)[:count]


class Group:
    """The messages since groupStart(), which all travel at groupEnd()."""

    def __init__(self, ranks: Any) -> None:
        self.ranks, self.open = ranks, False
        self.sent: list[bytes] = [b""] * ranks.size
        self.to_fill: dict[int, np.ndarray] = {}

    def end(self) -> None:
        for peer, message in enumerate(self.ranks.alltoall(self.sent)):
            assert len(message) == self.to_fill[peer].size, "NCCL would wait for the rest for ever"
            self.to_fill[peer][:] = np.frombuffer(message, np.uint8)
        self.__init__(self.ranks)


class NcclCommunicator:
    """The ranks of an MPI communicator, which carries what the GPUs would send each other."""

    group: Group

    def __init__(self, ndev: int, commId: bytes, rank: int, config: None = None) -> None:
        self._ranks = self.group.ranks
        assert len(commId) == 128 and rank == self._ranks.rank
        assert self._ranks.allgather(commId) == [commId] * ndev, "NCCL would wait for them for ever"

    def send(self, sendbuf: Address, count: int, datatype: int, peer: int, stream: int) -> None:
        assert self.group.open, "alone, it would wait until the other rank receives"
        self.group.sent[peer] = memory(sendbuf, count, datatype, stream).tobytes()

    def recv(self, recvbuf: Address, count: int, datatype: int, peer: int, stream: int) -> None:
        assert self.group.open, "alone, it would wait until the other rank sends"
        self.group.to_fill[peer] = memory(recvbuf, count, datatype, stream)

    def allGather(
        self, sendbuf: Address, recvbuf: Address, count: int, datatype: int, stream: int
    ) -> None:
        sent = memory(sendbuf, count, datatype, stream).tobytes()
        received = memory(recvbuf, count * self._ranks.size, datatype, stream)
        received[:] = np.frombuffer(b"".join(self._ranks.allgather(sent)), np.uint8)

    def check_async_error(self) -> None:
        """Nothing fails, unless a test puts something else here."""


def group_start() -> None:
    NcclCommunicator.group.open = True


def group_end() -> None:
    NcclCommunicator.group.end()


nccl = SimpleNamespace(
    available=True,
    NcclCommunicator=NcclCommunicator,
    NcclError=NcclError,
    NCCL_UINT8=1,
    get_unique_id=lambda: np.random.default_rng().bytes(128),
    get_version=lambda: 22707,
    groupStart=group_start,
    groupEnd=group_end,
)


@contextmanager
def installed(ranks: Any, gpus: int | None = None) -> Iterator[ModuleType]:
    """Within this block `import cupy` gives fake_cupy, with so many GPUs: left out, one a rank.

    `ranks` is an MPI communicator, or has its `rank`, `size`, `allgather` and `alltoall`.
    """
    Stream.at = {}
    Stream.current = [Stream(null=True)]
    NcclCommunicator.group = Group(ranks)
    parts = {
        "Stream": Stream,
        "get_current_stream": lambda: Stream.current[-1],
        "nccl": nccl,
        "Device": lambda number=0: SimpleNamespace(compute_capability="70", use=lambda: None),
    }
    runtime = {
        "getDeviceCount": lambda: ranks.size if gpus is None else gpus,
        "deviceGetPCIBusId": lambda number: f"0000:{number:02x}:00.0",
    }
    with fake_cupy.installed() as cupy, pytest.MonkeyPatch.context() as patch:
        for name, part in parts.items():
            patch.setattr(cupy.cuda, name, part, raising=False)
        for name, function in runtime.items():
            patch.setattr(cupy.cuda.runtime, name, function, raising=False)
        patch.setattr(cupy, "touched", used_on_current_stream)
        patch.setattr(cupy.ndarray, "data", property(address_of), raising=False)
        patch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
        yield cupy
