"""AdamW whose moments and updates are divided among the ranks.

AdamW keeps two numbers for each parameter, its moments: twice the memory of the model. With
ShardedAdamW each rank keeps the moments of its part only, and updates only that part (stage 1 of
ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054):

    ranks.add_up(model.parameters())         # each rank has the sums of its part of the gradients
    clip_grad_norm(optimizer, 1.0)           # by the norm of all parts
    optimizer.step()                         # updates this rank's part, then gathers all parts

Ranks send each other no more than they do to add up all gradients on every rank, which has the
same two halves. A rank's part is a piece of each bucket that gradients are added up in. Pieces
begin and end anywhere in a parameter, since AdamW treats each number by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from micrograd_gpt import optim
from micrograd_gpt.arrays.devices import Array, array_module, to_device
from micrograd_gpt.checks import check_trainable
from micrograd_gpt.optim import AdamW
from micrograd_gpt.runs.buckets import flat_view, ordered_like
from micrograd_gpt.runs.ranks import Ranks
from micrograd_gpt.tensor import Tensor

ENOUGH = 0  # what rank 0 asks for when it has all moments that it wants


class ShardedAdamW:
    """AdamW for the `parameters` that all `ranks` have, with the other arguments of optim.AdamW.

    Raises what optim.AdamW does, and ValueError for a parameter that is not contiguous in memory.
    Once it is made, `ranks.add_up` leaves to each rank the sums of its part of the gradients.
    `m` and `v` are the moments of each parameter, whose numbers lie with several ranks.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], **settings: Any) -> None:
        self.ranks, self.parameters = ranks, check_trainable(parameters)
        self.missed = [0] * len(self.parameters)  # how many steps had no gradient of each
        ranks.shards = True
        cuts = ranks.cut([parameter.size for parameter in self.parameters])
        self._pieces = [Piece(i, self.parameters[i], bounds, ranks.rank) for i, bounds in cuts]
        self._not_empty = [piece for piece in self._pieces if piece.size]
        self._own = AdamW([Tensor(piece.data) for piece in self._not_empty], **settings)
        self.m = self._scattered(self._own.m, 1)
        self.v = self._scattered(self._own.v, 1 + len(self.m))

    def _scattered(self, moments: Sequence[Array], first: int) -> list[Scattered]:
        """The moments of each parameter; `moments` are those of this rank's pieces."""
        own = {id(piece): m for piece, m in zip(self._not_empty, moments, strict=True)}
        found = []
        for i, parameter in enumerate(self.parameters):
            pieces = [piece for piece in self._pieces if piece.number == i]
            arrays = [own.get(id(piece), moments[0][:0]) for piece in pieces]
            bounds = [piece.bounds for piece in pieces]
            found.append(Scattered(self, first + i, parameter.data, bounds, arrays))
        return found

    @property
    def lr(self) -> float:
        return self._own.lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._own.lr = lr

    @property
    def steps(self) -> int:
        return self._own.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._own.steps = steps

    def step(self) -> None:
        """Update this rank's part of the parameters, and take the other parts from their ranks.

        As optim.AdamW does, it leaves a parameter alone that has no gradient, here on any rank.
        ValueError, before any is changed, if one cannot be updated.
        """
        self._take_gradients()
        self._own.missed = [self.missed[piece.number] for piece in self._not_empty]
        self._own.step()
        self.missed = [self.missed[i] + (p.grad is None) for i, p in enumerate(self.parameters)]
        self.ranks.gather([parameter.data for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.data = parameter.data  # tells the tape that it has changed

    def _take_gradients(self) -> None:
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                if parameter.grad.shape != parameter.shape:
                    shapes = f"{parameter.shape}, its gradient {parameter.grad.shape}"
                    raise ValueError(f"ShardedAdamW: parameter {i} has the shape {shapes}")
                parameter.grad = ordered_like(parameter.grad, parameter.data)
        for own, piece in zip(self._own.parameters, self._not_empty, strict=True):
            own.data, own.grad = piece.data, piece.grad

    def zero_grad(self) -> None:
        """Forget all gradients; the next backward starts them anew."""
        for tensor in (*self.parameters, *self._own.parameters):
            tensor.grad = None

    def clip_grad_norm(self, max_norm: float, loss_scale: float = 1.0) -> float:
        """What optim.clip_grad_norm does, to the gradients of all parts; returns their norm.

        In its last digits the norm depends on the number of ranks.
        """
        self._take_gradients()
        norms = self.ranks.join([optim.clip_grad_norm(self._own.parameters, math.inf)])
        norm = math.hypot(*norms)
        ours = norms[self.ranks.rank]
        if ours > 0 and norm < math.inf:  # a rank's share of max_norm is its share of the norm
            optim.clip_grad_norm(self._own.parameters, max_norm * (ours / norm), loss_scale)
        return norm / loss_scale


Optimizer: TypeAlias = AdamW | ShardedAdamW


def clip_grad_norm(optimizer: Optimizer, max_norm: float, loss_scale: float = 1.0) -> Any:
    """What optim.clip_grad_norm does, to all gradients, wherever their sums are."""
    if isinstance(optimizer, ShardedAdamW):
        return optimizer.clip_grad_norm(max_norm, loss_scale)
    return optim.clip_grad_norm(optimizer.parameters, max_norm, loss_scale)


class Piece:
    """Numbers of a parameter, as they lie in memory, which this rank updates.

    The parameter has this number in the optimizer. `bounds` says where all ranks' pieces begin, and
    where the last one ends. A piece of a matrix is a matrix, of one column: that is what AdamW
    decays.
    """

    def __init__(self, number: int, parameter: Tensor, bounds: Sequence[int], rank: int) -> None:
        self.number, self.parameter, self.bounds = number, parameter, bounds
        self._start, self._end = bounds[rank], bounds[rank + 1]
        self.size = self._end - self._start

    @property
    def data(self) -> Array:
        return self._of(self.parameter.data)

    @property
    def grad(self) -> Array | None:
        return None if self.parameter.grad is None else self._of(self.parameter.grad)

    def _of(self, array: Array) -> Array:
        numbers = flat_view(array)[self._start : self._end]
        return numbers[:, None] if array.ndim >= 2 else numbers


# ------------------------------------------------------------------ all moments, for a checkpoint


class Scattered:
    """An array of which each rank has pieces. It has `get` and `set`, as an array on a GPU has.

    `get` is for rank 0, while the other ranks do what answer_first says. Every rank calls `set`,
    with all numbers.
    """

    def __init__(
        self,
        owner: ShardedAdamW,
        number: int,
        like: Array,
        bounds: Sequence[Sequence[int]],
        pieces: Sequence[Array],
    ) -> None:
        self.shape, self.dtype, self.size, self.nbytes = (
            like.shape,
            like.dtype,
            like.size,
            like.nbytes,
        )
        self._owner, self._number, self._like = owner, number, like
        self._bounds, self._pieces = bounds, pieces

    def get(self, order: str = "A") -> np.ndarray:
        """All numbers, in the host's memory, in the parameter's order there."""
        self._owner.ranks.agree(self._number)
        return self.sent()

    def sent(self) -> np.ndarray:
        """Send this rank's numbers to rank 0, which returns all."""
        whole = ordered_like(np.empty(self.shape, self.dtype), self._like)
        flat = flat_view(whole)
        for bounds, piece in zip(self._bounds, self._pieces, strict=True):
            into = flat[bounds[0] : bounds[-1]]
            self._owner.ranks.to_first(
                to_device(piece, "cpu").reshape(-1), into, np.diff(bounds).tolist()
            )
        return whole

    def set(self, array: np.ndarray) -> None:
        """Keep this rank's pieces of an array of this shape."""
        flat, rank = flat_view(ordered_like(array, self._like)), self._owner.ranks.rank
        for bounds, piece in zip(self._bounds, self._pieces, strict=True):
            numbers = flat[bounds[rank] : bounds[rank + 1]].reshape(piece.shape)
            piece[:] = array_module(piece).asarray(numbers)


@contextmanager
def asking(optimizer: Optimizer) -> Iterator[None]:
    """Within this block rank 0 may read moments, while the other ranks are in answer_first."""
    try:
        yield
    finally:
        if isinstance(optimizer, ShardedAdamW):
            optimizer.ranks.agree(ENOUGH)


def answer_first(optimizer: Optimizer) -> None:
    """Send rank 0 the moments that it asks for, until it has enough."""
    if isinstance(optimizer, ShardedAdamW):
        moments = [*optimizer.m, *optimizer.v]
        while asked := optimizer.ranks.agree(ENOUGH):
            moments[asked - 1].sent()
