"""Kernels for the CPU in C (kernels/c/), called through ctypes: float32 only.

Each stands in for the kernel of the same name in `cpu.py`, or where there is none for the
definition, and takes the same arguments; where those are of another type or layout than the C code
reads, or nothing could be compiled, that one does it. A structure below is the C structure of the
same name, field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from micrograd_gpt.arrays.backend import Key
from micrograd_gpt.kernels.blocks import parameters_of
from micrograd_gpt.kernels.in_c.arguments import (
    NotForC,
    call,
    check,
    contiguous,
    floats,
    ints,
    or_numpy,
    pointers,
    strides_of,
)
from micrograd_gpt.kernels.in_numpy.threads import cores

Array = np.ndarray

MANY_ELEMENTS = 2**14  # with fewer, another thread is not worth waking
FEW_ROWS = 16  # a product of at most so many rows is bound by reading the matrix


class _Add(ctypes.Structure):
    _fields_ = [*ints("size"), *pointers("a", "b", "out")]


@or_numpy
def add(a: Array, b: Array, out: Array | None = None) -> Array:
    check(a, b, out)
    if a.shape != b.shape or a.size < MANY_ELEMENTS:
        raise NotForC
    if out is None:
        out = np.empty_like(a)
    elif (out is not a and out is not b) or not out.flags.writeable:
        raise NotForC
    in_c, in_fortran = (
        all(getattr(array.flags, order) for array in (a, b, out))
        for order in ("c_contiguous", "f_contiguous")
    )
    if not in_c and not in_fortran:
        raise NotForC
    call("add", _Add(a.size, a.ctypes.data, b.ctypes.data, out.ctypes.data))
    return out


# ------------------------------------------------------------------------------ matrix products


class _Product(ctypes.Structure):
    _fields_ = [
        *ints("n", "k", "m"),
        *pointers("a"),
        *ints("a_row", "a_column"),
        *pointers("b"),
        *ints("b_row", "b_column"),
        *pointers("bias", "c"),
        *ints("c_row"),
    ]


class _LinearBackward(ctypes.Structure):
    _fields_ = [
        ("dx", _Product),
        ("dweight", _Product),
        *pointers("grad", "dbias"),
        *ints("n", "m"),
    ]


class _FewRows(ctypes.Structure):
    _fields_ = [*ints("n", "k", "m"), *pointers("x", "weight", "bias", "y")]


def _product(a: Array, b: Array, c: Array, bias: Array | None = None) -> _Product:
    """c = a @ b + bias for the C code; a c whose columns have no gaps goes as its transpose."""
    if a.shape[1] != b.shape[0] or c.shape != (a.shape[0], b.shape[1]):
        raise NotForC  # NumPy says what is wrong
    if c.strides[1] != 4:
        if c.strides[0] != 4 or bias is not None:
            raise NotForC
        a, b, c = b.T, a.T, c.T
    (n, k), m = a.shape, b.shape[1]
    (a_row, a_column), (b_row, b_column), c_row = a.strides, b.strides, c.strides[0]
    if (a_row | a_column | b_row | b_column | c_row) % 4:
        raise NotForC
    return _Product(
        *(n, k, m, a.ctypes.data, a_row // 4, a_column // 4, b.ctypes.data, b_row // 4),
        *(b_column // 4, None if bias is None else bias.ctypes.data, c.ctypes.data, c_row // 4),
    )


@or_numpy
def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    check(a, b, out)
    if out is None:
        return _multiply(a, b, None)
    if not out.flags.writeable or np.may_share_memory(out, a) or np.may_share_memory(out, b):
        raise NotForC
    call("matmul", _product(a, b, out))
    return out


@or_numpy
def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    check(x, weight, bias)
    return _multiply(x, weight, None if bias is None else np.ascontiguousarray(bias))


def _multiply(a: Array, b: Array, bias: Array | None) -> Array:
    (n, k), m = a.shape, b.shape[1]
    y = np.empty((n, m), np.float32)
    if n <= FEW_ROWS and b.flags.f_contiguous and k == b.shape[0]:
        a = np.ascontiguousarray(a)
        place = None if bias is None else bias.ctypes.data
        call("few_rows", _FewRows(n, k, m, a.ctypes.data, b.ctypes.data, place, y.ctypes.data))
    else:
        call("matmul", _product(a, b, y, bias))
    return y


@or_numpy
def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    check(x, weight)
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


@or_numpy
def embedding_backward(grad: Array, ids: Array, dweight: Array) -> None:
    check(dweight)
    (grad,) = contiguous(grad)
    if not dweight.flags.c_contiguous:
        raise NotForC
    ids = np.ascontiguousarray(ids, np.int64)
    places = grad.ctypes.data, ids.ctypes.data, dweight.ctypes.data
    call("embedding_backward", _Embedding(ids.size, grad.shape[-1], *places))


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


@or_numpy
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


@or_numpy
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
    _fields_ = [*ints("size"), *pointers("grad", "x", "result")]


@or_numpy
def gelu_forward(x: Array) -> Array:
    (x,) = contiguous(x)
    y = np.empty(x.shape, np.float32)
    call("gelu_forward", _Gelu(x.size, None, x.ctypes.data, y.ctypes.data))
    return y


@or_numpy
def gelu_backward(grad: Array, x: Array) -> Array:
    grad, x = contiguous(grad, x)
    dx = np.empty(x.shape, np.float32)
    call("gelu_backward", _Gelu(x.size, grad.ctypes.data, x.ctypes.data, dx.ctypes.data))
    return dx


# ------------------------------------------------------------------------------------ attention


class _Attention(ctypes.Structure):
    _fields_ = [
        *ints("batches", "heads", "queries", "keys", "d"),
        *pointers("q", "k", "v"),
        *[(name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")],
        *pointers("out", "log_total"),
    ]


class _AttentionBackward(ctypes.Structure):
    _fields_ = [
        ("forward", _Attention),
        *pointers("grad", "dq", "dk", "dv"),
        *[(name, ctypes.c_int64 * 3) for name in ("dq_strides", "dk_strides", "dv_strides")],
    ]


def _head_strides(array: Array) -> Any:
    """How far batches, heads and tokens of a (B, H, T, D) array lie apart; D must have no gaps."""
    *strides, last = strides_of(array)
    if last != 1 and array.shape[-1] > 1:
        raise NotForC
    return (ctypes.c_int64 * 3)(*strides)


def _attention(q: Array, k: Array, v: Array, out: Array, log_total: Array) -> _Attention:
    b, h, t, d = q.shape
    return _Attention(
        *(b, h, t, k.shape[2], d),
        *(a.ctypes.data for a in (q, k, v)),
        *map(_head_strides, (q, k, v)),
        *(out.ctypes.data, log_total.ctypes.data),
    )


@or_numpy
def attention_forward(
    q: Array, k: Array, v: Array, dropout: float = 0.0, key: Key = ()
) -> tuple[Array, Array]:
    check(q, k, v)
    if dropout:
        raise NotForC
    b, h, t, d = q.shape
    out, log_total = np.empty((b, t, h, d), np.float32), np.empty((b, h, t), np.float32)
    call("attention_forward", _attention(q, k, v, out, log_total))
    return out, log_total


@or_numpy
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
    check(q, k, v, dq, dk, dv)
    if dropout:
        raise NotForC
    grad, out, log_total = contiguous(grad, out, log_total)
    call(
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
        *ints("n", "vocab_size"),
        *pointers("logits", "targets"),
        *floats("scale"),
        *pointers("losses", "dlogits"),
    ]


@or_numpy
def cross_entropy_forward(
    logits: Array, targets: Array, scale: float = 1.0, out: Array | None = None
) -> tuple[Array, Array]:
    (logits,) = contiguous(logits)
    dlogits = np.empty(logits.shape, np.float32) if out is None else out
    if dlogits.dtype != np.float32 or not dlogits.flags.c_contiguous:
        raise NotForC
    targets = np.ascontiguousarray(targets, np.int64)
    losses = np.empty(len(logits), np.float32)
    places = losses.ctypes.data, dlogits.ctypes.data
    call(
        "cross_entropy_forward",
        _CrossEntropy(*logits.shape, logits.ctypes.data, targets.ctypes.data, scale, *places),
    )
    return losses.sum(), dlogits


# ------------------------------------------------------------------------------------ optimizer


class _AdamW(ctypes.Structure):
    _fields_ = [
        *ints("count"),
        *pointers("sizes", "p", "grad", "m", "v", "kept"),
        *floats("beta1", "rest1", "beta2", "rest2", "rate", "eps"),
    ]


class _Squares(ctypes.Structure):
    _fields_ = [*ints("count"), *pointers("sizes", "arrays", "sums")]


CHUNK = 65536  # optimizer.c's


def _places(arrays: Sequence[Array]) -> Array:
    return np.array([a.ctypes.data for a in arrays], np.uintp)


@or_numpy
def sum_of_squares(arrays: Sequence[Array]) -> float:
    check(*arrays)
    if not all(a.flags.c_contiguous or a.flags.f_contiguous for a in arrays):
        raise NotForC
    sizes, places = np.array([a.size for a in arrays], np.int64), _places(arrays)
    sums = np.empty(int((-(-sizes // CHUNK)).sum()))
    at = sizes.ctypes.data, places.ctypes.data, sums.ctypes.data
    call("sum_of_squares", _Squares(len(arrays), *at))
    return float(sums.sum())


@or_numpy
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
        check(*arrays)
        in_c = all(a.flags.c_contiguous for a in arrays)
        if not in_c and not all(a.flags.f_contiguous for a in arrays):
            raise NotForC
    correction = float(np.sqrt(1 - beta2**step))
    rate = lr * correction / (1 - beta1**step)  # the bias corrections, drawn together in front
    sizes = np.array([p.size for p in parameters], np.int64)
    kept = np.array([1 - lr * decay for decay in decays], np.float32)
    tables = [sizes, *map(_places, columns), kept]
    at = (table.ctypes.data for table in tables)
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    call("adamw_update", _AdamW(len(sizes), *at, *betas, rate, eps * correction))


# ------------------------------------------------------------------------------------- decoding


class _Block(ctypes.Structure):
    _fields_ = [
        *pointers("ln_1_weight", "ln_1_bias", "c_attn_weight", "c_attn_bias"),
        *pointers("attn_c_proj_weight", "attn_c_proj_bias", "ln_2_weight", "ln_2_bias"),
        *pointers("c_fc_weight", "c_fc_bias", "mlp_c_proj_weight", "mlp_c_proj_bias"),
    ]


class _Decode(ctypes.Structure):
    _fields_ = [
        *ints("rows", "tokens", "width", "heads", "layers"),
        *floats("eps"),
        *pointers("blocks", "cache"),
        *ints("layer_stride", "value_stride", "row_stride", "head_stride"),
        *pointers("lengths", "x", "room"),
    ]


@or_numpy
def cached_blocks(x: Array, blocks: Sequence[Any], cache: Any) -> Array:
    (rows, tokens, width), data = x.shape, cache.data
    check(x, data)
    layers = parameters_of(blocks)  # these arrays live at least as long as the call
    if rows * tokens > FEW_ROWS or layers is None or not data.flags.writeable:
        raise NotForC
    heads, capacity, size = data.shape[3:]
    *strides, token, element = strides_of(data)
    lengths = np.array(cache.lengths, np.int64)
    fits = data.shape[:3] == (len(blocks), 2, rows) and heads * size == width
    fits = (
        fits and len(lengths) == rows and lengths.min() >= 0 and lengths.max() <= capacity - tokens
    )
    if not fits or (token, element) != (size, 1):
        raise NotForC
    eps, *others = {norm.eps for block in blocks for norm in (block.ln_1, block.ln_2)}
    if others or any(block.attn.n_head != heads or block.attn.c_attn.half for block in blocks):
        raise NotForC
    entries = (_block(block, layer, width) for block, layer in zip(blocks, layers, strict=True))
    table = (_Block * len(blocks))(*entries)
    y, room = np.array(x, order="C"), np.empty(rows * tokens * (6 * width + heads + 2), np.float32)
    call(
        "decode",
        _Decode(
            *(rows, tokens, width, heads, len(blocks), eps),
            *(ctypes.addressof(table), data.ctypes.data, *strides),
            *(lengths.ctypes.data, y.ctypes.data, room.ctypes.data),
        ),
    )
    cache.lengths += tokens
    return y


# Where the parameters of each block lie, with the arrays that were asked: asking takes a while.
_BLOCKS: WeakKeyDictionary[Any, tuple[list[ref[Array]], _Block]] = WeakKeyDictionary()


def _block(block: Any, arrays: list[Array], width: int) -> _Block:
    """Where a block's parameters lie; NotForC where decode.c cannot read them."""
    if len(arrays[0]) != width:
        raise NotForC
    asked, places = _BLOCKS.get(block, ((), None))
    if places is not None and all(array() is now for array, now in zip(asked, arrays, strict=True)):
        return places
    check(*arrays)
    shapes = [(width,), (width, 3 * width), (width, width)]
    shapes += [(width,), (width, 4 * width), (4 * width, width)]
    for weight, bias, shape in zip(arrays[::2], arrays[1::2], shapes, strict=True):
        in_order = weight.flags.f_contiguous and bias.flags.c_contiguous
        if weight.shape != shape or bias.shape != shape[-1:] or not in_order:
            raise NotForC
    places = _Block(*(array.ctypes.data for array in arrays))
    _BLOCKS[block] = list(map(ref, arrays)), places
    return places
