"""Products of a few rows with a matrix, the bulk of decoding: bound by reading the matrix."""

from __future__ import annotations

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.kernels.in_cuda.arguments import THREADS, WARPS, activation, float32, strips
from micrograd_gpt.kernels.in_cuda.modules import launch

FEW_ROWS = 8  # a product of at most this many rows reads the matrix once, and is bound by that
MOST_ROWS = 64  # on tensor cores it still is with this many
OUTPUTS = 16  # that a block of batch_rows.cu computes


def multiply_few_rows(
    x: Array,
    weight: Array,
    bias: Array | None,
    y: Array | None,
    stream: Array | None = None,
    gelu: bool = False,
) -> None:
    """Write x (N, K) @ weight (K, M) + bias (M,) into y (N, M), or add it to `stream` (N, M).

    With `gelu`, GELU of the product goes into y. N is at most MOST_ROWS. The weight may be stored
    in rows or in columns; unless those hold two-byte numbers and lie in columns, it is read once
    for every FEW_ROWS rows. Where `stream`, which is float32, is given, `y` is None. Raises
    NotForMe unless the other arrays are of one type that the kernels take.
    """
    n, (k, m) = len(x), weight.shape
    stored = weight if weight.flags.c_contiguous else weight.T
    dtype = activation(x, stored, *(array for array in (bias, y) if array is not None))
    if stream is not None:
        float32(stream)
    groups = -(-n // FEW_ROWS)
    if stored is weight:
        file, kernel, blocks = "matvec", "matvec_columns", groups * strips(m, dtype, 4)
    elif n == 1:
        file, kernel, blocks = "matvec", "matvec_row", -(-m // WARPS)
    elif n <= FEW_ROWS or dtype == "float32":
        file, kernel, blocks = "matvec", "matvec_rows", groups * -(-m // WARPS)
    else:
        file, kernel, blocks = "batch_rows", "multiply_batch", -(-m // OUTPUTS)
    arguments = (x, stored, bias, y, stream, n, k, m, int(gelu))
    launch(file, kernel, dtype, (blocks,), (THREADS,), *arguments)
