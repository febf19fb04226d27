"""Modules: layers that own parameters and know them by the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt import functional as F
from micrograd_gpt.arrays.backend import Array, RandomStream, library_for
from micrograd_gpt.arrays.precision import array_dtype, half_name, moved, wide
from micrograd_gpt.tensor import Tensor

M = TypeVar("M", bound="Module")


class Parameter(Tensor):
    """A tensor that is trained: a leaf that requires a gradient."""

    __slots__ = ()

    def __init__(self, data: Any, dtype: Any = None, device: str | None = None) -> None:
        super().__init__(data, requires_grad=True, dtype=dtype, device=device)


class Init:
    """How new parameters are made: their dtype and device, and the random numbers they start with.

    With `random=False` matrices are left unwritten, for a loader to fill: no time is spent on them
    and no memory is touched. Numbers are drawn on the CPU, so a seed means the same model anywhere.

    `compute` is the type that linear layers compute in; left out, that of the parameters. `half` is
    its name where it is one of half precision, else None.
    """

    def __init__(
        self,
        seed: int = 0,
        dtype: str = "float32",
        device: str = "cpu",
        random: bool = True,
        compute: str | None = None,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype, self.device, self.random = dtype, device, random
        self.half = half_name(compute or dtype)

    def normal(self, shape: tuple[int, ...], std: float, order: Any = "C") -> Parameter:
        if not self.random:
            dtype = array_dtype(self.dtype, self.device)
            unwritten = Parameter(library_for(self.device).empty(shape, dtype, order=order))
            unwritten.half = half_name(self.dtype)
            return unwritten
        numbers = self.rng.standard_normal(shape, dtype=np.float32)
        numbers *= np.float32(std)
        numbers = np.asarray(numbers, wide(self.dtype), order=order)
        return Parameter(numbers, self.dtype, self.device)

    def full(self, shape: tuple[int, ...], value: float, dtype: str | None = None) -> Parameter:
        dtype = dtype or self.dtype
        numbers = library_for(self.device).full(shape, value, array_dtype(dtype, self.device))
        return Parameter(numbers, dtype)


class Module:
    """A part of a model. Its parameters are the `Parameter` attributes of it and its parts.

    Parts are attributes that are modules or lists of modules; `training` says whether dropout is
    on, and is set for the module and all its parts by `train()` and `eval()`.
    """

    training: bool = True

    def children(self) -> Iterator[tuple[str, Module]]:
        """Direct parts with their names; those of a list are called `name.0`, `name.1`, …"""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                for i, part in enumerate(value):
                    if isinstance(part, Module):
                        yield f"{name}.{i}", part

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """All parameters in the order they were made, with names like `h.0.attn.c_attn.weight`.

        One that stands in several places comes once, under its first name.
        """
        seen: set[int] = set()
        for name, value in self._named_tensors(prefix):
            if isinstance(value, Parameter) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def _named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
        for name, part in self.children():
            yield from part._named_tensors(f"{prefix}{name}.")

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def train(self: M, mode: bool = True) -> M:
        self.training = mode
        for _, part in self.children():
            part.train(mode)
        return self

    def eval(self: M) -> M:
        return self.train(False)

    def to(self: M, device: str) -> M:
        """Move all tensors and their gradients to "cpu" or "gpu"; make the optimizer after this."""
        for _, tensor in self._named_tensors():
            tensor.data = moved(tensor.data, device, tensor.half)
            if tensor.grad is not None:
                tensor.grad = moved(tensor.grad, device, tensor.half)
        return self


class Linear(Module):
    """x (…, n_in) -> x @ weight + bias (…, n_out); weight (n_in, n_out) as GPT-2 stores it.

    In memory the weights of one output lie side by side (Fortran order): decoding multiplies one
    row at a time, and each of its outputs is then a product of two rows of adjacent numbers.

    With `half`, a half-precision type, the product and all that follows from it are kept in that
    type, whatever x and the weight are held in. `layer(x, gelu=True)` is F.gelu(layer(x)), made
    faster where it can be.
    """

    def __init__(self, n_in: int, n_out: int, init: Init, std: float = 0.02) -> None:
        self.half = init.half
        self.weight = init.normal((n_in, n_out), std, order="F")
        self.bias = init.full((n_out,), 0)

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        x = x.astype(self.half) if self.half else x
        return (F.linear_gelu if gelu else F.linear)(x, self.weight, self.bias)


class Embedding(Module):
    """Integer ids (…) -> rows of weight (…, width)."""

    def __init__(self, count: int, width: int, init: Init, std: float = 0.02) -> None:
        self.weight = init.normal((count, width), std)

    def __call__(self, ids: Array | Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class LayerNorm(Module):
    """Normalise the last axis (…, width) to mean 0, variance 1, then scale and shift it.

    Never computed in half precision; the result is kept in `half` where that is one.
    """

    def __init__(self, width: int, init: Init, eps: float = 1e-5, half: str | None = None) -> None:
        self.half = half
        self.weight = init.full((width,), 1, wide(init.dtype))
        self.bias = init.full((width,), 0, wide(init.dtype))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps, self.half)


class Dropout(Module):
    """While training, zero each element with probability p and scale the rest by 1 / (1 - p)."""

    def __init__(self, p: float, random: RandomStream) -> None:
        self.p, self.random = p, random

    def __call__(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return F.dropout(x, self.p, self.random.next_key())
