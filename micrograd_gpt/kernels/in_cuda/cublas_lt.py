"""Linear layers of two-byte arrays by cuBLASLt, which adds the bias and takes GELU on the way out.

cuBLASLt comes with the cuBLAS that CuPy loads, but CuPy has no functions for it: they are called
here by ctypes. The numbers in capitals are those of cublasLt.h and library_types.h (NVIDIA, cuBLAS
documentation, "Using the cuBLASLt API").
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from threading import Lock
from typing import Any

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.arrays.precision import is_half
from micrograd_gpt.kernels.in_cuda.cublas import CUDA_TYPES, is_transposed, leading
from micrograd_gpt.kernels.in_cuda.modules import address

BIAS, BIAS_THEN_GELU = 4, 164  # cublasLtEpilogue_t; the second keeps what GELU is taken of
# cublasLtMatmulDescAttributes_t, of a product
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, ADDED, BEFORE, LEADING_OF_BEFORE = 3, 4, 7, 8, 11, 12
MOST_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t
FLOAT32_SUMS = 68  # cublasComputeType_t
ALIGNED = 16  # bytes; cuBLASLt's quick products need it
WORKSPACE = 32 << 20  # bytes that a product may use meanwhile; NVIDIA advises this for an H100

ONE, ZERO = c_float(1), c_float(0)
_POINTERS = Lock()  # held while a product's pointers are set and read


class _Way(ctypes.Structure):
    """How a product can be done: cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def product(a: Array, b: Array, bias: Array, out: Array, before: Array | None = None) -> bool:
    """Write a (n, k) @ b (k, m) + bias (m,) into `out` (n, m); with `before`, into that one, and
    its GELU into `out`.

    The GELU is taken before anything is rounded. `out` and `before` are C-contiguous. False, with
    nothing done, unless all are float16 or all bfloat16, a and b have no gaps, and cuBLASLt is
    found and has a way to do it.
    """
    arrays = [x for x in (a, b, out, bias, before) if x is not None]
    if not is_half(a) or any(x.dtype != a.dtype for x in arrays):
        return False
    if any(not x.size or address(x) % ALIGNED for x in arrays):
        return False
    if not all(x.flags.c_contiguous or x.flags.f_contiguous for x in (a, b)):
        return False
    sizes = (*out.shape, a.shape[1], is_transposed(a), is_transposed(b), leading(a), leading(b))
    plan = _plan(before is not None, CUDA_TYPES[str(a.dtype)], sizes)
    if plan is not None:
        plan(*map(address, arrays))
    return plan is not None


@cache
def _library() -> Any:
    """cuBLASLt, None where it is not found."""
    import cupy

    cupy.cuda.device.get_cublas_handle()  # loads cuBLAS, which loads cuBLASLt
    version = cupy.cuda.runtime.runtimeGetVersion() // 1000
    windows = sys.platform == "win32"
    try:
        return ctypes.CDLL(f"cublasLt64_{version}.dll" if windows else f"libcublasLt.so.{version}")
    except OSError:
        return None


@cache
def _plan(gelu: bool, kind: int, sizes: tuple[int, ...]) -> Plan | None:
    """What does all products of this kind; None where nothing does."""
    library = _library()
    if library is None:
        return None
    plan = Plan(library, gelu, kind, sizes)
    return plan if plan.found else None


class Plan:
    """A product of one kind, and the way cuBLASLt finds best for it.

    cuBLASLt reads columns, so it sees a matrix stored in rows as its transpose, and is asked for
    outᵀ = bᵀ aᵀ: its A is our b.

    Args:
        library: cuBLASLt.
        gelu: whether GELU comes after the bias.
        kind: the type of all arrays (CUDA_TYPES).
        sizes: n, m, k, whether a and b are stored in columns, and their leading dimensions.
    """

    def __init__(self, library: Any, gelu: bool, kind: int, sizes: tuple[int, ...]) -> None:
        n, m, k, a_in_columns, b_in_columns, leading_a, leading_b = sizes
        self.library = library
        float32 = c_int(CUDA_TYPES["float32"])
        self.description = self._make("MatmulDesc", c_int(FLOAT32_SUMS), float32)
        self._set(TRANSPOSE_A, c_int(b_in_columns))
        self._set(TRANSPOSE_B, c_int(a_in_columns))
        self._set(EPILOGUE, c_int(BIAS_THEN_GELU if gelu else BIAS))
        self._set(ADDED, c_void_p(ALIGNED))  # how pointers will be aligned
        if gelu:
            self._set(BEFORE, c_void_p(ALIGNED))
            self._set(LEADING_OF_BEFORE, c_int64(m))
        of_b = (k, m) if b_in_columns else (m, k)
        of_a = (n, k) if a_in_columns else (k, n)
        self.layouts = [
            self._make("MatrixLayout", c_int(kind), *map(c_uint64, size), c_int64(apart))
            for size, apart in ((of_b, leading_b), (of_a, leading_a), ((m, n), m))
        ]
        self.way = _Way()
        self.found = self._find_way()

    def _make(self, what: str, *arguments: Any) -> c_void_p:
        made = c_void_p()
        _check(getattr(self.library, f"cublasLt{what}Create")(byref(made), *arguments), what)
        return made

    def _set(self, attribute: int, value: Any, of: str = "MatmulDesc", where: Any = None) -> None:
        setter = getattr(self.library, f"cublasLt{of}SetAttribute")
        size = c_size_t(ctypes.sizeof(value))
        _check(setter(where or self.description, c_int(attribute), byref(value), size), of)

    def _find_way(self) -> bool:
        preference = self._make("MatmulPreference")
        self._set(MOST_WORKSPACE, c_uint64(WORKSPACE), "MatmulPreference", preference)
        for alignment in ALIGNMENTS:
            self._set(alignment, ctypes.c_uint32(ALIGNED), "MatmulPreference", preference)
        found = c_int()
        of_b, of_a, of_out = self.layouts
        status = self.library.cublasLtMatmulAlgoGetHeuristic(
            *(_handle(), self.description, of_b, of_a, of_out, of_out, preference),
            *(c_int(1), byref(self.way), byref(found)),
        )
        self.library.cublasLtMatmulPreferenceDestroy(preference)
        return status == 0 and found.value > 0

    def __call__(self, a: int, b: int, out: int, bias: int, before: int | None = None) -> None:
        """Start the product of the matrices at these addresses, on the current stream."""
        import cupy

        (of_b, of_a, of_out), way = self.layouts, self.way
        workspace = cupy.empty(way.workspace, "u1")
        stream = cupy.cuda.get_current_stream().ptr
        with _POINTERS:
            self._set(ADDED, c_void_p(bias))
            if before is not None:
                self._set(BEFORE, c_void_p(before))
            status = self.library.cublasLtMatmul(
                *(_handle(), self.description, byref(ONE)),
                *(c_void_p(b), of_b, c_void_p(a), of_a, byref(ZERO)),
                *(c_void_p(out), of_out, c_void_p(out), of_out, byref(way)),
                *(c_void_p(workspace.data.ptr), c_size_t(way.workspace), c_void_p(stream)),
            )
        _check(status, "Matmul")


def _handle() -> c_void_p:
    """That of cuBLAS is one of cuBLASLt, too."""
    import cupy

    return c_void_p(cupy.cuda.device.get_cublas_handle())


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"cublasLt{what} failed with status {status} (cublasStatus_t)")
