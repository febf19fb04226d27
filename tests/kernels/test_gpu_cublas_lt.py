"""Products of cuBLASLt and what is done beside them: on a library that reads columns as documented,
and on a GPU."""

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
from micrograd_gpt.functional import gelu_backward, gelu_forward
from micrograd_gpt.kernels.in_cuda import cublas_lt

HALF = {"float16": np.float16, "bfloat16": bfloat16}
SUMS = {"a": cublas_lt.SUMS_OF_A, "b": cublas_lt.SUMS_OF_B}


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
        (m, n), kind, product = result.shape, self.made[of_out.value][0], matrix_a @ matrix_b
        if how[7] != 192:
            vector = column_major(how[8], kind, n if how[7] == 512 else m, 1, 10**4)[:, 0]
        if how[7] in (4, 164):
            product = product + vector[:, None].astype("f4")
        if how[7] in (164, 192):
            before = column_major(how[11], kind, m, n, how[12])
            if how[7] == 164:
                before[...] = product
            product = gelu_forward(product) if how[7] == 164 else gelu_backward(product, before)
        if how[7] in (256, 512):
            vector[...] = matrix_a.sum(1) if how[7] == 256 else matrix_b.sum(0)
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
    """Random a (n, k) and b (k, m) in these orders, and what to write into, which holds NaN."""

    def __init__(self, put: Any, dtype: str, orders: str, result: str | None = None) -> None:
        n, k, m = 64, 48, 80
        rng, half = np.random.default_rng(0), HALF[dtype]
        a, b = (
            np.asarray(rng.standard_normal(shape), half, order=order)
            for shape, order in zip(((n, k), (k, m)), orders, strict=True)
        )
        self.row, self.before = (
            rng.standard_normal(shape).astype(half) for shape in ((m,), (n, m))
        )
        self.a, self.b, self.product = put(a), put(b), a.astype("f4") @ b.astype("f4")
        self.sums = {"a": a.astype("f4").sum(1), "b": b.astype("f4").sum(0)}
        self.out = put(np.full((n, m), np.nan, result or half))


def assert_close(array: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(get(array), expected.astype("f4"), rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
def test_a_bias_is_added(put: Any, orders: str, dtype: str) -> None:
    case = Case(put, dtype, orders)
    row = case.row.astype("f4")
    assert cublas_lt.product(case.a, case.b, case.out, cublas_lt.BIAS, put(case.row))
    assert_close(case.out, case.product + row)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("orders", ["CC", "CF"])
def test_a_bias_then_gelu(put: Any, orders: str, dtype: str) -> None:
    case = Case(put, dtype, orders)
    before = put(np.full(case.product.shape, np.nan, HALF[dtype]))
    how = cublas_lt.BIAS_THEN_GELU
    assert cublas_lt.product(case.a, case.b, case.out, how, put(case.row), before)
    expected = case.product + case.row.astype("f4")
    assert_close(before, expected)
    assert_close(case.out, gelu_forward(expected))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("orders", ["CC", "CF"])
def test_back_through_gelu(put: Any, orders: str, dtype: str) -> None:
    case = Case(put, dtype, orders)
    how = cublas_lt.BACK_THROUGH_GELU
    assert cublas_lt.product(case.a, case.b, case.out, how, before=put(case.before))
    assert_close(case.out, gelu_backward(case.product, case.before.astype("f4")))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_far_out_gelu_has_the_slopes_0_and_1(dtype: str) -> None:
    cupy = library_for("gpu")
    large = 6e4 if dtype == "float16" else 1e30
    values = np.array([large, -large, 1e3, -1e3, np.inf, -np.inf, 0, 30], HALF[dtype])
    eye, grads = np.eye(8, dtype=HALF[dtype]), np.ones((8, 8), HALF[dtype])
    before, out = (cupy.asarray(np.tile(x, (8, 1))) for x in (values, values * 0))
    a, b = cupy.asarray(grads), cupy.asarray(eye)
    assert cublas_lt.product(a, b, out, cublas_lt.BACK_THROUGH_GELU, before=before)
    np.testing.assert_allclose(get(out)[0], [1, 0, 1, 0, 1, 0, 0.5, 1])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("orders", "of"), [("FC", "b"), ("FC", "a"), ("CC", "b"), ("CF", "a")])
def test_sums_beside_a_product_in_float32(put: Any, orders: str, of: str, dtype: str) -> None:
    case = Case(put, dtype, orders, "f4")
    sums = put(np.full(len(case.sums[of]), np.nan, "f4"))
    assert cublas_lt.product(case.a, case.b, case.out, SUMS[of], sums)
    assert_close(case.out, case.product)
    assert_close(sums, case.sums[of])


def test_what_it_does_not_take(put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and writes nothing."""
    case = Case(put, "bfloat16", "CC")
    row, how = put(case.row), cublas_lt.BIAS
    wide, gaps, odd = case.a.astype("f4"), case.a[:, ::2], case.a.reshape(-1)[1 : 3073 - 47]
    assert not cublas_lt.product(wide, case.b, case.out, how, row)
    assert not cublas_lt.product(case.a, case.b.astype("f4"), case.out, how, row)
    assert not cublas_lt.product(gaps, case.b[:24], case.out, how, row)
    assert not cublas_lt.product(case.a[:0], case.b, case.out[:0], how, row)
    unaligned = odd[: 48 * 62].reshape(62, 48)
    assert not cublas_lt.product(unaligned, case.b, case.out[:62], how, row)
    monkeypatch.setattr(cublas_lt, "_library", lambda: None)
    cublas_lt._plan.cache_clear()
    assert not cublas_lt.product(case.a, case.b, case.out, how, row)
    assert np.isnan(get(case.out)).all()


def test_a_product_for_which_no_way_is_found(put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCublasLt, "ways", 0)
    monkeypatch.setattr(cublas_lt.Plan, "_find_way", lambda _: False)
    case = Case(put, "bfloat16", "CC")
    assert not cublas_lt.product(case.a, case.b, case.out, cublas_lt.BIAS, put(case.row))
