"""What the C kernels take: structures of sizes, numbers and addresses of float32 arrays."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt.kernels.in_c.compiler import library
from micrograd_gpt.kernels.in_numpy import kernels as cpu

Array = np.ndarray
F = TypeVar("F", bound=Callable[..., Any])


class NotForC(Exception):
    """The arguments are of a type or layout that the C code does not read."""


def or_numpy(kernel: F) -> F:
    """Run `kernel`; where it is not for C, its namesake in cpu.py (nothing is written before).

    Without a namesake NotForC goes on to the caller, who has the definition.
    """
    namesake = getattr(cpu, kernel.__name__, None)

    @functools.wraps(kernel)
    def choose(*args: Any, **kwargs: Any) -> Any:
        if library() is not None:
            try:
                return kernel(*args, **kwargs)
            except NotForC:
                if namesake is None:
                    raise
        if namesake is None:
            raise NotForC
        return namesake(*args, **kwargs)

    return choose  # type: ignore[return-value]


def call(name: str, arguments: ctypes.Structure) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)(ctypes.byref(arguments))


def ints(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


def floats(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_float) for name in names]


def pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


def check(*arrays: Array | None) -> None:
    """Only float32 arrays that hold something are for C."""
    for array in arrays:
        if array is not None and (array.dtype != np.float32 or not array.size):
            raise NotForC


def contiguous(*arrays: Array) -> list[Array]:
    """The arrays without gaps: themselves where they are so already."""
    check(*arrays)
    return [a if a.flags.c_contiguous else np.ascontiguousarray(a) for a in arrays]


def strides_of(array: Array) -> list[int]:
    """How many elements apart neighbours along each axis lie."""
    if any(stride % 4 for stride in array.strides):
        raise NotForC
    return [stride // 4 for stride in array.strides]
