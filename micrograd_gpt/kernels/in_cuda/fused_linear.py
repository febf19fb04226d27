"""Linear layers of half precision, with what stands beside them in a block of GPT-2.

Each function is two or three of those in kernels.py. Arrays are all float16 or all bfloat16 unless
it says otherwise: x (N, n_in), weight (n_in, n_out), bias (n_out,), grad (N, n_out).
"""

from __future__ import annotations

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.kernels.in_cuda import kernels


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """x @ weight + bias: (N, n_out)."""
    return kernels.linear_forward(x, weight, bias)


def linear_gelu(x: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """before = x @ weight + bias, and gelu(before): both (N, n_out)."""
    before = kernels.linear_forward(x, weight, bias)
    return before, kernels.gelu_forward(before)


def weight_gradients(grad: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """The float32 gradients of a weight, in its layout in memory, and of its bias."""
    return kernels.weight_gradients(grad, x, weight)


def input_gradient(grad: Array, weight: Array) -> Array:
    """grad @ weight.T: (N, n_in)."""
    return kernels.input_gradient(grad, weight)


def input_gradient_before_gelu(grad: Array, weight: Array, before: Array) -> Array:
    """The gradient of `before` (N, n_in), where x was gelu(before)."""
    return kernels.gelu_backward(kernels.input_gradient(grad, weight), before)
