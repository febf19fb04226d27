"""Tests of the fused layers alone; test_layers.py compares them with the composed ones."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from layer_cases import CASES, numbers

from micrograd_gpt import Tensor, layers, no_grad
from micrograd_gpt import functional as F
from micrograd_gpt.arrays import memory
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.kernels import linear_cross_entropy as in_parts
from micrograd_gpt.layers import IGNORE

FUSED = {  # those with a backward; attention's stand-in has none, since a KV cache needs none
    name: case
    for name, case in CASES.items()
    if "fused" in getattr(case.layer, "stand_ins", {}) and case.layer is not layers.attention
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_is_one_operation_on_the_tape(name: str) -> None:
    with at_most("fused"):
        out = FUSED[name](*FUSED[name].inputs("float64"))
    assert out._node is not None
    assert all(parent.name == "leaf" for parent in out._node.parents)


@pytest.mark.parametrize("level", ["fused", "numpy", "c"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cross_entropy_never_holds_more_logits_than_it_needs(
    level: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = numbers(7, 4, dtype=dtype), numbers(11, 4, dtype=dtype)
    targets = np.array([1, 2, IGNORE, 10, 0, 5, IGNORE])
    tolerance = {"float64": 1e-14, "float32": 1e-6}[dtype]

    def run() -> tuple[float, list[np.ndarray]]:
        leaves = [Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)]
        loss = F.linear_cross_entropy(*leaves, targets)
        (loss * 3).backward()
        with no_grad():
            assert F.linear_cross_entropy(*leaves, targets).item() == loss.item()
        return loss.item(), [leaf.grad for leaf in leaves]

    with at_most(level):
        loss, grads = run()
        for rows_at_once in (1, 2, 3, 6):
            monkeypatch.setitem(in_parts.LOGITS_AT_ONCE, "cpu", rows_at_once * 11 + 5)
            loss_in_parts, grads_in_parts = run()
            assert loss_in_parts == pytest.approx(loss, rel=tolerance)
            for ours, whole in zip(grads_in_parts, grads, strict=True):
                np.testing.assert_allclose(ours, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("level", ["fused", "numpy", "c"])
def test_cross_entropy_takes_the_memory_of_some_rows(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = Tensor(numbers(800, 8, dtype="float32"), requires_grad=True)
    w = Tensor(numbers(1000, 8, dtype="float32"), requires_grad=True)
    targets = np.arange(800)
    peaks = []
    for rows in (800, 80):
        monkeypatch.setitem(in_parts.LOGITS_AT_ONCE, "cpu", rows * 1000)
        with at_most(level):
            tracemalloc.start()
            F.linear_cross_entropy(x, w, targets).backward()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    at_once = 800 if level != "c" else memory.ROWS_AT_ONCE  # C has no more at a time anyway
    assert peaks[0] > at_once * 1000 * 4 > 2 * peaks[1]


@pytest.mark.parametrize("level", ["fused", "numpy", "c"])
def test_a_row_without_a_target_reaches_neither_the_loss_nor_a_gradient(level: str) -> None:
    x, w = numbers(2, 4, 8, dtype="float32"), numbers(9, 8, dtype="float32")
    targets = np.array([[1, IGNORE, 3, 8], [IGNORE, IGNORE, IGNORE, 0]])
    x[targets == IGNORE] = np.nan
    leaves = [Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)]
    with at_most(level):
        loss = F.linear_cross_entropy(*leaves, targets)
        loss.backward()
    kept = [Tensor(x[targets != IGNORE], requires_grad=True), Tensor(w, requires_grad=True)]
    with at_most("definitions"):
        expected = F.linear_cross_entropy(*kept, targets[targets != IGNORE])
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(leaves[1].grad, kept[1].grad, atol=1e-6)
    np.testing.assert_allclose(leaves[0].grad[targets != IGNORE], kept[0].grad, atol=1e-6)
    assert not leaves[0].grad[targets == IGNORE].any()


def test_dropout_in_a_backward_is_drawn_again_and_not_kept() -> None:
    x = Tensor(np.ones((200, 100), np.float32), requires_grad=True)
    (y := F.dropout(x, 0.5, (4,))).sum().backward()
    np.testing.assert_array_equal(x.grad, y.data)  # of ones, the result is the factors


def test_shapes_that_do_not_fit_are_named() -> None:
    x, w = Tensor(numbers(2, 3)), Tensor(numbers(4, 5))
    with pytest.raises(ValueError, match=r"linear: shapes \[\(2, 3\), \(4, 5\)\] do not fit"):
        F.linear(x, w)
    four = Tensor(np.ones(4))
    with pytest.raises(
        ValueError, match=r"layer_norm: shapes \[\(2, 3\), \(4,\), \(4,\)\] do not fit"
    ):
        F.layer_norm(x, four, four)
    q, k = Tensor(numbers(1, 2, 4, 3)), Tensor(numbers(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"attention: shapes \[\(1, 2, 4, 3\), \(1, 2, 3, 3\)"):
        F.attention(q, k, k)  # the first query would see no key
    with pytest.raises(ValueError, match=r"linear_cross_entropy: shapes \[\(2, 3\), \(4, 5\)"):
        F.linear_cross_entropy(x, w, [0, 1])


@pytest.mark.parametrize("level", ["definitions", "fused", "c"])
def test_what_is_no_tensor_is_named(level: str) -> None:
    x, w = numbers(2, 3), Tensor(numbers(3, 5))
    with at_most(level):
        with pytest.raises(TypeError, match=r"softmax: x must be a Tensor, not ndarray: .*\(x\)"):
            F.softmax(x)
        with pytest.raises(TypeError, match="cross_entropy: logits must be a Tensor, not ndarray"):
            F.cross_entropy(logits=x, targets=[0, 1])
        with pytest.raises(TypeError, match="linear: x must be a Tensor, not list"):
            F.linear(x.tolist(), w)
        with pytest.raises(TypeError, match="linear: weight must be a Tensor, not ndarray"):
            F.linear(Tensor(x), w.data)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'weight'"):
            F.linear(Tensor(x))


@pytest.mark.parametrize("name", FUSED)
def test_two_types_of_float_give_the_wider_one(name: str) -> None:
    """As in NumPy; and each gradient has its input's type."""
    results = []
    for level in ("definitions", "c"):
        inputs = FUSED[name].inputs("float64")
        inputs[0] = Tensor(inputs[0].data.astype("float32"), requires_grad=True)
        with at_most(level):
            out = FUSED[name](*inputs)
            out.backward(numbers(*out.shape, seed=1))
        results.append([out.data, *(x.grad for x in inputs)])
        assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]
        assert out.dtype == np.result_type(*(x.dtype for x in inputs))
    for composed, ours in zip(*results, strict=True):
        size = np.abs(composed).max()
        np.testing.assert_allclose(ours, composed, rtol=0, atol=3e-6 * size)
