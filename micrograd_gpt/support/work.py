"""Work in pieces, which one process does one after another, or several share (runs/ranks.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Do(Protocol):
    """Does pieces of work, wherever, and yields what each returns, in order."""

    def __call__(self, work: Iterator[Callable[[], T]]) -> Iterator[T]: ...


def one_by_one(work: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Do each piece of work when its result is asked for."""
    return (piece() for piece in work)
