"""Matrices in memory as cuBLAS reads them: column after column."""

from __future__ import annotations

import ctypes

import numpy as np

TYPES = {0: "float32", 2: "float16", 14: "bfloat16"}  # cudaDataType_t in library_types.h


def column_major(address: int, kind: int, rows: int, columns: int, leading: int) -> np.ndarray:
    """A view of `columns` columns of `rows` elements, each `leading` elements after the last."""
    assert leading >= max(1, rows), "cuBLAS would refuse this leading dimension"
    dtype = np.dtype(TYPES[kind])
    memory = (ctypes.c_char * (leading * columns * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(columns, leading).T[:rows]
