"""Examples of many lengths to batches: a shuffled order that needs no state, and padding.

B batch, T time (tokens of the longest example in a batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.base_tokenizer import Tokenizer

Array = np.ndarray
POOL = 16  # steps whose examples are sorted by length together, so that little is padding


class Batch(Protocol):
    """Some examples, padded to the same length."""

    @property
    def count(self) -> int:
        """How many terms the mean has that is their loss."""

    @property
    def tokens(self) -> int:
        """How many tokens they have, without padding."""


class Task(Protocol):
    """What is learned from: examples to train on and others to validate on, and their loss."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def unit(self) -> str:
        """What the loss is the mean over: "text", "token"."""

    @property
    def lengths(self) -> Array:
        """How many tokens each example to train on has, (N,)."""

    @property
    def kinds(self) -> Array | None:
        """Which of some kinds each is, if all kinds are to be seen equally often, (N,)."""

    def amount(self) -> str:
        """How much of what there is to train on, in words."""

    def fingerprint(self) -> str:
        """What tells this data from other data."""

    def batch(self, examples: Array) -> Any:
        """The Batch of the training examples with these numbers."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The mean loss of a batch, a scalar, in nats."""

    def evaluate(self, model: Any) -> dict[str, float]:
        """`val_loss`, the mean over the validation examples, and what else is worth a row."""


class Order:
    """Which examples each step of a run learns from: a function of (seed, step).

    `lengths` (N,) are in tokens, `per_step` is how many examples a step has; the last of an epoch
    may have fewer. Steps have examples of like length. An epoch has every example once, or with
    `kinds` (N,), numbers 0, 1, …, as many of each kind, among which rare examples recur and
    frequent ones take turns.
    """

    def __init__(
        self, lengths: Array, per_step: int, seed: int, kinds: Array | None = None
    ) -> None:
        self.lengths, self.per_step, self.seed = np.asarray(lengths), per_step, seed
        kinds = np.zeros(len(self.lengths), int) if kinds is None else np.asarray(kinds)
        self._members = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        self._of_each = -(-len(self.lengths) // len(self._members))  # examples an epoch
        self.steps_per_epoch = -(-self._of_each * len(self._members) // per_step)
        self._epoch: tuple[int, list[Array]] = (-1, [])  # the latest, as it is needed again

    def step(self, step: int) -> Array:
        """The numbers of the examples of a step, counted from 0, the shortest example first."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._steps(epoch))
        return self._epoch[1][place]

    def _steps(self, epoch: int) -> list[Array]:
        rng = np.random.default_rng((self.seed, epoch))
        kinds = range(len(self._members))
        drawn = rng.permutation(np.concatenate([self._drawn(kind, epoch) for kind in kinds]))
        steps = []
        for pool in _pieces(drawn, POOL * self.per_step):
            by_length = pool[np.argsort(self.lengths[pool], kind="stable")]
            steps += _pieces(by_length, self.per_step)
        return [steps[i] for i in rng.permutation(len(steps))]

    def _drawn(self, kind: int, epoch: int) -> Array:
        """An epoch's examples of a kind: the next ones of an endless row of shuffled passes."""
        members = self._members[kind]
        first, end = epoch * self._of_each, (epoch + 1) * self._of_each
        passes = range(first // len(members), -(-end // len(members)))
        row = np.concatenate(
            [np.random.default_rng((self.seed, kind, i)).permutation(members) for i in passes]
        )
        start = first - passes[0] * len(members)
        return row[start : start + self._of_each]


def by_length(lengths: Array, batch_size: int) -> list[Array]:
    """All examples, in batches of like length, for evaluation: their numbers."""
    return _pieces(np.argsort(lengths, kind="stable"), batch_size)


def micro_batches(examples: Array, batch_size: int) -> list[Array]:
    """The examples of a step in micro-batches of at most `batch_size`."""
    return _pieces(examples, batch_size)


def padded(sequences: Sequence[Array], fill: int = 0) -> Array:
    """Sequences of integers (T_i,) below one another, filled up on the right, int64 (B, T)."""
    rows = np.full((len(sequences), max(map(len, sequences))), fill, np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows


def _pieces(array: Array, size: int) -> list[Array]:
    return [array[i : i + size] for i in range(0, len(array), size)]
