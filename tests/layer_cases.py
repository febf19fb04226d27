"""The table of cases for every layer: from `layers.py` alone, fused, and with each kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from micrograd_gpt import Tensor, layers
from micrograd_gpt.layers import IGNORE

LEVELS = ("definitions", "fused", "numpy", "c")


def numbers(*shape: int, seed: int = 0, dtype: Any = "float64") -> np.ndarray:
    """Random numbers of this shape, the same each time."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


class Input(tuple[int, ...]):
    """The shape of an argument that is a tensor, and gets a gradient."""


def of(*shape: int) -> Input:
    return Input(shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and its arguments: the shapes of tensors, and anything else as it is."""

    layer: Callable[..., Tensor]
    arguments: tuple[Any, ...]

    @property
    def shapes(self) -> list[Input]:
        return [a for a in self.arguments if isinstance(a, Input)]

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Call the layer with these tensors in place of the shapes."""
        rest = iter(tensors)
        return self.layer(*(next(rest) if isinstance(a, Input) else a for a in self.arguments))

    def inputs(self, dtype: Any, seed: int = 0) -> list[Tensor]:
        """Random leaves of these shapes."""
        arrays = [numbers(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(self.shapes)]
        return [Tensor(array, requires_grad=True) for array in arrays]


IDS = np.array([[1, 1, 2], [0, 1, 3]])
TARGETS = np.array([[0, 3, IGNORE], [4, 4, 1]])
HEADS = of(2, 3, 5, 4)  # (B, H, T, D)

CASES = {
    "embedding": Case(layers.embedding, (IDS, of(5, 4))),
    "linear": Case(layers.linear, (of(2, 3, 4), of(4, 5), of(5))),
    "linear, one row": Case(layers.linear, (of(4), of(4, 5), of(5))),
    "linear, no bias": Case(layers.linear, (of(2, 4), of(4, 5))),
    "linear, many rows": Case(layers.linear, (of(3, 33, 65), of(65, 17), of(17))),
    "layer_norm": Case(layers.layer_norm, (of(2, 3, 8), of(8), of(8))),
    "layer_norm, its own eps": Case(layers.layer_norm, (of(4, 8), of(8), of(8), 0.1)),
    "gelu": Case(layers.gelu, (of(3, 7),)),
    "softmax": Case(layers.softmax, (of(2, 3, 5),)),
    "log_softmax": Case(layers.log_softmax, (of(2, 3, 5),)),
    "attention": Case(layers.attention, (HEADS, HEADS, HEADS)),
    "attention, one token": Case(layers.attention, (of(1, 1, 1, 3),) * 3),
    "attention, older keys": Case(layers.attention, (of(2, 3, 2, 4), HEADS, HEADS)),
    "attention, 130 tokens": Case(layers.attention, (of(1, 2, 130, 3),) * 3),
    "self_attention": Case(layers.self_attention, (of(2, 5, 3, 2, 4),)),
    "self_attention, one token": Case(layers.self_attention, (of(1, 1, 3, 1, 3),)),
    "self_attention, 130 tokens": Case(layers.self_attention, (of(1, 130, 3, 2, 3),)),
    "self_attention, dropout": Case(layers.self_attention, (of(2, 5, 3, 2, 4), 0.3, (3, 1))),
    "attention, dropout": Case(layers.attention, (HEADS, HEADS, HEADS, 0.3, (3, 1))),
    "dropout": Case(layers.dropout, (of(5, 6), 0.25, (1, 2))),
    "cross_entropy": Case(layers.cross_entropy, (of(2, 3, 5), TARGETS)),
    "linear_cross_entropy": Case(layers.linear_cross_entropy, (of(2, 3, 4), of(5, 4), TARGETS)),
}
