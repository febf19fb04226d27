"""Matrix products of two-byte arrays by cuBLAS: tensor cores, float32 sums, a chosen result type.

CuPy's own product has the type of its operands. The gradient of a float32 weight must be float32,
and must not be rounded on the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.kernels.in_cuda.modules import address

CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t in library_types.h
ONE, ZERO = (np.array(value, np.float32) for value in (1, 0))


def product(a: Array, b: Array, out: Array) -> Array:
    """Write a (n, k) @ b (k, m) into out (n, m), and return it.

    a and b are both float16 or both bfloat16, each C-contiguous or F-contiguous. `out` has their
    type or is float32, and is C-contiguous.
    """
    import cupy
    from cupy_backends.cuda.libs import cublas

    n, m, k = len(a), b.shape[1], a.shape[1]
    kind = CUDA_TYPES[str(a.dtype)]
    # cuBLAS reads columns, so it sees a matrix stored in rows as its transpose: outᵀ = bᵀ aᵀ
    cublas.gemmEx(
        cupy.cuda.device.get_cublas_handle(),
        *(is_transposed(b), is_transposed(a), m, n, k, ONE.ctypes.data),
        *(address(b), kind, leading(b), address(a), kind, leading(a), ZERO.ctypes.data),
        *(address(out), CUDA_TYPES[str(out.dtype)], m),
        *(cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP),
    )
    return out


def is_transposed(matrix: Any) -> int:
    """CUBLAS_OP_N (0) for a matrix stored in rows, CUBLAS_OP_T (1) for one stored in columns."""
    return 0 if matrix.flags.c_contiguous else 1


def leading(matrix: Any) -> int:
    """How many elements separate the starts of two stored rows (or columns)."""
    return matrix.shape[1] if matrix.flags.c_contiguous else matrix.shape[0]
