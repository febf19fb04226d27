"""What ranks with GPUs do in tests/runs/test_nccl.py: mpirun -n 2 python nccl_child.py sums."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import fake_nccl
import numpy as np
from fake_cupy import asarray
from ml_dtypes import bfloat16
from mpi4py import MPI
from training import script

from micrograd_gpt.runs import mpi, nccl
from micrograd_gpt.runs.exchange import Exchange
from micrograd_gpt.runs.ranks import started_ranks
from micrograd_gpt.support import cli
from micrograd_gpt.tensor import Tensor

WORLD = MPI.COMM_WORLD


@contextmanager
def both_exchanges() -> Iterator[tuple[Exchange, nccl.GPUExchange]]:
    """The one between the memories of hosts, and the one between GPUs."""
    with fake_nccl.installed(WORLD), started_ranks() as ranks:
        ranks.use_device("gpu")
        yield Exchange(WORLD, MPI.Request.Wait, 100), ranks.exchange


def sums() -> int:
    """What NCCL brings has the bits of what MPI brings, whether or not parts are of one length."""
    with both_exchanges() as (host, gpu):
        random = np.random.default_rng(WORLD.rank)
        for length in (1, WORLD.size, 7, 30):
            for own, wire in (("f4", None), ("f8", None), ("f4", bfloat16), ("f2", "f4")):
                numbers = random.normal(size=length).astype(own)
                expected = host.scatter_sum(numbers, wire).copy()
                part = gpu.scatter_sum(asarray(numbers), wire)
                assert_same(part, expected)
                assert_same(gpu.gather(part, wire), host.gather(expected, wire))
        gpu.finish()
        print("the same sums")
    return 0


def gradients() -> int:
    """Gradients on a GPU become those that `add_up` makes of them on the CPU, in both layouts."""
    mpi.GPU_BUCKET = mpi.BUCKET = 10
    random, shapes = np.random.default_rng(WORLD.rank), [(3, 5), (1,), (2, 3, 4), (), (4, 4)]
    with fake_nccl.installed(WORLD), started_ranks() as ranks:
        grads = [np.asarray(random.normal(size=shape), "f4") for shape in shapes]
        on_cpu = [Tensor(np.zeros(grad.shape, "f4"), True) for grad in grads]
        on_gpu = [Tensor(asarray(np.zeros(grad.shape, "f4", order="F")), True) for grad in grads]
        for dtype in ("float32", "bfloat16"):
            for cpu, gpu, grad in zip(on_cpu, on_gpu, grads, strict=True):
                cpu.grad, gpu.grad = grad.copy(), asarray(grad)
            ranks.add_up(on_cpu, dtype)
            ranks.use_device("gpu")
            ranks.add_up(on_gpu, dtype)
            for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
                assert_same(gpu.grad, cpu.grad)
            ranks.exchange = Exchange(WORLD, ranks._wait, mpi.BUCKET)
        print("the same gradients")
    return 0


def assert_same(ours: object, expected: np.ndarray) -> None:
    array = ours.get()
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def train(flags: list[str], gpus: int | None = None) -> int:
    with fake_nccl.installed(WORLD, gpus):
        return script("train_gpt2").main([*flags, "--device", "gpu"])


def overlapped(flags: list[str]) -> int:
    """Train; count the sums that begin while a backward is under way."""
    mpi.GPU_BUCKET = 200
    counts, scatter_sum, backward = Counter(), nccl.GPUExchange.scatter_sum, Tensor.backward

    def count(*args: object) -> object:
        counts["during" if counts["backwards"] else "after"] += 1
        return scatter_sum(*args)

    def watched(loss: Tensor) -> None:
        counts["backwards"] += 1
        backward(loss)
        counts["backwards"] -= 1

    nccl.GPUExchange.scatter_sum, Tensor.backward = count, watched
    status = train(flags)
    print(f"during the backward: {counts['during'] > counts['after']}")
    return status


def without_nccl(flags: list[str]) -> int:
    fake_nccl.nccl.available = False
    return train(flags)


def other_version(flags: list[str]) -> int:
    fake_nccl.nccl.get_version = lambda: 22700 + WORLD.rank
    return train(flags)


def no_connection(flags: list[str]) -> int:
    def fail(*_: object) -> None:
        raise fake_nccl.NcclError(fake_nccl.ERROR)

    fake_nccl.NcclCommunicator.__init__ = fail
    return train(flags)


def fails(when: str, flags: list[str]) -> int:
    """NCCL works in the first steps, then no more on rank 1."""
    calls = iter(range(WORLD.rank * 5, sys.maxsize))
    works = getattr(fake_nccl.NcclCommunicator, when)

    def fail(*args: object) -> None:
        if next(calls) == 9:
            raise fake_nccl.NcclError(fake_nccl.ERROR)
        works(*args)

    setattr(fake_nccl.NcclCommunicator, when, fail)
    return train(flags)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    actions = {
        "sums": sums,
        "gradients": gradients,
        "train": partial(train, rest),
        "one_gpu": partial(train, rest, 1),
        "fails": lambda: fails(rest[0], rest[1:]),
    }
    for action in (overlapped, without_nccl, other_version, no_connection):
        actions[action.__name__] = partial(action, rest)
    cli.run(actions[what])
