"""Arguments of the CUDA kernels: which arrays they take, and how many blocks share the work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.arrays.stand_ins import CUDA, NotForMe, stands_in_for
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.modules import ACTIVATIONS
from micrograd_gpt.kernels.shapes import fitting_on_gpu

F = TypeVar("F", bound=Callable[..., Any])

THREADS = 256  # of a block, unless a kernel asks for others
WARPS = THREADS // 32
HEAD_SIZES = range(16, 129, 16)  # that the attention kernels are compiled for
MAX_BLOCKS = 1024  # of a kernel that loops over its elements: several for each multiprocessor


def in_cuda(definition: Callable[..., Any]) -> Callable[[F], F]:
    """Register a kernel in CUDA for `definition`; it raises NotForMe for arrays that do not fit."""

    def register(kernel: F) -> F:
        return stands_in_for(definition, CUDA)(fitting_on_gpu(definition)(kernel))

    return register


@cache
def name_of(dtype: np.dtype) -> str:
    return str(dtype)


def activation(*arrays: Array) -> str:
    """The one type that all these arrays have; NotForMe unless the kernels can read them.

    They must all be float32, all float16 or all bfloat16, C-contiguous, of one array library, and
    the first not empty.
    """
    first = arrays[0]
    dtype = name_of(first.dtype)
    alike = all(
        type(array) is type(first) and array.dtype == first.dtype and array.flags.c_contiguous
        for array in arrays
    )
    if dtype not in ACTIVATIONS or not alike or not first.size or not cuda_modules.usable():
        raise NotForMe
    return dtype


def float32(*arrays: Array) -> None:
    """Raise NotForMe unless the kernels can read these arrays as float32."""
    if activation(*arrays) != "float32":
        raise NotForMe


def pack(dtype: str) -> int:
    """How many neighbouring elements a thread loads at once: 16 bytes of them."""
    return 16 // itemsize(dtype)


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def blocks(n: int, dtype: str) -> tuple[int]:
    """The grid for n elements, which blocks of THREADS threads take in packs, in turns."""
    return (min(MAX_BLOCKS, -(-n // (THREADS * pack(dtype)))),)


def strips(width: int, dtype: str, threads: int = 32) -> int:
    """How many blocks stand side by side on a row of `width`, each `threads` packs wide."""
    return -(-width // (threads * pack(dtype)))
