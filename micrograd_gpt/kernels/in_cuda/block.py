"""GPT-2's blocks while they train on a GPU, in half precision: forward and backward, written out.

This is `Block` of gpt2.py once more, in the same order and under the same names, from functions of
arrays alone. It leaves no tensors between them, one operation on the tape for each block, and few
launches: a sum of the residual stream and the LayerNorm after it are one, and so are a product, its
bias and GELU. Each branch stands beside its backward, as in functional.py.

    B batch   T time (tokens)   C channels   H heads   D head size   N = B × T rows

The residual stream and its gradient are float32; weights are rounded once, on their way in, as all
matrix work in half precision does (arrays/precision.py). What the backward needs is kept: of each
LayerNorm its input, mean and deviation, and of each product what it multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from micrograd_gpt import gpt2
from micrograd_gpt.arrays.devices import Array, array_module
from micrograd_gpt.arrays.stand_ins import CUDA, NotForMe, converted, stands_in_for
from micrograd_gpt.gpt2 import MLP, Block, CausalSelfAttention
from micrograd_gpt.kernels.blocks import BYPASSED
from micrograd_gpt.kernels.in_cuda import cublas_lt, kernels
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.block_parameters import Weights, check_stream, known_block
from micrograd_gpt.kernels.in_cuda.residual import (
    Normed,
    add_and_normalise,
    add_and_normalise_backward,
    normalised,
)
from micrograd_gpt.layers import Key
from micrograd_gpt.nn import Parameter
from micrograd_gpt.tensor import Tensor, record

# A branch's backward: the gradient of its result -> that of its input, and of its parameters
Backward: TypeAlias = Callable[[Array], tuple[Array, list[Array]]]


@stands_in_for(gpt2.through_blocks, CUDA, bypasses=BYPASSED)
def through_blocks(x: Tensor, blocks: list[Block], cache: Any = None) -> Tensor:
    """As the definition, without a cache, where matrix work is done in half precision."""
    if cache is not None or not blocks or not cuda_modules.usable():
        raise NotForMe
    known = [known_block(block) for block in blocks]
    check_stream(x, known, blocks)
    norms = [(*k.ln_1(), block.ln_1.eps) for k, block in zip(known, blocks, strict=True)]
    rows = array_module(x.data).ascontiguousarray(x.data).reshape(-1, x.shape[-1])  # (N, C)
    normed: Any = normalised(rows, *norms[0], known[0].dtype)
    passed = Passed()
    for block, k, then in zip(blocks, known, [*norms[1:], ()], strict=True):
        x, normed = through_block(x, normed, block, k.rounded(), k.parameters, then, passed)
    return x


def through_block(
    x: Tensor,
    normed: Normed,
    block: Block,
    weights: Weights,
    parameters: Sequence[Parameter],
    then: Sequence[Any],
    passed: Passed,
) -> tuple[Tensor, Normed | None]:
    """The stream x (B, T, C) through one block, as one operation on the tape.

    `normed` has the rows of x after ln_1. `then` is the LayerNorm that follows the block (weight,
    bias, eps), and the second result has the rows after it; () and None after the last block.
    """
    branch, attention_backward = attention(normed.rows, block.attn, weights, x.shape)
    normed_2 = add_and_normalise(normed.x, branch, *weights.ln_2, block.ln_2.eps)
    branch, mlp_backward = mlp(normed_2.rows, block.mlp, weights)
    after = add_and_normalise(normed_2.x, branch, *then) if then else None
    y = after.x if after else normed_2.x + branch  # (N, C)
    ln_1, ln_2, shape = weights.ln_1.weight, weights.ln_2.weight, x.shape

    def backward(grad: Array) -> tuple[Array, ...]:
        along, rounded = passed.taken(grad, weights.c_fc.weight.dtype)  # (N, C), float32 and half
        dnormed, of_mlp = mlp_backward(rounded)
        along, rounded, *of_ln_2 = add_and_normalise_backward(dnormed, normed_2, ln_2, along)
        dnormed, of_attn = attention_backward(rounded)
        along, rounded, *of_ln_1 = add_and_normalise_backward(dnormed, normed, ln_1, along)
        dx = passed.on(along.reshape(shape), rounded)
        return dx, *of_ln_1, *of_attn, *of_ln_2, *of_mlp

    result = record("block", y.reshape(shape), [x, *parameters], backward)
    if result._node:  # what is kept as it is must not change until the backward
        kept = [x, *(p for p, w in zip(parameters[::2], weights, strict=True) if w[0] is p.data)]
        result._node.versions += [(tensor.version, *tensor.version) for tensor in kept]
    return result, after


# ------------------------------------------------------------------- the two branches of a block


def attention(
    normed: Array, attn: CausalSelfAttention, w: Weights, shape: tuple[int, ...]
) -> tuple[Array, Backward]:
    """The branch of attention, (N, C), and its backward; `shape` is (B, T, C)."""
    b, t, width = shape
    heads = (b, t, attn.n_head, width // attn.n_head)
    qkv = kernels.linear_forward(normed, *w.c_attn)  # (N, 3C)
    q, k, v = qkv.reshape(b, t, 3, *heads[2:]).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
    of_weights = attn.attn_dropout.draw()
    out, log_total = kernels.attention_forward(q, k, v, *of_weights)  # (B, H, T, D), (B, H, T)
    mixed = out.swapaxes(1, 2).reshape(-1, width)  # (N, C)
    of_branch = attn.resid_dropout.draw()
    y = dropout(kernels.linear_forward(mixed, *w.attn_c_proj), *of_branch)  # (N, C)

    def backward(grad: Array) -> tuple[Array, list[Array]]:
        grad = dropout(grad, *of_branch)  # (N, C)
        of_c_proj = kernels.weight_gradients(grad, mixed, w.attn_c_proj.weight)
        dmixed = kernels.input_gradient(grad, w.attn_c_proj.weight)  # (N, C)
        dout = dmixed.reshape(heads).swapaxes(1, 2)  # (B, H, T, D)
        dqkv = kernels.attention_backward(dout, q, k, v, out, log_total, *of_weights)
        dqkv = dqkv.reshape(-1, 3 * width)  # (N, 3C)
        of_c_attn = kernels.weight_gradients(dqkv, normed, w.c_attn.weight)
        return kernels.input_gradient(dqkv, w.c_attn.weight), [*of_c_attn, *of_c_proj]

    return y, backward


def mlp(normed: Array, layers: MLP, w: Weights) -> tuple[Array, Backward]:
    """The branch of the MLP, (N, C), and its backward."""
    before, hidden = linear_gelu(normed, *w.c_fc)  # (N, 4C)
    of_branch = layers.resid_dropout.draw()
    y = dropout(kernels.linear_forward(hidden, *w.mlp_c_proj), *of_branch)  # (N, C)

    def backward(grad: Array) -> tuple[Array, list[Array]]:
        grad = dropout(grad, *of_branch)  # (N, C)
        of_c_proj = kernels.weight_gradients(grad, hidden, w.mlp_c_proj.weight)
        dhidden = kernels.input_gradient(grad, w.mlp_c_proj.weight)  # (N, 4C)
        dbefore = kernels.gelu_backward(dhidden, before)  # (N, 4C)
        of_c_fc = kernels.weight_gradients(dbefore, normed, w.c_fc.weight)
        return kernels.input_gradient(dbefore, w.c_fc.weight), [*of_c_fc, *of_c_proj]

    return y, backward


def linear_gelu(x: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """before = x @ weight + bias, and gelu(before), in one launch where cuBLASLt can."""
    y, before = (array_module(x).empty((len(x), weight.shape[1]), x.dtype) for _ in range(2))
    if not cublas_lt.product(x, weight, bias, y, before):
        before = kernels.linear_forward(x, weight, bias)
        y = kernels.gelu_forward(before)
    return before, y


def dropout(x: Array, p: float, key: Key) -> Array:
    return kernels.dropout_forward(x, p, key) if p else x


class Passed:
    """What the backward of a block leaves for that of the block below, besides the gradient of the
    stream on the tape: the same, rounded, which a kernel wrote beside it."""

    def __init__(self) -> None:
        self.wide: Array | None = None  # (B, T, C), float32
        self.rounded: Array | None = None  # (N, C), half precision

    def on(self, wide: Array, rounded: Array) -> Array:
        """Leave both, and return the first, to send down the tape."""
        self.wide, self.rounded = wide, rounded
        return wide

    def taken(self, grad: Array, dtype: np.dtype) -> tuple[Array, Array]:
        """The gradient that came up the tape as rows (N, C), and rounded to `dtype`."""
        rows = array_module(grad).ascontiguousarray(grad).reshape(-1, grad.shape[-1])
        rounded = self.rounded if grad is self.wide else None
        self.wide = self.rounded = None
        return rows, converted(rows, dtype) if rounded is None else rounded
