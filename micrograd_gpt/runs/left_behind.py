"""What ranks leave for each other in files, when they can no longer talk.

After the launcher has killed all ranks, each has a process that saves (last_resort.py). With a
sharded optimizer (sharding.py) rank 0's needs the moments that the others hold. It asks for them by
making a folder that names its step, with a folder in it for each of the others, who write their
pieces there. One that cannot, since it has another step or the disk is full, removes its folder,
which is an answer too.

As long as rank 0, or the process that it left, is there, the run's folder is locked (lock.py). Once
it no longer is, or another run has locked it, nobody will ask, and the others end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from micrograd_gpt.runs.lock import present_writer
from micrograd_gpt.runs.ranks import Ranks
from micrograd_gpt.runs.sharding import Optimizer, ShardedAdamW
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.tensor_files import TensorFile, write_safetensors

PLACE = ".moments-of-step-"  # in the run's folder
PIECES = "moments.safetensors"  # in the folder of each rank there
PATIENCE = 20.0  # seconds in which something has to happen
BETWEEN_LOOKS = 0.05  # seconds


class Left(Ranks):
    """Ranks of which one leaves its pieces of moments in `pieces`, or rank 0 finds the others'."""

    def __init__(self, ranks: Ranks, files: Sequence[TensorFile] = ()) -> None:
        self.rank, self.size, self._files = ranks.rank, ranks.size, files
        self.pieces: dict[str, np.ndarray] = {}
        self._asked = self._count = 0

    def agree(self, number: int) -> int:
        self._asked, self._count = number, 0
        return number

    def to_first(self, numbers: np.ndarray, into: np.ndarray, counts: Sequence[int]) -> None:
        name = f"{self._asked}.{self._count}"
        self._count += 1
        if self.rank:
            self.pieces[name] = numbers
            return
        into[: len(numbers)] = numbers
        start = counts[0]
        for file, count in zip(self._files, counts[1:], strict=True):
            if file.shapes.get(name) != (count,):
                raise UserError(f"{file.path} lacks moments of its rank")
            file.read_into(name, into[start : start + count])
            start += count


def leave_part(optimizer: Optimizer, folder: Path) -> None:
    """Write this rank's moments for rank 0, if it asks for those of this step.

    UserError if it asks for those of another one, or if they cannot be written.
    """
    if not isinstance(optimizer, ShardedAdamW):  # rank 0 has all moments
        return
    first = present_writer(folder)  # rank 0
    file = _asked_for(folder, first, optimizer.ranks.rank)
    if file is None:
        return
    try:
        if file.parent.parent != _place(optimizer, folder):
            raise UserError(f"{file} is not of step {optimizer.steps}")
        left = optimizer.ranks = Left(optimizer.ranks)
        for number, moments in enumerate((*optimizer.m, *optimizer.v), 1):
            left.agree(number)
            moments.sent()
        write_safetensors(file, left.pieces)
    except BaseException:
        _remove(file.parent)
        raise
    until = time.monotonic() + PATIENCE
    while file.exists() and present_writer(folder) == first and time.monotonic() < until:
        time.sleep(BETWEEN_LOOKS)
    if present_writer(folder) != first:  # rank 0's process ended while we were writing
        _remove(file.parent.parent)


def _asked_for(folder: Path, first: str, rank: int) -> Path | None:
    """The file that rank 0 waits for; None if it will not wait for any."""
    until = time.monotonic() + PATIENCE
    while first and present_writer(folder) == first and time.monotonic() < until:
        for place in folder.glob(f"{PLACE}*/{rank}"):
            return place / PIECES
        time.sleep(BETWEEN_LOOKS)
    return None


@contextmanager
def parts_left(optimizer: Optimizer, folder: Path) -> Iterator[None]:
    """Within this block rank 0 has the moments of the others, by the files that they leave.

    UserError if one of them has none of this step, or nothing comes any more.
    """
    if not isinstance(optimizer, ShardedAdamW):
        yield
        return
    place = _place(optimizer, folder)
    files = [place / str(rank) / PIECES for rank in range(1, optimizer.ranks.size)]
    try:
        try:
            for each in (place, *(file.parent for file in files)):
                each.mkdir()
        except OSError as error:
            raise UserError(f"cannot write {place}: {error.strerror or error}") from error
        _wait_for(files)
        optimizer.ranks = Left(optimizer.ranks, [TensorFile(file) for file in files])
        yield
    finally:
        _remove(place)


def remove_parts(folder: Path) -> None:
    """Remove what ranks have left, in a folder where nobody asks for it any more."""
    for place in folder.glob(f"{PLACE}*"):
        shutil.rmtree(place)


def _remove(place: Path) -> None:
    # Another process may do the same, or just write into it: then that one removes it.
    shutil.rmtree(place, ignore_errors=True)


def _place(optimizer: Optimizer, folder: Path) -> Path:
    return folder / f"{PLACE}{optimizer.steps}"


def _wait_for(files: Sequence[Path]) -> None:
    """Wait for files that others write, each into its own folder, as long as any is growing."""
    size, written, since = 0, -1, time.monotonic()
    while not all(file.exists() for file in files):
        for file in files:
            if not file.parent.exists():
                raise UserError(f"another rank could not write {file}")
        with suppress(FileNotFoundError):  # it has just been renamed
            size = sum(part.stat().st_size for file in files for part in file.parent.iterdir())
        if size != written:
            written, since = size, time.monotonic()
        if time.monotonic() > since + PATIENCE:
            raise UserError(f"other ranks have not written all of {', '.join(map(str, files))}")
        time.sleep(BETWEEN_LOOKS)
