"""Products with weights of int8 in C (int8.c, narrow.c, few_rows.c, matmul.c)."""

from __future__ import annotations

import numpy as np

from micrograd_gpt.arrays import int8
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.kernels.in_c.arguments import Array, call, in_c
from micrograd_gpt.kernels.in_c.half import KINDS, NarrowRows
from micrograd_gpt.kernels.shapes import FLOAT32, INT8, check_int8, check_plain


@in_c(int8.product)
def product(x: Array, weight: int8.Int8Matrix) -> Array:
    """As the definition; in groups along the first axis only, stored column after column.

    Where the processor has AMX it multiplies three rows and more, with numbers of x rounded to
    multiples of a 2**30th of the first power of two above their row's largest number. Elsewhere one
    to four rows, as long as they stay in the nearest cache, are added up group by group, and each
    sum is scaled; with more rows the weights are scaled, as in the definition. Where sums are
    scaled, numbers beyond 4e34 may become infinite. So the last bits of a row depend on how many
    there are beside it, by at most 2**-20 of the sum of its products' sizes, and with AMX 2**-30 of
    its largest number times the sum of the weights' sizes.
    """
    check_plain([x], [FLOAT32])
    values, scales = check_int8(weight)
    if x.ndim != 2 or x.shape[1] != len(values) or not x.size:
        raise NotForMe
    (n, k), m = x.shape, values.shape[1]
    x, y = np.ascontiguousarray(x), np.empty((n, m), np.float32)
    places = x.ctypes.data, values.ctypes.data, scales.ctypes.data, None, y.ctypes.data
    call("multiply_int8", NarrowRows(KINDS.index(INT8), n, k, m, *places))
    return y
