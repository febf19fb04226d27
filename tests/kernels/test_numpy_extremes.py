"""The kernels in NumPy at the limits of float32: many rows, huge, tiny and infinite numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from kernel_cases import parameters

from micrograd_gpt.kernels.in_numpy import kernels as in_numpy
from micrograd_gpt.layers import IGNORE, dropout_factors


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", [0.1, -1e6, 3e-30, 12345.678])
@pytest.mark.parametrize("width", [1, 3, 768, 50_000])
def test_a_row_of_equal_numbers_is_normalised_to_zeros(
    number: float, width: int, dtype: str
) -> None:
    x = np.full((3, width), number, dtype)
    weight, bias = np.full(width, 2, dtype), np.arange(width, dtype=dtype)
    y, mean, rstd = in_numpy.layer_norm_forward(x, weight, bias, 1e-5)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    np.testing.assert_array_equal(mean, x[:, :1])
    grad = np.ones_like(x)
    _, dweight, _ = in_numpy.layer_norm_backward(grad, x, weight, mean, rstd)
    np.testing.assert_array_equal(dweight, 0)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("width", [1, 5, 16])
def test_sums_over_many_rows_keep_their_digits(width: int, order: str) -> None:
    n = 1_000_003
    grad = np.asarray(np.full((n, width), 0.1, np.float32), order=order)  # type: ignore[call-overload]
    grad[::7] = 0.3
    exact = grad.sum(axis=0, dtype=np.float64)
    x, weight = np.ones((n, 1), np.float32), np.ones((1, width), np.float32)
    _, _, dbias = in_numpy.linear_backward(grad, x, weight)
    np.testing.assert_allclose(dbias, exact, rtol=1e-6)
    ones, rows = np.ones(width, np.float32), np.ones((n, 1), np.float32)
    _, dweight, dbias = in_numpy.layer_norm_backward(grad, 2 * np.ones_like(grad), ones, rows, rows)
    np.testing.assert_allclose(dweight, exact, rtol=1e-6)
    np.testing.assert_allclose(dbias, exact, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1.0, 1e18, 3e19, 1e30])
def test_gradients_of_any_size_are_clipped(size: float) -> None:
    grads = [numbers(300_000) * np.float32(size), numbers(5, 7) * np.float32(size)]
    exact = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in grads))
    before = [grad.copy() for grad in grads]
    assert in_numpy.clip_grad_norm(parameters(grads), size) == pytest.approx(exact, rel=1e-9)
    for grad, old in zip(grads, before, strict=True):
        np.testing.assert_allclose(grad, old * np.float32(size / exact), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_out_gelu_is_the_number_itself_or_0(dtype: str) -> None:
    largest = float(np.finfo(dtype).max)
    x = np.array([s * size for size in (19, 21, 1e13, 1e20, 1e38, largest) for s in (1, -1)], dtype)
    np.testing.assert_array_equal(in_numpy.gelu_forward(x), np.maximum(x, 0))
    grad = np.full_like(x, 3)
    np.testing.assert_array_equal(in_numpy.gelu_backward(grad, x), np.where(x > 0, 3, 0))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("logit", [np.inf, -np.inf, np.nan])
def test_an_ignored_row_has_no_gradient_whatever_its_logits(logit: float) -> None:
    logits, labels = numbers(4, 6), np.array([2, IGNORE, 5, IGNORE])
    expected, loss = in_numpy.cross_entropy_forward(logits, labels)
    logits[1, 3] = logits[3] = logit
    dlogits, loss_too = in_numpy.cross_entropy_forward(logits, labels)
    np.testing.assert_array_equal(dlogits, expected)
    assert loss == loss_too and not dlogits[[1, 3]].any()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_an_infinite_gradient_stops_at_a_dropped_weight() -> None:
    """Value 0 of head 0 is huge: the gradient of the weights that see it is infinite."""
    t, p, key = 6, 0.5, (7,)
    q, k, v, grad = (numbers(1, 1, t, 4, seed=i) for i in range(4))
    v[0, 0, 0] = 3e38
    grad[...] = 2
    out, log_total = in_numpy.attention_forward(q, k, v, p, key)
    dropped = dropout_factors(np.empty((1, 1, t, t), np.float32), p, key)[0, 0, :, 0] == 0
    alone = [i for i in range(t) if dropped[i]]  # queries for which it has been dropped
    assert alone and len(alone) < t and np.isfinite(out[0, 0, alone]).all()
    dq = in_numpy.attention_backward(grad, q, k, v, out, log_total, p, key)[0, :, 0, 0]
    assert np.isfinite(dq[alone]).all()


def test_no_more_threads_run_than_this_process_may_use() -> None:
    """BLAS's neither, which counts the machine's cores where a container has a few of them."""
    code = """if True:
        from micrograd_gpt.kernels.in_numpy import threads

        libraries = threads._Pool().blas
        for library in libraries:
            library.set_num_threads(2)
        threads.usable_cores = lambda: 1
        print(threads._Pool().size, *(library.num_threads for library in libraries))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert set(done.stdout.split()) == {"1"}, done.stderr
