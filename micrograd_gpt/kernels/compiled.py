"""Kernels for the CPU in C (kernels/c/), called through ctypes: float32 only.

Each stands in for the kernel of the same name in `cpu.py` and takes the same arguments; where those
are of another type or layout than the C code reads, or nothing could be compiled, `cpu.py` does it.
A structure below is the C structure of the same name, field by field.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt.backend import Key
from micrograd_gpt.kernels import cpu
from micrograd_gpt.kernels.compiler import library
from micrograd_gpt.kernels.threads import cores

Array = np.ndarray
F = TypeVar("F", bound=Callable[..., Any])

MANY_ELEMENTS = 2**14  # with fewer, another thread is not worth waking
FEW_ROWS = 16  # a product of at most so many rows is bound by reading the matrix


class _NotForC(Exception):
    """The arguments are of a type or layout that the C code does not read."""


def _or_numpy(kernel: F) -> F:
    """Run `kernel`; where it is not for C, its namesake in cpu.py (nothing is written before)."""
    namesake = getattr(cpu, kernel.__name__)

    @functools.wraps(kernel)
    def choose(*args: Any, **kwargs: Any) -> Any:
        if library() is not None:
            try:
                return kernel(*args, **kwargs)
            except _NotForC:
                pass
        return namesake(*args, **kwargs)

    return choose  # type: ignore[return-value]


def _call(name: str, arguments: ctypes.Structure) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)(ctypes.byref(arguments))


def _ints(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


def _floats(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_float) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


def _check(*arrays: Array | None) -> None:
    """Only float32 arrays that hold something are for C."""
    for array in arrays:
        if array is not None and (array.dtype != np.float32 or not array.size):
            raise _NotForC


def _contiguous(*arrays: Array) -> list[Array]:
    """The arrays without gaps: themselves where they are so already."""
    _check(*arrays)
    return [a if a.flags.c_contiguous else np.ascontiguousarray(a) for a in arrays]


def _strides(array: Array) -> list[int]:
    """How many elements apart neighbours along each axis lie."""
    if any(stride % 4 for stride in array.strides):
        raise _NotForC
    return [stride // 4 for stride in array.strides]


class _Add(ctypes.Structure):
    _fields_ = [*_ints("size"), *_pointers("a", "b", "out")]


@_or_numpy
def add(a: Array, b: Array, out: Array | None = None) -> Array:
    _check(a, b, out)
    if a.shape != b.shape or a.size < MANY_ELEMENTS:
        raise _NotForC
    if out is None:
        out = np.empty_like(a)
    elif (out is not a and out is not b) or not out.flags.writeable:
        raise _NotForC
    in_c, in_fortran = (
        all(getattr(array.flags, order) for array in (a, b, out))
        for order in ("c_contiguous", "f_contiguous")
    )
    if not in_c and not in_fortran:
        raise _NotForC
    _call("add", _Add(a.size, a.ctypes.data, b.ctypes.data, out.ctypes.data))
    return out


# ------------------------------------------------------------------------------ matrix products


class _Product(ctypes.Structure):
    _fields_ = [
        *_ints("n", "k", "m"),
        *_pointers("a"),
        *_ints("a_row", "a_column"),
        *_pointers("b"),
        *_ints("b_row", "b_column"),
        *_pointers("bias", "c"),
        *_ints("c_row"),
    ]


class _LinearBackward(ctypes.Structure):
    _fields_ = [
        ("dx", _Product),
        ("dweight", _Product),
        *_pointers("grad", "dbias"),
        *_ints("n", "m"),
    ]


class _FewRows(ctypes.Structure):
    _fields_ = [*_ints("n", "k", "m"), *_pointers("x", "weight", "bias", "y")]


def _product(a: Array, b: Array, c: Array, bias: Array | None = None) -> _Product:
    """c = a @ b + bias for the C code; a c whose columns have no gaps goes as its transpose."""
    if a.shape[1] != b.shape[0] or c.shape != (a.shape[0], b.shape[1]):
        raise _NotForC  # NumPy says what is wrong
    if c.strides[1] != 4:
        if c.strides[0] != 4 or bias is not None:
            raise _NotForC
        a, b, c = b.T, a.T, c.T
    (n, k), m = a.shape, b.shape[1]
    (a_row, a_column), (b_row, b_column), c_row = a.strides, b.strides, c.strides[0]
    if (a_row | a_column | b_row | b_column | c_row) % 4:
        raise _NotForC
    return _Product(
        *(n, k, m, a.ctypes.data, a_row // 4, a_column // 4, b.ctypes.data, b_row // 4),
        *(b_column // 4, None if bias is None else bias.ctypes.data, c.ctypes.data, c_row // 4),
    )


@_or_numpy
def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    _check(a, b, out)
    if out is None:
        return _multiply(a, b, None)
    if not out.flags.writeable or np.may_share_memory(out, a) or np.may_share_memory(out, b):
        raise _NotForC
    _call("matmul", _product(a, b, out))
    return out


@_or_numpy
def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    _check(x, weight, bias)
    return _multiply(x, weight, None if bias is None else np.ascontiguousarray(bias))


def _multiply(a: Array, b: Array, bias: Array | None) -> Array:
    (n, k), m = a.shape, b.shape[1]
    y = np.empty((n, m), np.float32)
    if n <= FEW_ROWS and b.flags.f_contiguous and k == b.shape[0]:
        a = np.ascontiguousarray(a)
        place = None if bias is None else bias.ctypes.data
        _call("few_rows", _FewRows(n, k, m, a.ctypes.data, b.ctypes.data, place, y.ctypes.data))
    else:
        _call("matmul", _product(a, b, y, bias))
    return y


@_or_numpy
def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    _check(x, weight)
    (grad,) = _contiguous(grad)
    dx, dweight = np.empty(x.shape, np.float32), np.empty_like(weight)
    dbias = np.empty(grad.shape[1], np.float32)
    back, across = _product(grad, weight.T, dx), _product(x.T, grad, dweight)
    _call(
        "linear_backward",
        _LinearBackward(back, across, grad.ctypes.data, dbias.ctypes.data, *grad.shape),
    )
    return dx, dweight, dbias


class _Embedding(ctypes.Structure):
    _fields_ = [*_ints("n", "width"), *_pointers("grad", "ids", "dweight")]


@_or_numpy
def embedding_backward(grad: Array, ids: Array, dweight: Array) -> None:
    _check(dweight)
    (grad,) = _contiguous(grad)
    if not dweight.flags.c_contiguous:
        raise _NotForC
    ids = np.ascontiguousarray(ids, np.int64)
    places = grad.ctypes.data, ids.ctypes.data, dweight.ctypes.data
    _call("embedding_backward", _Embedding(ids.size, grad.shape[-1], *places))


# ----------------------------------------------------------------------------------- layer norm


class _LayerNorm(ctypes.Structure):
    _fields_ = [
        *_ints("n", "width"),
        *_pointers("x", "weight", "bias"),
        *_floats("eps"),
        *_pointers("y", "mean", "rstd"),
    ]


class _LayerNormBackward(ctypes.Structure):
    _fields_ = [
        *_ints("n", "width", "parts"),
        *_pointers("grad", "x", "weight", "mean", "rstd", "dx", "dweights", "dbiases"),
    ]


@_or_numpy
def layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Array, Array]:
    x, weight, bias = _contiguous(x, weight, bias)
    n, width = x.shape
    y, rows = np.empty((n, width), np.float32), np.empty((2, n, 1), np.float32)
    mean, rstd = rows
    inputs = x.ctypes.data, weight.ctypes.data, bias.ctypes.data
    results = y.ctypes.data, mean.ctypes.data, rstd.ctypes.data
    _call("layer_norm_forward", _LayerNorm(n, width, *inputs, eps, *results))
    return y, mean, rstd


@_or_numpy
def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    inputs = _contiguous(grad, x, weight, mean, rstd)
    n, width = x.shape
    parts = cores() if x.size >= MANY_ELEMENTS else 1
    dx, sums = np.empty(x.shape, np.float32), np.empty((2, parts, width), np.float32)
    arrays = (*inputs, dx, *sums)
    _call(
        "layer_norm_backward",
        _LayerNormBackward(n, width, parts, *(a.ctypes.data for a in arrays)),
    )
    dweight, dbias = sums.sum(axis=1)
    return dx, dweight, dbias


# ----------------------------------------------------------------------------------------- gelu


class _Gelu(ctypes.Structure):
    _fields_ = [*_ints("size"), *_pointers("grad", "x", "result")]


@_or_numpy
def gelu_forward(x: Array) -> Array:
    (x,) = _contiguous(x)
    y = np.empty(x.shape, np.float32)
    _call("gelu_forward", _Gelu(x.size, None, x.ctypes.data, y.ctypes.data))
    return y


@_or_numpy
def gelu_backward(grad: Array, x: Array) -> Array:
    grad, x = _contiguous(grad, x)
    dx = np.empty(x.shape, np.float32)
    _call("gelu_backward", _Gelu(x.size, grad.ctypes.data, x.ctypes.data, dx.ctypes.data))
    return dx


# ------------------------------------------------------------------------------------ attention


class _Attention(ctypes.Structure):
    _fields_ = [
        *_ints("batches", "heads", "queries", "keys", "d"),
        *_pointers("q", "k", "v"),
        *[(name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")],
        *_pointers("out", "log_total"),
    ]


class _AttentionBackward(ctypes.Structure):
    _fields_ = [
        ("forward", _Attention),
        *_pointers("grad", "dq", "dk", "dv"),
        *[(name, ctypes.c_int64 * 3) for name in ("dq_strides", "dk_strides", "dv_strides")],
    ]


def _head_strides(array: Array) -> Any:
    """How far batches, heads and tokens of a (B, H, T, D) array lie apart; D must have no gaps."""
    *strides, last = _strides(array)
    if last != 1 and array.shape[-1] > 1:
        raise _NotForC
    return (ctypes.c_int64 * 3)(*strides)


def _attention(q: Array, k: Array, v: Array, out: Array, log_total: Array) -> _Attention:
    b, h, t, d = q.shape
    return _Attention(
        *(b, h, t, k.shape[2], d),
        *(a.ctypes.data for a in (q, k, v)),
        *map(_head_strides, (q, k, v)),
        *(out.ctypes.data, log_total.ctypes.data),
    )


@_or_numpy
def attention_forward(
    q: Array, k: Array, v: Array, dropout: float = 0.0, key: Key = ()
) -> tuple[Array, Array]:
    _check(q, k, v)
    if dropout:
        raise _NotForC
    b, h, t, d = q.shape
    out, log_total = np.empty((b, t, h, d), np.float32), np.empty((b, h, t), np.float32)
    _call("attention_forward", _attention(q, k, v, out, log_total))
    return out, log_total


@_or_numpy
def attention_backward(
    grad: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    log_total: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    dropout: float = 0.0,
    key: Key = (),
) -> None:
    _check(q, k, v, dq, dk, dv)
    if dropout:
        raise _NotForC
    grad, out, log_total = _contiguous(grad, out, log_total)
    _call(
        "attention_backward",
        _AttentionBackward(
            _attention(q, k, v, out, log_total),
            *(a.ctypes.data for a in (grad, dq, dk, dv)),
            *map(_head_strides, (dq, dk, dv)),
        ),
    )


# -------------------------------------------------------------------------------- cross-entropy


class _CrossEntropy(ctypes.Structure):
    _fields_ = [
        *_ints("n", "vocab_size"),
        *_pointers("logits", "targets"),
        *_floats("scale"),
        *_pointers("losses", "dlogits"),
    ]


@_or_numpy
def cross_entropy_forward(
    logits: Array, targets: Array, scale: float = 1.0, out: Array | None = None
) -> tuple[Array, Array]:
    (logits,) = _contiguous(logits)
    dlogits = np.empty(logits.shape, np.float32) if out is None else out
    if dlogits.dtype != np.float32 or not dlogits.flags.c_contiguous:
        raise _NotForC
    targets = np.ascontiguousarray(targets, np.int64)
    losses = np.empty(len(logits), np.float32)
    places = losses.ctypes.data, dlogits.ctypes.data
    _call(
        "cross_entropy_forward",
        _CrossEntropy(*logits.shape, logits.ctypes.data, targets.ctypes.data, scale, *places),
    )
    return losses.sum(), dlogits


# ------------------------------------------------------------------------------------ optimizer


class _AdamW(ctypes.Structure):
    _fields_ = [
        *_ints("count"),
        *_pointers("sizes", "p", "grad", "m", "v", "kept"),
        *_floats("beta1", "rest1", "beta2", "rest2", "rate", "eps"),
    ]


class _Squares(ctypes.Structure):
    _fields_ = [*_ints("count"), *_pointers("sizes", "arrays", "sums")]


CHUNK = 65536  # optimizer.c's


def _places(arrays: Sequence[Array]) -> Array:
    return np.array([a.ctypes.data for a in arrays], np.uintp)


@_or_numpy
def sum_of_squares(arrays: Sequence[Array]) -> float:
    _check(*arrays)
    if not all(a.flags.c_contiguous or a.flags.f_contiguous for a in arrays):
        raise _NotForC
    sizes, places = np.array([a.size for a in arrays], np.int64), _places(arrays)
    sums = np.empty(int((-(-sizes // CHUNK)).sum()))
    at = sizes.ctypes.data, places.ctypes.data, sums.ctypes.data
    _call("sum_of_squares", _Squares(len(arrays), *at))
    return float(sums.sum())


@_or_numpy
def adamw_update(
    parameters: Sequence[Array],
    grads: Sequence[Array],
    ms: Sequence[Array],
    vs: Sequence[Array],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decays: Sequence[float],
    step: int,
) -> None:
    columns = (parameters, grads, ms, vs)
    for arrays in zip(*columns, strict=True):
        _check(*arrays)
        in_c = all(a.flags.c_contiguous for a in arrays)
        if not in_c and not all(a.flags.f_contiguous for a in arrays):
            raise _NotForC
    correction = float(np.sqrt(1 - beta2**step))
    rate = lr * correction / (1 - beta1**step)  # the bias corrections, drawn together in front
    sizes = np.array([p.size for p in parameters], np.int64)
    kept = np.array([1 - lr * decay for decay in decays], np.float32)
    tables = [sizes, *map(_places, columns), kept]
    at = (table.ctypes.data for table in tables)
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    _call("adamw_update", _AdamW(len(sizes), *at, *betas, rate, eps * correction))
