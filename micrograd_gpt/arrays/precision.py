"""Half precision: its two 16-bit types, which parts of a model compute in them, and how.

    float16    5 bits of exponent, 11 of precision: infinite beyond 65504, zero below 3e-8
    bfloat16   8 bits of exponent, 8 of precision: the upper half of a float32, with its range

The dtype of an array says it all. On the CPU and on the GPU, bfloat16 is ml_dtypes' type.

"Compute wide, keep narrow" (Micikevicius et al. 2018, arXiv:1710.03740) happens here, where a
definition meets its arrays, so that no readable definition mentions it. A definition gets
half-precision arrays as float32, and its first result is rounded to the type of its first argument.
Its other results (statistics, a loss, the gradients of parameters) stay float32.

Two rules say which parts of a GPT-2 this affects. Matrix work begins at `linear`: within
`compute_in("bfloat16")`, or where the weight is half precision, its inputs are rounded, and what
follows (attention, GELU, dropout) keeps that type. An embedding returns float32 rows, and so the
residual stream, which starts there, is float32. LayerNorm, softmax, the loss and the gradients of
parameters are always computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import ml_dtypes
import numpy as np

from micrograd_gpt.support.errors import UserError

HALF = ("bfloat16", "float16")
PRECISIONS = ("float32", "float64", *HALF)

# Layers, and functions of arrays, whose inputs are rounded
MATRIX_WORK = ("linear", "linear_cross_entropy")
MATRIX_WORK_ON_ARRAYS = ("linear_forward", "linear_backward", "linear_cross_entropy_forward")
COMPOSED = ("self_attention",)  # of views and of layers that are computed wide themselves
LOOK_UPS = ("embedding",)  # layers that return float32 rows, whatever type their table is held in

_HALF_DTYPES = frozenset((np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)))
_CONVERSIONS: list[Callable[[Any, np.dtype], Any]] = []
_FAST: list[Callable[[str, bool], bool]] = []
_COMPUTE: ContextVar[np.dtype | None] = ContextVar("the type of the matrix work", default=None)


@contextmanager
def compute_in(dtype: str) -> Iterator[None]:
    """Within this block matrix work is done in `dtype`, "bfloat16" or "float16".

    Any other type leaves it in the type of the weights. The parameters themselves do not change.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"cannot compute in {dtype!r}: choose from {', '.join(PRECISIONS)}")
    token = _COMPUTE.set(np.dtype(dtype) if dtype in HALF else None)
    try:
        yield
    finally:
        _COMPUTE.reset(token)


def compute_dtype(weight: Any) -> np.dtype:
    """The type in which matrix work with this weight, a tensor or an array, is done now.

    Weights of int8 (int8.py) stand for float32.
    """
    asked = _COMPUTE.get()
    held_in = weight.dtype if weight.dtype != np.int8 else np.dtype(np.float32)
    return held_in if asked is None else asked


def computes_as_held(weight: Any) -> bool:
    """Whether nothing asks for matrix work in another type than the weights are held in."""
    return _COMPUTE.get() in (None, weight.dtype)


def is_half(value: Any) -> bool:
    """True for an array or tensor of half precision."""
    return getattr(value, "dtype", None) in _HALF_DTYPES


def widened(array: Any) -> Any:
    """A half-precision array as float32, to compute with; any other array itself."""
    return cast(array, np.float32) if is_half(array) else array


def cast(array: Any, dtype: Any) -> Any:
    """A copy of `array` in this type, which on a CPU a kernel may make."""
    for conversion in _CONVERSIONS if isinstance(array, np.ndarray) else ():
        converted = conversion(array, np.dtype(dtype))
        if converted is not None:
            return converted
    return array.astype(dtype)


def converts_on_cpu(function: Callable[[Any, np.dtype], Any]) -> Callable[[Any, np.dtype], Any]:
    """Register a function that copies some NumPy arrays into another type; None for all others."""
    _CONVERSIONS.append(function)
    return function


def check_precision(dtype: str, *others: str) -> None:
    """UserError for a type that is none of PRECISIONS, nor of these others (int8.py has int8)."""
    known = (*PRECISIONS, *others)
    if dtype not in known:
        raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(known)}")


def hold_in(model: Any, dtype: str) -> None:
    """Convert a model's parameters to `dtype`.

    In half precision LayerNorm's stay float32: they are few, and are used in float32. Raises
    UserError for a type that is not one of PRECISIONS.
    """
    check_precision(dtype)
    for name, parameter in model.named_parameters():
        stays_wide = dtype in HALF and ".ln_" in name
        parameter.data = parameter.data.astype("float32" if stays_wide else dtype, copy=False)


def multiplies(function: Callable[[str, bool], bool]) -> Callable[[str, bool], bool]:
    """Register a function of a type, and of whether it is for decoding, in which reading weights
    takes the time. It says whether a CPU's kernels are faster with weights of this type."""
    _FAST.append(function)
    return function


def emulation_note(dtype: str, device: str, decoding: bool = False) -> str | None:
    """What a user who asks for this type on this device, to train or for decoding, should know;
    None if there is nothing."""
    if dtype not in (*HALF, "int8") or device != "cpu":
        return None
    if any(fast(dtype, decoding) for fast in _FAST):
        return None
    if dtype == "int8":
        return "note: int8 is computed in float32 here: it is smaller, but not faster"
    return f"note: {dtype} on the CPU is computed in float32 and rounded: it is not faster"


# ----------------------------------------------------------------- what definitions are called with


def is_needed(args: tuple[Any, ...]) -> bool:
    """Whether half precision plays any part in a call with these arguments."""
    return _COMPUTE.get() is not None or any(map(is_half, args))


def rounded(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, rounded where `function` begins matrix work in half precision.

    On a CPU, weights are left to whoever reads them (computed_wide, or a kernel): a rounded copy
    would take memory from the forward to the backward.
    """
    if function.__name__ not in MATRIX_WORK or len(args) < 2:
        return args
    dtype = compute_dtype(args[1])
    if dtype not in _HALF_DTYPES:
        return args
    if isinstance(args[0].data, np.ndarray):
        return args[0].astype(dtype), *args[1:]
    return all_in(dtype, args)


def all_in(dtype: np.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with every array or tensor of floats in this type."""
    return tuple(_in_type(dtype, arg) if _is_float(arg) else arg for arg in args)


def _in_type(dtype: np.dtype, value: Any) -> Any:
    return cast(value, dtype) if value.dtype != dtype else value


def _is_float(value: Any) -> bool:
    return hasattr(value, "dtype") and value.dtype.kind not in "iub"


def computed_wide(
    function: Callable[..., Any], again: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """function(*args); where arguments are half precision, again(*args) in float32, then rounded.

    `again` is the function with its stand-ins, which may take the float32 arguments; or, of matrix
    work, the weights once they are rounded. A function that returns nothing has changed its first
    argument, which is then rounded in place.
    """
    if not any(map(is_half, args)) or function.__name__ in COMPOSED:
        return function(*args)
    if function.__name__ in (*MATRIX_WORK, *MATRIX_WORK_ON_ARRAYS) and is_half(args[0]):
        alike = all_in(args[0].dtype, args)
        if any(x is not y for x, y in zip(alike, args, strict=True)):
            return again(*alike)
    if function.__name__ in LOOK_UPS:
        return function(*args).astype(np.float32)
    wide = [widened(arg) for arg in args]
    results = again(*wide)
    if results is None:
        args[0][...] = wide[0]
        return None
    first, *others = results if isinstance(results, tuple) else (results,)
    if is_half(args[0]) and first is not None and first.ndim:  # a scalar stays float32
        first = cast(first, args[0].dtype)
    return (first, *others) if isinstance(results, tuple) else first
