"""Numbers that float32 has trouble with, in the C kernels: large, equal, many and infinite ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_cases import parameters

from micrograd_gpt import functional as F
from micrograd_gpt import optim
from micrograd_gpt.arrays.stand_ins import NotForMe, at_most
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.kernels.in_c import kernels as compiled

pytestmark = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)

EPS = float(np.finfo(np.float32).eps)
MANY = 2**20  # rows
TOTAL = 1e-6  # the error of a sum over so many rows, relative to the sum of the absolute values


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype("float32")


# ------------------------------------------------------------------------------------ attention

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 13, 97)


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("d", [1, 7, 32, 33, 64])
def test_attention_backward_sees_the_weights_of_the_forward(t: int, d: int) -> None:
    """With all values 1 and a gradient of 1 for one query, dv is that query's weights: their sum is
    1, as the forward's is, up to the rounding of log_total. Scores are a million here, so that a
    score whose last bit differs changes its weight by several percent."""
    q, k = numbers(2, 1, 3, t, d) * 1000 / d**0.25
    out, log_total = F.attention_forward(q, k, k, 0.0, ())
    for query in {0, t // 2, t - 1}:
        grad = np.zeros_like(q)
        grad[:, :, query] = 1
        dv = F.attention_backward(grad, q, k, np.ones_like(k), out, log_total, 0.0, ())[:, :, 2]
        ours = dv.sum(axis=1)  # (B, H, D)
        # Where two scores are close, log_total is not the larger one, and is rounded.
        rounding = np.expm1(EPS * np.abs(log_total[:, :, query, None]))
        assert (np.abs(ours - 1) <= 1e-5 + rounding).all()


@pytest.mark.parametrize("t", LENGTHS)
def test_attention_to_one_token_alone_is_exact(t: int) -> None:
    """Each query's score for itself exceeds all others by thousands: dv is the gradient, bit for
    bit, as the weights are 1 and 0."""
    across = np.linalg.qr(np.random.default_rng(0).standard_normal((97, 97)))[0][:t]
    q = np.ascontiguousarray(np.broadcast_to(across * 300, (1, 2, t, 97)), np.float32)
    v, grad = numbers(1, 2, t, 97), numbers(1, 2, t, 97, seed=1)
    out, log_total = F.attention_forward(q, q, v, 0.0, ())
    np.testing.assert_array_equal(out, v)
    dv = F.attention_backward(grad, q, q, v, out, log_total, 0.0, ())[:, :, 2]
    np.testing.assert_array_equal(dv.swapaxes(1, 2), grad)


# ----------------------------------------------------------------------------------- layer norm


@pytest.mark.parametrize("value", [1e6, 0.1, -3.3e-5, 7e30, 1.0])
@pytest.mark.parametrize("width", [1, 3, 97, 768, 5000])
def test_layer_norm_of_equal_numbers_is_exactly_the_bias(value: float, width: int) -> None:
    x = np.full((40, width), value, np.float32)
    weight, bias, grad = numbers(width), numbers(width, seed=1), numbers(40, width, seed=2)
    y, mean, rstd = F.layer_norm_forward(x, weight, bias, 1e-5)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    np.testing.assert_array_equal(mean, np.full((40, 1), value, np.float32))
    dweight = F.layer_norm_backward(grad, x, weight, mean, rstd)[1]
    np.testing.assert_array_equal(dweight, np.zeros(width))


# ------------------------------------------------------------------------------ sums of many rows


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["equal", "positive", "random"])
def test_a_bias_gradient_of_a_million_rows(kind: str) -> None:
    grad = many_rows(kind)
    x, weight = numbers(MANY, 1), numbers(1, grad.shape[1])
    dbias = F.linear_backward(grad, x, weight)[2]
    assert error_of_sums(dbias, grad) < TOTAL


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["equal", "positive", "random"])
def test_layer_norm_gradients_of_a_million_rows(kind: str) -> None:
    grad = many_rows(kind)
    x = np.broadcast_to(numbers(grad.shape[1]), grad.shape)  # the same row again and again
    weight = numbers(grad.shape[1])
    _, mean, rstd = F.layer_norm_forward(x, weight, weight, 1e-5)
    _, dweight, dbias = F.layer_norm_backward(grad, x, weight, mean, rstd)
    assert error_of_sums(dbias, grad) < TOTAL
    normed = (x[:1].astype("float64") - mean[:1]) * rstd[:1]
    assert error_of_sums(dweight, grad * normed) < TOTAL


def many_rows(kind: str) -> np.ndarray:
    if kind == "equal":
        return np.full((MANY, 5), 0.1, np.float32)
    random = numbers(MANY, 5)
    return np.abs(random) if kind == "positive" else random


def error_of_sums(sums: np.ndarray, rows: np.ndarray) -> float:
    wide = rows.astype("float64")
    return float((np.abs(sums - wide.sum(axis=0)) / np.abs(wide).sum(axis=0)).max())


# ------------------------------------------------------------------------------- gradient norms


@pytest.mark.parametrize("size", [3e-30, 1e-25, 1.0, 3e19, 5e37])
def test_the_norm_of_any_finite_gradients_is_right(size: float) -> None:
    grads = [numbers(300, 400) * np.float32(size), numbers(5) * np.float32(size)]
    exact = np.sqrt(sum(float((grad.astype("float64") ** 2).sum()) for grad in grads))
    before = [grad.copy() for grad in grads]
    assert optim.clip_grad_norm(parameters(grads), exact * 2) == pytest.approx(
        exact, rel=1e-6, abs=0
    )
    for grad, old in zip(grads, before, strict=True):
        np.testing.assert_array_equal(grad, old)


def test_gradients_that_share_memory_are_scaled_one_after_another() -> None:
    """What two of them have in common is scaled twice, as the definition does it."""
    whole = numbers(300, 1000)
    for views in (lambda x: (x[:200], x[100:]), lambda x: (x, x[150:160]), lambda x: (x, x)):
        ours, expected = whole.copy(), whole.copy()
        with at_most("definitions"):
            norm = optim.clip_grad_norm(parameters(views(expected)), 1.0)
        assert optim.clip_grad_norm(parameters(views(ours)), 1.0) == pytest.approx(norm, rel=1e-12)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        with pytest.raises(NotForMe):  # its threads would scale them at once
            compiled.clip_grad_norm(parameters(views(ours)), 1.0)


# -------------------------------------------------------------- infinities, and what is no number


@pytest.mark.parametrize("places", [(0,), (1,), (5, 6), range(7)])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_cross_entropy_of_such_logits_is_as_defined(places: list[int], bad: float) -> None:
    logits = numbers(9, 7) * 3
    logits[2:7, list(places)] = bad
    logits[7] = [0, -86, -87, -88, -100, -104, -1e30]
    labels = np.array([0, 1, 0, 1, 5, 6, F.IGNORE, 0, 3])
    dlogits, loss = F.cross_entropy_forward(logits, labels)
    with np.errstate(invalid="ignore"):
        expected, expected_loss = F.cross_entropy_forward.definition(logits, labels)  # type: ignore[attr-defined]
    expected[labels == F.IGNORE] = 0  # whatever the logits there are
    np.testing.assert_allclose(dlogits, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    if bad == -np.inf and len(places) < 7:  # a token that is ruled out
        assert (dlogits[2][list(places)] == [-1.0 if i == 0 else 0.0 for i in places]).all()


def test_gelu_of_any_number_is_as_defined() -> None:
    sizes = [0, 1e-45, 1e-38, 1e-5, 1, 4, 7, 10, 13, 1e3, 1e13, 1e19, 1e20, 3e38, np.inf, np.nan]
    x = np.array([sign * size for sign, size in itertools.product((1, -1), sizes)], np.float32)
    grad = numbers(len(x))
    with np.errstate(all="ignore"):
        forward = F.gelu_forward.definition(x)  # type: ignore[attr-defined]
        x64 = x.astype(float)  # in which 1e20 ** 3 does not overflow
        backward = F.gelu_backward.definition(grad, x64)  # type: ignore[attr-defined]
    backward[x == np.inf], backward[x == -np.inf] = grad[x == np.inf], 0
    np.testing.assert_allclose(F.gelu_forward(x), forward, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(F.gelu_backward(grad, x), backward, rtol=1e-5, atol=1e-6)
