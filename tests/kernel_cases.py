"""Cases for each kernel on the CPU: sizes that fit no block, several layouts, both float types.

A kernel may refuse arguments by raising NotForMe. A case says at which levels that is expected, so
that a kernel that refuses others is noticed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from layer_cases import numbers

from micrograd_gpt import Tensor, functional, optim, tensor
from micrograd_gpt.arrays import int8
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.kernels import linear_cross_entropy
from micrograd_gpt.layers import IGNORE

TOLERANCE = {"float32": 2e-5, "float64": 1e-13}  # a few hundred roundings


@dataclasses.dataclass
class Case:
    arguments: tuple[Any, ...]
    not_for: tuple[str, ...] = ()  # levels that refuse these arguments
    changes: tuple[int, ...] = ()  # which arguments are written to
    tolerance: float = 1.0  # in units of TOLERANCE
    together: bool = False  # errors are relative to the largest of all results, not of each

    def run(self, function: Callable[..., Any]) -> list[Any]:
        """The arrays that the function returns, and those that it may write to, after the call.

        Asserts that all other arguments are as they were; where it raises NotForMe, all arguments.
        """
        arguments = list(self.arguments)
        for i in self.changes:
            arguments[i] = copy.deepcopy(arguments[i])
        before = copy.deepcopy(arguments)
        try:
            results = function(*arguments)
        except NotForMe:
            assert_unchanged(arguments, before)
            raise
        constant = [i for i in range(len(arguments)) if i not in self.changes]
        assert_unchanged([arguments[i] for i in constant], [before[i] for i in constant])
        return [*flat(results), *flat([arguments[i] for i in self.changes])]


def flat(value: Any) -> Iterator[Any]:
    """The arrays and numbers in nested tuples and lists, and the gradients of parameters."""
    if isinstance(value, Tensor):
        yield value.grad
    elif isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)
    else:
        yield value


def assert_unchanged(arguments: Any, before: Any) -> None:
    for now, old in zip(flat(arguments), flat(before), strict=True):
        if isinstance(now, np.ndarray):
            np.testing.assert_array_equal(now, old, err_msg="an input was overwritten")


CASES: dict[Callable[..., Any], Callable[[str], Iterator[Case]]] = {}


def cases_of(definition: Callable[..., Any]) -> Callable[..., Any]:
    def register(function: Any) -> Any:
        CASES[definition] = function
        return function

    return register


# --------------------------------------------------------------------------------------- adding


@cases_of(tensor.add_at)
def _(dtype: str) -> Iterator[Case]:
    for rows, width in ((1, 1), (13, 5), (257, 130)):
        ids = np.random.default_rng(0).integers(0, 9, rows)
        total = numbers(11, width, dtype=dtype)
        yield Case((total, ids, numbers(rows, width, dtype=dtype, seed=1)), changes=(0,))
    three = np.array([[0, 3, 3], [10, 0, 3]], np.int32)
    total, part = numbers(11, 4, dtype=dtype), numbers(2, 3, 4, dtype=dtype)
    yield Case((total, three, part), changes=(0,))
    from_the_end = np.array([-1, 2, -1])
    yield Case((total, from_the_end, part[0]), changes=(0,))
    across = numbers(4, 11, dtype=dtype).T
    yield Case((across, three, part), not_for=("c",), changes=(0,))
    # Anything but picking rows by number is left to NumPy's own indexing.
    for index, shape in (((slice(None), 1), (11,)), (np.arange(11) % 2 == 0, (6, 4))):
        part = numbers(*shape, dtype=dtype)
        yield Case((total, index, part), not_for=("numpy", "c"), changes=(0,))


# ------------------------------------------------------------------------------ matrix products

PRODUCTS = [(1, 3, 5), (17, 300, 401), (130, 65, 33), (64, 1, 64)]


@cases_of(functional.linear_forward)
def _(dtype: str) -> Iterator[Case]:
    for n, k, m in PRODUCTS:
        x, w, b = (numbers(*s, dtype=dtype) for s in ((n, k), (k, m), (m,)))
        yield Case((x, w, b))
        yield Case((x, w, None))
        yield Case((x, np.asfortranarray(w), b))
        yield Case((np.asfortranarray(x), w[:, ::-1], b[::-1]))


@cases_of(int8.product)
def _(dtype: str) -> Iterator[Case]:
    for n, k, m in (*PRODUCTS, (5, 130, 37), (4, 1600, 33), (2, 64, 16)):
        x, w = numbers(n, k, dtype=dtype), numbers(k, m, dtype="float32")
        weight = int8.quantised(w, 0)
        yield Case((x, weight))
        yield Case((np.asfortranarray(x), weight))
        across = int8.int8_matrix(weight.values.copy(order="C"), weight.scales)
        if k > 1 and m > 1:
            yield Case((x, across), not_for=("c",))  # decoding would read it column by column
        if k > int8.GROUP < m:
            yield Case((x, int8.quantised(w, 1)), not_for=("c",))  # groups along the other axis


@cases_of(functional.linear_backward)
def _(dtype: str) -> Iterator[Case]:
    for n, k, m in PRODUCTS:
        x, w = numbers(n, k, dtype=dtype), numbers(k, m, dtype=dtype)
        grad = numbers(n, m, dtype=dtype, seed=1)
        yield Case((grad, x, w))
        yield Case((grad, x, np.asfortranarray(w)))
        yield Case((np.asfortranarray(grad), np.asfortranarray(x), w))
        yield Case((np.broadcast_to(grad[:, :1], (n, m)), x, w))  # like the gradient of a sum


# ------------------------------------------------------------------- layer norm, gelu, row by row

ROWS = [(1, 1), (1, 7), (13, 5), (100, 768), (257, 130)]


@cases_of(functional.layer_norm_forward)
def _(dtype: str) -> Iterator[Case]:
    for n, width in ROWS:
        w, b = numbers(width, dtype=dtype), numbers(width, dtype=dtype, seed=2)
        yield Case((numbers(n, width, dtype=dtype) * 3 + 1, w, b, 1e-5))


@cases_of(functional.layer_norm_backward)
def _(dtype: str) -> Iterator[Case]:
    for n, width in ROWS:
        if width > 1:  # one channel is always 0: its gradient is all cancellation
            x, w = numbers(n, width, dtype=dtype) * 3 + 1, numbers(width, dtype=dtype)
            _, mean, rstd = functional.layer_norm_forward.definition(x, w, w, 1e-5)
            grad = numbers(n, width, dtype=dtype, seed=1)
            yield Case((grad, x, w, mean, rstd))
            yield Case((np.asfortranarray(grad), x, w, mean, rstd))


@cases_of(functional.gelu_forward)
def _(dtype: str) -> Iterator[Case]:
    for shape in (*ROWS, (2, 3, 4), (5,)):
        yield Case((numbers(*shape, dtype=dtype) * 3,))
    yield Case((np.array([-1e4, -30, -0.0, 30, 1e4], dtype),))


@cases_of(functional.gelu_backward)
def _(dtype: str) -> Iterator[Case]:
    for shape in (*ROWS, (2, 3, 4), (5,)):
        grad = numbers(*shape, dtype=dtype, seed=1)
        yield Case((grad, numbers(*shape, dtype=dtype) * 3))
    yield Case((grad, np.array([-1e4, -30, -0.0, 30, 1e4], dtype)))


# ------------------------------------------------------------------------------------ attention

HEADS = [(1, 1, 1, 4), (2, 3, 7, 5), (3, 2, 128, 8), (1, 2, 129, 4), (2, 1, 300, 8)]
KEY = (1, 2)


def heads(b: int, h: int, t: int, d: int, dtype: str, seed: int = 0) -> list[np.ndarray]:
    """q, k and v (B, H, T, D) as in the model: views of one array (B, T, 3, H, D)."""
    qkv = numbers(b, t, 3, h, d, dtype=dtype, seed=seed) * 2
    return [qkv[:, :, i].swapaxes(1, 2) for i in range(3)]


@cases_of(functional.attention_forward)
def _(dtype: str) -> Iterator[Case]:
    for b, h, t, d in HEADS:
        q, k, v = heads(b, h, t, d, dtype)
        yield Case((q, k, v, 0.0, ()))
        yield Case((q, k, v, 0.4, KEY), not_for=("c",))
        yield Case((*map(np.ascontiguousarray, (q, k, v)), 0.0, ()))
    for t, keys in ((1, 9), (5, 9), (130, 300), (1, 1)):
        q = numbers(2, 3, t, 4, dtype=dtype)
        k, v = (numbers(2, 3, keys, 4, dtype=dtype, seed=s) for s in (1, 2))
        yield Case((q, k, v, 0.0, ()))
        yield Case((q, k, v, 0.4, KEY), not_for=("c",))
        room = np.full((2, 2, 3, keys + 7, 4), np.nan, dtype)  # a cache has room to spare
        room[:, :, :, :keys] = k, v
        yield Case((q, *room[:, :, :, :keys], 0.0, ()))
    by_channel = [x.swapaxes(2, 3).copy().swapaxes(2, 3) for x in heads(2, 3, 7, 5, dtype)]
    yield Case((*by_channel, 0.0, ()), not_for=("c",))


@cases_of(functional.attention_backward)
def _(dtype: str) -> Iterator[Case]:
    for b, h, t, d in HEADS:
        for p, key in ((0.0, ()), (0.4, KEY)):
            q, k, v = heads(b, h, t, d, dtype)
            out, log_total = functional.attention_forward.definition(q, k, v, p, key)
            grad = numbers(b, t, h, d, dtype=dtype, seed=1).swapaxes(1, 2)
            not_for = ("c",) if p else ()
            # One token attends to itself alone: dq and dk are 0, by cancellation.
            yield Case((grad, q, k, v, out, log_total, p, key), not_for, together=True)
            contiguous = (np.ascontiguousarray(x) for x in (grad, q, k, v, out))
            yield Case((*contiguous, log_total, p, key), not_for, together=True)


# -------------------------------------------------------------------------------- cross-entropy


def labels_of(rows: int, vocab_size: int) -> np.ndarray:
    labels = np.random.default_rng(1).integers(0, vocab_size, rows)
    labels[::3] = IGNORE
    return labels


@cases_of(functional.cross_entropy_forward)
def _(dtype: str) -> Iterator[Case]:
    for n, vocab_size in ROWS:
        logits, labels = numbers(n, vocab_size, dtype=dtype) * 3, labels_of(n, vocab_size)
        yield Case((logits, labels))
        yield Case((np.asfortranarray(logits), labels.astype(np.int32)))


@cases_of(linear_cross_entropy.linear_cross_entropy_forward)
def _(dtype: str) -> Iterator[Case]:
    for n, k, m in PRODUCTS:
        x, w = numbers(n, k, dtype=dtype), numbers(m, k, dtype=dtype)
        yield Case((x, w, labels_of(n, m), True))
        yield Case((x, w, labels_of(n, m), False))


# ------------------------------------------------------------------------------------ optimizer


def gradients(dtype: str) -> list[np.ndarray]:
    shapes = [(3,), (5, 7), (), (40, 50), (200_001,)]
    return [numbers(*s, dtype=dtype) for s in shapes] + [numbers(6, 4, dtype=dtype).T]


def parameters(grads: list[np.ndarray]) -> list[Tensor]:
    """Parameters with these gradients, and one that has none."""
    made = [Tensor(np.zeros_like(grad), requires_grad=True) for grad in grads]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = grad
    return [*made, Tensor(1.0, requires_grad=True)]


@cases_of(optim.clip_grad_norm)
def _(dtype: str) -> Iterator[Case]:
    for max_norm, loss_scale in ((1e6, 1.0), (1.0, 1.0), (1.0, 1024.0), (1e6, 1024.0)):
        yield Case((parameters(gradients(dtype)), max_norm, loss_scale), changes=(0,))
    bad = gradients(dtype)
    bad[1][2, 3] = np.inf
    yield Case((parameters(bad), 1.0, 8.0), changes=(0,))
    mixed_up = numbers(2, 3, 4, dtype=dtype).swapaxes(1, 2)  # neither C order nor Fortran order
    yield Case((parameters([mixed_up]), 1.0, 1.0), not_for=("c",), changes=(0,))


def beside(grads: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Other numbers, laid out in memory as the gradients are."""
    arrays = [np.empty_like(grad) for grad in grads]
    for array in arrays:
        array[...] = numbers(*array.shape, seed=seed)
    return arrays


@cases_of(optim.adamw_update)
def _(dtype: str) -> Iterator[Case]:
    grads, decays = gradients(dtype), (0.1, 0.0, 0.1, 0.2, 0.3, 0.4)
    p, m, v = (beside(grads, seed) for seed in (1, 2, 3))
    rows = list(zip(p, grads, m, [np.square(x, out=x) for x in v], decays, strict=True))
    for step in (1, 3, 1000):
        # The updates come from the moments by a root and a quotient: some roundings more.
        yield Case((rows, 1e-2, 0.9, 0.95, 1e-8, step), changes=(0,), tolerance=10)
    across = [(p.copy(order="C"), grad.copy(order="F"), *rest) for p, grad, *rest in rows]
    yield Case((across, 1e-2, 0.9, 0.95, 1e-8, 2), ("c",), changes=(0,), tolerance=10)
