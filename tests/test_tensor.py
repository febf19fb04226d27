"""The tape and the primitive operations."""

from __future__ import annotations

import contextvars
import copy
import functools
import gc
import importlib.util
import math
import operator
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gradcheck import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from micrograd_gpt import Tensor, concatenate, layers, nn, no_grad, optim, stack, tensor, where
from micrograd_gpt.graph import draw_graph, retain_grad
from micrograd_gpt.nn import no_dropout
from micrograd_gpt.tensor import record

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@st.composite
def broadcastable(draw: st.DrawFn, count: int) -> list[tuple[int, ...]]:
    """`count` shapes that broadcast together: axes dropped from the left or shrunk to 1."""
    full = draw(SHAPES)
    shapes = []
    for _ in range(count):
        kept = full[draw(st.integers(0, len(full))) :]
        shapes.append(tuple(n if draw(st.booleans()) else 1 for n in kept))
    return shapes


def away_from_zero(x: np.ndarray) -> np.ndarray:
    """Numbers of size 0.5 or more, so that differences meet no kink and no pole."""
    return np.where(x < 0, x - 0.5, x + 0.5)


ONE_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x,
    "scalar right": lambda x: (x + 2) * 3 - 0.5,
    "scalar left": lambda x: 2 - (3 * x) + (1.5 + x),
    "divided by scalar": lambda x: x / 3,
    "scalar divided": lambda x: 2.0 / x,
    "numpy scalar left": lambda x: np.float64(2) * x,
    "cube": lambda x: x**3,
    "power 0": lambda x: x**0 + x,
    "power -2": lambda x: x**-2,
    "power of a number": lambda x: 2**x + np.float32(0.5) ** x,
    "abs": abs,
    "exp": lambda x: x.exp(),
    "log": lambda x: (x * x).log(),
    "sqrt": lambda x: (x * x).sqrt(),
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: x.relu(),
    "sigmoid": lambda x: x.sigmoid(),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "max": lambda x: x.max(),
    "flatten": lambda x: x.reshape(-1),
    "transpose": lambda x: x.transpose(),
    "new axis": lambda x: x[None, ..., None],
    "concatenate": lambda x: concatenate([x[None], x[None] * 2, -x[None]]),
    "stack": lambda x: stack([x, x * 2, -x]),
    "stack last": lambda x: stack([x, x * 2], axis=-1),
    "items": lambda x: sum(x[None], x * 3),
    "where": lambda x: where(x > 0, x * 2, -3.0),
    "a mask": lambda x: where(x < 0, 7.0, x * x),
    "astype": lambda x: x.astype("float64") * 2,
    "used twice": lambda x: x * x + x.exp() * x,
}
TWO_INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "pow": lambda x, y: abs(x) ** y,
    "where": lambda x, y: where(x > y, x, y * 2),
}


@pytest.mark.parametrize("name", ONE_INPUT)
@settings(max_examples=15)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_gradient_of_one_input(name: str, shape: tuple[int, ...], seed: int) -> None:
    x = away_from_zero(np.random.default_rng(seed).standard_normal(shape))
    check_gradients(ONE_INPUT[name], x, seed=seed)


@pytest.mark.parametrize("name", TWO_INPUTS)
@settings(max_examples=25)
@given(shapes=broadcastable(2), seed=st.integers(0, 2**31))
def test_gradient_of_two_inputs(name: str, shapes: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (away_from_zero(rng.standard_normal(shape)) for shape in shapes)
    check_gradients(TWO_INPUTS[name], x, y, seed=seed)


@settings(max_examples=25)
@given(batch=broadcastable(2), n=st.integers(1, 4), k=st.integers(1, 4), m=st.integers(1, 4))
def test_gradient_of_matmul(batch: list[tuple[int, ...]], n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(n * 16 + k * 4 + m)
    x = rng.standard_normal((*batch[0], n, k))
    y = rng.standard_normal((*batch[1], k, m))
    check_gradients(lambda a, b: a @ b, x, y)


@pytest.mark.parametrize(
    ("left", "right"),
    [((3,), (3,)), ((3,), (3, 2)), ((2, 3), (3,)), ((3,), (4, 3, 2)), ((4, 2, 3), (3,))],
)
def test_gradient_of_matmul_with_vectors(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    check_gradients(lambda a, b: a @ b, rng.standard_normal(left), rng.standard_normal(right))


@settings(max_examples=40)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_gradient_of_reductions(name: str, data: st.DataObject, shape: tuple[int, ...]) -> None:
    axes = st.integers(-len(shape), len(shape) - 1)
    axis = data.draw(st.none() | axes | st.just(tuple(range(len(shape)))))
    keepdims = data.draw(st.booleans())
    # Distinct numbers, far apart, so that a difference does not change which one is largest.
    x = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape) / 3.0
    check_gradients(lambda t: getattr(t, name)(axis, keepdims), x)


@pytest.mark.parametrize(
    "index",
    [
        1,
        -1,
        slice(None, None, 2),
        (slice(None), 0),
        (..., slice(0, 2)),
        [0, 2, 0, 0],
        (np.array([[0, 1], [1, 1]]), slice(1, 3)),
        np.array([True, False, True]),
        (None, 2),
    ],
)
def test_gradient_of_indexing(index: object) -> None:
    check_gradients(lambda t: t[index], np.random.default_rng(0).standard_normal((3, 4)))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (-1, 0, 1)])
def test_gradient_of_transpose(axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    check_gradients(lambda t: t.transpose(*axes), x)
    assert Tensor(x).transpose(axes).shape == x.transpose(axes).shape
    check_gradients(lambda t: t.swapaxes(0, -1), x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gradient_of_concatenate(axis: int) -> None:
    rng = np.random.default_rng(0)
    shapes = [[2, 3, 2], [2, 3, 2]]
    shapes[1][axis] = 4
    check_gradients(
        lambda a, b: concatenate([a, b], axis), *(rng.standard_normal(s) for s in shapes)
    )


def test_the_checker_rejects_a_gradient_wrong_by_one_percent() -> None:
    def square(x: Tensor, factor: float) -> Tensor:
        data = x.data
        return record("square", data * data, [x], lambda grad: (factor * 2 * grad * data,))

    x = np.random.default_rng(0).standard_normal((3, 4))
    check_gradients(lambda t: square(t, 1.0), x)
    with pytest.raises(AssertionError, match="measured"):
        check_gradients(lambda t: square(t, 1.01), x)


def test_values_of_everything_micrograd_has() -> None:
    a, b = Tensor(-4.0, requires_grad=True, dtype="float64"), Tensor(2.0, True, dtype="float64")
    c = a + b
    d = a * b + b**3
    c = c + c + 1
    c = c + 1 + c + (-a)
    d = d + d * 2 + (b + a).relu()
    d = d + 3 * d + (b - a).relu()
    e = c - d
    g = e**2 / 2.0 + 10.0 / (e**2)
    g.backward()
    # The expression and the figures are those of micrograd's README, which PyTorch confirms.
    assert g.item() == pytest.approx(24.70408163265306, rel=1e-12)
    assert a.grad == pytest.approx(138.83381924198252, rel=1e-12)
    assert b.grad == pytest.approx(645.5772594752186, rel=1e-12)


def test_sigmoid_neither_overflows_nor_vanishes() -> None:
    with np.errstate(over="raise", invalid="raise"):
        y = Tensor([-1e4, -20.0, 0.0, 1e4]).sigmoid()
    np.testing.assert_allclose(y.data, [0, np.exp(-20.0), 0.5, 1], rtol=1e-6)


def test_dtypes() -> None:
    assert Tensor([1, 2]).dtype == np.float32 and Tensor(3.0).dtype == np.float32
    assert Tensor(np.arange(3)).dtype == np.int64
    assert Tensor(np.ones(3), dtype="float32").dtype == np.float32
    half = Tensor(np.ones(2, np.float32), requires_grad=True)
    double = Tensor(np.ones((3, 2)), requires_grad=True)
    product = (half * 2 + 1) * double
    assert product.dtype == np.float64
    product.sum().backward()
    assert half.grad.dtype == np.float32 and half.grad.shape == (2,)
    assert double.grad.dtype == np.float64
    np.testing.assert_array_equal(half.grad, [6, 6])
    with pytest.raises(ValueError, match="int64 cannot require a gradient"):
        Tensor(np.arange(3), requires_grad=True)


# -------------------------------------------------- two rules: which gradients may change, and when


def watched(x: Tensor, seen: list[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """x as the result of an operation that passes its gradient on and records a copy of it."""

    def backward(grad: np.ndarray) -> tuple[np.ndarray]:
        seen.append((grad, grad.copy()))
        return (grad,)

    return record("watched", x.data, [x], backward)


@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16"]))
def test_a_backward_never_sees_its_gradient_change(data: st.DataObject, dtype: str) -> None:
    """In random graphs where most gradients are one and the same array, or parts of it.

    All numbers are small and whole, so sums are exact in every type. A gradient is the number of
    ways that lead from a leaf's element to the results, which is counted beside the tape.
    """
    leaves = [Tensor(np.ones(4), requires_grad=True, dtype=dtype) for _ in range(2)]
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    # Beside each tensor: how often each of its elements contains each element of the leaves.
    stack = [(x, np.eye(4, 8, 4 * i)) for i, x in enumerate(leaves)]
    for _ in range(data.draw(st.integers(1, 8))):
        x, ways = stack[data.draw(st.integers(0, len(stack) - 1))]
        y, others = stack[data.draw(st.integers(0, len(stack) - 1))]
        match data.draw(st.sampled_from(["add", "watched", "view", "index", "pick", "join"])):
            case "add":
                stack.append((watched(x, seen) + y, ways + others))
            case "watched":
                stack.append((watched(x, seen), ways))
            case "view":
                stack.append((x.reshape(2, 2).T.reshape(4), ways[[0, 2, 1, 3]]))
            case "index":
                stack.append((watched(x[::-1], seen), ways[::-1]))
            case "pick":
                stack.append((x[np.array([0, 0, 1, 3])] + y, ways[[0, 0, 1, 3]] + others))
            case "join":
                parts = concatenate([x[:2], watched(y, seen)[2:]])
                stack.append((parts, np.concatenate([ways[:2], others[2:]])))
    total, ways = stack[-1]
    cotangent = np.array([1.0, 2.0, 3.0, 4.0])
    total.backward(cotangent)
    np.testing.assert_array_equal(cotangent, [1, 2, 3, 4])
    for grad, before in seen:
        np.testing.assert_array_equal(grad.astype(float), before.astype(float))
    expected = (cotangent @ ways).reshape(2, 4)
    for leaf, of_leaf in zip(leaves, expected, strict=True):
        if leaf.grad is not None and np.abs(of_leaf).max() <= 128:  # whole numbers in bfloat16
            np.testing.assert_array_equal(leaf.grad.astype(float), of_leaf)
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for i, grad in enumerate(grads):
        assert grad.dtype == dtype and grad.flags.writeable
        for other in [*grads[:i], *(array for array, _ in seen)]:
            assert not np.shares_memory(grad, other)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: concatenate([x, y]),
        lambda x, y: concatenate([x.reshape(2, 1), y.reshape(2, 1)], axis=1),
        lambda x, y: (x[None] + y[None]).T,
        lambda x, y: where(np.array([True, False]), x, y),
        lambda x, y: x.reshape(1, 2) + y.T,
        lambda x, y: x + y.to("cpu").astype("float32"),
    ],
)
def test_a_leafs_gradient_is_its_own(operation: Callable[..., Tensor]) -> None:
    x, y = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0], requires_grad=True)
    cotangent = np.ones(operation(x, y).shape, np.float32)
    operation(x, y).backward(cotangent)
    assert not np.shares_memory(x.grad, y.grad)
    for grad in (x.grad, y.grad):
        assert not np.shares_memory(grad, cotangent) and grad.flags.writeable
    kept = x.grad
    x.grad += 100
    assert (y.grad <= 1).all() and (cotangent == 1).all()
    operation(x, y).backward(cotangent)
    assert x.grad is kept  # added to in place, so that an optimizer may keep a reference


def test_gradients_accumulate_over_backwards() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = Tensor([3.0, 4.0], requires_grad=True)
    cotangent = np.array([1.0, 10.0], np.float32)
    (x + y).backward(cotangent)
    (x * 1.0).backward(cotangent)
    np.testing.assert_array_equal(x.grad, [2, 20])
    np.testing.assert_array_equal(y.grad, [1, 10])
    np.testing.assert_array_equal(cotangent, [1, 10])
    x.backward(cotangent)  # a leaf itself
    np.testing.assert_array_equal(x.grad, [3, 30])
    x[1].backward()
    x[np.array([0, 0])].sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 31])


def test_a_gradient_shared_by_add_is_never_added_into() -> None:
    x = Tensor([1.0], requires_grad=True)
    y = x * 2
    z = y + y * 3 + y  # y's gradient comes in three parts, two of them the same array
    w = Tensor([0.0], requires_grad=True)
    (z + w).backward(np.array([1.0]))
    assert x.grad[0] == 10 and w.grad[0] == 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_part_that_was_picked_joins_others_in_either_order(dtype: str) -> None:
    """Part of x's gradient comes through indices, part whole; x is a leaf or an intermediate."""
    for make in (lambda leaf: leaf, lambda leaf: leaf * 1):
        for picks_first in (True, False):
            leaf = Tensor(np.ones((3, 2)), requires_grad=True, dtype=dtype)
            x = make(leaf)
            picked = x[np.array([0, 0, 2])].sum() + x[1:, 0].sum()
            whole = (x * 2).sum()
            (picked + whole if picks_first else whole + picked).backward()
            assert leaf.grad.dtype == dtype
            np.testing.assert_array_equal(leaf.grad.astype(float), [[4, 4], [3, 2], [4, 3]])


@pytest.mark.slow
def test_a_graph_50_000_operations_deep() -> None:
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(50_000):
        y = y + x
    y.backward()
    assert x.grad == 50_001
    z = x * 1.0
    for _ in range(200_000):
        z = z * 1.0
    del z  # nor may a deep tape that is dropped unused overflow the stack


def test_backward_frees_the_tape_and_leaves_no_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        x = Tensor(np.ones((4, 4)), requires_grad=True)
        hidden = (x @ x).tanh()
        loss = (hidden * hidden).sum()
        saved = weakref.ref(hidden.data)
        intermediate = weakref.ref(hidden)
        del hidden
        assert intermediate() is None, "the tape holds a tensor"
        assert saved() is not None, "mul saved nothing"
        loss.backward()
        assert saved() is None, "the tape still holds what backward saved"
        del loss
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.garbage.clear()
        gc.collect()
        assert not [o for o in gc.garbage if type(o).__module__.startswith("micrograd_gpt")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_an_intermediate_no_backward_needs_is_not_kept() -> None:
    x = Tensor(np.ones((4, 4)), requires_grad=True)
    hidden = x * 2
    data = weakref.ref(hidden.data)
    out = hidden + 1
    del hidden
    assert data() is None
    out.sum().backward()


def test_no_grad_builds_no_tape() -> None:
    x = Tensor([1.0], requires_grad=True)
    with no_grad():
        y = x * 2
        with pytest.raises(ZeroDivisionError), no_grad():
            _ = 1 / 0
        assert not (x * 2).requires_grad
    assert not y.requires_grad and y._node is None
    assert (x * 2).requires_grad and not x.detach().requires_grad
    assert not (Tensor([1.0]) * 2).requires_grad


def test_retain_grad_keeps_an_intermediate_gradient() -> None:
    x = Tensor([2.0], requires_grad=True)
    y = retain_grad(x * 3)
    z = x * 5
    (y * y + z).sum().backward()
    assert y.grad[0] == 12 and z.grad is None and x.grad[0] == 41


def test_errors_name_the_mistake() -> None:
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(ValueError, match=r"add: .*\(2, 3\).*\(4,\)"):
        x + Tensor(np.ones(4))
    with pytest.raises(ValueError, match=r"^matmul: .*mismatch"):
        x @ x
    with pytest.raises(ValueError, match=r"\(4,\) \(2,3\)"):
        where(np.ones(4, bool), x, 0.0)
    with pytest.raises(ValueError, match="along dimension 1, the array at index 0 has size 3"):
        concatenate([x, Tensor(np.ones((2, 4)))])
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\): give a gradient"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=r"gradient of shape \(3,\) for \(2, 3\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="needs no gradient"):
        Tensor(1.0).backward()
    with pytest.raises(RuntimeError, match="needs no gradient"), no_grad():
        (x * 2).sum().backward()
    with pytest.raises(ValueError, match="not a single number"):
        x.item()
    with pytest.raises(ValueError, match=r"pow: .*\(2, 3\).*\(4,\)"):
        x ** Tensor(np.ones(4))
    with pytest.raises(ValueError, match="along dimension 1, the array at index 0 has size 3"):
        stack([x, Tensor(np.ones((2, 4)))], axis=-1)
    assert x.grad is None


def test_backward_twice_is_an_error_and_changes_nothing() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    shared = x * 2
    first, second = shared.sum(), (shared * x).sum()
    first.backward()
    before = x.grad.copy()
    for spent in (first, second):
        with pytest.raises(RuntimeError, match=r"freed the tape at .* compute it again"):
            spent.backward()
    np.testing.assert_array_equal(x.grad, before)


class FakeGPUArray:
    """An array on another device: not NumPy's, but with a shape and a dtype, and asked by NumPy."""

    shape, dtype, base, ndim = (2,), np.dtype("float32"), None, 1
    __array_function__: Any = None


def test_mixing_devices_is_an_error_that_names_both() -> None:
    here, there = Tensor([1.0, 2.0]), Tensor(FakeGPUArray())
    with pytest.raises(ValueError, match=r"mul: .* on the cpu, .* on the gpu.*\.to\(\)"):
        here * there


def test_sums_of_many_parts_work_on_scalars_and_on_empty_arrays() -> None:
    x = Tensor(1.0, requires_grad=True)
    y = x * 2
    ((y + y) + (y + y) + (y * 3) + (y + y * 2)).backward()
    assert x.grad == 20 and isinstance(x.grad, np.ndarray)
    assert isinstance((x + x).data, np.ndarray)
    empty = Tensor(np.zeros(0), requires_grad=True)
    z = empty * 1
    (z.sum() + (z * 2).sum()).backward()
    assert empty.grad.shape == (0,)


def test_gradients_are_the_same_bits_every_time() -> None:
    def gradient() -> bytes:
        x = Tensor(np.random.default_rng(0).standard_normal(50), requires_grad=True)
        y = x * 1.1
        parts = [(y * (0.1 * i)).tanh() for i in range(1, 8)]
        sum(parts[1:], parts[0]).sum().backward()
        return x.grad.tobytes()

    keep = []  # other objects in between, so that addresses differ
    for _ in range(10):
        keep.append([object() for _ in range(37)])
        assert gradient() == gradient()


def test_a_cotangent_may_be_a_leafs_own_gradient() -> None:
    x = Tensor([1.0], requires_grad=True)
    (x * 1).backward([1.0])
    (x + x).backward(x.grad)
    assert x.grad[0] == 3


@pytest.mark.parametrize("number", [np.int64(2), np.float64(2), np.float32(2)])
def test_an_exponent_of_numpys_leaves_the_type(number: np.number) -> None:
    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    y = x**number
    assert y.dtype == np.float32
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_equal_maxima_share_the_gradient() -> None:
    x = Tensor([1.0, 3.0, 3.0, 2.0, 3.0], requires_grad=True)
    (x.max() * 6).backward()
    np.testing.assert_allclose(x.grad, [0, 2, 2, 0, 2])


def test_comparisons_and_truth() -> None:
    x = Tensor([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal((x == 0).data, [False, True, False])
    np.testing.assert_array_equal((x != 0).data, [True, False, True])
    np.testing.assert_array_equal((x >= 0).data, [False, True, True])
    np.testing.assert_array_equal((x <= 0).data, [True, True, False])
    assert Tensor(1.0) > 0 and not Tensor([-1.0]) > 0
    assert len({x: 1, Tensor([5.0]): 2}) == 2
    with pytest.raises(ValueError, match=r"shape \(3,\) is not a single number: .*\.any\(\)"):
        bool(x > 0)


def test_numbers_of_other_kinds() -> None:
    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    assert (np.float64(2) * x).dtype == (x / np.int64(2)).dtype == np.float32
    whole = Tensor(np.array([16777217, 1]))
    assert (whole + 16777217).data[0] == 33554434 and (whole * 0.5).dtype.kind == "f"
    assert Tensor(np.full(3, 100000001)).mean().item() == 100000001
    assert x.sum(np.int64(0)).item() == 2
    assert not x.astype("int64").requires_grad
    masked = np.ma.array([1.0, 2.0], mask=[False, True])  # NumPy leaves the second out of a sum
    with pytest.raises(TypeError, match="a tensor has no masked numbers"):
        Tensor(masked)
    assert type(Tensor(masked.filled(0)).data) is type(Tensor(masked[:1]).data) is np.ndarray
    for other in (np.array([(1, 2.0)], "i4,f4"), np.array([1, 2], "timedelta64[s]")):
        with pytest.raises(TypeError, match="a tensor holds numbers, not"):
            Tensor(other)
    for wrong in (None, "3"):
        with pytest.raises(TypeError, match="is no tensor or array, nor a number beside"):
            x + wrong
    for axes in ((0, 3), (0, 0), (0,)):
        with pytest.raises(ValueError, match=r"ax[ei]s"):
            Tensor(np.zeros((2, 3))).transpose(*axes)


def test_a_backward_can_be_anything_that_is_called() -> None:
    x = Tensor([3.0], requires_grad=True)
    y = record("square", x.data**2, [x], functools.partial(lambda d, g: (2 * d * g,), x.data))
    y.backward()
    assert x.grad == 6


def test_a_tensor_of_a_copy_of_this_file_is_another_class(tmp_path: Path) -> None:
    """The optimizer and the drawing take it; an operation of the two would lose the gradient."""
    path = tmp_path / "copy_of_tensor.py"
    path.write_text(Path(tensor.__file__).read_text())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    x = copied.Tensor([2.0], requires_grad=True)
    for operation in (Tensor, nn.Linear(1, 1), lambda x: Tensor([1.0]) + x):
        with pytest.raises(TypeError, match="a Tensor of copy_of_tensor is another class"):
            operation(x)
    y = (x * x).sum()
    assert "mul" in draw_graph(y)
    y.backward()
    optim.AdamW([x], lr=0.5, weight_decay=0).step()
    assert x.data[0] == pytest.approx(1.5)


def test_a_column_of_a_table_becomes_an_array_of_its_own() -> None:
    class Column:  # as pandas has it: with NumPy's dtype, and arithmetic by the names of rows
        dtype, numbers = np.dtype("float64"), np.array([3.0, 1.0])

        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            return np.array(self.numbers, dtype, copy=copy)

    p = nn.Parameter(Column())
    assert (p - Tensor(Column())).numpy().tolist() == (p - Column()).numpy().tolist() == [0, 0]
    with no_grad():
        p -= 1
    assert (type(p.data), p.numpy().tolist(), Column.numbers[0]) == (np.ndarray, [2, 0], 3)


def test_a_tensor_shows_itself() -> None:
    x = Tensor([1.0], requires_grad=True)
    assert "requires_grad=True" in repr(x) and "made by mul" in repr(x * 2)
    assert len(x) == 1 and x.ndim == 1 and x.size == 1 and x.device == "cpu"
    assert x.numpy() is x.data and Tensor(x).data is x.data


def test_a_truth_value_as_an_index_picks_a_copy() -> None:
    x = Tensor(np.arange(3.0), requires_grad=True)
    (x[True] * 2).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])


def test_keywords_are_kept_whatever_stands_before_them() -> None:
    x = Tensor(np.ones((2, 3)))
    assert x.sum(keepdims=True).shape == x.mean(keepdims=True).shape == (1, 1)
    assert x.sum(axis=1, keepdims=True).shape == (2, 1)


def test_gradients_of_single_numbers_add_up() -> None:
    """NumPy gives sums of arrays of no dimensions as scalars, which cannot be written to."""
    x = Tensor(2.0, requires_grad=True)
    y = x * 1
    (y + y[()] + y[...] + y[None].sum()).backward()
    assert x.grad == 4
    a, b = (Tensor(values, requires_grad=True) for values in ([1.0, 2.0], [3.0, 4.0]))
    y = a @ b  # 11
    (y * y + y).backward()
    np.testing.assert_array_equal(a.grad, [3 * 23, 4 * 23])


def test_numbers_beside_truth_values_are_numbers() -> None:
    mask = Tensor([1.0, -1.0]) > 0
    np.testing.assert_array_equal((mask * 3).data, [3, 0])
    np.testing.assert_array_equal((mask + 1).data, [2, 1])
    np.testing.assert_array_equal((1 - mask).data, [0, 1])
    np.testing.assert_array_equal((mask < 2).data, [True, True])


def test_powers_and_means_keep_half_precision_and_do_not_overflow_in_between() -> None:
    for dtype in ("float16", "bfloat16"):
        x = Tensor(np.full(70_000, 2.0), dtype=dtype)
        assert (x**2).dtype == x.sqrt().dtype == x.dtype
        assert x.reshape(1, -1).mean(-1).data == 2 and x.reshape(1, -1).mean(-1).dtype == x.dtype


# --------------------------------------------- what is captured stays as it was, or is an error


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "by subtracting in place": lambda t: setattr(t, "data", t.data.__isub__(1)),
    "by its detached twin": lambda t: setattr(t.detach(), "data", t.data.__imul__(2)),
    "by AdamW": lambda t: adamw_step(t),
}


def adamw_step(t: Tensor) -> None:
    optimizer, before = optim.AdamW([t]), t.grad
    t.grad = np.ones_like(t.data)
    optimizer.step()
    t.grad = before


@pytest.mark.parametrize("change", CHANGES)
def test_a_leaf_changed_in_place_before_backward_is_an_error(change: str) -> None:
    x, w = (Tensor(np.full((2, 2), v), requires_grad=True) for v in (3.0, 5.0))
    y = ((x * w).tanh() @ x.T).sum()
    CHANGES[change](w)
    with pytest.raises(RuntimeError, match=r"an array of 'mul' was changed in place: compute it"):
        y.backward()
    assert x.grad is None  # found before anything was added anywhere
    ((x * w).tanh() @ x.T).sum().backward()  # computed again, it works
    assert x.grad is not None


def test_a_result_or_a_constant_changed_in_place_is_an_error() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x.exp()
    loss = y.sum()
    y.data *= 2  # exp's backward multiplies by it
    with pytest.raises(RuntimeError, match="'exp' was changed in place"):
        loss.backward()
    c = Tensor([3.0, 4.0])
    loss = (x * c).sum()
    c.data += 1
    with pytest.raises(RuntimeError, match="'mul' was changed in place"):
        loss.backward()


def test_a_new_array_or_a_change_before_the_forward_harms_nothing() -> None:
    x, w = Tensor([2.0], requires_grad=True), Tensor([3.0], requires_grad=True)
    w.data *= 2
    y = (x * w).sum()
    w.data = np.array([100.0], np.float32)  # another array: the tape keeps the one it used
    y.backward()
    assert x.grad == 6 and w.grad == 2


def test_a_read_only_gradient_is_not_written_to() -> None:
    x = Tensor(np.ones(5), requires_grad=True)
    x.grad = np.frombuffer(zeros := bytes(40))
    with pytest.raises(ValueError, match="read-only"):
        x[np.array([1, 1])].sum().backward()
    assert zeros == bytes(40)


def test_a_gradient_for_a_tensor_that_now_has_another_shape_is_an_error() -> None:
    w = Tensor(np.ones((2, 3)), requires_grad=True)
    y = (w * 2).sum()
    w.data = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"gradient of shape \(2, 3\) .* now \(4, 3\)"):
        y.backward()


def test_indices_and_masks_may_be_used_again_by_their_owner() -> None:
    x = Tensor(np.arange(12.0).reshape(4, 3), requires_grad=True)
    rows, mask, chosen = np.array([0, 0, 2]), np.array([True, False, True]), [1, 1]
    flags = np.array([[True], [False], [True], [True]])
    loss = x[rows].sum() + x[:, mask].sum() + where(flags, x, 0.0).sum() + x[chosen].sum()
    expected = np.zeros((4, 3))
    np.add.at(expected, rows, 1)
    expected[:, mask] += 1
    expected += flags
    np.add.at(expected, chosen, 1)
    rows[:], mask[:], flags[:], chosen[:] = 10**9, False, False, [99, 99]
    loss.backward()
    np.testing.assert_array_equal(x.grad, expected)


# ------------------------------------------------------------------- infinity, half, long sums


def test_what_a_constant_power_and_an_empty_mask_give() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    (x**0).backward(np.array([np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(x.grad, [0, 0])
    empty = Tensor(np.zeros((0, 3)))
    assert empty[np.zeros((0, 3), bool)].shape == (0,) and empty[[]].shape == (0, 3)


def test_a_gradient_that_is_not_chosen_is_zero_even_if_infinite() -> None:
    x = Tensor([-1.0, 2.0, 2.0, 0.0], requires_grad=True)
    infinite = np.full(4, np.inf, np.float32)
    x.relu().backward(infinite)
    np.testing.assert_array_equal(x.grad, [0, np.inf, np.inf, 0])
    x.grad = None
    x.max().backward(np.float32(np.inf))
    np.testing.assert_array_equal(x.grad, [0, np.inf, np.inf, 0])
    x.grad = None
    y = Tensor([1.0, np.nan, 3.0], requires_grad=True)
    y.max().backward()
    np.testing.assert_array_equal(y.grad, [0, 1, 0])  # NaN is the largest, and not lost
    where(np.array([True, False, True, False]), x, 0.0).backward(infinite)
    np.testing.assert_array_equal(x.grad, [np.inf, 0, np.inf, 0])
    x.grad = None
    layers.dropout(x, 0.5, (1,)).backward(infinite)
    kept = layers.dropout(Tensor(np.ones(4, np.float32)), 0.5, (1,)).data > 0
    np.testing.assert_array_equal(x.grad, np.where(kept, np.inf, 0))
    assert kept.any() and not kept.all()


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_numbers_act_in_float32_on_half_precision(half: str) -> None:
    x = Tensor([1000.0], dtype=half, requires_grad=True)
    assert (x / 70000).data == pytest.approx(1000 / 70000, rel=1e-6)
    assert (70000 / x).data == pytest.approx(70, rel=1e-6)
    assert (x * 1e-9 + 1).data == pytest.approx(1 + 1e-6, abs=1e-7)
    (x * 70000 * 1e-5).backward()
    assert x.grad.dtype == half and float(x.grad[0]) == pytest.approx(0.7, rel=2**-8)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_sums_and_means_of_half_precision_are_taken_wide(half: str) -> None:
    many = Tensor(np.full(100_000, 2.0), dtype=half)
    assert many.mean().item() == 2 and many.sum().item() == 200_000
    rows = Tensor(np.full((5000, 3), 100.0), dtype=half)
    np.testing.assert_array_equal(rows.mean(0).data.astype(float), 100)


def test_a_sum_of_a_million_numbers_keeps_its_digits() -> None:
    numbers = np.random.default_rng(0).random((1_000_000, 2), np.float32)
    exact = numbers.sum(axis=0, dtype=np.float64)
    x = Tensor(numbers, requires_grad=True)
    np.testing.assert_allclose(x.sum(0).data, exact, rtol=1e-7)
    bias = Tensor(np.zeros(2, np.float32), requires_grad=True)
    (x.detach() * bias).sum().backward()
    np.testing.assert_allclose(bias.grad, exact, rtol=1e-7)


def test_views_share_the_versions_of_their_arrays() -> None:
    x, w = Tensor(np.ones((2, 2)), requires_grad=True), Tensor(np.ones((2, 2)), requires_grad=True)
    with no_grad():
        view = w.reshape(4)[:4].reshape(2, 2).swapaxes(0, 1)
    for other in (view, w.detach().T):
        y = (x @ other).sum()
        w.data -= 1
        with pytest.raises(RuntimeError, match="'matmul' was changed in place"):
            y.backward()


def test_what_no_backward_needs_may_change() -> None:
    """As in PyTorch: a bias, a sum's terms, a result that is steered on its way."""
    x, b = (Tensor(np.ones((2, 2)), requires_grad=True) for _ in range(2))
    y = (x * 2 + b).sum()
    b.data -= 1
    y.backward()
    np.testing.assert_array_equal([x.grad, b.grad], [np.full((2, 2), 2.0), np.ones((2, 2))])
    hidden = x + 1
    hidden.data *= 0.5
    (hidden * hidden).sum().backward()
    np.testing.assert_array_equal(x.grad, 2 + 2 * hidden.data)


# ------------------------------------------------------- what NumPy's and PyTorch's users try first


def test_a_tensor_of_one_element_is_a_number() -> None:
    for data in (2.5, [2.5], [[2.5]]):
        t = Tensor(data, requires_grad=True)
        assert (float(t), int(t), bool(t)) == (2.5, 2, True)
        assert type(float(t)) is float and type(int(t)) is int
    for kind in (float, int, bool):
        with pytest.raises(ValueError, match=r"shape \(2,\) is not a single number"):
            kind(Tensor([1.0, 2.0]))


def test_numpy_reads_a_tensor_unless_a_gradient_would_be_lost() -> None:
    x = Tensor([[1.0, 2.0]])
    for array in (np.asarray(x), np.array(x), np.asarray(x, "float64")):
        assert array.tolist() == [[1.0, 2.0]] and array.dtype.kind == "f"
    assert np.shares_memory(np.asarray(x), x.data) and not np.shares_memory(np.array(x), x.data)
    for wants in (Tensor([1.0], requires_grad=True), Tensor([1.0], requires_grad=True) * 2):
        with pytest.raises(TypeError, match=r"lose the gradient: .*\.numpy\(\)"):
            np.asarray(wants)
        assert wants.numpy().shape == wants.detach().numpy().shape == (1,)


def test_powers_of_numbers_that_are_not_positive() -> None:
    """PyTorch gives these values and gradients; the last exponent's gradient is NaN, as log(-2)."""
    x = Tensor([0.0, 0.0, -2.0, -2.0, 2.0, -2.0], requires_grad=True)
    n = Tensor([2.0, 0.0, 2.0, 0.0, 0.0, 3.0])
    with np.errstate(all="raise"):
        y = x**n
        y.backward(np.full(6, 10, np.float32))
        for whole in range(4):  # a number in place of the tensor
            (x**whole).sum().backward()
    np.testing.assert_array_equal(y.data, [0, 1, 4, 1, 1, -8])
    np.testing.assert_array_equal(x.grad, [1, 1, -40 + 9, 9, 17, 120 + 9])
    learned = Tensor([2.0, 2.0], requires_grad=True)
    with np.errstate(invalid="ignore"):
        (Tensor([0.0, -2.0]) ** learned).sum().backward()
    np.testing.assert_array_equal(learned.grad, [0, np.nan])


def test_numbers_and_arrays_combine_with_a_power_as_with_a_product() -> None:
    x = Tensor(np.array([1.0, 2.0], np.float32))
    for y in (2**x, np.float64(2) ** x, np.full(2, 2.0, np.float32) ** x):
        assert isinstance(y, Tensor) and y.dtype == np.float32 and y.data.tolist() == [2, 4]
    whole = Tensor(np.array([1, 2]))
    assert (2**whole).dtype == (whole**2).dtype == np.int64
    for half in ("float16", "bfloat16"):
        assert (x.astype(half) ** x.astype(half)).dtype == half


def test_abs_is_flat_at_0_and_keeps_the_type() -> None:
    x = Tensor([-3.0, 0.0, -0.0, -np.inf, np.nan], requires_grad=True)
    abs(x).backward(np.ones(5))
    np.testing.assert_array_equal(abs(x).data, [3, 0, 0, np.inf, np.nan])
    np.testing.assert_array_equal(x.grad, [-1, 0, 0, -1, np.nan])
    assert abs(Tensor(np.array([3, 200], np.uint8))).data.tolist() == [3, 200]
    for dtype in ("int32", "float16", "bfloat16", "float64"):
        assert abs(Tensor([-2.0], dtype=dtype)).dtype == dtype


def test_stack_joins_along_a_new_axis() -> None:
    a, b = np.arange(6.0).reshape(2, 3), -np.ones((2, 3))
    for axis in (0, 1, 2, -1, -3):
        stacked = stack([Tensor(a), Tensor(b)], axis)
        np.testing.assert_array_equal(stacked.data, np.stack([a, b], axis))
    assert stack([Tensor(1.0), Tensor(2.0)]).data.tolist() == [1, 2]
    with pytest.raises(ValueError, match="axis 3"):
        stack([Tensor(a)], 3)


def test_a_number_formats_as_one() -> None:
    loss = Tensor(2.5, requires_grad=True) * 1
    assert f"{loss:.3f} {loss:>6.1f} {loss}" == "2.500    2.5 2.5"
    assert f"{Tensor(1.5, dtype='bfloat16'):.2f} {Tensor(np.array(7)):03d}" == "1.50 007"
    several = Tensor([1.0, 2.0])
    assert f"{several}" == repr(several)
    with pytest.raises(TypeError, match=r"unsupported format string passed to Tensor"):
        f"{several:.2f}"


def test_iteration_goes_along_the_first_axis() -> None:
    x = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    first, second = x
    (first * second).sum().backward()
    np.testing.assert_array_equal(x.grad, [[3, 4], [1, 2]])
    assert [float(item) for item in first] == [1, 2] and list(Tensor(np.zeros((0, 2)))) == []
    for use in (list, sum, iter, lambda t: [*t], dict.fromkeys):
        with pytest.raises(TypeError, match="iteration over a 0-d array"):
            use(Tensor(1.0))


@pytest.mark.parametrize("decorate", [no_grad, no_grad()], ids=["@no_grad", "@no_grad()"])
def test_no_grad_decorates_a_function(decorate: Callable[..., Callable[..., Tensor]]) -> None:
    x = Tensor([2.0], requires_grad=True)

    @decorate
    def double(t: Tensor, plus: float = 0.0) -> Tensor:
        """Twice t."""
        return t * 2 + plus

    for _ in range(2):
        y = double(x, plus=1.0)
        assert not y.requires_grad and y.item() == 5
        assert (x * 2).requires_grad
    assert double.__name__ == "double" and double.__doc__ == "Twice t."
    with pytest.raises(TypeError):
        double(x, 1, 2)
    assert (x * 2).requires_grad


def test_one_no_grad_may_be_entered_again_and_by_other_threads() -> None:
    x, off = Tensor([2.0], requires_grad=True), no_grad()
    recorded = []

    def in_a_thread() -> None:
        with off:
            recorded.append((x * 2).requires_grad)
        recorded.append((x * 2).requires_grad)

    with off:
        with off:
            assert not (x * 2).requires_grad
        assert not (x * 2).requires_grad
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
    assert (x * 2).requires_grad and recorded == [False, True]


def test_what_leaves_no_grad_where_it_was_not_entered_records() -> None:
    """As a suspended generator that another thread closes."""
    x, elsewhere = Tensor([2.0], requires_grad=True), contextvars.Context()
    elsewhere.run(no_grad().__exit__)
    assert elsewhere.run(lambda: (x * 2).requires_grad)


GENERATORS = "cannot hold in a generator or an async function"


async def asynchronous() -> None:
    pass


def generating() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("switch", [no_grad, no_dropout], ids=["no_grad", "no_dropout"])
def test_what_a_switch_cannot_hold_in_is_an_error(switch: Any) -> None:
    name = switch.inside.name
    for late in (asynchronous, generating):
        for decorate in (switch, switch()):
            with pytest.raises(TypeError, match=f"@{name} {GENERATORS}: write `with {name}"):
                decorate(late)
    for other in (5, int):
        with pytest.raises(TypeError, match=f"@{name} is for functions, not for"):
            switch(other)
    with pytest.raises(TypeError, match=rf"write `with {name}\(\):`, with parentheses"), switch:
        pass
    assert not switch.inside.get()


def test_arrays_are_joined_as_tensors_are() -> None:
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    array = np.zeros((2, 3), np.float32)
    for joined in (concatenate([array, x]), stack([array, x]), stack(t for t in (array, x))):
        assert joined.data.reshape(4, 3)[:, 0].tolist() == [0, 0, 1, 1]
        x.grad = None
        joined.sum().backward()
        assert x.grad is not None and x.grad.tolist() == np.ones((2, 3)).tolist()
    assert stack([array, array]).shape == (2, 2, 3)
    for join in (concatenate, stack):
        with pytest.raises(ValueError, match="need at least one array"):
            join([])
        with pytest.raises(TypeError, match=r"\[1\] is no tensor or array"):
            join([[1], [2]])
    with pytest.raises(TypeError, match=r"1\.0 is no tensor or array, nor a number beside a tens"):
        where(array > 0, 1.0, 2.0)


@pytest.mark.parametrize(
    "parts",
    [lambda grad: grad, lambda grad: None, lambda grad: (grad, grad), lambda grad: ()],
    ids=["an array", "nothing", "one more", "one less"],
)
def test_a_backward_of_ones_own_says_what_it_must_return(parts: Callable[..., Any]) -> None:
    for x in (Tensor(2.0), Tensor([2.0, 3.0]), Tensor([[1.0], [2.0]])):
        x.requires_grad = True
        with pytest.raises(TypeError, match="must return a tuple that has for each input"):
            record("square", x.data**2, [x], parts).sum().backward()


@pytest.mark.parametrize(
    "parts",
    [
        lambda grads: tuple(grads),
        lambda grads: (grad for grad in grads),
        lambda grads: map(np.asarray, grads),
        lambda grads: np.array(grads),
    ],
    ids=["a tuple", "a generator", "a map", "an array"],
)
def test_a_backward_of_ones_own_may_return_any_iterable(parts: Callable[..., Any]) -> None:
    a, b = (Tensor(numbers, requires_grad=True) for numbers in ([2.0, 3.0], [5.0, 7.0]))
    product = record("own", a.data * b.data, [a, b], lambda g: parts([g * b.data, g * a.data]))
    product.sum().backward()
    assert [x.grad.tolist() for x in (a, b)] == [[5, 7], [2, 3]]


@pytest.mark.parametrize(
    "data",
    [None, "abc", "3", b"3", [None, 1.0], ["a"], 1j, {"a": 1}, np.array(["a"]), np.array([None])],
    ids=repr,
)
def test_a_tensor_holds_numbers_only(data: Any) -> None:
    with pytest.raises(TypeError, match="a tensor holds numbers, not "):
        Tensor(data)
    with pytest.raises(TypeError, match="a tensor holds numbers, not "):
        Tensor(1.0).data = data


@pytest.mark.parametrize(
    "use",
    [
        Tensor,
        lambda rows: Tensor([[1.0, 2.0], [3.0, 4.0]])[rows],
        lambda rows: layers.embedding(rows, Tensor([[1.0], [2.0], [3.0], [4.0]])),
        lambda rows: layers.cross_entropy(Tensor(np.zeros((2, 2, 4))), rows),
    ],
    ids=["a tensor", "an index", "ids", "targets"],
)
def test_rows_that_differ_in_length_are_said_to(use: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="rows of a list differ in length"):
        use([[1, 2], [3]])


def test_whatever_is_a_number_makes_a_tensor() -> None:
    for data in (True, 2**70, [2**70], Fraction(1, 2), [], range(3), np.float64(2), [Tensor(1.0)]):
        wanted = np.float64 if isinstance(data, np.float64) else np.float32
        assert Tensor(data).dtype == wanted
    assert Tensor([2**70]).item() == 2.0**70


def test_data_may_be_set_to_numbers() -> None:
    x = Tensor([3.0, 4.0], requires_grad=True)
    x.data = [1, 2]
    (x * x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 4]


def test_transpose_says_how_two_axes_are_swapped() -> None:
    x = Tensor(np.ones((2, 3, 4), np.float32))
    for axes in ((0, 1), ((0, 1),), (1,)):
        with pytest.raises(ValueError, match=r"shape \(2, 3, 4\): to swap two, \.swapaxes\(\)"):
            x.transpose(*axes)
    assert x.swapaxes(0, 1).shape == x.transpose(1, 0, 2).shape == (3, 2, 4)
    matrix = x[0]
    for axes in ((0, 1), (0, -1), (-2, 1), (-2, -1), range(2)):  # swaps in PyTorch, not in NumPy
        with pytest.raises(ValueError, match=r"shape \(3, 4\): to swap two, \.swapaxes\(\)"):
            matrix.transpose(*axes)
    assert matrix.transpose(1, 0).shape == (4, 3) and matrix.transpose((0, 1)).shape == (3, 4)


def test_functions_of_numpy_see_the_numbers() -> None:
    x = Tensor([[1.0, 2.0], [3.0, 6.0]])
    assert np.mean(x) == 3 and np.sum(x, axis=0).tolist() == [4, 8] and np.allclose(x, x.data)
    assert np.concatenate([x, x]).shape == (4, 2) and np.shape(x) == (2, 2)
    x.requires_grad = True
    assert np.ndim(x) == 2
    with pytest.raises(TypeError, match=r"lose the gradient: .*\.numpy\(\)"):
        np.mean(x)


def test_elementwise_functions_of_numpy_see_the_numbers() -> None:
    x = Tensor([[1.0, 2.0], [3.0, 6.0]])
    np.testing.assert_array_equal(np.exp(x), np.exp(x.data))
    assert np.maximum(x, 2).tolist() == [[2, 2], [3, 6]] and np.add.reduce(x).tolist() == [4, 8]
    total = np.zeros((2, 2), np.float32)
    total += x
    assert total.tolist() == x.data.tolist() and type(total) is np.ndarray
    x.requires_grad = True
    loss = x.sum()
    assert np.isfinite(loss) and not np.isnan(loss) and not np.isinf(x).any()
    for lost in (lambda: np.exp(x), lambda: np.maximum(x, 2), lambda: np.add.reduce(x)):
        with pytest.raises(TypeError, match=r"lose the gradient: .*\.numpy\(\)"):
            lost()
    with pytest.raises(TypeError, match="lose the gradient"):
        total += x


@pytest.mark.parametrize("left", [np.float32(2), np.full((2, 2), 2, np.float32)])
def test_with_an_array_on_the_left_an_operation_is_the_tensor_s(left: Any) -> None:
    x = Tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True)
    names = ("__add__", "__sub__", "__mul__", "__truediv__", "__pow__", "__matmul__")
    for name in names[: 6 if np.ndim(left) else 5]:
        operation, grads = getattr(operator, name), []
        for a in (left, Tensor(np.broadcast_to(left, x.shape))):
            y = operation(a, x)
            y.sum().backward()
            grads.append((y.data.tolist(), x.grad.tolist()))
            x.grad = None
        assert grads[0] == grads[1]
    for name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
        result = getattr(operator, name)(left, x)
        assert isinstance(result, Tensor)
        assert result.data.tolist() == getattr(operator, name)(left, x.data).tolist()


def test_a_leaf_changes_in_place_within_no_grad_alone() -> None:
    p = kept = Tensor([1.0, 2.0], requires_grad=True)
    (p * p).sum().backward()
    spent = p * p
    with no_grad():
        p -= 0.5 * p.grad
        p *= 3
        p /= 2
        p += 1
        p **= 2
        p @= np.eye(2, dtype=np.float32)
    assert p is kept and p.requires_grad and p.data.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="changed in place"):
        spent.sum().backward()
    with pytest.raises(RuntimeError, match=r"within no_grad\(\)"):
        p -= 0.5 * p.grad
    with pytest.raises(RuntimeError, match=r"within no_grad\(\)"):
        p **= 2
    with pytest.raises(RuntimeError, match=r"within no_grad\(\)"):
        p @= np.eye(2)
    with no_grad(), pytest.raises(ValueError, match="broadcast"):
        p -= np.ones((3, 2), np.float32)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_and_an_array_of_objects_become_plain_arrays() -> None:
    x = Tensor(np.matrix([[1, 2], [3, 4]]))
    assert (x * x).data.tolist() == [[1, 4], [9, 16]] and type(x.data) is np.ndarray
    mixed = np.array([1, 2.5, np.float32(3), True], object)
    assert Tensor(mixed).dtype == np.float32 and Tensor(mixed).data.tolist() == [1, 2.5, 3, 1]
    assert Tensor(mixed, dtype="float64").dtype == np.float64


def test_a_frozen_parameter_changes_in_place() -> None:
    average = kept = nn.Parameter([1.0, 2.0])
    average.requires_grad = False
    x = Tensor([3.0, 4.0], requires_grad=True)
    y = x * average
    average *= 0.5
    with no_grad():
        average += 0.5 * x
    assert average is kept and average.data.tolist() == [2, 3]
    with pytest.raises(RuntimeError, match="an array of 'mul' was changed in place"):
        y.sum().backward()


def test_another_name_gets_a_new_tensor() -> None:
    """With and without a tape, so that a layer computes the same in training and in decoding."""
    batch = np.ones((2, 3), np.float32)
    x = first = Tensor(batch)
    with no_grad():
        x += 1
        x *= Tensor(np.ones((4, 1, 1)))
        x @= Tensor(np.ones((3, 5), np.float32))
    assert first.data is batch and batch.max() == 1 and x.shape == (4, 2, 5)


def test_a_result_that_grows_keeps_its_gradients() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = first = x * 2
    y += x
    y.sum().backward()
    assert y is not first and first.data.tolist() == [2, 4] and x.grad.tolist() == [3, 3]


def test_a_dtype_where_requires_grad_stands_is_an_error() -> None:
    """The second argument of np.array is the dtype."""
    for second in (np.float64, "float64", "cpu", np.dtype("int64"), ml_dtypes.bfloat16):
        with pytest.raises(TypeError, match=r"requires_grad must be True or False, .*dtype="):
            Tensor([1, 2], second)  # type: ignore[arg-type]
    for first, second in ((2, 3), ([1, 2], [3, 4]), ((1, 2), (3, 4))):
        with pytest.raises(TypeError, match=r"more numbers stand in one list, Tensor\(\[…\]\)"):
            Tensor(first, second)  # type: ignore[arg-type]
    for second, expected in ((np.bool_(True), True), (1, True), (0, False), (None, False)):
        assert Tensor([1, 2], second).requires_grad is expected  # type: ignore[arg-type]


def test_integers_never_take_a_gradient_which_would_be_rounded_to_0() -> None:
    counts = Tensor(np.arange(3))
    counts.requires_grad = True
    weights = Tensor([0.1, 0.2, 0.3], requires_grad=True)
    weights.data = np.arange(3)
    for t in (counts, weights):
        with pytest.raises(ValueError, match="int64 cannot require a gradient: use a float"):
            t * 0.5
        with pytest.raises(ValueError, match="int64 cannot require a gradient: use a float"):
            t.backward(np.ones(3))
        assert t.grad is None
        with no_grad():
            assert (t * 0.5).data.tolist() == [0, 0.5, 1]


def test_a_copied_result_has_no_tape() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    for y, made_by in ((x * 2, "mul"), (x.astype("float64"), "leaf")):
        for twin in (copy.deepcopy(y), pickle.loads(pickle.dumps(y))):
            assert twin.data.tolist() == y.data.tolist()
            for result in (twin, twin + x):  # never a gradient without the part through the copy
                with pytest.raises(RuntimeError, match=f"tape at 'copy of {made_by}': compute it"):
                    result.backward(np.ones(2))
                assert x.grad is None
    copy.copy(x * 2).sum().backward()  # a second name for the same result
    assert x.grad.tolist() == [2, 2]
    for twin in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        (twin * twin).sum().backward()
        assert twin.requires_grad and twin.grad.tolist() == [4, 6] and x.grad.tolist() == [2, 2]


def test_a_gradient_set_to_0_starts_anew() -> None:
    """As micrograd's users forget a gradient."""
    for shape in ((3,), ()):
        x = Tensor(np.ones(shape), requires_grad=True)
        for use in (lambda x: x[...] * 2, lambda x: x[None][np.array([0])] * 2, lambda x: x * 2):
            for nothing in (0, 0.0):
                x.grad = nothing
                use(x).sum().backward()
                assert type(x.grad) is np.ndarray and x.grad.shape == shape and (x.grad == 2).all()
    table = Tensor(np.ones((4, 2)), requires_grad=True)
    table.grad = 0
    table[np.array([1, 1])].sum().backward()
    assert table.grad.sum(axis=1).tolist() == [0, 4, 0, 0]


def test_a_cast_says_that_it_is_one() -> None:
    cast = Tensor([1.0, 2.0], requires_grad=True).astype("float64")
    assert repr(cast).endswith("made by astype)")
    with pytest.raises(ValueError, match="parameter 0 is the result of 'astype', not a leaf"):
        optim.AdamW([cast])


def test_a_condition_is_truth_values_or_numbers() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    for condition in (None, "mask", object()):
        with pytest.raises(TypeError, match="a tensor holds numbers, not"):
            where(condition, x, 0.0)
    for mask in ([True, False], np.array([2, 0]), Tensor([1.0, 0.0]), (1, 0), [True]):
        assert where(mask, x, 0.0).data.tolist() in ([1, 0], [1, 2])


def test_a_complex_number_is_refused_not_cut() -> None:
    x = Tensor([1.0, 2.0])
    for number in (1j, np.complex64(1 + 2j), np.complex128(1)):
        for operation in (operator.mul, operator.add, operator.eq):
            with pytest.raises(TypeError, match="number"):
                operation(x, number)
    with pytest.raises(
        TypeError, match=r"\[1, 2\] is no tensor .*: Tensor\(\) makes one of a list"
    ):
        x + [1, 2]
