"""A linear layer and the GELU beside it, as one product of cuBLASLt.

Arrays are all float16 or all bfloat16: x (N, n_in), weight (n_in, n_out), bias (n_out,).
"""

from __future__ import annotations

from micrograd_gpt.arrays.devices import Array, array_module
from micrograd_gpt.kernels.in_cuda import cublas_lt, kernels


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """x @ weight + bias: (N, n_out)."""
    return kernels.linear_forward(x, weight, bias)


def linear_gelu(x: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """before = x @ weight + bias, and gelu(before): both (N, n_out)."""
    y, before = (array_module(x).empty((len(x), weight.shape[1]), x.dtype) for _ in range(2))
    if not cublas_lt.product(x, weight, bias, y, before):
        before = kernels.linear_forward(x, weight, bias)
        y = kernels.gelu_forward(before)
    return before, y


def weight_gradients(grad: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """The float32 gradients of a weight, in its layout in memory, and of its bias."""
    return kernels.weight_gradients(grad, x, weight)


def input_gradient(grad: Array, weight: Array) -> Array:
    """grad (N, n_out) @ weight.T: (N, n_in)."""
    return kernels.input_gradient(grad, weight)


def input_gradient_before_gelu(grad: Array, weight: Array, before: Array) -> Array:
    """The gradient of `before` (N, n_in), where the layer's input was gelu(before)."""
    return kernels.gelu_backward(kernels.input_gradient(grad, weight), before)
