"""The tape and the primitive operations."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from gradcheck import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from micrograd_gpt import Tensor, concatenate, draw_graph, no_grad, where
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
    """Numbers of size 0.5 and more: no kink and no pole within a difference's reach."""
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
    "where": lambda x: where(x > 0, x * 2, -3.0),
    "masked_fill": lambda x: (x * x).masked_fill(x < 0, 7.0),
    "astype": lambda x: x.astype("float64") * 2,
    "used twice": lambda x: x * x + x.exp() * x,
}
TWO_INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "where": lambda x, y: where(x > y, x, y * 2),
}


@pytest.mark.parametrize("name", ONE_INPUT)
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_gradient_of_one_input(name: str, shape: tuple[int, ...], seed: int) -> None:
    x = away_from_zero(np.random.default_rng(seed).standard_normal(shape))
    check_gradients(ONE_INPUT[name], x, seed=seed)


@pytest.mark.parametrize("name", TWO_INPUTS)
@settings(max_examples=25, deadline=None)
@given(shapes=broadcastable(2), seed=st.integers(0, 2**31))
def test_gradient_of_two_inputs(name: str, shapes: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (away_from_zero(rng.standard_normal(shape)) for shape in shapes)
    check_gradients(TWO_INPUTS[name], x, y, seed=seed)


@settings(max_examples=25, deadline=None)
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


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_gradient_of_reductions(name: str, data: st.DataObject, shape: tuple[int, ...]) -> None:
    axes = st.integers(-len(shape), len(shape) - 1)
    axis = data.draw(st.none() | axes | st.just(tuple(range(len(shape)))))
    keepdims = data.draw(st.booleans())
    # Distinct numbers, far apart: a difference must not change which one is largest.
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
    # The expression of micrograd's README, whose figures PyTorch confirms.
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


def test_gradients_accumulate_into_leaves_and_into_arrays_of_their_own() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = Tensor([3.0, 4.0], requires_grad=True)
    total = x + y  # hands one and the same gradient to both
    cotangent = np.array([1.0, 10.0], np.float32)
    total.backward(cotangent)
    (x * 1.0).backward(cotangent)
    np.testing.assert_array_equal(x.grad, [2, 20])
    np.testing.assert_array_equal(y.grad, [1, 10])
    np.testing.assert_array_equal(cotangent, [1, 10])
    x.backward(cotangent)
    np.testing.assert_array_equal(x.grad, [3, 30])


def test_a_gradient_shared_by_add_is_never_added_into() -> None:
    x = Tensor([1.0], requires_grad=True)
    y = x * 2
    z = y + y * 3 + y  # y's gradient comes in three parts, two of them the same array
    w = Tensor([0.0], requires_grad=True)
    (z + w).backward(np.array([1.0]))
    assert x.grad[0] == 10 and w.grad[0] == 1


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
    del z  # a deep tape that is dropped unused must not overflow the stack either


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
    y = (x * 3).retain_grad()
    z = x * 5
    (y * y + z).sum().backward()
    assert y.grad[0] == 12 and z.grad is None and x.grad[0] == 41


def test_errors_name_the_mistake() -> None:
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(ValueError, match=r"add: shapes \(2, 3\) and \(4,\) do not broadcast"):
        x + Tensor(np.ones(4))
    with pytest.raises(ValueError, match=r"matmul: shapes \(2, 3\) and \(2, 3\) do not fit"):
        x @ x
    with pytest.raises(ValueError, match=r"where: shapes \(4,\), \(2, 3\) and \(\)"):
        where(np.ones(4, bool), x, 0.0)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\), \(2, 4\) do not line up on axis 0"):
        concatenate([x, Tensor(np.ones((2, 4)))])
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) needs a cotangent"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=r"cotangent of shape \(3,\) for \(2, 3\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="needs no gradient"):
        Tensor(1.0).backward()
    with pytest.raises(ValueError, match=r"a tensor of one element; this one has shape \(2, 3\)"):
        x.item()
    with pytest.raises(TypeError, match="only a number can be an exponent"):
        x**x


def test_backward_twice_is_an_error_and_changes_nothing() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    shared = x * 2
    first, second = shared.sum(), (shared * x).sum()
    first.backward()
    before = x.grad.copy()
    for spent in (first, second):
        with pytest.raises(RuntimeError, match="freed by a backward"):
            spent.backward()
    np.testing.assert_array_equal(x.grad, before)


class FakeGPUArray:
    """Something that lives elsewhere: no NumPy array, yet with a shape and a dtype."""

    shape, dtype, base, ndim = (2,), np.dtype("float32"), None, 1


def test_mixing_devices_is_an_error_that_names_both() -> None:
    here, there = Tensor([1.0, 2.0]), Tensor(FakeGPUArray())
    with pytest.raises(ValueError, match=r"mul: .*\(2,\) on cpu, \(2,\) on gpu.*\.to\(\)"):
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
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x > 0)


def test_numbers_of_other_kinds() -> None:
    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    assert (x ** np.int64(2)).dtype == np.float32 and (np.float64(2) * x).dtype == np.float32
    whole = Tensor(np.array([16777217, 1]))
    assert (whole + 16777217).data[0] == 33554434 and (whole * 0.5).dtype.kind == "f"
    assert Tensor(np.full(3, 100000001)).mean().item() == 100000001
    assert x.sum(np.int64(0)).item() == 2
    assert not x.astype("int64").requires_grad
    for wrong in (None, "3"):
        with pytest.raises(TypeError, match="combines with tensors, arrays and numbers"):
            x + wrong
    for axes in ((0, 3), (0, 0), (0,)):
        with pytest.raises(ValueError, match="do not permute"):
            Tensor(np.zeros((2, 3))).transpose(*axes)


def test_draw_graph_draws_scalars_and_says_when_it_is_too_late() -> None:
    x = Tensor(2.0, requires_grad=True)
    loss = x * x
    assert draw_graph(loss).count("n0 -> n1") == 2 and "leaf" in draw_graph(x)
    loss.backward()
    with pytest.raises(RuntimeError, match="before drawing it"):
        draw_graph(loss)


def test_draw_graph_names_operations_shapes_and_dtypes() -> None:
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    w = Tensor(np.ones((3, 1), np.float32), requires_grad=True)
    dot = draw_graph(((x @ w).tanh() + (x @ w)).sum())
    assert dot.startswith("digraph") and dot.rstrip().endswith("}")
    for label in ("matmul", "tanh", "add", "sum", r"(2, 1) float32", r"leaf\n(2, 3) float32"):
        assert label in dot
    assert dot.count("leaf") == 2 and dot.count("->") == 2 * 2 + 1 + 2 + 1


def test_a_tensor_shows_itself() -> None:
    x = Tensor([1.0], requires_grad=True)
    assert "requires_grad=True" in repr(x) and "made by mul" in repr(x * 2)
    assert len(x) == 1 and x.ndim == 1 and x.size == 1 and x.device == "cpu"
    assert x.numpy() is x.data and Tensor(x).data is x.data
