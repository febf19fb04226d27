"""Linear layers by cuBLASLt: on a library that reads columns as documented, and on a GPU."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from columns import column_major
from ml_dtypes import bfloat16

from micrograd_gpt.arrays.devices import library_for
from micrograd_gpt.functional import gelu_forward
from micrograd_gpt.kernels.in_cuda import cublas_lt

HALF = {"float16": np.float16, "bfloat16": bfloat16}


class FakeCublasLt:
    """Matrices in columns, as the documentation of cuBLASLt describes them."""

    ways = 1  # how many the heuristic finds

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.numbers = itertools.count(1)

    def _create(self, handle: Any, what: Any) -> int:
        handle._obj.value = next(self.numbers)
        self.made[handle._obj.value] = what
        return 0

    def cublasLtMatmulDescCreate(self, handle: Any, compute: Any, scale: Any) -> int:
        assert (compute.value, scale.value) == (68, 0)  # CUBLAS_COMPUTE_32F, CUDA_R_32F
        return self._create(handle, {})

    def cublasLtMatrixLayoutCreate(self, handle: Any, *of: Any) -> int:
        return self._create(handle, [number.value for number in of])

    def cublasLtMatmulPreferenceCreate(self, handle: Any) -> int:
        return self._create(handle, {})

    def _set(self, handle: Any, attribute: Any, value: Any, size: Any) -> int:
        assert ctypes.sizeof(value._obj) == size.value
        self.made[handle.value][attribute.value] = value._obj.value
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatmulPreferenceSetAttribute = _set

    def cublasLtMatmulPreferenceDestroy(self, handle: Any) -> int:
        del self.made[handle.value]
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle: Any, *arguments: Any) -> int:
        *_, preference, asked, way, found = arguments
        assert (handle.value, asked.value) == (1234, 1)
        assert self.made[preference.value][1] == 32 << 20
        found._obj.value = self.ways
        way._obj.workspace = 64
        return 0

    def cublasLtMatmul(self, handle: Any, description: Any, alpha: Any, *arguments: Any) -> int:
        a, of_a, b, of_b, beta, c, of_c, out, of_out, _, workspace, size, stream = arguments
        assert (handle.value, alpha._obj.value, beta._obj.value) == (1234, 1, 0)
        assert (size.value, stream.value) == (64, 77)
        assert workspace.value
        assert (c.value, of_c.value) == (out.value, of_out.value)
        how = self.made[description.value]
        matrix_a, matrix_b, result = (
            column_major(address.value, *self.made[layout.value])
            for address, layout in ((a, of_a), (b, of_b), (out, of_out))
        )
        matrix_a = (matrix_a.T if how[3] else matrix_a).astype("f4")
        matrix_b = (matrix_b.T if how[4] else matrix_b).astype("f4")
        (m, n), kind = result.shape, self.made[of_out.value][0]
        bias = column_major(how[8], kind, m, 1, m)
        product = matrix_a @ matrix_b + bias.astype("f4")
        if how[7] == 164:  # CUBLASLT_EPILOGUE_GELU_AUX_BIAS
            column_major(how[11], kind, m, n, how[12])[...] = product
            product = gelu_forward(product)
        else:
            assert how[7] == 4  # CUBLASLT_EPILOGUE_BIAS
        result[...] = product
        return 0


@pytest.fixture(params=["documented", pytest.param("gpu", marks=pytest.mark.gpu)])
def put(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts an array where cuBLASLt finds it; get(array) brings it back."""
    cublas_lt._plan.cache_clear()
    if request.param == "gpu":
        cupy = library_for("gpu")
        yield lambda array: cupy.array(array, order="K")
        return
    library = FakeCublasLt()
    workspace = SimpleNamespace(data=SimpleNamespace(ptr=1))
    cuda = SimpleNamespace(
        device=SimpleNamespace(get_cublas_handle=lambda: 1234),
        get_current_stream=lambda: SimpleNamespace(ptr=77),
    )
    cupy = SimpleNamespace(cuda=cuda, empty=lambda *_: workspace)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cublas_lt, "_library", lambda: library)
    yield np.asarray
    cublas_lt._plan.cache_clear()


def get(array: Any) -> np.ndarray:
    return np.asarray(array.get() if hasattr(array, "get") else array).astype("f4")


class Case:
    """Random a (n, k), b (k, m) in these orders, bias (m,), and two to write into, full of NaN."""

    def __init__(self, put: Any, dtype: str, orders: str = "CC") -> None:
        n, k, m = 64, 48, 80
        rng, half = np.random.default_rng(0), HALF[dtype]
        a, b, bias = (
            np.asarray(rng.standard_normal(shape), half, order=order)
            for shape, order in (((n, k), orders[0]), ((k, m), orders[1]), ((m,), "C"))
        )
        self.given = self.a, self.b, self.bias = put(a), put(b), put(bias)
        self.expected = a.astype("f4") @ b.astype("f4") + bias.astype("f4")
        self.out, self.before = (put(np.full((n, m), np.nan, half)) for _ in range(2))


def assert_close(array: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(get(array), expected, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
def test_a_bias_is_added(put: Any, orders: str, dtype: str) -> None:
    case = Case(put, dtype, orders)
    assert cublas_lt.product(*case.given, case.out)
    assert_close(case.out, case.expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("orders", ["CC", "CF"])
def test_a_bias_then_gelu(put: Any, orders: str, dtype: str) -> None:
    case = Case(put, dtype, orders)
    assert cublas_lt.product(*case.given, case.out, case.before)
    assert_close(case.before, case.expected)
    assert_close(case.out, gelu_forward(case.expected))


@pytest.mark.parametrize("dtype", HALF)
def test_gelu_far_out(put: Any, dtype: str) -> None:
    """It is x or 0, and no infinity nor NaN on the way."""
    values = np.array([6e4, -6e4, 1e3, -1e3, 30, -30, 0, 1], HALF[dtype])
    eye, bias = put(np.eye(8, dtype=values.dtype)), put(values)
    out, before = (put(np.full((8, 8), np.nan, values.dtype)) for _ in range(2))
    assert cublas_lt.product(eye, put(np.zeros((8, 8), values.dtype)), bias, out, before)
    np.testing.assert_allclose(get(out)[0], gelu_forward(values.astype("f4")), rtol=1e-2)


def test_what_it_does_not_take(put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and writes nothing."""
    case = Case(put, "bfloat16")
    (a, b, bias), out = case.given, case.out
    assert not cublas_lt.product(a.astype("f4"), b.astype("f4"), bias.astype("f4"), out)
    assert not cublas_lt.product(a, b.astype("f4"), bias, out)
    assert not cublas_lt.product(a[:, ::2], b[:24], bias, out)
    assert not cublas_lt.product(a[:0], b, bias, out[:0])
    unaligned = a.reshape(-1)[1 : 1 + 48 * 62].reshape(62, 48)
    assert not cublas_lt.product(unaligned, b, bias, out[:62])
    monkeypatch.setattr(cublas_lt, "_library", lambda: None)
    cublas_lt._plan.cache_clear()
    assert not cublas_lt.product(a, b, bias, out)
    assert np.isnan(get(out)).all()


def test_a_product_for_which_no_way_is_found(put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublas_lt.Plan, "_find_way", lambda _: False)
    case = Case(put, "bfloat16")
    assert not cublas_lt.product(*case.given, case.out)
    assert np.isnan(get(case.out)).all()
