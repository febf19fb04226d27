"""Memory in huge pages: arrays of zeros that share it, and never each other's numbers."""

from __future__ import annotations

import numpy as np
import pytest

from micrograd_gpt.arrays.memory import CHUNK, HugePages

FLOAT32 = np.dtype(np.float32)
# Some fill a chunk together, one is larger than a chunk, and some have odd sizes
SHAPES = [(3, 5), (7,), (2000, 3001), (1, 1), (4001, 1000), (CHUNK // 4000, 1001), (0, 4), (3, 3)]


@pytest.mark.parametrize("order", ["C", "F"])
def test_each_array_has_memory_of_its_own(order: str) -> None:
    memory = HugePages()
    arrays = [memory.zeros(shape, FLOAT32, order) for shape in SHAPES]
    del memory
    assert [array.shape for array in arrays] == SHAPES
    for array in arrays:
        assert array.flags[f"{order}_CONTIGUOUS"] and array.flags.writeable
        assert array.ctypes.data % 64 == 0 or not array.size  # begins with a cache line
        assert not array.any()
    for i, array in enumerate(arrays):
        array += i + 1
    assert all((array == i + 1).all() for i, array in enumerate(arrays))
    assert len({id(array.base) for array in arrays if array.size}) == len(SHAPES) - 1


@pytest.mark.parametrize("rows", [2**40, 2**62])
def test_no_memory_is_a_memory_error(rows: int) -> None:
    with pytest.raises(MemoryError):
        HugePages().zeros((rows, 768), FLOAT32)
