"""The machines on which the tests of the CUDA kernels run: emulated on the CPU, or a GPU."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest
from cuda_emulator import Emulator
from guarded_arrays import GuardedArrays

from micrograd_gpt.functional import gelu_forward
from micrograd_gpt.kernels.in_cuda import cublas, cublas_lt, residual, token_step
from micrograd_gpt.kernels.in_cuda import kernels as gpu
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules


class Machine(ABC):
    """`put` copies NumPy arrays to the machine, `get` one back; `repeated` computes there."""

    def __init__(self, library: Any) -> None:
        self.arrays = GuardedArrays(library)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (gpu, residual, token_step):
            monkeypatch.setattr(module, "array_module", lambda array: self.arrays)

    @abstractmethod
    def put(self, *arrays: np.ndarray) -> list[Any]: ...

    @abstractmethod
    def get(self, array: Any) -> np.ndarray: ...

    @abstractmethod
    def prepare(self, repetition: int) -> None:
        """Called before each run of `repeated`."""

    def repeated(self, function: Callable[[], Any]) -> Any:
        """The arrays that function() returns, as NumPy's; three runs must agree bit for bit."""
        runs = []
        for repetition in range(3):
            self.prepare(repetition)
            result = function()
            results = result if isinstance(result, tuple) else (result,)
            runs.append([self.get(array) for array in results])
        self.prepare(0)
        for others in runs[1:]:
            for a, b in zip(runs[0], others, strict=True):
                assert a.tobytes() == b.tobytes(), "the order of the threads changes the result"
        return runs[0] if len(runs[0]) > 1 else runs[0][0]


class EmulatedGPU(Machine):
    """Kernels compiled by g++, whose threads take turns in another order each time."""

    ORDERS = (0, 1, 7)  # upwards, downwards, shuffled

    def __init__(self, folder: Path) -> None:
        super().__init__(np)
        self.emulator = Emulator(folder)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().install(monkeypatch)
        monkeypatch.setattr(cuda_modules, "run", self.emulator.run)
        monkeypatch.setattr(cuda_modules, "usable", lambda: True)
        monkeypatch.setattr(cublas, "product", _product)
        monkeypatch.setattr(cublas_lt, "product", _product_with_bias)

    def put(self, *arrays: np.ndarray) -> list[np.ndarray]:
        return list(arrays)

    def get(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array)

    def prepare(self, repetition: int) -> None:
        self.emulator.order = self.ORDERS[repetition]


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Does what cuBLAS does in cublas.product: float32 sums, rounded once."""
    out[...] = a.astype(np.float32) @ b.astype(np.float32)
    return out


def _product_with_bias(
    a: np.ndarray,
    b: np.ndarray,
    bias: np.ndarray,
    out: np.ndarray,
    before: np.ndarray | None = None,
) -> bool:
    """Does what cuBLASLt does in cublas_lt.product."""
    if a.dtype == np.float32 or a.dtype != b.dtype:
        return False
    product = a.astype(np.float32) @ b.astype(np.float32) + bias
    if before is not None:
        before[...], product = product, gelu_forward(product)
    out[...] = product
    return True


@contextmanager
def emulated_cupy(emulator: Emulator) -> Iterator[None]:
    """Within this block a model on "gpu" computes, with fake_cupy's arrays and emulated kernels."""

    def product(a: fake_cupy.ndarray, b: fake_cupy.ndarray, out: fake_cupy.ndarray) -> Any:
        out[...] = fake_cupy.matmul(a.astype(np.float32), b.astype(np.float32))
        return out

    def product_with_bias(*arrays: Any) -> bool:
        return _product_with_bias(*(array if array is None else array._numbers for array in arrays))

    emulator.launched.clear()
    with fake_cupy.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_modules, "run", functools.partial(fake_cupy.launch, emulator.run))
        patch.setattr(cuda_modules, "usable", lambda: True)
        patch.setattr(cuda_modules, "address", lambda array: array._numbers.ctypes.data)
        patch.setattr(cublas, "product", product)
        patch.setattr(cublas_lt, "product", product_with_bias)
        yield


class RealGPU(Machine):
    def __init__(self) -> None:
        import cupy

        super().__init__(cupy)

    def put(self, *arrays: np.ndarray) -> list[Any]:
        """Copy to the GPU; a view stays a view, as the array it is part of is copied as well."""
        return [self._moved(array) for array in arrays]

    def _moved(self, array: np.ndarray) -> Any:
        base = array.base if isinstance(array.base, np.ndarray) else None
        if base is None:
            return self.arrays.library.asarray(array)
        start = array.ctypes.data - base.ctypes.data
        memory = self.arrays.library.asarray(base.reshape(-1).view(np.uint8))
        return self.arrays.library.ndarray(
            array.shape, array.dtype, memory.data + start, array.strides
        )

    def prepare(self, repetition: int) -> None:
        """Nothing to do: a GPU orders its threads anew each time."""

    def get(self, array: Any) -> np.ndarray:
        """A copy with the array's layout: its axes, from the largest stride to the smallest."""
        axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        return array.transpose(axes).get().transpose(np.argsort(axes))
