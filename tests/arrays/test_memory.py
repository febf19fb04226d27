"""Memory in huge pages: arrays of zeros that share it, and never each other's numbers."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt.arrays.memory import CHUNK, HugePages
from micrograd_gpt.gpt2 import GPT2Config
from micrograd_gpt.weights.pretrained import unwritten

FLOAT32 = np.dtype(np.float32)
# Some fill a chunk together, one is larger than a chunk, and some have odd sizes
SHAPES = [(3, 5), (7,), (2000, 3001), (1, 1), (4001, 1000), (CHUNK // 4000, 1001), (0, 4), (3, 3)]
IN_USE = Path("/proc/self/statm")  # pages of this process's addresses, then other numbers


@pytest.fixture(params=["as here", "no huge pages"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This system, and one like macOS and Windows, which cannot ask for huge pages."""
    if request.param == "no huge pages":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("order", ["C", "F"])
def test_each_array_has_memory_of_its_own(order: str) -> None:
    memory = HugePages()
    arrays = [memory.zeros(shape, FLOAT32, order) for shape in SHAPES]
    del memory
    assert [array.shape for array in arrays] == SHAPES
    for array in arrays:
        assert array.flags[f"{order}_CONTIGUOUS"] and array.flags.writeable
        begins_a_cache_line = array.ctypes.data % 64 == 0
        assert begins_a_cache_line or not array.size or not hasattr(mmap, "MADV_HUGEPAGE")
        assert not array.any()
    for i, array in enumerate(arrays):
        array += i + 1
    assert all((array == i + 1).all() for i, array in enumerate(arrays))


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("rows", [2**40, 2**62])
def test_no_memory_is_a_memory_error(rows: int) -> None:
    with pytest.raises(MemoryError):
        HugePages().zeros((rows, 768), FLOAT32)


@pytest.mark.skipif(not IN_USE.exists(), reason="only Linux says how many addresses are in use")
def test_a_model_takes_few_more_addresses_than_its_weights() -> None:
    """Addresses are what `ulimit -v` limits. The model is GPT-2's largest."""
    before = int(IN_USE.read_text().split()[0])
    model = unwritten(GPT2Config(n_layer=48, n_embd=1600, n_head=25))
    taken = (int(IN_USE.read_text().split()[0]) - before) * mmap.PAGESIZE
    assert taken < 1.2 * sum(parameter.data.nbytes for parameter in model.parameters())
