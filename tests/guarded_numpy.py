"""NumPy in CuPy's place under kernels/gpu.py: new arrays are poisoned, and watched at their ends."""

from __future__ import annotations

from typing import Any

import numpy as np

GUARD = 512  # bytes on either side of a new array
CANARY = 0xA5


class GuardedNumpy:
    """Like the module numpy; `empty` and `empty_like` give arrays full of NaN, as aligned as CuPy's.

    `check()` finds what was written outside of them.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[np.ndarray, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size + 3 * GUARD, CANARY, np.uint8)
        start = -memory.ctypes.data % GUARD + GUARD
        self.buffers.append((memory, start + size))
        array = memory[start : start + size].view(dtype).reshape(shape)
        array[...] = np.nan
        return array

    def empty_like(self, array: np.ndarray) -> np.ndarray:
        return self.empty(array.shape, array.dtype)

    def check(self) -> None:
        """AssertionError where a byte before or behind one of the arrays was written."""
        for memory, end in self.buffers:
            start = -memory.ctypes.data % GUARD + GUARD
            outside = np.concatenate([memory[:start], memory[end:]])
            assert (outside == CANARY).all(), "something was written outside of an array"
        self.buffers.clear()
