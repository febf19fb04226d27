"""Trading time for memory: a training step that keeps only the input of each block of the model.

The backward computes each block again, this time with a tape. The gradients are the same, from less
memory, in about a quarter more time. Chen et al. 2016 (arXiv:1604.06174). What an edited block
hands out besides its result, as a term of the loss, has no gradient then.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.nn import Draws, Dropout, Module
from micrograd_gpt.tensor import Array, Tensor, no_grad, node_of, record, walk_back


def recompute_blocks(model: GPT2) -> None:
    """Make the blocks of `model`, while it trains, compute again in the backward. All their dropout
    draws from the model's random numbers then."""
    blocks: Sequence[Any] = model.transformer.h
    for block in blocks:
        kind = type(block)
        if not issubclass(kind, Recomputed):  # as where one block stands in several places
            block.__class__ = type(f"Recomputed{kind.__name__}", (Recomputed, kind), {})
        block.draws = model.draws
        for _, part in block.modules():
            if isinstance(part, Dropout):
                part.draws = model.draws


class Recomputed(Module):
    """Mixed in before a block's own class; while it trains, the block keeps only its input."""

    draws: Draws

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        compute: Callable[..., Tensor] = super().__call__
        if not self.training or past is not None:
            return compute(x, past)
        return recompute(compute, x, self.parameters(), self.draws)


def recompute(
    function: Callable[[Tensor], Tensor], x: Tensor, leaves: Sequence[Tensor], draws: Draws
) -> Tensor:
    """function(x), of which only x is kept: the backward computes the function again.

    `leaves` are the parameters that the function reads besides x. `draws` names its random numbers,
    so that the backward draws the same ones.

    The gradients are those of function(x), bit for bit, with two exceptions that differ by
    rounding. If x is used elsewhere too, its parts are added up in another order. If the result is
    half precision and nothing stands in for the definitions, its gradient is rounded to its type.
    """
    data, before, context = x.data, draws.latest, contextvars.copy_context()
    node = node_of(x)
    x_type = node.dtype if node else x.dtype  # a half-precision x may have a float32 gradient
    with no_grad():
        y = function(x)

    def backward(grad: Array) -> list[Array | None]:
        start = Tensor(data.astype(x_type, copy=False), requires_grad=True)
        after, draws.latest = draws.latest, before
        try:  # in the precision of the forward, with a tape
            result = context.run(function, start.astype(data.dtype))
        finally:
            draws.latest = after
        if top := node_of(result):
            walk_back(top, grad.astype(top.dtype, copy=False))  # fills the leaves' gradients itself
        return [start.grad, *(None for _ in leaves)]

    result = record("recompute", y.data, [x, *leaves], backward)
    if result._node:  # the function reads the leaves again: they must not change until then
        result._node.versions += [(leaf.version, *leaf.version) for leaf in leaves]
    return result
