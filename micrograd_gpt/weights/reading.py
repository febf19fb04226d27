"""From a file into the array that keeps the numbers: the one reader, whatever the file's format.

A tensor in a file is numbers of one dtype, end to end in C order. They are read a chunk at a time,
straight into the array where it has that dtype and order, so that a model is in memory once. A
matrix in another order is filled some rows at a time, while these are in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.arrays.int8 import Arriving
from micrograd_gpt.support.errors import UserError

CHUNK = 1 << 20  # bytes read and converted at a time: few enough to stay in the processor's cache

POINTER = b"version https://git-lfs.github.com/spec/"  # begins what git clone leaves without LFS

FLOATS = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: numbers of `dtype`, from byte `offset` of `path` on."""

    name: str
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def read_into(self, out: Array | Arriving) -> bool:
        """Fill `out`, an array of this shape on any device, or a matrix that is to be kept in int8;
        returns whether all numbers are finite.

        Floats are converted to `out`'s dtype; one that is too large for it becomes infinity. Raises
        ValueError for an `out` of another shape, and UserError if the file can't be read or holds
        integers where floats are needed, or the reverse.
        """
        if out.shape != self.shape:
            raise ValueError(f"{self.name}: need an array of shape {self.shape}, not {out.shape}")
        same = out.dtype == self.dtype
        if not same and not (is_float(self.dtype) and is_float(out.dtype)):
            raise UserError(
                f"{self.path}: {self.name!r} holds {self.dtype}, where {out.dtype} is needed"
            )
        if not isinstance(out, np.ndarray | Arriving):  # on a GPU
            finite = self.read_into(copy := np.empty(out.shape, out.dtype))
            out.set(copy)
            return finite
        target: Any = out
        target = target if target.ndim else target[None]
        row, in_place = max(1, math.prod(target.shape[1:])), None
        together = target.rows_together if isinstance(target, Arriving) else 1
        if same and isinstance(target, np.ndarray) and target.flags.c_contiguous:
            in_place = target.reshape(-1)
        finite = True
        for start, numbers in self.chunks(in_place, row * together):
            if in_place is None:  # in another type or order than the file, as a Linear's weight is
                with np.errstate(over="ignore"):
                    numbers = numbers.astype(target.dtype, copy=False)
                rows = slice(start // row, (start + numbers.size) // row)
                target[rows] = numbers.reshape(-1, *target.shape[1:])
            finite &= bool(np.isfinite(numbers).all())
        return finite

    def chunks(
        self, into: np.ndarray | None = None, row: int = 1
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read rows of so many numbers, CHUNK bytes at a time, and yield each chunk with its start.

        A chunk is whole rows, at least one. The chunks are pieces of `into` (flat, of this dtype)
        if given, else one buffer used again.
        """
        step = max(1, CHUNK // self.dtype.itemsize // row) * row
        buffer = np.empty(min(self.count, step), self.dtype) if into is None else into
        with open_unbuffered(self.path) as file:
            file.seek(self.offset)
            for start in range(0, self.count, step):
                first = 0 if into is None else start
                chunk = buffer[first : first + min(step, self.count - start)]
                _fill(file, chunk)
                yield start, chunk


class Transposed(StoredTensor):
    """A matrix (n_in, n_out) to the model, which the file holds as (n_out, n_in), row by row.

    That is how torch.nn.Linear stores its weight, and in memory it is how our Linear keeps its own.
    """

    def read_into(self, out: Array) -> bool:
        """Fill `out`, of the model's shape, as StoredTensor.read_into does."""
        in_file = StoredTensor(self.name, self.path, self.dtype, self.shape[::-1], self.offset)
        return in_file.read_into(out.T)


class Zeros(StoredTensor):
    """A tensor that the file leaves out because it is zero, as a bias of a model without biases."""

    def read_into(self, out: Array) -> bool:
        """Fill `out` with zeros."""
        out[...] = 0
        return True


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal bit for bit (dtype and shape too)."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.path, a.offset) == (b.path, b.offset):
        return True
    pairs = zip(a.chunks(), b.chunks(), strict=True)
    return all(np.array_equal(x.view("u1"), y.view("u1")) for (_, x), (_, y) in pairs)


def ways_out(path: Path, otherwise: str) -> str:
    """What to do about a file that is not what it is called."""
    with open_unbuffered(path) as file:
        is_pointer = file.read(len(POINTER)) == POINTER
    return "it only names the file in Git LFS: run git lfs pull" if is_pointer else otherwise


def is_float(dtype: np.dtype) -> bool:
    return dtype.name in FLOATS


def open_unbuffered(path: Path) -> FileIO:
    """Open for reading with no buffer between the file and the array; UserError if it can't be."""
    try:
        return open(path, "rb", buffering=0)
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {why}") from error


def _fill(file: FileIO, out: np.ndarray) -> None:
    # Exactly the bytes of `out`, which is flat.
    remaining = out.view(np.uint8).data
    while len(remaining):  # one read may give less than asked for
        try:
            got = file.readinto(remaining)
        except OSError as error:
            raise UserError(f"cannot read {file.name}: {error.strerror or error}") from error
        if not got:
            raise UserError(f"{file.name} ended early: it was changed while it was being read")
        remaining = remaining[got:]
