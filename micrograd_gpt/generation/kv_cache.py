"""The KV cache: keys and values of the tokens read so far, so that only new ones are computed."""

from __future__ import annotations

import copy

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.devices import library_for
from micrograd_gpt.arrays.precision import compute_dtype
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.layers import Key
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Array, Tensor, concatenate, is_recorded


class NoCacheFits(UserError):
    """An attention of one's own does not go with a KV cache: decode without one."""


class KVCache:
    """The keys and values of every token so far, for several texts, one text a row.

    `data` is one array (n_layer, 2, B, H, capacity, D), allocated once and written in place: it
    takes 2 × n_layer × n_embd × capacity × B numbers of the type that the model computes in. Row b
    holds `lengths[b]` tokens; to forget the latest ones, lower that number. `length` is the length
    of all rows where they agree, and raises ValueError where they do not; setting it sets them all.

    Raises NoCacheFits for a model whose blocks do not all have the same number of heads, `n_head`.
    """

    def __init__(self, model: GPT2, batch_size: int = 1, capacity: int | None = None) -> None:
        weight, blocks = model.transformer.wte.weight, model.transformer.h
        heads = {getattr(getattr(block, "attn", None), "n_head", None) for block in blocks}
        if None in heads or len(heads) > 1:  # an attention of one's own
            raise NoCacheFits(
                "a KV cache needs an `attn` in each block, all with the same number `n_head`"
            )
        (count,) = heads
        capacity = model.config.n_positions if capacity is None else capacity
        shape = (len(blocks), 2, batch_size, count, capacity, weight.shape[1] // count)
        self.data = library_for(weight.device).empty(shape, compute_dtype(weight))
        self.lengths = np.zeros(batch_size, int)

    @property
    def length(self) -> int:
        first, *others = {int(n) for n in self.lengths}
        if others:
            raise ValueError(f"the rows of this KV cache differ in length: {self.lengths}")
        return first

    @length.setter
    def length(self, length: int) -> None:
        self.lengths[:] = length

    def positions(self, batch_size: int, count: int) -> np.ndarray:
        """The positions in their texts of the next `count` tokens of each row: (B, count).

        Raises ValueError unless the cache has `batch_size` rows.
        """
        if len(self.lengths) != batch_size:
            raise ValueError(f"a KV cache of {len(self.lengths)} rows for a batch of {batch_size}")
        return self.lengths[:, None] + np.arange(count)

    def layer(self, i: int) -> Past:
        """What attention needs of layer i."""
        keys, values = self.data[i]
        return Past(keys, values, self.lengths)

    def rows(self, first: int, end: int) -> KVCache:
        """Rows first … end-1 as a cache of their own: a view, so nothing is copied."""
        if (first, end) == (0, len(self.lengths)):
            return self
        part = copy.copy(self)
        part.data, part.lengths = self.data[:, :, first:end], self.lengths[first:end]
        return part

    def copy_rows(self, sources: list[int], since: int = 0) -> None:
        """Let row i go on from row sources[i]; their first `since` tokens already agree."""
        moves = [(source, row) for row, source in enumerate(sources) if source != row]
        if moves:
            old, new = zip(*moves, strict=True)
            since = min(since, int(self.lengths[list(new)].min()))
            part = slice(since, int(self.lengths[list(old)].max()))
            to, source = (np.asarray(rows, like=self.data) for rows in (new, old))
            self.data[:, :, to, :, part] = self.data[:, :, source, :, part]
            self.lengths[list(new)] = self.lengths[list(old)]


def bytes_of_cache(model: GPT2, batch_size: int, capacity: int) -> int:
    """How many bytes the array of a KVCache of these sizes takes."""
    body, dtype = model.transformer, compute_dtype(model.transformer.wte.weight)
    return 2 * len(body.h) * body.wte.weight.shape[1] * capacity * batch_size * dtype.itemsize


class Past:
    """One layer's keys and values (B, H, capacity, D), of which row b holds `lengths[b]` tokens."""

    def __init__(self, keys: Array, values: Array, lengths: np.ndarray) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths

    def attention(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, key: Key = ()) -> Tensor:
        """`layers.attention` of new tokens, each argument (B, H, T, D), over older ones too.

        Returns (B, H, T, D). The new keys and values are written after the older ones. Raises
        ValueError where they do not fit, and RuntimeError where a gradient is wanted, since none
        can flow back through a cache.
        """
        if is_recorded(q, k, v):
            raise RuntimeError("a KV cache is for decoding: use it within no_grad()")
        starts, t, room = self.lengths, q.shape[2], self.keys.shape[2]
        if starts.min() < 0 or starts.max() + t > room:
            raise ValueError(f"the KV cache holds {room} positions: no {t} more after {starts}")
        heads, size = self.keys.shape[1], self.keys.shape[3]
        if any(x.shape[1] not in (1, heads) or x.shape[3] != size for x in (k, v)):
            raise NoCacheFits(
                f"the KV cache holds {heads} heads of {size} numbers, not those of keys {k.shape} "
                f"and values {v.shape}"
            )

        def attend(rows: slice, start: int) -> Tensor:
            end = start + t
            self.keys[rows, :, start:end] = k.data[rows]
            self.values[rows, :, start:end] = v.data[rows]
            keys, values = Tensor(self.keys[rows, :, :end]), Tensor(self.values[rows, :, :end])
            return layers.attention(q[rows].astype(keys.dtype), keys, values, p, key)

        if (starts == starts[0]).all():  # rows of equal length go together, others one by one
            return attend(slice(None), int(starts[0]))
        rows = [attend(slice(row, row + 1), int(start)) for row, start in enumerate(starts)]
        return concatenate(rows)
