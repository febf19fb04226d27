"""Token ids on disk: files ("shards") of uint16 numbers, read by memory map.

A shard of ours, like one of llm.c's, begins with 256 int32: the magic number, the version, how many
ids follow, then zeros. nanoGPT's files have no such header: they are ids from the first byte on.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading, written_whole
from micrograd_gpt.text.decoding import is_text

MAGIC, VERSION = 20240520, 1  # as llm.c's dev/data/data_common.py writes them
HEADER_SIZE = 1024  # bytes
TOKEN = np.dtype("<u2")
SLICE = 1 << 22  # ids brought into memory at a time


class Shards:
    """Several arrays of ids (memory maps) used like one array of shape (N,), without joining them.

    An index is a slice, or an array of positions of any shape; the ids there come as an array.
    UserError where a file has been cut short since.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)])  # of each part, and the end of all

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"a position is outside the {len(self)} tokens")
        found = np.empty(index.shape, TOKEN)
        which = np.searchsorted(self._starts, index, side="right") - 1
        for part in np.unique(which):
            _check_length(self.parts[part])
            here = which == part
            found[here] = self.parts[part][index[here] - self._starts[part]]
        return found

    def split(self, position: int) -> tuple[Shards, Shards]:
        """Return the ids before `position`, and those from it on."""
        cuts = np.clip(position - self._starts[:-1], 0, [len(part) for part in self.parts])
        pairs = list(zip(self.parts, cuts.tolist(), strict=True))
        return Shards([part[:cut] for part, cut in pairs]), Shards(
            [part[cut:] for part, cut in pairs]
        )


def _check_length(ids: np.ndarray) -> None:
    """UserError if the file under a memory map is shorter now, as where it is being made again:
    whoever reads beyond its end is killed by the system (SIGBUS).
    """
    name, base = "", ids
    while isinstance(base, np.ndarray):
        name, base = getattr(base, "filename", name), base.base  # type: ignore[assignment]
    if isinstance(base, mmap.mmap) and base.size() < len(base):
        raise UserError(
            f"{name} was cut short while it was in use: --resume once it is whole again"
        )


def slices(tokens: np.ndarray | Shards) -> Iterator[np.ndarray]:
    """Yield the ids in order, as arrays that each fit in memory."""
    for part in tokens.parts if isinstance(tokens, Shards) else [tokens]:
        for start in range(0, len(part), SLICE):
            yield part[start : start + SLICE]


# ----------------------------------------------------------------------------------------------
# One file


def write_shard(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Write arrays of ids, each of shape (N,), one after another as one shard: all or nothing."""
    count = 0
    with written_whole(path) as file:
        file.seek(HEADER_SIZE)
        for ids in arrays:
            file.write(ids.astype(TOKEN).tobytes())
            count += len(ids)
        file.seek(0)
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, VERSION, count
        file.write(header.tobytes())


def open_shard(path: Path, headerless: bool = False) -> np.ndarray:
    """Return the ids of a shard as a read-only memory map, uint16 of shape (N,).

    With `headerless`, a file that does not begin with the magic number is ids from its first byte
    on. Raises UserError, naming the file, where it is damaged or not a shard.
    """
    with reading(path):
        with open(path, "rb") as file:
            start, size = _ids_in(path, file, headerless)
        if start == size:
            return np.empty(0, TOKEN)  # there is no empty memory map
        return np.asarray(np.memmap(path, TOKEN, mode="r", offset=start))


def read_shard(path: Path, headerless: bool = False) -> Iterator[np.ndarray]:
    """Yield all ids of a shard, in uint16 arrays that each fit in memory.

    Unlike the pages of a memory map, what has been read does not count as this process's memory.
    Raises what `open_shard` raises.
    """
    with reading(path), open(path, "rb") as file:
        start, _ = _ids_in(path, file, headerless)
        file.seek(start)
        while len(ids := np.fromfile(file, TOKEN, SLICE)):
            yield ids


def _are_wider(numbers: np.ndarray) -> bool:
    """Whether uint16 numbers look like halves or quarters of wider ones, whose upper parts are 0.

    Of a text's ids, the share of zeros is much the same whichever place in four they stand at.
    """
    if len(numbers) < 64:
        return False  # too few to tell
    zeros = (numbers[: len(numbers) // 4 * 4].reshape(-1, 4) == 0).mean(axis=0)
    return bool(zeros.max() - zeros.min() > 0.5)


def _ids_in(path: Path, file: BinaryIO, headerless: bool) -> tuple[int, int]:
    """Check a shard's header, and return where its ids start and end, in bytes."""
    header = file.read(HEADER_SIZE)
    size = file.seek(0, os.SEEK_END)
    if header[:4] != MAGIC.to_bytes(4, "little"):
        if not headerless:
            raise UserError(
                f"{path} is not a token shard (it does not begin with the magic number {MAGIC}, of "
                "ids in two bytes each): remove it, or make it again so"
            )
        if header and is_text(header):
            raise UserError(
                f"{path} is a text and holds no token ids: rename it to {path.stem}.txt, or write "
                "the ids of its tokens into it"
            )
        if size % TOKEN.itemsize:
            raise UserError(
                f"{path} is damaged: it has {size:,} bytes, and ids of two bytes each cannot make "
                "an odd number; make it again"
            )
        if _are_wider(np.frombuffer(header, TOKEN)):
            raise UserError(
                f"{path} seems to hold ids of four or eight bytes each, most of them 0: write "
                "them as uint16 (ids.astype(np.uint16).tofile), or give the text itself"
            )
        return 0, size
    if len(header) < HEADER_SIZE:
        raise UserError(
            f"{path} is damaged: it has {size:,} bytes, fewer than its header; make it again"
        )
    version, count = np.frombuffer(header, "<i4")[1:3].tolist()
    if version != VERSION:
        raise UserError(
            f"{path} is a token shard of version {version}, and only version {VERSION} (uint16 "
            "ids) can be read: make it again in that version"
        )
    expected = HEADER_SIZE + count * TOKEN.itemsize
    if size != expected:
        raise UserError(
            f"{path} is damaged: it has {size:,} bytes where its header says {expected:,}; make it "
            "again"
        )
    return HEADER_SIZE, size
