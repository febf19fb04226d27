"""Losses and gradient norms that may still be on the GPU, until somebody looks at them.

A GPU works through what it was given while Python goes on, and reading a number makes Python wait.
So numbers stay where they are until they are wanted, and then all of them come at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from micrograd_gpt.arrays.devices import array_module, device_of, to_device


class Unread:
    """The losses and gradient norms of the steps that nobody has looked at yet."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int]] = []  # each step's number, and how many losses it has
        self._numbers: list[Any] = []  # floats or scalar arrays: each step's losses, then its norm

    def add(self, step: int, losses: Sequence[Any], grad_norm: Any) -> None:
        """Note the parts of a step's loss, one for each micro-batch, and its gradient norm."""
        self._steps.append((step, len(losses)))
        self._numbers += [*losses, grad_norm]

    def read(self) -> list[tuple[int, float, float]]:
        """Step, loss and gradient norm of every step since the last time."""
        numbers, rows = iter(read_numbers(self._numbers)), []
        for step, count in self._steps:
            loss = sum(itertools.islice(numbers, count))
            rows.append((step, loss, next(numbers)))
        self._steps, self._numbers = [], []
        return rows


def read_numbers(numbers: Sequence[Any]) -> list[float]:
    """Floats and scalar arrays as floats; those on the GPU are fetched together, in one wait."""
    on_gpu = [x for x in numbers if not isinstance(x, float) and device_of(x) == "gpu"]
    if not on_gpu:
        return [float(x) for x in numbers]
    fetched = iter(to_device(array_module(on_gpu[0]).stack(on_gpu), "cpu").tolist())
    return [x if isinstance(x, float) else next(fetched) for x in numbers]
