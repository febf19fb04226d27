"""Arguments of the C kernels: structures of sizes, numbers and the addresses of arrays."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt.arrays.stand_ins import NotForMe, stands_in_for
from micrograd_gpt.kernels.in_c.compiler import library
from micrograd_gpt.kernels.shapes import FLOAT32, fitting

Array = np.ndarray
F = TypeVar("F", bound=Callable[..., Any])


def in_c(
    definition: Callable[..., Any], *also: Any, bypasses: Sequence[Callable[..., Any]] = ()
) -> Callable[[F], F]:
    """Register a kernel in C for `definition`, for arrays of float32 or `also` that fit.

    It raises NotForMe for all others (shapes.py), and where none could be compiled.
    """

    def register(kernel: F) -> F:
        checked = fitting(definition, FLOAT32, *also)(kernel)

        @functools.wraps(kernel)
        def if_compiled(*args: Any) -> Any:
            if library() is None:
                raise NotForMe
            return checked(*args)

        return stands_in_for(definition, "c", bypasses)(if_compiled)  # type: ignore[return-value]

    return register


def call(name: str, arguments: ctypes.Structure) -> None:
    """Call the compiled function of this name with a pointer to its arguments.

    Raises MemoryError where it could not get the memory it needs meanwhile.
    """
    loaded = library()
    assert loaded is not None
    if getattr(loaded, name)(ctypes.byref(arguments)):
        raise MemoryError(
            f"{name}: there is not enough memory for intermediate results: "
            "use shorter contexts or smaller batches"
        )


def ints(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


def floats(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_float) for name in names]


def pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


def contiguous(*arrays: Array) -> list[Array]:
    """The arrays without gaps: themselves where they have none, else copies."""
    return [a if a.flags.c_contiguous else np.ascontiguousarray(a) for a in arrays]


def strides_of(array: Array) -> list[int]:
    """How many elements apart neighbours along each axis of an aligned array are."""
    return [stride // array.itemsize for stride in array.strides]


def address(array: Array | None) -> int | None:
    """Where an array's numbers begin; None, which C takes for NULL, where there is no array."""
    return None if array is None else array.ctypes.data
