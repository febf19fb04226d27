"""Check a backward against central differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from micrograd_gpt import Tensor


def check_gradients(
    function: Callable[..., Tensor],
    *arrays: np.ndarray,
    seed: int = 0,
    directions: int = 3,
    step: float = 1e-6,
    rtol: float = 1e-6,
) -> None:
    """Assert that the backward of `function(*tensors)` agrees with central differences.

    It computes in float64. The cotangent is random, so that a permuted or transposed gradient
    shows. The derivative is taken along random directions u in the space of all inputs: the central
    difference (f(x + h u) - f(x - h u)) / 2h must equal the gradient's component along u. The error
    of the difference itself is about step² (truncation) plus 1e-16 / step (rounding), relative to
    the sum of the magnitudes that go into the component.
    """
    rng = np.random.default_rng(seed)
    tensors = [Tensor(a.astype(np.float64), requires_grad=True) for a in arrays]
    out = function(*tensors)
    cotangent = rng.standard_normal(out.shape)
    out.backward(cotangent)
    for tensor in tensors:
        assert tensor.grad is not None, "an input got no gradient"
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == np.float64
        assert isinstance(tensor.grad, np.ndarray)

    def value(offset: float, along: list[np.ndarray]) -> float:
        moved = [Tensor(t.data + offset * u) for t, u in zip(tensors, along, strict=True)]
        return float((function(*moved).data * cotangent).sum())

    for _ in range(directions):
        along = [rng.standard_normal(t.shape) for t in tensors]
        numeric = (value(step, along) - value(-step, along)) / (2 * step)
        terms = [t.grad * u for t, u in zip(tensors, along, strict=True)]
        analytic = float(sum(term.sum() for term in terms))
        scale = max(1e-3, abs(numeric), *(float(np.abs(term).max(initial=0)) for term in terms))
        assert abs(analytic - numeric) <= rtol * scale, f"gradient {analytic}, measured {numeric}"
