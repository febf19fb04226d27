"""Modules: layers that own parameters and know them by the checkpoint's names."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.layers import Key
from micrograd_gpt.tensor import Array, Switch, Tensor, as_tensor

no_dropout = Switch("no_dropout")  # with no_dropout(): as if in eval mode; a decorator too
Init = Callable[[tuple[int, ...], float], Array]  # (shape, standard deviation) -> a new matrix


class Parameter(Tensor):
    """A tensor that is trained: a leaf that requires a gradient."""

    def __init__(self, data: Any) -> None:
        super().__init__(data, requires_grad=True)


def normal(seed: int) -> Init:
    """New matrices are drawn from a normal distribution; the same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    return lambda shape, std: rng.standard_normal(shape, np.float32) * np.float32(std)


class Draws:
    """Names for random draws: the n-th after `reseed(*seed)` is (*seed, n). A draw is a function of
    its name, so a run that reseeds with (seed, step) goes on exactly after a restart."""

    def __init__(self, *seed: int) -> None:
        self.reseed(*seed)

    def reseed(self, *seed: int) -> None:
        self.latest: Key = (*map(operator.index, seed), 0)

    def next_key(self) -> Key:
        self.latest = (*self.latest[:-1], self.latest[-1] + 1)
        return self.latest


def parts(value: Any, name: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """This module or parameter, and all in it, its lists, tuples and dicts, by `name.0.key`."""
    if id(value) in above:  # a part may refer to what it is in
        return
    if isinstance(value, Module | Parameter):
        yield name, value
    inside = vars(value) if isinstance(value, Module) else value
    inside = dict(enumerate(inside)) if isinstance(inside, list | tuple) else inside
    for key, part in inside.items() if isinstance(inside, dict) else ():
        yield from parts(part, f"{name}.{key}".lstrip("."), (*above, id(value)))


class Module:
    """A part of a model. Its parameters are those among its attributes and in its `parts`."""

    forward: Callable[..., Any]
    _training = True  # as train() and eval() set it; dropout is on while `training`
    training = property(lambda self: self._training and not no_dropout.inside.get())

    def __init_subclass__(cls, **options: Any) -> None:
        from micrograd_gpt.checks import check_call

        super().__init_subclass__(**options)
        check_call(cls)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.forward(*inputs, **options)  # a module may define either, as in PyTorch

    def __repr__(self) -> str:
        from micrograd_gpt.graph import outline

        return outline(self)

    def modules(self) -> list[tuple[str, Module]]:
        """This module and all below it, each with its name."""
        return [(name, part) for name, part in parts(self) if isinstance(part, Module)]

    def named_parameters(self) -> Iterable[tuple[str, Parameter]]:
        """Each parameter once, under its first name, such as `h.0.attn.c_attn.weight`."""
        found: dict[int, tuple[str, Parameter]] = {}
        for name, part in parts(self):
            if isinstance(part, Parameter):
                found.setdefault(id(part), (name, part))
        return found.values()

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def train(self, mode: bool = True) -> Any:
        for _, part in self.modules():
            part._training = mode
        return self

    def eval(self) -> Any:
        return self.train(False)


class Linear(Module):
    """x (…, n_in) -> x @ weight + bias (…, n_out); weight (n_in, n_out) as GPT-2 stores it, but
    column after column in memory (Fortran order), as decoding, one row @ weight, reads it."""

    def __init__(self, n_in: int, n_out: int, init: Init = normal(101), std: float = 0.02) -> None:
        self.weight = Parameter(np.asfortranarray(init((n_in, n_out), std)))
        self.bias = Parameter(np.zeros(n_out, np.float32))

    def __call__(self, x: Any) -> Tensor:
        return layers.linear(as_tensor(x), self.weight, self.bias)


class Embedding(Module):
    """Integer ids (…) -> rows of weight (…, width), drawn apart from Linear's by default."""

    def __init__(self, count: int, width: int, init: Init = normal(102), std: float = 0.02) -> None:
        self.weight = Parameter(init((count, width), std))

    def __call__(self, ids: Any) -> Tensor:
        return layers.embedding(ids, self.weight)


class LayerNorm(Module):
    """Normalise the last axis (…, width) to mean 0, variance 1, then scale and shift it."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        self.weight = Parameter(np.ones(width, np.float32))
        self.bias = Parameter(np.zeros(width, np.float32))
        self.eps = eps

    def __call__(self, x: Any) -> Tensor:
        return layers.layer_norm(as_tensor(x), self.weight, self.bias, self.eps)


class Dropout(Module):
    """While training, zero each element with probability p and divide the others by 1 - p."""

    def __init__(self, p: float, draws: Draws = Draws(0)) -> None:
        self.p, self.draws = p, draws

    def draw(self) -> tuple[float, Key]:
        """The probability that holds now, and the draw to use it with."""
        return (self.p, self.draws.next_key()) if self.training and self.p else (0.0, ())

    def __call__(self, x: Any) -> Tensor:
        p, key = self.draw()
        return layers.dropout(as_tensor(x), p, key) if p else as_tensor(x)
