"""What ranks do in tests/test_ranks.py: mpirun -n 2 python ranks_child.py sums."""

from __future__ import annotations

import sys
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faults import fill_disk
from ml_dtypes import bfloat16
from mpi4py import MPI
from training import script

from micrograd_gpt.runs import checkpoint, mpi
from micrograd_gpt.runs.buckets import flat_view
from micrograd_gpt.runs.overlap import Overlap
from micrograd_gpt.runs.ranks import Cut, Ranks, started_ranks
from micrograd_gpt.support import cli, files
from micrograd_gpt.support.file_sets import SAVING
from micrograd_gpt.support.machine import bound_to, usable_cores
from micrograd_gpt.tensor import Tensor


def check_sums(ranks: Ranks, own: type, sent: type, shards: bool = False) -> None:
    """Sums of gradients that fit no bucket, of a type of their own, sent in another one.

    If `shards`, each rank gets the sums of its part, not rounded again, and all gather the parts.
    """
    shapes = [(3, 5), (1,), (7,), (2, 3, 4), (4, 4), ()]
    given = [
        [np.random.default_rng([rank, i]).normal(size=shape) for i, shape in enumerate(shapes)]
        for rank in range(ranks.size)
    ]
    parameters = []
    for i, array in enumerate(given[ranks.rank]):
        by_columns = i % 2 == 1
        parameter = Tensor(np.zeros(array.shape, own, order="F" if by_columns else "C"), True)
        # A gradient may lie otherwise in memory than its parameter, and on one rank only.
        parameter.grad = np.array(array, own, order="F" if ranks.rank == 0 else "C")
        parameters.append(parameter)
    ranks.shards = shards
    ranks.add_up(parameters, "bfloat16" if sent is bfloat16 else "float32")
    if shards:
        pieces = ranks.cut([parameter.size for parameter in parameters])
        keep_pieces([parameter.grad for parameter in parameters], pieces, ranks.rank)
        ranks.gather([parameter.grad for parameter in parameters])
    for i, parameter in enumerate(parameters):
        first, *others = (np.asarray(arrays[i], own).astype(sent).astype(own) for arrays in given)
        for other in others:  # in the order of the ranks: not only close, but the same bits
            first = first + other
        expected = first if shards else first.astype(sent).astype(own)
        np.testing.assert_array_equal(parameter.grad, expected)
        assert parameter.grad.dtype == own


def keep_pieces(arrays: list[np.ndarray], cuts: Iterable[Cut], rank: int) -> None:
    """Make everything NaN that is not in this rank's pieces of the arrays."""
    owned = [np.zeros(array.size, bool) for array in arrays]
    for i, bounds in cuts:
        owned[i][bounds[rank] : bounds[rank + 1]] = True
    for array, ours in zip(arrays, owned, strict=True):
        flat_view(array)[~ours] = np.nan


def sums() -> int:
    """Sums of gradients, joined numbers, and who goes first."""
    mpi.BUCKET = 10
    with started_ranks() as ranks:
        check_sums(ranks, np.float64, np.float64)
        check_sums(ranks, np.float32, bfloat16)
        check_sums(ranks, np.float32, np.float32)
        check_sums(ranks, np.float64, np.float64, shards=True)
        check_sums(ranks, np.float32, bfloat16, shards=True)

        assert ranks.join([float(ranks.rank), 0.5]) == [
            x for r in range(ranks.size) for x in (r, 0.5)
        ]
        assert ranks.agree(10 - ranks.rank) == 10
        assert list(ranks.every(iter("abcde"))) == list("abcde"[ranks.rank :: ranks.size])
        shares = ranks.join([float(i) for i in ranks.share(range(6 * ranks.size, 12 * ranks.size))])
        assert shares == list(range(6 * ranks.size, 12 * ranks.size))
        ranks.wait_for_all()
        with ranks.first_on_machine():
            if ranks.is_first:
                time.sleep(0.3)
            done = time.monotonic()
        times = ranks.join([done])
        assert all(time > times[0] for time in times[1:])
        assert usable_cores() <= max(1, len(bound_to()) // ranks.size)
        print(f"{ranks.size} ranks agree")
    return 0


def overlapped(flags: list[str]) -> int:
    """Train, and add gradients up during the backward, as ranks on several machines do."""
    mpi.overlaps, mpi.BUCKET = lambda machines: True, 1000
    finish, begun = Overlap.finish, []

    def note(overlap: Overlap) -> None:
        begun.append(overlap.has_begun)
        finish(overlap)

    Overlap.finish = note
    status = script("train_gpt2").main(flags)
    assert begun and all(begun)
    return status


def memory() -> int:
    """Adding up what fills many buckets needs memory of a few, the same each time."""
    mpi.BUCKET = 1 << 14
    with started_ranks() as ranks:
        parameters = [Tensor(np.zeros(100 << 14, np.float32), requires_grad=True)]
        parameters[0].grad = np.ones_like(parameters[0].data)
        ranks.add_up(parameters)
        tracemalloc.start()
        ranks.add_up(parameters)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 3 * 4 * mpi.BUCKET, peak
        numbers = np.ones(100, np.float32)
        places = [ranks.exchange.scatter_sum(numbers).ctypes.data for _ in range(3)]
        places += [ranks.exchange.scatter_sum(numbers[:7]).ctypes.data for _ in range(3)]
        assert len(set(places)) == 1
        print(f"{peak} bytes")
    return 0


def raises() -> int:
    """Rank 1 meets a bug while rank 0 waits for it."""
    with started_ranks() as ranks:
        if ranks.rank == 1:
            raise ZeroDivisionError("a bug of rank 1")
        ranks.wait_for_all()
    return 0


def full_disk(flags: list[str]) -> int:
    """Train; while the second checkpoint is written the disk has no room for the moments."""
    save_run, saved = checkpoint.save_run, []

    def save_on_a_full_disk(out: Path, *args: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            saved.append(None)
            if len(saved) == 2:
                fill_disk(patch, files, (out / checkpoint.MODEL).stat().st_size + 1000)
            save_run(out, *args)

    checkpoint.save_run = save_on_a_full_disk
    return script("train_gpt2").main(flags)


def slow_save(flags: list[str]) -> int:
    """Train; a checkpoint takes longer than Open MPI's mpirun waits."""
    save_run = checkpoint.save_run

    def save_slowly(*args: object) -> None:
        time.sleep(1)
        save_run(*args)

    checkpoint.save_run = save_slowly
    return script("train_gpt2").main(flags)


def endless_save(flags: list[str]) -> int:
    """Train; the first checkpoint is never complete, and other ranks' files find no room."""
    if MPI.COMM_WORLD.rank:
        fill_disk(pytest.MonkeyPatch(), files, 100)

    def save_endlessly(out: Path, *args: object) -> None:
        (out / SAVING).mkdir()
        time.sleep(60)

    checkpoint.save_run = save_endlessly
    return script("train_gpt2").main(flags)


def slow_validation(flags: list[str]) -> int:
    """Train; a validation leaves a file in the run's folder, and takes several seconds."""
    training = script("train_gpt2")
    evaluate = training.evaluate

    def evaluate_slowly(
        model: object, validation: object, settings: Namespace, ranks: Ranks
    ) -> float:
        Path(settings.out, "validating").touch()
        time.sleep(3)
        return evaluate(model, validation, settings, ranks)

    training.evaluate = evaluate_slowly
    return training.main(flags)


def loads(flags: list[str]) -> int:
    """Train; each rank that reads the text leaves a file."""
    training = script("train_gpt2")
    load_corpus = training.load_corpus

    def load(*args: object) -> object:
        Path(f"{flags[-1]}-read-by-{MPI.COMM_WORLD.rank}").touch()
        return load_corpus(*args)

    training.load_corpus = load
    return training.main(flags)


def raises_in_step(flags: list[str]) -> int:
    """Train; rank 1 meets a bug in step 7, while rank 0 waits for its gradients."""
    training = script("train_gpt2")
    learning_rate = training.learning_rate

    def fail_at_7(step: int, settings: Namespace) -> float:
        if step == 7 and MPI.COMM_WORLD.rank == 1:
            raise ZeroDivisionError("a bug of rank 1")
        return learning_rate(step, settings)

    training.learning_rate = fail_at_7
    return training.main(flags)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    actions: dict[str, Callable[[], int]] = {"sums": sums, "raises": raises, "memory": memory}
    for action in (
        overlapped,
        full_disk,
        loads,
        slow_save,
        endless_save,
        slow_validation,
        raises_in_step,
    ):
        actions[action.__name__] = partial(action, rest)
    cli.run(actions[what])
