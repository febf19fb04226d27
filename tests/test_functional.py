"""The fused operations: against central differences, against the same composed of primitives, and
the kernels against the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gradcheck import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from micrograd_gpt import Tensor, no_grad, where
from micrograd_gpt import functional as F
from micrograd_gpt.kernels import definitions_only

LEADING = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def numbers(*shape: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


# ------------------------------------------------ the same operations, composed of primitives


def composed_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ w + b


def composed_layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / (variance + eps).sqrt() * w + b


def composed_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def composed_softmax(x: Tensor) -> Tensor:
    exp = (x - x.max(-1, keepdims=True)).exp()
    return exp / exp.sum(-1, keepdims=True)


def composed_attention(qkv: Tensor, n_head: int, factors: Any = 1.0) -> Tensor:
    b, t, width = qkv.shape
    heads = qkv.reshape(b, t, 3, n_head, width // 3 // n_head)
    q, k, v = (heads[:, :, i].swapaxes(1, 2) for i in range(3))  # (B, H, T, D)
    scores = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]))
    scores = where(np.tri(t, dtype=bool), scores, -1e30)
    mixed = composed_softmax(scores) * factors @ v
    return mixed.swapaxes(1, 2).reshape(b, t, width // 3)


def composed_cross_entropy(logits: Tensor, targets: np.ndarray) -> Tensor:
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counted = np.flatnonzero(labels != F.IGNORE)
    exp = (rows - rows.max(-1, keepdims=True)).exp()
    return -(exp / exp.sum(-1, keepdims=True))[counted, labels[counted]].log().mean()


TARGETS = np.array([[0, 3, F.IGNORE], [4, 4, 1]])

# name: (fused, composed, shapes of the inputs)
OPERATIONS: dict[
    str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]
] = {
    "linear": (F.linear, composed_linear, [(2, 3, 4), (4, 5), (5,)]),
    "linear 1 row": (F.linear, composed_linear, [(4,), (4, 5), (5,)]),
    "linear no bias": (F.linear, lambda x, w: x @ w, [(2, 4), (4, 5)]),
    "layer_norm": (F.layer_norm, composed_layer_norm, [(2, 3, 8), (8,), (8,)]),
    "gelu": (F.gelu, composed_gelu, [(3, 7)]),
    "linear_gelu": (
        F.linear_gelu,
        lambda x, w, b: composed_gelu(composed_linear(x, w, b)),
        [(2, 3, 4), (4, 5), (5,)],
    ),
    "softmax": (F.softmax, composed_softmax, [(2, 3, 5)]),
    "log_softmax": (F.log_softmax, lambda x: composed_softmax(x).log(), [(2, 3, 5)]),
    "attention": (
        lambda x: F.causal_attention(x, 2),
        lambda x: composed_attention(x, 2),
        [(2, 5, 12)],
    ),
    "attention 1 token": (
        lambda x: F.causal_attention(x, 1),
        lambda x: composed_attention(x, 1),
        [(1, 1, 9)],
    ),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, TARGETS),
        lambda x: composed_cross_entropy(x, TARGETS),
        [(2, 3, 5)],
    ),
    "linear_cross_entropy": (
        lambda x, w: F.linear_cross_entropy(x, w, TARGETS),
        lambda x, w: composed_cross_entropy(x @ w.T, TARGETS),
        [(2, 3, 4), (5, 4)],
    ),
}


@pytest.fixture(params=["kernels", "definitions"])
def arithmetic(request: pytest.FixtureRequest) -> Any:
    """Run the test once with the kernels of this device and once without."""
    if request.param == "kernels":
        yield
    else:
        with definitions_only():
            yield


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients(name: str, arithmetic: None) -> None:
    fused, _, shapes = OPERATIONS[name]
    for seed in range(3):
        check_gradients(fused, *(numbers(*s, seed=seed) for s in shapes), seed=seed)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fused_equals_composed(name: str, dtype: str, arithmetic: None) -> None:
    fused, composed, shapes = OPERATIONS[name]
    results = []
    for function in (fused, composed):
        inputs = [Tensor(numbers(*s, dtype=dtype), requires_grad=True) for s in shapes]
        out = function(*inputs)
        out.backward(numbers(*out.shape, seed=1))
        results.append([out.data, *(x.grad for x in inputs)])
    # Two orders of the same few roundings: some units in the last place of the largest element.
    tolerance = {"float64": 1e-13, "float32": 3e-6}[dtype]
    for ours, oracle in zip(*results, strict=True):
        assert ours.dtype == dtype and ours.shape == oracle.shape
        np.testing.assert_allclose(ours, oracle, rtol=0, atol=tolerance * np.abs(oracle).max())


@settings(max_examples=20, deadline=None)
@given(leading=LEADING, channels=st.integers(1, 6), out=st.integers(1, 4))
def test_gradients_over_shapes(leading: tuple[int, ...], channels: int, out: int) -> None:
    x = numbers(*leading, channels)
    check_gradients(F.linear, x, numbers(channels, out), numbers(out))
    check_gradients(F.gelu, x)
    check_gradients(F.softmax, x)
    check_gradients(F.log_softmax, x)
    if channels > 1:  # one channel is always normalised to 0
        spread = x + 3 * np.arange(channels)
        check_gradients(F.layer_norm, spread, numbers(channels), numbers(channels), rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 2), t=st.integers(1, 6), heads=st.integers(1, 3), size=st.integers(1, 3))
def test_gradient_of_attention_over_shapes(b: int, t: int, heads: int, size: int) -> None:
    check_gradients(lambda x: F.causal_attention(x, heads), numbers(b, t, 3 * heads * size))


def test_embedding_adds_the_gradients_of_a_repeated_token(arithmetic: None) -> None:
    ids = np.array([[1, 1, 2], [0, 1, 3]])
    check_gradients(lambda w: F.embedding(ids, w), numbers(5, 4))
    weight = Tensor(numbers(5, 4), requires_grad=True)
    F.embedding(Tensor(ids), weight).sum().backward()
    np.testing.assert_array_equal(weight.grad[:, 0], [1, 3, 1, 1, 0])
    both = weight * 1  # not a leaf, and used in two ways: the same gradient, whichever comes first
    (F.embedding(ids, both) + 0).sum().backward()
    np.testing.assert_array_equal(weight.grad[:, 0], [2, 6, 2, 2, 0])
    (both := weight * 1).retain_grad()
    (F.embedding(ids, both).sum() + both.sum()).backward()
    np.testing.assert_array_equal(both.grad[:, 0], [2, 4, 2, 2, 1])
    both = weight * 1
    (both.sum() + F.embedding(ids, both).sum()).backward()
    np.testing.assert_array_equal(weight.grad[:, 0], [6, 14, 6, 6, 2])


@pytest.mark.parametrize("t", [1, 63, 64, 65, 130])
def test_attention_looks_only_back(t: int, arithmetic: None) -> None:
    qkv = numbers(1, t, 12)
    before = F.causal_attention(Tensor(qkv), 2).data
    qkv[0, t // 2 :] = 1e3
    after = F.causal_attention(Tensor(qkv), 2).data
    np.testing.assert_allclose(after[0, : t // 2], before[0, : t // 2], rtol=1e-12)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores_and_logits_do_not_overflow(size: float, arithmetic: None) -> None:
    with np.errstate(over="raise", invalid="raise"):
        out = F.causal_attention(Tensor(np.full((1, 4, 6), size)), 1)
        loss = F.cross_entropy(Tensor(np.array([[size, 0.0]])), np.array([0]))
    assert np.isfinite(out.data).all()
    assert loss.item() == pytest.approx(max(0.0, -size))


def test_dropout_is_a_function_of_its_key_and_keeps_the_mean(arithmetic: None) -> None:
    x = Tensor(np.ones((100, 100)), requires_grad=True)
    y = F.dropout(x, 0.25, (1, 2))
    np.testing.assert_array_equal(y.data, F.dropout(x, 0.25, (1, 2)).data)
    assert (y.data != F.dropout(x, 0.25, (1, 3)).data).any()
    assert set(np.unique(y.data)) == {0, np.float32(1 / 0.75)}
    # 10,000 draws: the standard deviation of the mean is 0.006.
    assert abs(y.data.mean() - 1) < 0.03
    check_gradients(lambda t: F.dropout(t, 0.25, (1, 2)), numbers(5, 6))
    assert F.dropout(x, 0.0, (1,)) is x
    with pytest.raises(ValueError, match="dropout probability"):
        F.dropout(x, 1.0, (1,))


@pytest.mark.parametrize("t", [5, 64, 100])
def test_attention_dropout(t: int, arithmetic: None) -> None:
    key, p = (3, 1), 0.3
    check_gradients(lambda x: F.causal_attention(x, 2, p, key), numbers(1, t, 12))
    qkv = Tensor(numbers(2, t, 12))
    factors = F.attention_dropout(key, (2, 2, t, t), p)
    kept = np.count_nonzero(factors) / factors.size
    assert abs(kept - 0.7) < 4 * math.sqrt(0.21 / factors.size)
    expected = composed_attention(qkv, 2, Tensor(factors))
    np.testing.assert_allclose(F.causal_attention(qkv, 2, p, key).data, expected.data, rtol=1e-6)


def test_cross_entropy_never_holds_more_logits_than_it_needs(
    monkeypatch: pytest.MonkeyPatch, arithmetic: None
) -> None:
    x, w = numbers(7, 4), numbers(11, 4)
    targets = np.array([1, 2, F.IGNORE, 10, 0, 5, F.IGNORE])
    whole = [Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)]
    loss = F.linear_cross_entropy(*whole, targets)
    (loss * 3).backward()
    for rows_at_once in (1, 2, 3, 6):
        monkeypatch.setattr(F, "LOGITS_AT_ONCE", rows_at_once * 11 + 5)
        parts = [Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)]
        blocked = F.linear_cross_entropy(*parts, targets)
        (blocked * 3).backward()
        assert blocked.item() == pytest.approx(loss.item(), rel=1e-14)
        for a, b in zip(parts, whole, strict=True):
            np.testing.assert_allclose(a.grad, b.grad, rtol=0, atol=1e-14)
        with no_grad():
            assert F.linear_cross_entropy(*parts, targets).item() == blocked.item()


def test_errors_name_the_mistake() -> None:
    x, w, ints = Tensor(numbers(2, 3)), Tensor(numbers(4, 5)), Tensor(np.arange(3))
    with pytest.raises(ValueError, match=r"linear: shapes do not fit: \(2, 3\) @ \(4, 5\)"):
        F.linear(x, w)
    with pytest.raises(ValueError, match=r"layer_norm: \(2, 3\) with weight \(4,\)"):
        F.layer_norm(x, Tensor(np.ones(4)), Tensor(np.ones(4)))
    with pytest.raises(ValueError, match="4 heads do not divide 3C = 18"):
        F.causal_attention(Tensor(numbers(1, 2, 18)), 4)
    with pytest.raises(ValueError, match="token id 4 is outside the vocabulary of 4"):
        F.embedding([0, 4], w)
    with pytest.raises(ValueError, match="token id -1 is outside"):
        F.embedding([0, -1], w)
    with pytest.raises(ValueError, match="token ids must be integers, not float64"):
        F.embedding([0.0], w)
    with pytest.raises(ValueError, match=r"targets \(3,\) for rows of shape \(2,\)"):
        F.cross_entropy(x, [0, 1, 2])
    with pytest.raises(ValueError, match="token id 3 is outside the vocabulary of 3"):
        F.cross_entropy(x, [0, 3])
    for mixed in (
        lambda: F.linear(x, Tensor(numbers(3, 2, dtype="float32"))),
        lambda: F.gelu(ints),
    ):
        with pytest.raises(ValueError, match="needs one float dtype, not"):
            mixed()
    with pytest.raises(ValueError, match="every target is ignored"):
        F.cross_entropy(x, [-100, -100])
