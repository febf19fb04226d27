"""Kernels for the CPU in C (sources/), called through ctypes: for arrays of float32, and for matrix
work also of bfloat16 and float16 (half.py).

Each stands in for a definition and takes the same arguments, and sees only those that fit together
(shapes.py). Where they have a type or layout that the C code cannot read, or nothing could be
compiled, it raises NotForMe and a kernel in NumPy does the work. A structure below is the C
structure of the same name, field by field.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from micrograd_gpt import functional, optim, tensor
from micrograd_gpt.arrays.memory import ROWS_AT_ONCE, keep_freed_memory
from micrograd_gpt.arrays.precision import cast, is_half
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.kernels import linear_cross_entropy
from micrograd_gpt.kernels.in_c import half
from micrograd_gpt.kernels.in_c.arguments import (
    call,
    contiguous,
    floats,
    in_c,
    ints,
    pointers,
    strides_of,
)
from micrograd_gpt.kernels.in_numpy.kernels import gradients, scale_of
from micrograd_gpt.kernels.in_numpy.threads import cores
from micrograd_gpt.kernels.shapes import (
    FLOAT32,
    check_plain,
    checked_labels,
    checked_rows,
    checked_update,
)
from micrograd_gpt.layers import Key
from micrograd_gpt.tensor import Tensor

Array = np.ndarray

MANY_ELEMENTS = 2**14  # with fewer, another thread is not worth waking
FEW_QUERIES = 4  # as in decoding; for them tiles do not pay


# ------------------------------------------------------------------------------ matrix products


class _Product(ctypes.Structure):
    _fields_ = [
        *ints("n", "k", "m"),
        *pointers("a"),
        *ints("a_row", "a_column"),
        *pointers("b"),
        *ints("b_row", "b_column"),
        *pointers("bias", "c"),
        *ints("c_row", "adds", "b_kind"),
        *pointers("scales"),
    ]


class _LinearBackward(ctypes.Structure):
    _fields_ = [
        ("dx", _Product),
        ("dweight", _Product),
        *pointers("grad", "dbias"),
        *ints("n", "m"),
    ]


def _product(
    a: Array, b: Array, c: Array, bias: Array | None = None, adds: bool = False
) -> _Product:
    """c = a @ b + bias for the C code; where c is stored by columns, its transpose is computed."""
    if c.strides[1] != 4:
        if c.strides[0] != 4 or bias is not None:
            raise NotForMe
        a, b, c = b.T, a.T, c.T
    (n, k), m = a.shape, b.shape[1]
    return _Product(
        *(n, k, m, a.ctypes.data, *strides_of(a), b.ctypes.data, *strides_of(b)),
        *(None if bias is None else bias.ctypes.data, c.ctypes.data, strides_of(c)[0], adds),
    )


@in_c(functional.linear_forward, half.FLOAT16, half.BFLOAT16)
def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    if x.dtype == half.FLOAT16 and len(x) > half.FEW_ROWS:
        return _many_rows_of_float16(x, weight, bias)
    if is_half(x):
        return half.linear_forward(x, weight, bias)
    return _multiply(x, weight, None if bias is None else np.ascontiguousarray(bias))


def _many_rows_of_float16(x: Array, weight: Array, bias: Array | None) -> Array:
    """In float32, for weights stored column after column, which are widened in cache by parts."""
    if weight.dtype != x.dtype or not weight.flags.f_contiguous:
        raise NotForMe
    bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
    wide, y = cast(x, np.float32), np.empty((len(x), weight.shape[1]), np.float32)
    product = _product(wide, weight, y, bias)
    product.b_kind = half.KINDS.index(half.FLOAT16)
    call("matmul", product)
    return cast(y, x.dtype)


def _multiply(a: Array, b: Array, bias: Array | None) -> Array:
    (n, k), m = a.shape, b.shape[1]
    y = np.empty((n, m), np.float32)
    if n <= half.FEW_ROWS and b.flags.f_contiguous:
        a = np.ascontiguousarray(a)
        place = None if bias is None else bias.ctypes.data
        call("few_rows", half.FewRows(n, k, m, a.ctypes.data, b.ctypes.data, place, y.ctypes.data))
    else:
        call("matmul", _product(a, b, y, bias))
    return y


@in_c(functional.linear_backward, half.BFLOAT16)
def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    if is_half(x):
        return half.linear_backward(grad, x, weight)
    (grad,) = contiguous(grad)
    dx, dweight = np.empty(x.shape, np.float32), np.empty_like(weight)
    dbias = np.empty(grad.shape[1], np.float32)
    back, across = _product(grad, weight.T, dx), _product(x.T, grad, dweight)
    call(
        "linear_backward",
        _LinearBackward(back, across, grad.ctypes.data, dbias.ctypes.data, *grad.shape),
    )
    return dx, dweight, dbias


class _Embedding(ctypes.Structure):
    _fields_ = [*ints("n", "width"), *pointers("grad", "ids", "dweight")]


@in_c(tensor.add_at)
def add_at(total: Array, index: Any, part: Array) -> None:
    check_plain([total, part], [FLOAT32])
    ids = checked_rows(total, index, part)
    if not total.flags.c_contiguous:
        raise NotForMe
    (part,) = contiguous(part)
    places = part.ctypes.data, ids.ctypes.data, total.ctypes.data
    call("embedding_backward", _Embedding(ids.size, total.shape[1], *places))


# ----------------------------------------------------------------------------------- layer norm


class _LayerNorm(ctypes.Structure):
    _fields_ = [
        *ints("n", "width"),
        *pointers("x", "weight", "bias"),
        *floats("eps"),
        *pointers("y", "mean", "rstd"),
    ]


class _LayerNormBackward(ctypes.Structure):
    _fields_ = [
        *ints("n", "width", "parts"),
        *pointers("grad", "x", "weight", "mean", "rstd", "dx", "dweights", "dbiases"),
    ]


@in_c(functional.layer_norm_forward)
def layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Array, Array]:
    x, weight, bias = contiguous(x, weight, bias)
    n, width = x.shape
    y, rows = np.empty((n, width), np.float32), np.empty((2, n, 1), np.float32)
    mean, rstd = rows
    inputs = x.ctypes.data, weight.ctypes.data, bias.ctypes.data
    results = y.ctypes.data, mean.ctypes.data, rstd.ctypes.data
    call("layer_norm_forward", _LayerNorm(n, width, *inputs, eps, *results))
    return y, mean, rstd


@in_c(functional.layer_norm_backward)
def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    inputs = contiguous(grad, x, weight, mean, rstd)
    n, width = x.shape
    parts = cores() if x.size >= MANY_ELEMENTS else 1
    dx, sums = np.empty(x.shape, np.float32), np.empty((2, parts, width), np.float32)
    arrays = (*inputs, dx, *sums)
    call(
        "layer_norm_backward",
        _LayerNormBackward(n, width, parts, *(a.ctypes.data for a in arrays)),
    )
    dweight, dbias = sums.sum(axis=1)
    return dx, dweight, dbias


# ----------------------------------------------------------------------------------------- gelu


class _Gelu(ctypes.Structure):
    _fields_ = [*ints("size"), *pointers("grad", "x", "result"), *ints("narrow")]


@in_c(functional.gelu_forward, half.BFLOAT16)
def gelu_forward(x: Array) -> Array:
    (x,) = contiguous(x)
    y = np.empty(x.shape, x.dtype)
    call("gelu_forward", _Gelu(x.size, None, x.ctypes.data, y.ctypes.data, is_half(x)))
    return y


@in_c(functional.gelu_backward, half.BFLOAT16)
def gelu_backward(grad: Array, x: Array) -> Array:
    grad, x = contiguous(grad, x)
    dx = np.empty(x.shape, x.dtype)
    places = grad.ctypes.data, x.ctypes.data, dx.ctypes.data
    call("gelu_backward", _Gelu(x.size, *places, is_half(x)))
    return dx


# ------------------------------------------------------------------------------------ attention


class _Attention(ctypes.Structure):
    _fields_ = [
        *ints("batches", "heads", "queries", "keys", "d"),
        *pointers("q", "k", "v"),
        *[(name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")],
        *pointers("out", "log_total"),
        *ints("narrow_q", "narrow_kv"),
    ]


class _AttentionBackward(ctypes.Structure):
    _fields_ = [
        ("forward", _Attention),
        *pointers("grad", "dq", "dk", "dv"),
        *[(name, ctypes.c_int64 * 3) for name in ("dq_strides", "dk_strides", "dv_strides")],
    ]


def _head_strides(array: Array) -> Any:
    """How far apart batches, heads and tokens of a (B, H, T, D) array are; D must have no gaps."""
    *strides, last = strides_of(array)
    if last != 1 and array.shape[-1] > 1:
        raise NotForMe
    return (ctypes.c_int64 * 3)(*strides)


def _attention(q: Array, k: Array, v: Array, out: Array, log_total: Array) -> _Attention:
    b, h, t, d = q.shape
    return _Attention(
        *(b, h, t, k.shape[2], d),
        *(a.ctypes.data for a in (q, k, v)),
        *map(_head_strides, (q, k, v)),
        *(out.ctypes.data, log_total.ctypes.data, is_half(q), is_half(k)),
    )


@in_c(functional.attention_forward, half.BFLOAT16)
def attention_forward(q: Array, k: Array, v: Array, p: float, key: Key) -> tuple[Array, Array]:
    """As the definition; the result lies in memory as (B, T, H, D), so joining heads is free."""
    if p:
        raise NotForMe
    b, h, t, d = q.shape
    decoding = t <= FEW_QUERIES and t < k.shape[2]  # a backward follows all others, by tiles too
    by_tiles = is_half(q) and not decoding and half.by_tiles()
    out = np.empty((b, t, h, d), q.dtype if by_tiles else np.float32)
    log_total = np.empty((b, h, t), np.float32)
    name = "attention_forward_bfloat16" if by_tiles else "attention_forward"
    call(name, _attention(q, k, v, out, log_total))
    out = out if out.dtype == q.dtype else cast(out, q.dtype)
    return out.swapaxes(1, 2), log_total


@in_c(functional.attention_backward, half.BFLOAT16)
def attention_backward(
    grad: Array, q: Array, k: Array, v: Array, out: Array, log_total: Array, p: float, key: Key
) -> Array:
    if p or (is_half(q) and not half.by_tiles()):
        raise NotForMe
    b, h, t, d = q.shape
    # The C code reads grad and out as (B, T, H, D) without gaps, the layout the forward writes.
    grad, out, log_total = contiguous(grad.swapaxes(1, 2), out.swapaxes(1, 2), log_total)
    dqkv = np.empty((b, t, 3, h, d), q.dtype)
    dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)  # views, each (B, H, T, D)
    call(
        "attention_backward_bfloat16" if is_half(q) else "attention_backward",
        _AttentionBackward(
            _attention(q, k, v, out, log_total),
            *(a.ctypes.data for a in (grad, dq, dk, dv)),
            *map(_head_strides, (dq, dk, dv)),
        ),
    )
    return dqkv


# -------------------------------------------------------------------------------- cross-entropy


class _CrossEntropy(ctypes.Structure):
    _fields_ = [
        *ints("n", "vocab_size"),
        *pointers("logits", "targets"),
        *floats("scale"),
        *pointers("losses", "dlogits"),
        *ints("narrow"),
    ]


@in_c(functional.cross_entropy_forward)
def cross_entropy_forward(logits: Array, labels: Array) -> tuple[Array, Array]:
    labels = checked_labels(labels, logits.shape[1])
    (logits,) = contiguous(logits)
    dlogits = np.empty(logits.shape, np.float32)
    return dlogits, _cross_entropy(logits, labels, dlogits)


@in_c(linear_cross_entropy.linear_cross_entropy_forward, half.BFLOAT16)
def linear_cross_entropy_forward(
    x: Array, weight: Array, labels: Array, with_gradients: bool
) -> tuple[Array | None, Array, Array | None]:
    """As the definition, ROWS_AT_ONCE rows at a time, so that few logits exist at any moment."""
    labels = checked_labels(labels, len(weight))
    dx: Any = np.empty(x.shape, x.dtype) if with_gradients else None
    dweight: Any = np.empty(weight.shape, np.float32) if with_gradients else None
    loss = np.zeros((), np.float32)
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        dpart = dx[part] if with_gradients else None
        loss = loss + _loss_of_rows(x[part], weight, labels[part], dpart, dweight, start > 0)
    return dx, loss, dweight


def _loss_of_rows(
    x: Array, weight: Array, labels: Array, dx: Array | None, dweight: Array | None, adds: bool
) -> Array:
    """The summed loss of some rows; writes their gradients, where there is a place for them."""
    narrow = is_half(x)
    logits = half.multiply(x, weight.T, FLOAT32) if narrow else _multiply(x, weight.T, None)
    loss = _cross_entropy(logits, labels, logits, narrow)
    if dx is not None and dweight is not None:
        dlogits = logits.view(half.BFLOAT16)[:, : len(weight)] if narrow else logits
        _gradients(dlogits, x, weight, dx, dweight, adds)
    return loss


def _gradients(
    dlogits: Array, x: Array, weight: Array, dx: Array, dweight: Array, adds: bool
) -> None:
    """Write the gradients of x and of the weight, or add the latter to what `dweight` holds."""
    if is_half(x):
        half.write_product(dlogits, weight, dx)
        half.write_product(dlogits.T, x, dweight, adds)
    else:
        call("matmul", _product(dlogits, weight, dx))
        call("matmul", _product(dlogits.T, x, dweight, adds=adds))


def _cross_entropy(logits: Array, labels: Array, dlogits: Array, narrow: bool = False) -> Array:
    """The summed loss; writes the gradient into `dlogits`, which may be `logits` itself.

    A gradient that is `narrow` is of bfloat16, and each of its rows fills the first half of one.
    """
    losses = np.empty(len(logits), np.float32)
    places = losses.ctypes.data, dlogits.ctypes.data
    arguments = (*logits.shape, logits.ctypes.data, labels.ctypes.data, 1.0, *places, narrow)
    call("cross_entropy_forward", _CrossEntropy(*arguments))
    return losses.sum()


# ------------------------------------------------------------------------------------ optimizer


class _AdamW(ctypes.Structure):
    _fields_ = [
        *ints("count"),
        *pointers("sizes", "p", "grad", "m", "v", "kept"),
        *floats("beta1", "rest1", "beta2", "rest2", "rate", "eps"),
    ]


class _Squares(ctypes.Structure):
    _fields_ = [*ints("count"), *pointers("sizes", "arrays", "sums")]


class _Scaling(ctypes.Structure):
    _fields_ = [*ints("count"), *pointers("sizes", "arrays"), *floats("factor")]


CHUNK = 65536  # elements; the same as in optimizer.c


@in_c(optim.clip_grad_norm)
def clip_grad_norm(parameters: list[Tensor], max_norm: float, loss_scale: float = 1.0) -> float:
    grads = gradients(parameters, max_norm)
    check_plain(grads, [FLOAT32])
    # In C order or in Fortran order, without gaps; NumPy says what it says of those not writeable
    if not all(grad.flags.forc and grad.flags.writeable for grad in grads):
        raise NotForMe
    sizes = np.array([grad.size for grad in grads], np.int64)
    places = np.array([grad.ctypes.data for grad in grads], np.uintp)
    order = np.argsort(places)
    if (places[order][1:] < (places + 4 * sizes.astype(np.uintp))[order][:-1]).any():
        raise NotForMe  # two share memory, which threads would scale at once
    sums = np.empty(int((-(-sizes // CHUNK)).sum()))
    at = sizes.ctypes.data, places.ctypes.data, sums.ctypes.data
    call("sum_of_squares", _Squares(len(grads), *at))
    norm = math.sqrt(sums.sum()) / loss_scale
    factor = scale_of(norm, max_norm, loss_scale)
    if factor != 1:
        call("scale", _Scaling(len(grads), *at[:2], factor))
    return norm


@in_c(optim.adamw_update)
def adamw_update(
    rows: list[Any], lr: float, beta1: float, beta2: float, eps: float, step: int
) -> None:
    keep_freed_memory()  # a run has begun: the next step allocates the same arrays again
    places = checked_update(rows, FLOAT32)
    for *arrays, _ in rows:
        in_order = all(a.flags.c_contiguous for a in arrays)
        if not in_order and not all(a.flags.f_contiguous for a in arrays):
            raise NotForMe
    correction = float(np.sqrt(1 - beta2**step))
    rate = lr * correction / (1 - beta1**step)  # with both bias corrections in one factor
    sizes = np.array([p.size for p, *_ in rows], np.int64)
    kept = np.array([1 - lr * decay for *_, decay in rows], np.float32)
    tables = [sizes, *places, kept]
    at = (table.ctypes.data for table in tables)
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    call("adamw_update", _AdamW(len(sizes), *at, *betas, rate, eps * correction))
