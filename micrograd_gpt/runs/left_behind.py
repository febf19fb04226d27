"""What ranks leave for each other in files, when they can no longer talk.

After the launcher has killed all ranks, each has a process that saves (last_resort.py). With a
sharded optimizer (sharding.py) rank 0's needs the moments that the others hold. It asks for them by
making a folder that names its step; the others write their pieces into it, if they have that step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from micrograd_gpt.runs.ranks import Ranks
from micrograd_gpt.runs.sharding import Optimizer, ShardedAdamW
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.tensor_files import TensorFile, write_safetensors

PLACE = ".moments-of-step-"  # in the run's folder
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
            file.read_into(name, into[start : start + count])
            start += count


def leave_part(optimizer: Optimizer, folder: Path) -> None:
    """Write this rank's moments for rank 0, if it asks for those of this step."""
    place = _place(optimizer, folder)
    until = time.monotonic() + PATIENCE
    while not place.exists():
        if time.monotonic() > until:
            return
        time.sleep(BETWEEN_LOOKS)
    if isinstance(optimizer, ShardedAdamW):
        left = optimizer.ranks = Left(optimizer.ranks)
        for number, moments in enumerate((*optimizer.m, *optimizer.v), 1):
            left.agree(number)
            moments.sent()
        write_safetensors(_file(place, left.rank), left.pieces)


@contextmanager
def parts_left(optimizer: Optimizer, folder: Path) -> Iterator[None]:
    """Within this block rank 0 has the moments of the others, by the files that they leave.

    UserError if nothing comes any more.
    """
    if not isinstance(optimizer, ShardedAdamW):
        yield
        return
    place = _place(optimizer, folder)
    place.mkdir()
    try:
        files = [_file(place, rank) for rank in range(1, optimizer.ranks.size)]
        _wait_for(files)
        optimizer.ranks = Left(optimizer.ranks, [TensorFile(file) for file in files])
        yield
    finally:
        shutil.rmtree(place)


def remove_parts(folder: Path) -> None:
    """Remove what ranks have left, in a folder where nobody asks for it any more."""
    for place in folder.glob(f"{PLACE}*"):
        shutil.rmtree(place)


def _place(optimizer: Optimizer, folder: Path) -> Path:
    return folder / f"{PLACE}{optimizer.steps}"


def _file(place: Path, rank: int) -> Path:
    return place / f"{rank}.safetensors"


def _wait_for(files: Sequence[Path]) -> None:
    """Wait for files that others write into one folder, as long as something is written there."""
    place, size, written, since = files[0].parent, 0, -1, time.monotonic()
    while not all(file.exists() for file in files):
        with suppress(FileNotFoundError):  # it has just been renamed
            size = sum(file.stat().st_size for file in place.iterdir())
        if size != written:
            written, since = size, time.monotonic()
        if time.monotonic() > since + PATIENCE:
            raise UserError(f"{place} lacks the moments of other ranks")
        time.sleep(BETWEEN_LOOKS)
