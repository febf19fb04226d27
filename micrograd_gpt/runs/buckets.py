"""Arrays as flat numbers laid end to end, as they lie in memory, and cut into buckets.

Gradients are added up a bucket at a time (runs/mpi.py): few messages for many small arrays, and
while one bucket travels, the gradients of another are computed (runs/overlap.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from micrograd_gpt.arrays.devices import Array, array_module

Bucket: TypeAlias = Sequence[tuple[int, int, int]]  # pieces of arrays: (array, start, end)


def ordered_like(array: Array, like: Array) -> Array:
    """An array, such as a gradient, in memory in the order of another, such as its parameter."""
    by_columns = like.flags.f_contiguous and not like.flags.c_contiguous
    return array_module(array).asarray(array, order="F" if by_columns else "C")


def flat_view(array: Array) -> Array:
    """All numbers of a contiguous array as they lie in memory, (N,): a view.

    ValueError for an array that is not contiguous, of which NumPy would return a copy.
    """
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ValueError(
            f"an array of shape {array.shape} has gaps in memory, or lies there in another order, "
            "so that ranks cannot share it: give a copy of it"
        )
    return (array if array.flags.c_contiguous else array.T).reshape(-1)


def buckets(sizes: Sequence[int], most: int) -> Iterator[Bucket]:
    """Arrays of these sizes, one after another, in buckets of `most` numbers: a bucket is the
    pieces in it, each (array, start, end)."""
    bucket, room = [], most
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            end = min(size, start + room)
            bucket.append((i, start, end))
            room, start = room - (end - start), end
            if not room:
                yield bucket
                bucket, room = [], most
    if bucket:
        yield bucket


def taken(parts: Sequence[Array], first: int, count: int) -> Array:
    """`count` numbers of flat arrays laid end to end, from number `first` on: a view, where they
    are in one array. Zeros stand for those after the last one."""
    pieces = []
    for part in parts:
        piece = part[max(0, first) : max(0, first + count)]
        if len(piece) == count:
            return piece
        pieces.append(piece)
        first -= len(part)
    xp = array_module(parts[0])
    missing = count - sum(map(len, pieces))
    return xp.concatenate([*pieces, xp.zeros(missing, parts[0].dtype)] if missing else pieces)


def put(parts: Sequence[Array], first: int, numbers: Array) -> None:
    """Write numbers into flat arrays laid end to end, from number `first` on, as far as they go."""
    for part in parts:
        start, end = max(0, first), min(len(part), first + len(numbers))
        if start < end:
            part[start:end] = numbers[start - first : end - first]
        first -= len(part)
