"""Weights of 8 bits: integers from -127 to 127, and a float32 scale for each group of 64 of them.

A group is 64 neighbours along the axis that a product adds up, and its scale is its largest number
divided by 127, so no number is off by more than 1/254 of the largest one near it (subnormal scales
have few digits: there it may be more). With groups of 64 a weight takes 8.5 bits; with groups of
32, 9. And a group fills a cache line, or one register.

Everything else (activations, sums, embeddings that were looked up, LayerNorm, the KV cache) stays
float32. Only matrices that are multiplied are held so; the table of token embeddings, which is the
head too, is one of them. Decoding reads every weight for every token, so where memory sets the pace
it takes about a quarter of the time. This is for using a model: training changes weights by less
than a step between two integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from micrograd_gpt.arrays.stand_ins import definition
from micrograd_gpt.support.errors import UserError

Array = Any
NewArray = Callable[[tuple[int, ...], np.dtype], np.ndarray]  # shape, dtype -> an array to fill

INT8 = "int8"
GROUP = 64
LARGEST = np.float32(127)
ROWS_AT_ONCE = 1024  # that are quantised together: what that computes takes memory
TABLES = ("wte.weight", "lm_head.weight")  # a row for each token: products add up the last axis
NEVER_MULTIPLIED = ("wpe.weight",)
UNCHANGEABLE = "the weights of an int8 model cannot be changed: load it in float32"
UNSAVED = "a model in int8 cannot be saved: load it in float32, or in bfloat16"


class Int8Matrix(np.ndarray):
    """A matrix of int8 with `scales`, a float32 for each GROUP of numbers along one of its axes.

    In NumPy's operators and functions, and when it is indexed, it is the float32 matrix that it
    stands for. np.asarray and those methods of ndarray that are not here give integers: call
    `astype` first. Nothing can be written to it.
    """

    _scales: Any = None  # none on a view that NumPy has made itself

    @property
    def scales(self) -> np.ndarray:
        """What each group is multiplied by; TypeError on a view that has none."""
        if self._scales is None:
            raise TypeError(
                "this view of an int8 matrix has no scales: call .astype(float32) first"
            )
        return self._scales

    @property
    def values(self) -> np.ndarray:
        """The integers, a view."""
        return self.view(np.ndarray)

    @property
    def axis(self) -> int:
        """The axis along which the groups lie."""
        rows, columns = self.shape
        return 0 if self.scales.shape == (groups(rows), columns) else 1

    @property
    def T(self) -> Int8Matrix:
        return self.transpose()

    def transpose(self, *axes: Any) -> Int8Matrix:
        return int8_matrix(self.values.transpose(*axes), self.scales.transpose(*axes))

    def swapaxes(self, a: Any, b: Any) -> Int8Matrix:
        return int8_matrix(self.values.swapaxes(a, b), self.scales.swapaxes(a, b))

    def __getitem__(self, index: Any) -> Any:
        if self.axis == 1 and isinstance(index, np.ndarray) and index.dtype.kind in "iu":  # rows
            return dequantised(self.values[index], self.scales[index], -1)
        return self.astype(np.float32)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(UNCHANGEABLE)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        return dequantised(self.values, self.scales, self.axis).astype(dtype, *args, **kwargs)

    def copy(self, order: Any = "K") -> Int8Matrix:
        return int8_matrix(self.values.copy(order), self.scales.copy(order))

    def __copy__(self) -> Int8Matrix:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> Int8Matrix:
        return self.copy()

    def __reduce__(self) -> Any:
        return int8_matrix, (self.values, self.scales)

    def __repr__(self) -> str:
        return repr(self.astype(np.float32))

    def __str__(self) -> str:
        return str(self.astype(np.float32))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(array, Int8Matrix) for array in kwargs.get("out", ())):
            raise TypeError(UNCHANGEABLE)
        is_product = ufunc is np.matmul and method == "__call__" and not kwargs
        if is_product and type(inputs[0]) is np.ndarray:
            return product(inputs[0], self)
        return getattr(ufunc, method)(*_wide(inputs), **_wide(kwargs))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return function(*_wide(args), **_wide(kwargs))


def _wide(value: Any) -> Any:
    """A matrix of int8 as the float32 matrix that it stands for, also within a list or a dict;
    anything else itself. What NumPy would write to that matrix would be lost: it is an error."""
    if isinstance(value, list | tuple):
        return type(value)(map(_wide, value))
    if isinstance(value, dict):
        return {key: _wide(each) for key, each in value.items()}
    if not isinstance(value, Int8Matrix):
        return value
    wide = value.astype(np.float32, copy=False)
    wide.flags.writeable = False
    return wide


def int8_matrix(values: np.ndarray, scales: np.ndarray) -> Int8Matrix:
    """The matrix of these integers and scales, which are not copied."""
    matrix = values.view(Int8Matrix)
    matrix._scales = scales
    matrix.flags.writeable = False
    return matrix


def quantised(matrix: np.ndarray, axis: int) -> Int8Matrix:
    """A matrix of floats in int8, in groups along `axis`, the one that products add up.

    In memory the numbers along that axis have no gaps. A group with NaN or infinity becomes NaN.
    """
    rows = matrix if axis == 1 else matrix.T  # (M, K)
    starts = np.arange(0, rows.shape[1], GROUP)
    values = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), len(starts)), np.float32)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        some = rows[part].astype(np.float32)
        scale = np.maximum.reduceat(np.abs(some), starts, axis=1) / LARGEST  # (rows, K / 64)
        finite = np.isfinite(scale)
        divisor = repeated(np.where(finite & (scale > 0), scale, np.inf), some.shape[1], 1)
        with np.errstate(invalid="ignore"):  # infinity / infinity
            steps = np.nan_to_num(np.rint(some / divisor), nan=0)
        values[part] = np.clip(steps, -LARGEST, LARGEST)  # a subnormal scale may be too small
        scales[part] = np.where(finite, scale, np.nan)
    return int8_matrix(values, scales) if axis == 1 else int8_matrix(values.T, scales.T)


def groups(count: int) -> int:
    """How many groups so many numbers make."""
    return -(-count // GROUP)


def repeated(scales: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Each group's scale for each of its numbers, of which there are `length` along `axis`."""
    return np.repeat(scales, GROUP, axis).take(range(length), axis)


def dequantised(values: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    """The float32 numbers of these integers, in groups along `axis`."""
    return values * repeated(scales, values.shape[axis], axis)


@definition
def product(x: Array, weight: Int8Matrix) -> Array:
    """x (N, K) @ weight (K, M) -> (N, M), with all that weight stands for in float32."""
    return x @ dequantised(weight.values, weight.scales, weight.axis)


class Arriving:
    """A matrix of float32 that is only written, rows after rows, and is kept in int8 as `matrix`.

    Rows are written as they come from a file: a multiple of `rows_together`, up to the last ones.
    """

    dtype, ndim = np.dtype(np.float32), 2

    def __init__(self, values: np.ndarray, scales: np.ndarray, axis: int) -> None:
        self.values, self.scales, self.axis = values, scales, axis
        self.shape, self.nbytes = values.shape, self.dtype.itemsize * values.size
        self.rows_together = GROUP if axis == 0 else 1  # whole groups

    @property
    def matrix(self) -> Int8Matrix:
        return int8_matrix(self.values, self.scales)

    @property
    def T(self) -> Arriving:
        """The transpose, to write to."""
        return Arriving(self.values.T, self.scales.T, 1 - self.axis)

    def __setitem__(self, rows: slice, numbers: np.ndarray) -> None:
        part = quantised(numbers, self.axis)
        first, end, _ = rows.indices(len(self.values))
        first_scale = first // self.rows_together
        self.values[first:end] = part.values
        self.scales[first_scale : first_scale + len(part.scales)] = part.scales

    def set(self, numbers: np.ndarray) -> None:
        """Write all rows."""
        self[:] = numbers


def arriving(shape: tuple[int, ...], axis: int, new: NewArray) -> Arriving:
    """A matrix to write, in groups along `axis`, whose memory `new` gives (as zeros)."""
    rows, length = shape if axis == 1 else shape[::-1]
    values = new((rows, length), np.dtype(np.int8))
    scales = new((rows, groups(length)), np.dtype(np.float32))
    return Arriving(values, scales, 1) if axis == 1 else Arriving(values.T, scales.T, 0)


def is_held_in_int8(name: str, parameter: Any) -> bool:
    """Whether a model's parameter of this name is a matrix that is multiplied."""
    return parameter.ndim == 2 and not name.endswith(NEVER_MULTIPLIED)


def hold_in_int8(name: str, parameter: Any) -> None:
    """Convert a model's parameter of this name where it is a matrix that is multiplied.

    A parameter needs no gradient any more: none could be applied to it.
    """
    parameter.requires_grad = False
    if is_held_in_int8(name, parameter):
        parameter.data = quantised(parameter.data, axis_of(name))


def axis_of(name: str) -> int:
    """The axis along which products add up a parameter of this name."""
    return 1 if name.endswith(TABLES) else 0


def refuse_int8(dtype: str, device: str) -> None:
    """UserError for int8 on a GPU, which has no kernels for it."""
    if dtype == INT8 and device != "cpu":
        raise UserError("int8 is for the CPU: with --device gpu use --dtype bfloat16")
