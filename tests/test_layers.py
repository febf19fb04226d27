"""The layers: one table of cases, checked by central differences, and each level by `layers.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gradcheck import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import CASES, LEVELS, numbers

from micrograd_gpt import Tensor, layers
from micrograd_gpt import functional as F
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.graph import retain_grad
from micrograd_gpt.layers import IGNORE

LEADING = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    """Run the test once at each level; the kernels in C leave float64 to those in NumPy."""
    with at_most(request.param):
        yield request.param


def test_every_layer_has_a_case() -> None:
    on_arrays = {layers.dropout_forward}
    of_the_house = {f for f in vars(layers).values() if hasattr(f, "stand_ins")} - on_arrays
    assert of_the_house | {layers.dropout} == {case.layer for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, level: str) -> None:
    case = CASES[name]
    for seed in range(3):
        arrays = [x.data for x in case.inputs("float64", seed=10 * seed)]
        check_gradients(case, *arrays, seed=seed)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("faster", LEVELS[1:])
def test_each_level_equals_the_composed_layer(name: str, dtype: str, faster: str) -> None:
    results = []
    for level in ("definitions", faster):
        inputs = CASES[name].inputs(dtype)
        with at_most(level):
            out = CASES[name](*inputs)
            out.backward(numbers(*out.shape, seed=1))
        results.append([out.data, *(x.grad for x in inputs)])
    # The same few roundings in another order: some units in the last place of the largest element.
    tolerance = {"float64": 1e-13, "float32": 3e-6}[dtype]
    for composed, ours in zip(*results, strict=True):
        assert ours.dtype == dtype and ours.shape == composed.shape
        atol = tolerance * np.abs(composed).max()
        np.testing.assert_allclose(ours, composed, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_no_layer_changes_what_it_is_given(name: str, level: str) -> None:
    inputs = CASES[name].inputs("float32")
    before = [x.data.copy() for x in inputs]
    out = CASES[name](*inputs)
    cotangent = numbers(*out.shape, seed=1, dtype="float32")
    given_before = cotangent.copy()
    out.backward(cotangent)
    np.testing.assert_array_equal(cotangent, given_before)
    for x, old in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x.data, old)


@pytest.mark.parametrize("name", ["definitions", "c"])
@settings(max_examples=15)
@given(leading=LEADING, channels=st.integers(1, 6), out=st.integers(1, 4))
def test_gradients_over_shapes(
    name: str, leading: tuple[int, ...], channels: int, out: int
) -> None:
    x = numbers(*leading, channels)
    with at_most(name):
        check_gradients(layers.linear, x, numbers(channels, out), numbers(out))
        check_gradients(layers.gelu, x)
        check_gradients(layers.softmax, x)
        check_gradients(layers.log_softmax, x)
        if channels > 1:  # one channel is always normalised to 0
            spread = x + 3 * np.arange(channels)
            weight, bias = numbers(channels), numbers(channels)
            check_gradients(layers.layer_norm, spread, weight, bias, rtol=1e-5)


@pytest.mark.parametrize("name", ["definitions", "c"])
@settings(max_examples=15)
@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    t=st.integers(1, 6),
    older=st.integers(0, 3),
    size=st.integers(1, 3),
)
def test_gradient_of_attention_over_shapes(
    name: str, heads: tuple[int, int], t: int, older: int, size: int
) -> None:
    q = numbers(*heads, t, size)
    k, v = (numbers(*heads, older + t, size, seed=seed) for seed in (1, 2))
    with at_most(name):
        check_gradients(layers.attention, q, k, v)


def test_heads_may_share_their_keys_and_values(level: str) -> None:
    q = numbers(2, 3, 4, 5)
    k, v = (numbers(2, 1, 6, 5, seed=seed) for seed in (1, 2))  # as in multi-query attention
    check_gradients(layers.attention, q, k, v)
    shared = layers.attention(Tensor(q), Tensor(k), Tensor(v)).data
    each = layers.attention(Tensor(q), *(Tensor(a.repeat(3, axis=1)) for a in (k, v))).data
    np.testing.assert_allclose(shared, each, rtol=1e-5, atol=1e-6)
    identity = np.eye(6, dtype=np.float32)  # as a value for each key: the weights themselves
    weights = layers.attention(Tensor(q), Tensor(k), Tensor(identity)).data
    np.testing.assert_allclose(weights @ v, shared, rtol=1e-5, atol=1e-6)


def test_embedding_adds_the_gradients_of_a_repeated_token(level: str) -> None:
    ids = np.array([[1, 1, 2], [0, 1, 3]])
    weight = Tensor(numbers(5, 4), requires_grad=True)
    layers.embedding(Tensor(ids), weight).sum().backward()
    np.testing.assert_array_equal(weight.grad[:, 0], [1, 3, 1, 1, 0])
    both = weight * 1  # not a leaf, and used in two ways: the same gradient, whichever comes first
    (layers.embedding(ids, both) + 0).sum().backward()
    np.testing.assert_array_equal(weight.grad[:, 0], [2, 6, 2, 2, 0])
    retain_grad(both := weight * 1)
    (layers.embedding(ids, both).sum() + both.sum()).backward()
    np.testing.assert_array_equal(both.grad[:, 0], [2, 4, 2, 2, 1])
    both = weight * 1
    (both.sum() + layers.embedding(ids, both).sum()).backward()
    np.testing.assert_array_equal(weight.grad[:, 0], [6, 14, 6, 6, 2])


@pytest.mark.parametrize("t", [1, 63, 64, 65, 130])
def test_attention_looks_only_back(t: int, level: str) -> None:
    q, k, v = (numbers(1, 2, t, 3, seed=seed) for seed in range(3))
    before = layers.attention(Tensor(q), Tensor(k), Tensor(v)).data.copy()
    for array in (q, k, v):
        array[:, :, t // 2 :] = 1e3
    after = layers.attention(Tensor(q), Tensor(k), Tensor(v)).data
    np.testing.assert_allclose(after[:, :, : t // 2], before[:, :, : t // 2], rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float64", [20.0, 25.0, 1e20, 1e200, 1.7e308]),
        ("float32", [20.0, 25.0, 1e13, 1e20, 3e38]),
        ("bfloat16", [20.0, 1e20, 3e38]),
        ("float16", [20.0, 60_000.0]),
    ],
)
def test_far_out_gelu_is_the_number_or_0_with_slope_1_or_0(
    dtype: str, sizes: list[float], level: str
) -> None:
    x = Tensor(np.array([*sizes, *np.negative(sizes)]), requires_grad=True, dtype=dtype)
    is_positive = x.data > 0
    with np.errstate(all="ignore"):
        y = layers.gelu(x)
        y.backward(np.full(len(is_positive), 3.0))
    assert y.dtype == x.grad.dtype == dtype
    np.testing.assert_array_equal(y.data, np.where(is_positive, x.data, 0))
    np.testing.assert_array_equal(x.grad, np.where(is_positive, 3, 0))


def test_gelu_of_infinity_and_nan(level: str) -> None:
    """As PyTorch computes them, but for the slope at infinity, which is NaN there."""
    x = Tensor([np.inf, -np.inf, np.nan], requires_grad=True)
    with np.errstate(all="ignore"):
        y = layers.gelu(x)
        y.backward(np.full(3, 3.0))
    np.testing.assert_array_equal(y.data, [np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(x.grad, [3, 0, np.nan])


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_large_scores_and_logits_do_not_overflow(size: float, dtype: str, level: str) -> None:
    same = Tensor(np.full((1, 1, 4, 2), size, dtype))
    with np.errstate(over="raise", invalid="raise"):
        out = layers.attention(same, same, same)
        loss = layers.cross_entropy(Tensor(np.array([[size, 0.0]], dtype)), np.array([0]))
        probabilities = layers.softmax(Tensor(np.array([size, 0.0], dtype)))
    assert np.isfinite(out.data).all() and np.isfinite(probabilities.data).all()
    assert loss.item() == pytest.approx(max(0.0, -size))


def test_softmax_is_a_distribution_and_log_softmax_its_logarithm() -> None:
    x = Tensor(numbers(3, 7) * 5)
    probabilities = layers.softmax(x).data
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(layers.log_softmax(x).data), probabilities, rtol=1e-12)
    far = layers.log_softmax(Tensor([0.0, -1e4], dtype="float64"))  # whose softmax is 0
    assert far.data[1] == -1e4


def test_dropout_is_a_function_of_its_key_and_keeps_the_mean(level: str) -> None:
    x = Tensor(np.ones((100, 100)), requires_grad=True)
    y = layers.dropout(x, 0.25, (1, 2))
    np.testing.assert_array_equal(y.data, layers.dropout(x, 0.25, (1, 2)).data)
    assert (y.data != layers.dropout(x, 0.25, (1, 3)).data).any()
    assert set(np.unique(y.data)) == {0, np.float32(1 / 0.75)}
    # 10,000 draws: the standard deviation of the mean is 0.006.
    assert abs(y.data.mean() - 1) < 0.03
    np.testing.assert_array_equal(layers.dropout(x, 0.0, (1,)).data, x.data)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\), not 1"):
        layers.dropout(x, 1.0, (1,))


def test_every_level_drops_the_same_elements() -> None:
    """So that a run can be stepped through in `layers.py` from the same seed."""
    x = Tensor(np.ones((40, 50), np.float32))
    drawn = []
    for name in LEVELS:
        with at_most(name):
            drawn.append(layers.dropout(x, 0.25, (1, 2)).data)
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


@pytest.mark.parametrize("t", [5, 64, 100])
def test_attention_dropout(t: int, level: str) -> None:
    """The weights are multiplied by factors that only the key decides, and about 70% are kept."""
    key, p = (3, 1), 0.3
    # With the identity as values, the result is the weights themselves, after dropout.
    q, k = (Tensor(numbers(2, 2, t, t, seed=seed)) for seed in range(2))
    identity = Tensor(np.broadcast_to(np.eye(t), q.shape))
    whole = layers.attention(q, k, identity).data
    dropped = layers.attention(q, k, identity, p, key).data
    seen = whole > 0
    kept = dropped[seen] != 0
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.21 / kept.size)
    np.testing.assert_allclose(dropped[seen][kept], whole[seen][kept] / 0.7, rtol=1e-6)
    again = layers.attention(q, k, identity, p, key).data
    np.testing.assert_array_equal(again, dropped)
    assert (layers.attention(q, k, identity, p, (3, 2)).data != dropped).any()


def test_ignored_targets_count_for_nothing(level: str) -> None:
    logits, targets = numbers(5, 7), np.array([1, IGNORE, 6, IGNORE, 0])
    x, counted = (Tensor(a, requires_grad=True) for a in (logits, logits[[0, 2, 4]]))
    loss, alone = (
        layers.cross_entropy(x, targets),
        layers.cross_entropy(counted, targets[[0, 2, 4]]),
    )
    assert loss.item() == pytest.approx(alone.item(), rel=1e-14)
    loss.backward()
    alone.backward()
    assert not x.grad[[1, 3]].any()
    np.testing.assert_allclose(x.grad[[0, 2, 4]], counted.grad, rtol=1e-13)


def test_errors_name_the_layer_and_the_mistake(level: str) -> None:
    x, w = Tensor(numbers(2, 3)), Tensor(numbers(4, 5))
    with pytest.raises(ValueError, match=r"^linear: "):
        layers.linear(x, w)
    with pytest.raises(ValueError, match=r"^linear: "):
        layers.linear(x, Tensor(numbers(3, 5)), Tensor(numbers(4)))
    with pytest.raises(ValueError, match=r"^layer_norm: "):
        layers.layer_norm(x, Tensor(np.ones(4)), Tensor(np.ones(4)))
    heads = [Tensor(numbers(1, 2, t, d)) for t, d in ((3, 4), (3, 5), (3, 4))]
    with pytest.raises(ValueError, match=r"^attention: "):
        layers.attention(*heads)
    for ids, message in (
        ([0, 4], "token id 4 is outside the vocabulary of 4"),
        ([0, -1], "token id -1 is outside"),
        (np.int64(-1), "token id -1 is outside"),
        ([0.0], "token ids must be integers, not float64"),
        (Tensor([0, 1]), "token ids must be integers, not float32: a list or array of int"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.embedding(ids, w)
    for targets, message in (
        ([0, 1, 2], r"targets of shape \(3,\) for rows of shape \(2,\)"),
        ([0, 3], "token id 3 is outside the vocabulary of 3"),
        ([0, -1], "token id -1 is outside"),
        ([IGNORE, IGNORE], "every target is ignored"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.cross_entropy(x, targets)
        with pytest.raises(ValueError, match=message):
            layers.linear_cross_entropy(x, Tensor(numbers(3, 3)), targets)


def test_ids_of_another_library_are_taken_as_numpy_takes_them() -> None:
    class Ids:
        dtype = "int64 of another library"

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            return np.array([2, 0])

    w = Tensor(numbers(4, 3))
    np.testing.assert_array_equal(layers.embedding(Ids(), w).data, w.data[[2, 0]])


def test_masked_targets_are_refused(level: str) -> None:
    """The others' mean would be taken of all of them."""
    masked = np.ma.array([0, 1], mask=[False, True])
    with pytest.raises(TypeError, match="no masked numbers"):
        layers.cross_entropy(Tensor(numbers(2, 3)), masked)


def test_what_is_no_tensor_and_what_is_no_argument_is_named(level: str) -> None:
    x, w = Tensor(numbers(2, 3)), Tensor(numbers(3, 4))
    for bias in (numbers(4), [0.0] * 4, 1.0):
        with pytest.raises(TypeError, match=r"^linear: bias must be a Tensor, .* Tensor\(bias\)"):
            layers.linear(x, w, bias)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^softmax\(\) got an unexpected keyword argument 'dim'"):
        layers.softmax(x, dim=-1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^linear\(\) missing a required argument: 'x'"):
        layers.linear(input=x, weight=w)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^sum\(\) got an unexpected keyword argument 'dim'"):
        x.sum(dim=0)  # type: ignore[call-arg]
    array = numbers(2, 3)
    expected = layers.dropout(Tensor(array), 0.5, (1,)).data
    np.testing.assert_array_equal(layers.dropout(array, 0.5, (1,)).data, expected)  # type: ignore[arg-type]


def test_fused_layers_name_shapes_of_too_few_or_too_many_axes() -> None:
    one, row, w = Tensor(1.0), Tensor(numbers(3)), Tensor(numbers(3, 4))
    with pytest.raises(ValueError, match=r"^linear: shapes \[\(\), \(3, 4\)\] do not fit"):
        layers.linear(one, w)
    with pytest.raises(ValueError, match=r"^linear: shapes \[\(3,\), \(3,\)\] do not fit"):
        layers.linear(row, row)
    with pytest.raises(ValueError, match=r"^layer_norm: shapes \[\(\), \(\), \(\)\] do not fit"):
        layers.layer_norm(one, one, one)
    for shape in ((1, 2, 6), (1, 2, 4, 2, 2), (1, 2, 3, 2)):
        with pytest.raises(ValueError, match=r"^self_attention: shapes .* do not fit"):
            layers.self_attention(Tensor(numbers(*shape)))


def test_the_names_of_functional_are_those_of_layers() -> None:
    """`functional as F` is the public name; every layer is there, whether it is fused or not."""
    for case in CASES.values():
        assert getattr(F, case.layer.__name__) is case.layer


def test_arguments_may_be_given_by_name(level: str) -> None:
    x, w, b = (Tensor(numbers(*s)) for s in ((2, 3), (3, 4), (4,)))
    expected = layers.linear(x, w, b).data
    np.testing.assert_array_equal(layers.linear(x, weight=w, bias=b).data, expected)
    np.testing.assert_array_equal(layers.linear(x=x, weight=w, bias=b).data, expected)


@pytest.mark.parametrize("value", [0.1, 1e6, -3e-5])
@pytest.mark.parametrize("width", [1, 7, 48, 768])
def test_layer_norm_of_equal_numbers_is_exactly_its_bias(
    value: float, width: int, level: str
) -> None:
    """Their mean, rounded, is not quite their value, and 1 / deviation would make much of it."""
    x = Tensor(np.full((3, width), value, np.float32), requires_grad=True)
    weight, bias = (Tensor(numbers(width, seed=i, dtype="float32"), True) for i in range(2))
    y = layers.layer_norm(x, weight, bias)
    np.testing.assert_array_equal(y.data, np.broadcast_to(bias.data, y.shape))
    y.backward(numbers(3, width, seed=2, dtype="float32"))
    np.testing.assert_array_equal(weight.grad, 0)


def test_bias_gradients_of_many_rows_keep_their_digits(level: str) -> None:
    rows = 400_000 if level == "definitions" else 1_000_000
    grad = np.random.default_rng(0).random((rows, 2), np.float32)
    x = Tensor(np.ones((rows, 2), np.float32) * [0.5, -0.5], dtype="float32")
    weight, bias = (Tensor(np.ones(s, np.float32), requires_grad=True) for s in ((2, 2), (2,)))
    scale, shift = (Tensor(np.ones(2, np.float32), requires_grad=True) for _ in range(2))
    layers.linear(x, weight, bias).backward(grad)
    layers.layer_norm(x, scale, shift).backward(grad)
    exact = grad.sum(axis=0, dtype=np.float64)
    for parameter in (bias, shift):
        np.testing.assert_allclose(parameter.grad, exact, rtol=3e-6)
    np.testing.assert_allclose(scale.grad, exact * [1, -1], rtol=1e-4)  # 1 / deviation is rounded


@pytest.mark.parametrize("t", [1, 2, 4, 5, 64, 70])
def test_attention_with_large_scores_has_right_gradients(t: int, level: str) -> None:
    """The backward computes the weights again: by other rounding they would be others."""
    qkv = numbers(1, t, 3, 2, 16, seed=t) * 30  # scores in the thousands
    grad = numbers(1, t, 2, 16, seed=1)
    found = {}
    for dtype in ("float64", "float32"):
        x = Tensor(qkv.astype(np.float32).astype(dtype), requires_grad=True)
        layers.self_attention(x).backward(grad.astype(dtype))
        found[dtype] = x.grad
    values = found["float64"][:, :, 2]
    error = np.abs(found["float32"][:, :, 2] - values).max() / np.abs(values).max()
    assert error < 5e-3  # a score of 5,000 in float32 is off by 3e-4, and its weight by as much


def test_targets_and_ids_may_be_used_again_by_their_owner(level: str) -> None:
    ids, targets = np.array([0, 1, 1]), np.array([2, 0, IGNORE])
    found = []
    for spoil in (False, True):
        table, head = (
            Tensor(numbers(3, 4, seed=i, dtype="float32"), requires_grad=True) for i in (0, 1)
        )
        some_ids, some_targets = ids.copy(), targets.copy()
        x = layers.embedding(some_ids, table)
        loss = layers.linear_cross_entropy(x, head, some_targets)
        loss = loss + layers.cross_entropy(x, some_targets)
        if spoil:
            some_ids[:], some_targets[:] = 10**9, -(10**9)
        loss.backward()
        found.append((table.grad, head.grad))
    for right, ours in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, right)


def test_rows_whose_target_is_ignored_get_no_gradient_whatever_they_hold(level: str) -> None:
    logits = numbers(4, 5, dtype="float32")
    logits[1], logits[2, 0] = np.nan, np.inf
    x = Tensor(logits, requires_grad=True)
    with np.errstate(invalid="ignore"):
        layers.cross_entropy(x, np.array([1, IGNORE, IGNORE, 0])).backward()
    assert level == "definitions" or not x.grad[1:3].any()
    assert np.isfinite(x.grad[[0, 3]]).all()
