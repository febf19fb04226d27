"""Kernels for NVIDIA GPUs: the definitions of `functional.py` and `optim.py` in CUDA (cuda/*.cu).

Compiled and emulated; not yet run on a GPU.

Every function here that has a definition takes the same arguments, as CuPy arrays. Arrays are
float32 or, what linear, gelu and attention work on, float16 or bfloat16. What a kernel does not do
(another type, a GPU older than Ampere) raises Unsupported before anything is written, and the
definition does it. Nothing here waits for the device, and no result depends on the order in which
threads finish.

Dropout draws Philox numbers from the key, so its masks are others than on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from micrograd_gpt.arrays.backend import Array, Key, array_module
from micrograd_gpt.kernels.in_cuda import cublas
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.arguments import (
    HEAD_SIZES,
    MAX_BLOCKS,
    THREADS,
    WARPS,
    Unsupported,
    activation,
    blocks,
    float32,
    name_of,
    rows_in_memory,
    strips,
)
from micrograd_gpt.kernels.in_cuda.matvec import FEW_ROWS, multiply_few_rows
from micrograd_gpt.kernels.in_cuda.modules import ACTIVATIONS, TENSOR_TABLE, TENSORS_AT_ONCE, launch
from micrograd_gpt.kernels.in_cuda.token_step import cached_blocks

__all__ = ["Unsupported", "cached_blocks"]  # which others look for here

ROWS_AT_ONCE = 128  # that one block adds up, column by column


def _seed(key: Key) -> int:
    """64 bits of Philox's key for a draw."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


# ------------------------------------------------------------------------------ matrix products


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    if len(a) <= FEW_ROWS and b.flags.f_contiguous and out is None:
        return _product_of_few_rows(a, b, None)
    if not cuda_modules.usable():
        raise Unsupported
    return _product(a, b, out)


def _product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b, in `out` or in the type of a; float32 by CuPy, which knows whether TF32 was asked."""
    xp, dtype = array_module(a), name_of(a.dtype)
    two_bytes = a.dtype == b.dtype and dtype in ("float16", "bfloat16")
    if not two_bytes or not cuda_modules.usable():
        if out is not None and out.dtype != a.dtype:
            raise Unsupported
        return xp.matmul(a, b, out=out)
    a, b = (x if x.flags.c_contiguous or x.flags.f_contiguous else x.copy() for x in (a, b))
    if out is None:
        out = xp.empty((len(a), b.shape[1]), a.dtype)
    if not a.size or not b.size or not out.flags.c_contiguous:
        raise Unsupported
    return cublas.product(a, b, out)


def _product_of_few_rows(x: Array, weight: Array, bias: Array | None) -> Array:
    y = array_module(x).empty((len(x), weight.shape[1]), x.dtype)
    multiply_few_rows(x, weight, bias, y)
    return y


def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    n, m = len(x), weight.shape[1]
    if n <= FEW_ROWS:
        return _product_of_few_rows(x, weight, bias)
    dtype = activation(x, *([] if bias is None else [bias]))
    y = _product(x, weight)
    if bias is not None:
        grid = (strips(m, dtype, 128), min(n, MAX_BLOCKS))
        launch("sums", "add_bias", dtype, grid, (128,), y, bias, n, m)
    return y


def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """As the definition; the weight's gradient lies in memory as the weight does."""
    dtype, xp = activation(grad, x), array_module(x)
    if str(weight.dtype) != dtype:
        raise Unsupported
    if weight.flags.c_contiguous:
        dweight = _product(x.T, grad, xp.empty(weight.shape, np.float32))
    else:
        dweight = _product(grad.T, x, xp.empty(weight.shape[::-1], np.float32)).T
    return _product(grad, weight.T), dweight, _column_sums(grad, dtype)


def _column_sums(x: Array, dtype: str) -> Array:
    """Sums of x (n, m) along its first axis, float32: (m,)."""
    (n, m), xp = x.shape, array_module(x)
    parts = -(-n // ROWS_AT_ONCE)
    partials = xp.empty((parts, m), np.float32)
    grid = (strips(m, dtype), parts)
    launch("sums", "column_sums", dtype, grid, (32, 8), x, partials, n, m)
    return _sum_partials(partials)


def _sum_partials(partials: Array) -> Array:
    parts, width = partials.shape
    sums = array_module(partials).empty(width, np.float32)
    grid = (-(-width // THREADS),)
    launch("sums", "sum_partials", "float32", grid, (THREADS,), partials, sums, parts, width)
    return sums


def _total(numbers: Array) -> Array:
    """The sum of float32 numbers, a scalar that stays on the device."""
    total = array_module(numbers).empty((), np.float32)
    launch("sums", "total", "float32", (1,), (1024,), numbers, total, numbers.size)
    return total


# ------------------------------------------------------------------------------------ embedding


def embedding_forward(weight: Array, ids: Array, dtype: Any = np.float32) -> Array:
    """Rows of weight (V, C), float32, by ids (…) -> (…, C) of the given type."""
    float32(weight)
    width, ids = weight.shape[1], array_module(weight).ascontiguousarray(ids, dtype=np.int64)
    y = array_module(weight).empty((*ids.shape, width), dtype)
    kind = str(y.dtype)
    grid = (ids.size, strips(width, kind, 128))
    launch("embedding", "embedding_forward", kind, grid, (128,), weight, ids, y, width)
    return y


def embedding_backward(grad: Array, ids: Array, dweight: Array) -> None:
    dtype, width = activation(grad), grad.shape[-1]
    float32(dweight)
    ids = array_module(grad).ascontiguousarray(ids.reshape(-1), dtype=np.int64)
    order = array_module(grad).argsort(ids, kind="stable").astype(np.int64, copy=False)
    rows, grid = ids.size, (ids.size, strips(width, dtype))
    launch(
        *("embedding", "embedding_backward", dtype, grid, (32, 8)),
        *(grad, ids, order, dweight, rows, width),
    )


# ----------------------------------------------------------------------------------- layer norm


def layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float, dtype: Any = None
) -> tuple[Array, Array, Array]:
    """As the definition; with `dtype` y is of that type, so that it need not be converted after."""
    dtype = np.float32 if dtype is None else dtype
    float32(x, weight, bias)
    (n, width), xp = x.shape, array_module(x)
    y, mean, rstd = xp.empty(x.shape, dtype), *(xp.empty((n, 1), np.float32) for _ in range(2))
    launch(
        *("layer_norm", "layer_norm_forward", str(y.dtype), (-(-n // WARPS),), (THREADS,)),
        *(x, weight, bias, y, mean, rstd, n, width, eps),
    )
    return y, mean, rstd


def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    float32(x, weight, mean, rstd)
    dtype, (n, width), xp = activation(grad), x.shape, array_module(x)
    dx, parts = xp.empty_like(x), -(-n // ROWS_AT_ONCE)
    partials = xp.empty((parts, 2 * width), np.float32)
    launch(
        *("layer_norm", "layer_norm_backward", dtype, (-(-n // WARPS),), (THREADS,)),
        *(grad, x, weight, mean, rstd, dx, n, width),
    )
    launch(
        *("layer_norm", "layer_norm_backward_weight", dtype, (strips(width, dtype), parts)),
        *((32, 8), grad, x, mean, rstd, partials, n, width),
    )
    sums = _sum_partials(partials)
    return dx, sums[:width], sums[width:]


# ----------------------------------------------------------------------------------------- gelu


def gelu_forward(x: Array) -> Array:
    dtype, y = activation(x), array_module(x).empty_like(x)
    launch("gelu", "gelu_forward", dtype, blocks(x.size, dtype), (THREADS,), x, y, x.size)
    return y


def linear_gelu_forward(x: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    n, m = len(x), weight.shape[1]
    if n <= FEW_ROWS:
        raise Unsupported
    dtype = activation(x, bias)
    before = _product(x, weight)
    y, grid = array_module(x).empty_like(before), (strips(m, dtype, 128), min(n, MAX_BLOCKS))
    launch("gelu", "bias_gelu_forward", dtype, grid, (128,), before, bias, y, n, m)
    return before, y


def gelu_backward(grad: Array, x: Array) -> Array:
    dtype, dx = activation(grad, x), array_module(x).empty_like(x)
    grid = blocks(x.size, dtype)
    launch("gelu", "gelu_backward", dtype, grid, (THREADS,), grad, x, dx, x.size)
    return dx


# ------------------------------------------------------------------------------------ attention


def attention_forward(
    q: Array, k: Array, v: Array, dropout: float = 0.0, key: Key = ()
) -> tuple[Array, Array]:
    dtype, (b, h, t, d), xp = _heads(q, k, v), q.shape, array_module(q)
    q, (k, v), keys = *_aligned(q), _aligned(k, v), k.shape[2]
    out, log_total = xp.empty((b, t, h, d), q.dtype), xp.empty((b, h, t), np.float32)
    q_batch, q_head, q_row = _strides(q)
    scale = 1 / math.sqrt(d)
    if t == 1 and not dropout:
        launch(
            *("attention_decode", "attention_decode", dtype, (b * h,), (128,), q, k, v, out),
            *(log_total, h, keys, q_batch, q_head, *_strides(k), scale),
            head_size=d,
        )
        return out, log_total
    tf32 = _in_tf32(dtype)
    rows, threads = cuda_modules.attention_block(dtype, d, tf32)
    launch(
        *("attention", "attention_forward", dtype, (-(-t // rows), b * h), (threads,)),
        *(q, k, v, out, log_total, h, t, keys, q_batch, q_head, q_row, *_strides(k)),
        *(scale, _seed(key) if dropout else 0, dropout),
        head_size=d,
        dropout=bool(dropout),
        tf32=tf32,
    )
    return out, log_total


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
    dtype, (b, h, t, d), xp = _heads(q, k, v), q.shape, array_module(q)
    float32(log_total)
    if activation(grad, out) != dtype or k.shape != q.shape:
        raise Unsupported
    q, k, v = _aligned(q, k, v)
    in_place = _are_aligned(dq, dk, dv)
    results = (dq, dk, dv) if in_place else xp.empty((3, *q.shape), q.dtype)
    delta = xp.empty((b, h, t), np.float32)
    grid, block = (-(-(b * t * h) // WARPS),), (THREADS,)
    variant = {"head_size": d, "dropout": bool(dropout), "tf32": _in_tf32(dtype)}
    launch(
        *("attention", "attention_delta", dtype, grid, block, out, grad, delta, h, t, b * t * h),
        **variant,
    )
    rows, threads = cuda_modules.attention_block(dtype, d, variant["tf32"])
    seed = _seed(key) if dropout else 0
    for kernel, written in (("queries", results[:1]), ("keys", results[1:])):
        launch(
            *("attention", f"attention_backward_{kernel}", dtype, (-(-t // rows), b * h)),
            *((threads,), grad, q, k, v, log_total, delta, *written, h, t, *_strides(q)),
            *(*_strides(written[0]), 1 / math.sqrt(d), seed, dropout),
            **variant,
        )
    if not in_place:
        dq[...], dk[...], dv[...] = results


def _heads(q: Array, k: Array, v: Array) -> str:
    """The type of queries, keys and values; Unsupported where no kernel takes them."""
    dtype, (b, h, _, d) = name_of(q.dtype), q.shape
    alike = q.dtype == k.dtype == v.dtype and dtype in ACTIVATIONS and cuda_modules.usable()
    if not alike or not q.size or d not in HEAD_SIZES or b * h > 65535:
        raise Unsupported
    return dtype


def _in_tf32(dtype: str) -> bool:
    return dtype == "float32" and cuda_modules.tf32_wanted()


def _strides(x: Array) -> list[int]:
    """Elements between neighbouring batches, heads and rows of x (B, H, T, D)."""
    return [stride // x.itemsize for stride in x.strides[:3]]


def _are_aligned(*arrays: Array) -> bool:
    """Whether these (B, H, T, D) share strides, with rows that start at multiples of 16 bytes."""
    first = arrays[0]
    starts = [cuda_modules.address(x) for x in arrays]
    return (
        all(x.strides == first.strides for x in arrays)
        and first.strides[3] == first.itemsize
        and not any(number % 16 for number in (*starts, *first.strides[:3]))
    )


def _aligned(*arrays: Array) -> list[Array]:
    """The arrays as the attention kernels read them: themselves, or copies without gaps."""
    if _are_aligned(*arrays):
        return list(arrays)
    return [array_module(x).array(x, order="C") for x in arrays]


# ------------------------------------------------------------------------- dropout and residual


def dropout_forward(x: Array, p: float, key: Key) -> tuple[Array, None]:
    """As the definition, but no factors: the backward draws them again."""
    return _dropped_out(x, p, key), None


def dropout_backward(grad: Array, factors: Array | None, p: float, key: Key) -> Array:
    if factors is not None:  # the forward was the definition's
        raise Unsupported
    return _dropped_out(array_module(grad).ascontiguousarray(grad), p, key)


def _dropped_out(x: Array, p: float, key: Key) -> Array:
    dtype, y = activation(x), array_module(x).empty_like(x)
    grid = blocks(x.size, dtype)
    launch("residual", "dropout", dtype, grid, (THREADS,), x, y, x.size, _seed(key), p)
    return y


def add(a: Array, b: Array, out: Array | None = None) -> Array:
    """As the definition, of a float32 array and one of any type."""
    float32(a)
    dtype = activation(b)
    if a.shape != b.shape:
        raise Unsupported
    if out is None:
        out = array_module(a).empty_like(a)
    float32(out)
    grid = blocks(a.size, dtype)
    launch("residual", "residual_add", dtype, grid, (THREADS,), a, b, out, a.size)
    return out


# -------------------------------------------------------------------------------- cross-entropy


def cross_entropy_forward(
    logits: Array, targets: Array, scale: Any = 1.0, out: Array | None = None
) -> tuple[Array, Array]:
    """As the definition; `scale` is a number, or a scalar on the device."""
    dtype, (n, vocab_size), xp = activation(logits), logits.shape, array_module(logits)
    dlogits = xp.empty_like(logits) if out is None else out
    if activation(dlogits) != dtype:
        raise Unsupported
    scale = xp.full((), scale, np.float32)
    losses = xp.empty(n, np.float32)
    launch(
        *("cross_entropy", "cross_entropy_forward", dtype, (n,), (THREADS,), logits),
        *(xp.ascontiguousarray(targets, dtype=np.int64), dlogits, losses, vocab_size, scale),
    )
    return _total(losses), dlogits


# ------------------------------------------------------------------------------------ optimizer


def sum_of_squares(arrays: Sequence[Array]) -> Array:
    arrays = [rows_in_memory(array) for array in arrays]
    float32(*arrays)
    (across,) = blocks(max(a.size for a in arrays), "float32")
    partials = array_module(arrays[0]).empty((len(arrays), across), np.float32)
    for start in range(0, len(arrays), TENSORS_AT_ONCE):
        some = arrays[start : start + TENSORS_AT_ONCE]
        table, part = _table(gradients=some), partials[start : start + len(some)]
        grid = (across, len(some))
        launch("optimizer", "sum_of_squares", "float32", grid, (THREADS,), table, part)
    return _total(partials)


def clip_scale(squares: Array, max_norm: float, loss_scale: float) -> tuple[Array, Array]:
    float32(squares)
    norm, scale = (array_module(squares).empty((), np.float32) for _ in range(2))
    arguments = (squares, norm, scale, max_norm, loss_scale)
    launch("optimizer", "clip_scale", "float32", (1,), (1,), *arguments)
    return norm, scale


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
    gradient_scale: Array | None = None,
) -> None:
    columns = [not p.flags.c_contiguous for p in parameters]  # what is stored so is transposed
    parameters, grads, ms, vs = (
        [array.T if column else array for array, column in zip(arrays, columns, strict=True)]
        for arrays in (parameters, grads, ms, vs)
    )
    grads = [array_module(grad).ascontiguousarray(grad) for grad in grads]
    float32(*parameters, *grads, *ms, *vs)
    corrections = 1 - beta1**step, 1 - beta2**step
    for start in range(0, len(parameters), TENSORS_AT_ONCE):
        some = slice(start, start + TENSORS_AT_ONCE)
        table = _table(parameters[some], grads[some], ms[some], vs[some], decays[some])
        (across,) = blocks(max(p.size for p in parameters[some]), "float32")
        grid = (across, len(parameters[some]))
        launch(
            *("optimizer", "adamw_update", "float32", grid, (THREADS,)),
            *(table, gradient_scale, lr, beta1, beta2, eps, *corrections),
        )


def _table(
    parameters: Sequence[Array] = (),
    gradients: Sequence[Array] = (),
    ms: Sequence[Array] = (),
    vs: Sequence[Array] = (),
    decays: Sequence[float] = (),
) -> np.ndarray:
    """The TensorTable of optimizer.cu, which travels with the launch."""
    table = np.zeros((), TENSOR_TABLE)
    table["sizes"][: len(gradients)] = [gradient.size for gradient in gradients]
    for role, arrays in enumerate((parameters, gradients, ms, vs)):
        table["arrays"][role, : len(arrays)] = [cuda_modules.address(array) for array in arrays]
    table["decays"][: len(decays)] = decays
    return table
