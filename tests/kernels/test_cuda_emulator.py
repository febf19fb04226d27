"""Tests of the emulator: it reports what is undefined on a GPU, and rounds as NumPy does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_emulator
import numpy as np
import pytest

from micrograd_gpt.kernels.in_cuda import modules as cuda_modules

pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason=cuda_emulator.MISSING)


def run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    *arguments: Any,
    threads: int = 64,
    dtype: str = "float32",
    order: int = 0,
) -> None:
    """Run f, the only kernel of a source, in one block."""
    name, whole = f"{folder.name}-{dtype}", '#include "common.cuh"\n' + text
    (folder / f"{name}.cu").write_text(whole)
    (folder / "common.cuh").write_text((cuda_modules.FOLDER / "common.cuh").read_text())
    monkeypatch.setattr(cuda_modules, "FOLDER", folder)
    emulator = cuda_emulator.Emulator(folder)
    emulator.order = order
    monkeypatch.setattr(cuda_modules, "run", emulator.run)
    cuda_modules.launch(name, "f", dtype, (1,), (threads,), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "if (threadIdx.x < 40) __syncthreads(); else __syncwarp();",
        "if (threadIdx.x % 32 == 5) return; over_lanes<Sum>(1.0f);",
        "if (threadIdx.x % 32 < 16) over_lanes<Sum>(1.0f); else __syncthreads();",
    ],
)
def test_waiting_in_vain_is_reported(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f'extern "C" __global__ void f(float* x) {{ {body} }}'
    with pytest.raises(AssertionError, match="threads wait for others"):
        run(tmp_path, monkeypatch, source, np.zeros(1, np.float32))


def test_threads_that_returned_need_not_come_to_the_blocks_barrier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = 'extern "C" __global__ void f(float* x) { if (threadIdx.x) { __syncthreads(); } }'
    run(tmp_path, monkeypatch, source, np.zeros(1, np.float32))


def test_a_missing_barrier_shows_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """extern "C" __global__ void f(float* x) {
        __shared__ float shared[64];
        shared[threadIdx.x] = threadIdx.x;
        x[threadIdx.x] = shared[63 - threadIdx.x];
    }"""
    results = []
    for order in (0, 1):
        x = np.full(64, np.nan, np.float32)
        run(tmp_path, monkeypatch, source, x, order=order)
        results.append(x)
    right = [(x == np.arange(64)[::-1]) for x in results]
    assert not all(r.all() for r in right)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_round_as_numpys(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All numbers of the type, those halfway between two of them, and random ones."""
    source = """extern "C" __global__ void f(const float* x, Activation* y, float* z, int n) {
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            y[i] = rounded<Activation>(x[i]);
            z[i] = to_float(y[i]);
        }
    }"""
    with np.errstate(all="ignore"):
        every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
        halfway = ((every[:-1].astype(float) + every[1:]) / 2).astype(np.float32)
        others = np.random.default_rng(0).integers(0, 2**32, 10000, np.uint32).view(np.float32)
        x = np.concatenate([every, halfway, others])
        expected = x.astype(dtype)
    y, z = np.empty(len(x), dtype), np.empty(len(x), np.float32)
    run(tmp_path, monkeypatch, source, x, y, z, len(x), dtype=dtype)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(z, expected.astype(np.float32))
