"""An array library for tests of the CUDA kernels: new arrays hold NaN, and have guards around."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from micrograd_gpt.kernels.in_cuda.modules import address

GUARD = 512  # bytes on either side of a new array
CANARY = 0xA5


class GuardedArrays:
    """Like numpy or cupy, but `empty` and `empty_like` return arrays full of NaN.

    The arrays are aligned as CuPy's are. `check()` finds what was written outside of them.
    """

    def __init__(self, library: ModuleType) -> None:
        self.library = library
        self.buffers: list[tuple[Any, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def empty(self, shape: Any, dtype: Any = float, order: str = "C") -> Any:
        if order == "F":
            return self.empty(shape[::-1], dtype).T
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = self.library.full(size + 3 * GUARD, CANARY, np.uint8)
        start = -address(memory) % GUARD + GUARD
        self.buffers.append((memory, start, start + size))
        array = memory[start : start + size].view(dtype).reshape(shape)
        array[...] = np.nan
        return array

    def empty_like(self, array: Any) -> Any:
        return self.empty(array.shape, array.dtype)

    def check(self) -> None:
        """Raise AssertionError where a byte before or after one of the arrays was written."""
        for memory, start, end in self.buffers:
            intact = (memory[:start] == CANARY).all() and (memory[end:] == CANARY).all()
            assert bool(intact), "something was written outside of an array"
        self.buffers.clear()
