"""How a row-major product is passed to cuBLAS, which reads columns: gemmEx as documented."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from columns import column_major

from micrograd_gpt.kernels.in_cuda import cublas


def gemm_ex(
    handle: int, op_a: int, op_b: int, m: int, n: int, k: int, alpha: int,
    a: int, a_kind: int, lda: int, b: int, b_kind: int, ldb: int, beta: int,
    c: int, c_kind: int, ldc: int, compute: str, algorithm: str,
) -> None:  # fmt: skip
    """C (m, n) = alpha op(A) op(B) + beta C, as the cuBLAS documentation describes it."""
    assert (handle, compute, algorithm) == (1234, "32F", "tensor op")
    matrix_a = column_major(a, a_kind, *((k, m) if op_a else (m, k)), lda)
    matrix_b = column_major(b, b_kind, *((n, k) if op_b else (k, n)), ldb)
    matrix_a, matrix_b = (matrix_a.T if op_a else matrix_a), (matrix_b.T if op_b else matrix_b)
    factors = [ctypes.c_float.from_address(address).value for address in (alpha, beta)]
    assert factors == [1.0, 0.0]  # with beta 0, C is not read: it may hold NaN
    result = column_major(c, c_kind, m, n, ldc)
    result[...] = matrix_a.astype(np.float32) @ matrix_b.astype(np.float32)


@pytest.fixture(autouse=True)
def fake_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(get_cublas_handle=lambda: 1234)
    constants = {"CUBLAS_COMPUTE_32F": "32F", "CUBLAS_GEMM_DEFAULT_TENSOR_OP": "tensor op"}
    libs = SimpleNamespace(cublas=SimpleNamespace(gemmEx=gemm_ex, **constants))
    cupy = SimpleNamespace(cuda=SimpleNamespace(device=device))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libs)


@pytest.mark.parametrize("result", ["float32", "as given"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
@pytest.mark.parametrize(("n", "k", "m"), [(3, 5, 7), (1, 4, 6), (6, 4, 1), (5, 1, 3), (1, 1, 1)])
def test_product(n: int, k: int, m: int, orders: str, dtype: str, result: str) -> None:
    rng = np.random.default_rng(0)
    a = np.asarray(rng.standard_normal((n, k)), dtype, order=orders[0])
    b = np.asarray(rng.standard_normal((k, m)), dtype, order=orders[1])
    out = np.full((n, m), np.nan, dtype if result == "as given" else result)
    assert cublas.product(a, b, out) is out
    expected = (a.astype(np.float32) @ b.astype(np.float32)).astype(out.dtype)
    np.testing.assert_allclose(out.astype(float), expected.astype(float), rtol=1e-2, atol=1e-2)
