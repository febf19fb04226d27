"""A stream of tokens to the batches of a run, in a shuffled order that needs no state.

Shapes: B batch, T time (`block_size` tokens), N tokens in the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.shards import Shards


class Windows:
    """Sliding windows over a stream of tokens, in an order that needs no state and no memory.

    Window i is the `block_size` + 1 tokens from i * `stride` on: all but the last are the inputs,
    all but the first are the targets. One epoch is every window once; `len(windows)` is how many
    there are.

    The order is a function of (seed, epoch) alone, and batches are a function of (seed, step): a
    run is resumed by asking for its next step. Each epoch also shifts all its windows by one
    offset in [0, stride), so that over time every token is seen with every length of context before
    it. (A stream too short for that gets the offsets that fit.)

    `tokens` has shape (N,) and any integer dtype; memory-mapped files are read where they are used.
    Raises UserError where N is less than one window, TypeError for what are no such integers.
    """

    def __init__(
        self, tokens: np.ndarray | Shards, block_size: int, stride: int | None = None
    ) -> None:
        self.tokens = tokens if isinstance(tokens, Shards) else _as_ids(tokens)
        self.block_size = block_size
        self.stride = block_size if stride is None else stride
        if block_size < 1 or self.stride < 1:
            raise UserError(
                f"--block-size and the stride must be 1 or more, not {block_size} and {self.stride}"
            )
        starts = len(self.tokens) - block_size  # how many places a window can start at
        if starts < 1:
            raise UserError(
                f"{len(self.tokens)} tokens are too few for --block-size {block_size}, which needs "
                f"{block_size + 1}: give more text or a smaller --block-size"
            )
        self._count = max(1, starts // self.stride)
        self._offsets = min(self.stride, starts - (self._count - 1) * self.stride)

    def __len__(self) -> int:
        return self._count

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of step `step`, each int64 of shape (B, T).

        Step s takes rows s * B to s * B + B - 1 of the endless sequence epoch 0, epoch 1, ...
        """
        rows = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)  # (B,)
        epoch, row = np.divmod(rows, np.uint64(self._count))
        # A key per row: output number `epoch` of the generator SplitMix64 seeded with `seed`.
        key = _mix(epoch * GOLDEN + np.uint64(seed % (1 << 64)))
        window = _permute(row, self._count, key)
        offset = _mix(key) % np.uint64(self._offsets)
        return self._gather((window * np.uint64(self.stride) + offset).astype(np.int64))

    def evenly_spaced(self, count: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `count` windows as batches of inputs and targets, each int64 of shape (B, T).

        They are evenly spaced over the stream, and the same each time, whatever the batch size. A
        stream with fewer windows gives all of them, and the last batch may be smaller.
        """
        chosen = min(count, self._count)
        starts = np.arange(chosen) * self._count // max(chosen, 1) * self.stride
        for first in range(0, chosen, batch_size):
            yield self._gather(starts[first : first + batch_size])

    def _gather(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.tokens[starts[:, None] + np.arange(self.block_size + 1)]  # (B, T + 1)
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)


def _as_ids(tokens: Any) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"tokens must be integers of shape (N,), not {array.dtype} {array.shape}")
    return array


# A shuffled epoch without a shuffled list: a permutation of 0 .. n-1, computed index by index. The
# index is written as two digits, left and right. Each round of a Feistel network adds to one digit
# a hash of the other. Subtracting it again would undo the round, so the whole is one to one,
# whatever the hash. It permutes 0 .. a*b-1, a little more than n; an index that lands outside n
# goes through again until it lands inside ("cycle walking"), which keeps it one to one.
# Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains".

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: SplitMix64's step
ROUND_KEYS = GOLDEN * np.arange(1, 7, dtype=np.uint64)[:, None]  # (6 rounds, 1)
HALF = np.uint64(32)  # of a hash's bits: a digit and half a hash add up without overflow


def _permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Return where the permutation of 0 .. n-1 chosen by `key` sends `index`; uint64, all (B,)."""
    a = np.uint64(math.isqrt(n - 1) + 1)  # the square root of n, rounded up
    b = np.uint64(-(-n // int(a)))
    keys = key + ROUND_KEYS  # (6, B)

    def network(index: np.ndarray) -> np.ndarray:
        left, right = np.divmod(index, b)  # left < a, right < b
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + (_mix(right + even) >> HALF)) % a
            right = (right + (_mix(left + odd) >> HALF)) % b
        return left * b + right

    index = network(index)
    while (outside := index >= n).any():
        index = np.where(outside, network(index), index)
    return index


def _mix(x: np.ndarray) -> np.ndarray:
    """A one-to-one hash of 64 bits: the output function of SplitMix64. uint64, any shape.

    Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
