"""Matrix products in half precision in C: of bfloat16 (bfloat16.c), and of a few rows (narrow.c,
few_rows.c). kernels.py has those of many rows of float16 (matmul.c).

Sums are float32: what precision.py says half precision computes, but for the order of the sums, and
that instructions for bfloat16 take numbers below 2**-126 for 0. The order depends on how many rows
there are, so beside others a row may be rounded to the next number. kernels.py calls these
functions with arrays that fit together; NotForMe leaves a product to float32.
"""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from micrograd_gpt.arrays.precision import converts_on_cpu
from micrograd_gpt.arrays.stand_ins import NotForMe, highest_level
from micrograd_gpt.kernels.in_c.arguments import (
    Array,
    address,
    call,
    contiguous,
    ints,
    pointers,
    strides_of,
)
from micrograd_gpt.kernels.in_c.compiler import library

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FEW_NUMBERS = 2**14  # NumPy converts fewer as quickly
# At most so many rows are bound by reading the matrix; few_rows.h has the same number
FEW_ROWS = 16
KINDS = (np.dtype(np.float32), BFLOAT16, np.dtype(np.int8), FLOAT16)  # as narrow.h numbers them


class FewRows(ctypes.Structure):
    _fields_ = [*ints("n", "k", "m"), *pointers("x", "weight", "bias", "y")]


class NarrowRows(ctypes.Structure):
    _fields_ = [
        *ints("kind", "n", "k", "m"),
        *pointers("x", "weight", "scales", "bias", "y", "half_x", "half_y"),
    ]


class _HalfProduct(ctypes.Structure):
    _fields_ = [
        *ints("n", "k", "m"),
        *pointers("a"),
        *ints("a_row", "a_column"),
        *pointers("b"),
        *ints("b_row", "b_column"),
        *pointers("bias", "c"),
        *ints("c_row", "c_is_narrow", "adds", "b_is_wide"),
    ]


class _HalfLinearBackward(ctypes.Structure):
    _fields_ = [
        ("dx", _HalfProduct),
        ("dweight", _HalfProduct),
        *pointers("grad", "dbias"),
        *ints("n", "m"),
    ]


def _product(
    a: Array, b: Array, c: Array, bias: Array | None = None, adds: bool = False
) -> _HalfProduct:
    """c = a @ b + bias for the C code; where c is stored by columns, its transpose is computed.

    b may be float32, but not where c is stored by columns; it is rounded as it is read.
    """
    if c.strides[1] != c.itemsize:
        a, b, c = b.T, a.T, c.T
    (n, k), m = a.shape, b.shape[1]
    return _HalfProduct(
        *(n, k, m, a.ctypes.data, *strides_of(a), b.ctypes.data, *strides_of(b)),
        *(None if bias is None else bias.ctypes.data, c.ctypes.data, strides_of(c)[0]),
        *(c.dtype == BFLOAT16, adds, b.dtype == FLOAT32),
    )


def by_tiles() -> bool:
    """Whether AMX multiplies bfloat16 here."""
    loaded = library()
    return loaded is not None and bool(loaded.bfloat16_by_tiles())


def multiply(a: Array, b: Array, dtype: np.dtype) -> Array:
    """a (N, K) @ b (K, M) of bfloat16, in this type: bfloat16 or float32."""
    write_product(a, b, c := np.empty((len(a), b.shape[1]), dtype))
    return c


def write_product(a: Array, b: Array, c: Array, adds: bool = False) -> None:
    """Write a (N, K) @ b (K, M) of bfloat16 into c; with `adds`, add it to c of float32."""
    call("matmul_bfloat16", _product(a, b, c, adds=adds))


def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    """For weights in the type of x, or of many rows in float32."""
    few = len(x) <= FEW_ROWS and weight.flags.f_contiguous
    if weight.dtype != x.dtype and (few or x.dtype != BFLOAT16):
        raise NotForMe
    if few:
        return _few_rows(x, weight, bias)
    if x.dtype != BFLOAT16:
        raise NotForMe
    y = np.empty((len(x), weight.shape[1]), BFLOAT16)
    bias = None if bias is None else np.ascontiguousarray(bias, BFLOAT16)
    call("matmul_bfloat16", _product(x, weight, y, bias))
    return y


def _few_rows(x: Array, weight: Array, bias: Array | None) -> Array:
    """A few rows times a matrix in half precision, which is read as it is: half the bytes."""
    (n, k), m = x.shape, weight.shape[1]
    x, y = np.ascontiguousarray(x), np.empty((n, m), x.dtype)
    bias = None if bias is None else np.ascontiguousarray(bias)
    at = None, weight.ctypes.data, None, address(bias), None, x.ctypes.data, y.ctypes.data
    call("few_narrow_rows", NarrowRows(KINDS.index(x.dtype), n, k, m, *at))
    return y


def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of x in bfloat16, and of weight, which may be float32, and bias in float32."""
    (grad,) = contiguous(grad)
    dx = np.empty(x.shape, BFLOAT16)
    dweight = np.empty_like(weight, np.float32)
    if not dweight.flags.forc:
        dweight = np.empty(weight.shape, np.float32)
    dbias = np.empty(grad.shape[1], np.float32)
    back, across = _product(grad, weight.T, dx), _product(x.T, grad, dweight)
    call(
        "linear_backward_bfloat16",
        _HalfLinearBackward(back, across, grad.ctypes.data, dbias.ctypes.data, *grad.shape),
    )
    return dx, dweight, dbias


class _Conversion(ctypes.Structure):
    _fields_ = [*ints("size", "to_narrow"), *pointers("wide", "narrow")]


@converts_on_cpu
def converted(array: Array, dtype: np.dtype) -> Array | None:
    """A float32 array in half precision, or the other way round, with its axes in the same order.

    None for small arrays and other types.
    """
    to_narrow = array.dtype == FLOAT32
    wide, narrow = (array.dtype, dtype) if to_narrow else (dtype, array.dtype)
    if array.size < FEW_NUMBERS or wide != FLOAT32 or narrow not in (BFLOAT16, FLOAT16):
        return None
    if not array.flags.aligned or type(array) is not np.ndarray:
        return None
    if highest_level() != "c" or library() is None:
        return None
    if not array.flags.forc:
        array = array.copy("K")  # its axes may lie in any order, but without gaps
    result = np.empty_like(array, dtype)
    places = [a.ctypes.data for a in (array, result)]
    name = "convert_bfloat16" if narrow == BFLOAT16 else "convert_float16"
    call(name, _Conversion(array.size, to_narrow, *places[:: 1 if to_narrow else -1]))
    return result
