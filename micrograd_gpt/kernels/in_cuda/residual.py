"""Where a branch of a block meets the residual stream: the sum and the LayerNorm after it, at once.

The stream is float32. A branch is half precision, as its products are: all float16 or all bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from micrograd_gpt.arrays.devices import Array, array_module
from micrograd_gpt.kernels.in_cuda.arguments import THREADS, WARPS, blocks, name_of
from micrograd_gpt.kernels.in_cuda.kernels import normalise, sum_partials, tensor_table
from micrograd_gpt.kernels.in_cuda.modules import TENSORS_AT_ONCE, launch

ROWS = 16  # how many rows a block of add_and_normalise_backward takes
ALIGNED = 64  # new arrays that share memory begin at multiples of so many elements


class Normed(NamedTuple):
    """The rows of x (N, C), float32, normalised, in half precision, and what the backward needs."""

    rows: Array  # (N, C)
    x: Array  # (N, C)
    mean: Array  # (N, 1)
    rstd: Array  # (N, 1)


def normalised(x: Array, weight: Array, bias: Array, eps: float, dtype: np.dtype) -> Normed:
    """LayerNorm of float32 x (N, C), scaled and shifted by weight and bias (C,), in `dtype`."""
    normed = _empty_normed(x, dtype)
    normalise(x, weight, bias, eps, normed.rows, normed.mean, normed.rstd)
    return normed


def add_and_normalise(x: Array, branch: Array, weight: Array, bias: Array, eps: float) -> Normed:
    """LayerNorm of x + branch, both (N, C): that sum is `x` of the result."""
    (n, width), dtype = x.shape, name_of(branch.dtype)
    normed = _empty_normed(array_module(x).empty_like(x), branch.dtype)
    launch(
        *("residual", "add_and_normalise", dtype, (-(-n // WARPS),), (THREADS,)),
        *(x, branch, weight, bias, normed.x, *(normed.rows, normed.mean, normed.rstd)),
        *(n, width, eps),
    )
    return normed


def _empty_normed(x: Array, dtype: np.dtype) -> Normed:
    xp, n = array_module(x), len(x)
    return Normed(
        xp.empty(x.shape, dtype), x, xp.empty((n, 1), np.float32), xp.empty((n, 1), np.float32)
    )


def add_and_normalise_backward(
    grad: Array, normed: Normed, weight: Array, along: Array
) -> tuple[Array, Array, Array, Array]:
    """The gradient of `normed.x`, float32, and rounded; then those of weight and bias, float32.

    `grad` (N, C), half precision, is that of the normalised rows; `along` (N, C), float32, is what
    comes to x along the residual stream.
    """
    (n, width), xp, dtype = grad.shape, array_module(grad), name_of(grad.dtype)
    dx, rounded, parts = xp.empty_like(along), xp.empty_like(grad), -(-n // ROWS)
    partials = xp.empty((parts, 2 * width), np.float32)
    launch(
        *("residual", "add_and_normalise_backward", dtype, (parts,), (THREADS,)),
        *(grad, normed.x, weight, normed.mean, normed.rstd, along, dx, rounded, partials),
        *(n, width),
    )
    return dx, rounded, *sum_partials(partials, width)


def narrowed(arrays: Sequence[Array], dtype: np.dtype) -> list[Array]:
    """Copies of float32 arrays in half precision, with their layouts in memory, in one launch.

    There are at most TENSORS_AT_ONCE, each C-contiguous or F-contiguous.
    """
    assert len(arrays) <= TENSORS_AT_ONCE
    stored = [array if array.flags.c_contiguous else array.T for array in arrays]
    sizes = [-(-array.size // ALIGNED) * ALIGNED for array in stored]
    memory, starts = array_module(arrays[0]).empty(sum(sizes), dtype), np.cumsum([0, *sizes])
    copies = [
        memory[start : start + array.size].reshape(array.shape)
        for start, array in zip(starts.tolist(), stored, strict=False)
    ]
    (across,) = blocks(max(sizes), name_of(dtype))
    grid = (across, len(arrays))
    table = tensor_table(stored, copies)
    launch("convert", "narrow_all", name_of(dtype), grid, (THREADS,), table)
    return [
        copy if source is array else copy.T
        for copy, source, array in zip(copies, stored, arrays, strict=True)
    ]
