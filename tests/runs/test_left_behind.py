"""What ranks leave for each other in files; tests/test_ranks.py has launchers that kill them."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faults import fill_disk, needs_fork

from micrograd_gpt.runs import left_behind
from micrograd_gpt.runs.left_behind import leave_part, parts_left
from micrograd_gpt.runs.lock import LOCK, only_writer, present_writer
from micrograd_gpt.runs.ranks import Cut, Ranks
from micrograd_gpt.runs.sharding import ShardedAdamW
from micrograd_gpt.support import files
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.weights.tensor_files import write_safetensors

pytestmark = needs_fork  # which is what leaves these processes

SHAPES = [(6, 4), (7,), (3,)]
SOON = 3.0  # seconds; who waits in vain does so for left_behind.PATIENCE


class OneOf(Ranks):
    """One of so many ranks, with a part of each array."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def cut(self, sizes: Sequence[int]) -> Iterator[Cut]:
        return (
            (i, [n * r // self.size for r in range(self.size + 1)]) for i, n in enumerate(sizes)
        )


def optimizer(rank: int, size: int = 3, steps: int = 5) -> ShardedAdamW:
    """Of one rank, whose moments count on from a million times its number."""
    made = ShardedAdamW(OneOf(rank, size), [Tensor(np.zeros(s), True) for s in SHAPES])
    for i, moments in enumerate((*made.m, *made.v)):
        moments.set(1e6 * rank + 100 * i + np.arange(moments.size).reshape(moments.shape))
    made.steps = steps
    return made


def taken(out: Path, first: ShardedAdamW) -> list[np.ndarray]:
    with parts_left(first, out):
        return [moments.get() for moments in (*first.m, *first.v)]


def hidden(out: Path) -> set[str]:
    """What is in the folder that a user does not see, but for the lock."""
    return {path.name for path in out.iterdir()} - {LOCK}


@pytest.mark.parametrize("size", [2, 3])
def test_rank_0_gets_what_the_others_left(tmp_path: Path, size: int) -> None:
    with only_writer(tmp_path), ThreadPoolExecutor() as pool:
        others = [optimizer(rank, size) for rank in range(1, size)]
        left = [pool.submit(leave_part, other, tmp_path) for other in others]
        found = taken(tmp_path, optimizer(0, size))
        assert [part.result() for part in left] == [None] * (size - 1)
    for i, moments in enumerate(found):
        ranks = np.repeat(range(size), np.diff([moments.size * r // size for r in range(size + 1)]))
        expected = 1e6 * ranks + 100 * i + np.arange(moments.size)
        np.testing.assert_array_equal(moments.ravel(), expected)
    assert not hidden(tmp_path)


def fails_soon(out: Path, message: str, *others: Callable[[], None]) -> None:
    """Rank 0, which waits for these others, learns at once that it cannot have all parts."""
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        with only_writer(out), pytest.raises(UserError, match=message):
            left = [pool.submit(other) for other in others]
            taken(out, optimizer(0))
        for part in left:
            assert part.exception() is None or isinstance(part.exception(), UserError)
    assert time.monotonic() - began < SOON
    assert not hidden(out)


@pytest.mark.parametrize("steps", [4, 6])
def test_a_rank_that_has_another_step(tmp_path: Path, steps: int) -> None:
    others = [
        partial(leave_part, made, tmp_path) for made in (optimizer(1), optimizer(2, 3, steps))
    ]
    fails_soon(tmp_path, "another rank could not write", *others)


def test_a_rank_that_meets_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, files, 100)
    other = partial(leave_part, optimizer(1), tmp_path)
    fails_soon(tmp_path, "another rank could not write", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pieces: pieces.pop("2.0"), r"2/moments\.safetensors lacks moments of its rank"),
        (lambda pieces: pieces.update({"2.0": pieces["2.0"][1:]}), "lacks moments of its rank"),
        (None, "5 bytes that are not a whole safetensors file"),
    ],
)
def test_a_piece_that_is_missing_or_damaged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, np.ndarray]], object] | None,
    message: str,
) -> None:
    def write(path: Path, pieces: dict[str, np.ndarray]) -> None:
        if path.parent.name == "2" and change is None:
            path.write_bytes(b"short")
            return
        if path.parent.name == "2" and change:
            change(pieces)
        write_safetensors(path, pieces)

    monkeypatch.setattr(left_behind, "write_safetensors", write)
    others = [partial(leave_part, optimizer(rank), tmp_path) for rank in (1, 2)]
    fails_soon(tmp_path, message, *others)


def test_a_rank_that_left_nothing_is_waited_for_no_longer_than_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_behind, "PATIENCE", 0.3)
    fails_soon(
        tmp_path, "other ranks have not written all of", partial(leave_part, optimizer(1), tmp_path)
    )


def test_the_run_s_folder_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=f"cannot write {gone}.*No such file or directory"):
        taken(gone, optimizer(0))
    began = time.monotonic()
    leave_part(optimizer(1), gone)
    assert time.monotonic() - began < SOON and not gone.exists()


def test_nobody_stays_when_rank_0_has_ended(tmp_path: Path) -> None:
    """Then the folder is no longer locked, whether the lock is there or not."""
    began = time.monotonic()
    with ThreadPoolExecutor() as pool, only_writer(tmp_path):
        waits = pool.submit(leave_part, optimizer(1), tmp_path)
        time.sleep(0.3)
        assert not waits.done()
    waits.result()
    (tmp_path / LOCK).touch()  # as a process that was killed leaves it
    leave_part(optimizer(2), tmp_path)
    assert time.monotonic() - began < SOON and not hidden(tmp_path)


def test_rank_0_on_a_machine_whose_locks_are_not_seen_here(tmp_path: Path) -> None:
    """Some network file systems lock a file for one machine only."""
    (tmp_path / LOCK).write_text("process 1 on another\n")
    with ThreadPoolExecutor() as pool:
        left = pool.submit(leave_part, optimizer(1, 2), tmp_path)
        time.sleep(0.3)
        assert not left.done()
        assert len(taken(tmp_path, optimizer(0, 2))) == 2 * len(SHAPES)
    assert left.result() is None and not hidden(tmp_path)


def test_nobody_answers_another_run(tmp_path: Path) -> None:
    """Which may have begun in the folder, also where locks are not seen."""
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        for machine in ("another", platform.node()):
            (tmp_path / LOCK).write_text("process 1 on another\n")
            waits = pool.submit(leave_part, optimizer(1), tmp_path)
            time.sleep(0.3)
            assert not waits.done()
            (tmp_path / LOCK).write_text(f"process 2 on {machine}\n")
            waits.result()
    assert time.monotonic() - began < SOON


def test_who_writes_after_rank_0_has_given_up_removes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_late(path: Path, pieces: dict[str, np.ndarray]) -> None:
        while present_writer(tmp_path):
            time.sleep(0.01)
        write_safetensors(path, pieces)  # which makes the folder anew

    monkeypatch.setattr(left_behind, "PATIENCE", 0.3)
    monkeypatch.setattr(left_behind, "write_safetensors", write_late)
    fails_soon(
        tmp_path, "other ranks have not written all of", partial(leave_part, optimizer(1), tmp_path)
    )
