"""Half precision: the two 16-bit types the matrix work may be done in, and how numbers get there.

    float16    5 bits of exponent, 11 of precision: beyond 65504 it is infinity, below 6e-8 zero
    bfloat16   8 bits of exponent, 8 of precision: the upper half of a float32, and as wide

Both are types to keep numbers in. Arithmetic on them is done in float32, and its result rounded to
nearest, ties to even, when it is kept: so do a GPU's matrix units, which add up in float32.

On a GPU a half-precision array is what its name says, 2 bytes a number. The CPU has no fast
arithmetic on such arrays, and emulates them: by float32 arrays whose values are rounded wherever
the GPU would keep the result. That shows what half precision does to a model, and gains neither
speed nor memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from micrograd_gpt.arrays.backend import Array, array_module, device_of, resolve_device, to_device
from micrograd_gpt.arrays.bfloat16 import round_to_bfloat16
from micrograd_gpt.support.errors import UserError

HALF = ("bfloat16", "float16")
PRECISIONS = ("float32", "float64", *HALF)


def half_name(dtype: Any) -> str | None:
    """The name of a half-precision type, given by name or as a dtype; None for any other type."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    return name if name in HALF else None


def is_float(dtype: np.dtype) -> bool:
    """True for a floating-point dtype (that of bfloat16 comes from outside NumPy)."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def wide(dtype: Any) -> str:
    """The type that arithmetic is done in: float32 for half precision, any other as it is."""
    return "float32" if half_name(dtype) else np.dtype(dtype).name


def array_dtype(dtype: Any, device: str) -> np.dtype:
    """The dtype of the arrays that hold numbers of this type on "cpu" or "gpu"."""
    if not half_name(dtype):
        return np.dtype(dtype)
    if resolve_device(device) == "cpu":
        return np.dtype(np.float32)
    return np.dtype(np.float16 if half_name(dtype) == "float16" else _bfloat16())


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise UserError(
            "bfloat16 on a GPU needs ml_dtypes: pip install -e '.[cuda13]' (or '.[cuda12]')"
        ) from None
    return bfloat16


def emulation_note(dtype: str, device: str) -> str | None:
    """What a user should know who asks for this type on this device; None if nothing."""
    if half_name(dtype) is None or resolve_device(device) == "gpu":
        return None
    return f"note: on the CPU {dtype} is emulated, by rounding float32 numbers: it is not faster"


def widened(array: Array) -> Array:
    """Half precision as float32, to compute with; any other array as it is."""
    is_half = array.dtype.itemsize == 2 and is_float(array.dtype)
    return array.astype(np.float32) if is_half else array


def kept(array: Array, half: str) -> Array:
    """The numbers of a floating-point array rounded to `half`, in the array that keeps them.

    On a GPU that is a half-precision array, on the CPU a float32 one. What has that dtype on a GPU
    already is returned as it is. Beyond the largest float16 comes infinity.
    """
    if device_of(array) == "gpu":
        return array.astype(array_dtype(half, "gpu"), copy=False)
    numbers = np.asarray(array, np.float32)
    if half == "bfloat16":
        return round_to_bfloat16(numbers)
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16).astype(np.float32)


def moved(array: Array, device: str, half: str | None) -> Array:
    """The numbers of `array`, which are kept in `half` if that is not None, on `device`."""
    array = to_device(array, device)
    return kept(array, half) if half else array


def product_in_float32(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b without rounding the result to half precision, in which a and b may be kept."""
    return array_module(a).matmul(widened(a), widened(b), out=out)
