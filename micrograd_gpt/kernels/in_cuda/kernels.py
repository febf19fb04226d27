"""Kernels for NVIDIA GPUs in CUDA (sources/), which stand in for the definitions on CuPy arrays.

Arrays are float32. Linear, gelu, attention, dropout and the loss also take float16 or bfloat16:
their first result then has the type of the first argument, and the others are float32. A kernel
that does not take its arguments (another type, sizes that do not fit together, a GPU older than
Ampere) raises NotForMe before it has written anything. Nothing here waits for the device, and no
result depends on the order in which threads finish.

Dropout draws Philox numbers from its key, so its masks differ from those on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from micrograd_gpt import functional, layers, optim, tensor
from micrograd_gpt.arrays.devices import Array, array_module
from micrograd_gpt.arrays.precision import HALF, is_half
from micrograd_gpt.arrays.stand_ins import NotForMe, converts, stands_in_for
from micrograd_gpt.kernels import linear_cross_entropy
from micrograd_gpt.kernels.in_cuda import cublas, cublas_lt
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.arguments import (
    HEAD_SIZES,
    MAX_BLOCKS,
    THREADS,
    WARPS,
    activation,
    blocks,
    float32,
    in_cuda,
    name_of,
    strips,
)
from micrograd_gpt.kernels.in_cuda.matvec import FEW_ROWS, multiply_few_rows
from micrograd_gpt.kernels.in_cuda.modules import ACTIVATIONS, TENSOR_TABLE, TENSORS_AT_ONCE, launch
from micrograd_gpt.kernels.in_numpy.kernels import gradients
from micrograd_gpt.kernels.shapes import ROW_OF_ADAMW, check_apart, check_fit
from micrograd_gpt.layers import Key
from micrograd_gpt.tensor import Picked, Tensor, record

ROWS_AT_ONCE = 128  # how many rows one block adds up, column by column
LONG_ROW = 2**14  # from so many logits on, a block of 1024 threads has enough to do
ALIGNED = 64  # the head's rows are filled up to a multiple of this


def _seed(key: Key) -> int:
    """The 64-bit key of Philox for a draw."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@converts
def converted(array: Array, dtype: np.dtype) -> Array:
    """`array`, without gaps, between float32 and half precision; with the same layout in memory."""
    names = name_of(array.dtype), name_of(dtype)
    if "float32" not in names or not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise NotForMe
    stored = array if array.flags.c_contiguous else array.T
    activation(stored)
    result = array_module(array).empty(stored.shape, dtype)
    kernel, half = ("narrow", names[1]) if names[0] == "float32" else ("widen", names[0])
    if half not in HALF:
        raise NotForMe
    grid = blocks(stored.size, half)
    launch("convert", kernel, half, grid, (THREADS,), stored, result, stored.size)
    return result if stored is array else result.T


# ------------------------------------------------------------------------------- matrix products


def _product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b, in `out` or in the type of a. CuPy does float32, since it knows if TF32 is wanted."""
    xp, dtype = array_module(a), name_of(a.dtype)
    two_bytes = a.dtype == b.dtype and dtype in ("float16", "bfloat16")
    if not two_bytes or not cuda_modules.usable():
        if out is not None and out.dtype != a.dtype:
            raise NotForMe
        return xp.matmul(a, b, out=out)
    a, b = (x if x.flags.c_contiguous or x.flags.f_contiguous else x.copy() for x in (a, b))
    if out is None:
        out = xp.empty((len(a), b.shape[1]), a.dtype)
    if not a.size or not b.size or not out.flags.c_contiguous:
        raise NotForMe
    return cublas.product(a, b, out)


@in_cuda(functional.linear_forward)
def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    n, m = len(x), weight.shape[1]
    if n <= FEW_ROWS:
        y = array_module(x).empty((n, m), x.dtype)
        multiply_few_rows(x, weight, bias, y)
        return y
    dtype = activation(x, *([] if bias is None else [bias]))
    if bias is not None:
        y = array_module(x).empty((n, m), x.dtype)
        if cublas_lt.product(x, weight, bias, y):
            return y
    y = _product(x, weight)
    if bias is not None:
        grid = (strips(m, dtype, 128), min(n, MAX_BLOCKS))
        launch("sums", "add_bias", dtype, grid, (128,), y, bias, n, m)
    return y


@in_cuda(functional.linear_backward)
def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """As the definition; the weight's gradient has the weight's layout in memory."""
    if name_of(weight.dtype) != activation(grad, x):
        raise NotForMe
    return input_gradient(grad, weight), *weight_gradients(grad, x, weight)


def input_gradient(grad: Array, weight: Array) -> Array:
    """grad @ weight.T, in the type of both."""
    return _product(grad, weight.T)


def weight_gradients(grad: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """The float32 gradients of a weight, in its layout in memory, and of its bias."""
    order = "C" if weight.flags.c_contiguous else "F"
    dweight = array_module(x).empty(weight.shape, np.float32, order)
    if order == "C":
        _product(x.T, grad, dweight)
    else:
        _product(grad.T, x, dweight.T)
    return dweight, _column_sums(grad, name_of(grad.dtype))


def _column_sums(x: Array, dtype: str) -> Array:
    """Sums of x (n, m) along its first axis, float32: (m,)."""
    (n, m), xp = x.shape, array_module(x)
    parts = -(-n // ROWS_AT_ONCE)
    partials = xp.empty((parts, m), np.float32)
    grid = (strips(m, dtype), parts)
    launch("sums", "column_sums", dtype, grid, (32, 8), x, partials, n, m)
    return sum_partials(partials, m)[0]


def sum_partials(partials: Array, split: int) -> tuple[Array, Array]:
    """Sums of float32 partials (parts, width) along the first axis: of the first `split` columns,
    and of the others."""
    (parts, width), xp = partials.shape, array_module(partials)
    first, second = (xp.empty(n, np.float32) for n in (split, width - split))
    arguments = (partials, first, second, parts, width, split)
    launch("sums", "sum_partials", "float32", (-(-width // 32),), (32, 32), *arguments)
    return first, second


def _total(numbers: Array) -> Array:
    """The sum of float32 numbers: a scalar, which stays on the device."""
    total = array_module(numbers).empty((), np.float32)
    launch("sums", "total", "float32", (1,), (1024,), numbers, total, numbers.size)
    return total


@in_cuda(tensor.add_at)
def add_at(total: Array, index: Any, part: Array) -> None:
    """As the definition, for any types and indices; rows of a table are added in a fixed order."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(type(p) in (int, slice, type(None), type(...)) for p in parts):  # a bool is an array
        here = total[index]  # a view, even of a single number
        here += part
    elif is_half(total):
        wide = total.astype(np.float32)
        add_at(wide, index, part)
        total[...] = wide
    else:
        try:
            _add_rows(total, index, part)
        except NotForMe:
            xp = array_module(total)
            index = xp.asarray(index) if isinstance(index, np.ndarray) else index
            xp.add.at(total, index, part)


@stands_in_for(layers.embedding, "numpy")  # by the device of its first argument, ids on the host
def embedding(ids: Any, weight: Tensor) -> Tensor:
    """As the definition, for a weight on a GPU; the ids stay on the host, too.

    The backward sorts them, and to sort them on the GPU would be to wait for it.
    """
    if weight.device == "cpu" or is_half(weight):
        raise NotForMe
    ids = layers.checked_ids(ids, len(weight))
    if not isinstance(ids, np.ndarray):
        raise NotForMe
    rows = weight.data[array_module(weight.data).asarray(ids)]
    return record("embedding", rows, [weight], lambda grad: (Picked(ids, grad),))


def _add_rows(total: Array, index: Any, part: Array) -> None:
    """Add the rows of part (…, C) to those of total (V, C) that integers (…) name, on the device or
    on the host."""
    xp = array_module(total)
    if not isinstance(index, xp.ndarray | np.ndarray) or index.dtype.kind not in "iu":
        raise NotForMe
    if total.ndim != 2:
        raise NotForMe
    float32(total)
    dtype, width = activation(part), total.shape[1]
    if part.shape != (*index.shape, width) or not total.size or _share_memory(total, part):
        raise NotForMe
    ids = index.reshape(-1).astype(np.int64) % len(total)  # -1 is the last
    narrow = ids.astype(np.min_scalar_type(len(total) - 1))  # sorted sooner on the host
    order = (np if isinstance(index, np.ndarray) else xp).argsort(narrow, kind="stable")
    ids, order = (xp.asarray(numbers, np.int64) for numbers in (ids, order))
    rows, grid = ids.size, (ids.size, strips(width, dtype))
    launch(
        *("embedding", "embedding_backward", dtype, grid, (32, 8)),
        *(part, ids, order, total, rows, width),
    )


def _share_memory(a: Array, b: Array) -> bool:
    """Whether two arrays without gaps have memory in common."""
    starts = cuda_modules.address(a), cuda_modules.address(b)
    return starts[0] < starts[1] + b.nbytes and starts[1] < starts[0] + a.nbytes


# ------------------------------------------------------------------------------------ layer norm


@in_cuda(functional.layer_norm_forward)
def layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Array, Array]:
    float32(x, weight, bias)
    (n, _), xp = x.shape, array_module(x)
    y, mean, rstd = xp.empty_like(x), *(xp.empty((n, 1), np.float32) for _ in range(2))
    normalise(x, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


def normalise(
    x: Array, weight: Array, bias: Array, eps: float, y: Array, mean: Array, rstd: Array
) -> None:
    """Write the normalised rows of float32 x (N, C) into y, of any type; mean and rstd (N, 1)."""
    n, width = x.shape
    launch(
        *("layer_norm", "layer_norm_forward", name_of(y.dtype), (-(-n // WARPS),), (THREADS,)),
        *(x, weight, bias, y, mean, rstd, n, width, eps),
    )


@in_cuda(functional.layer_norm_backward)
def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    float32(grad, x, weight, mean, rstd)
    dtype, (n, width), xp = "float32", x.shape, array_module(x)
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
    return dx, *sum_partials(partials, width)


# ------------------------------------------------------------------------------------------ gelu


@in_cuda(functional.gelu_forward)
def gelu_forward(x: Array) -> Array:
    dtype, y = activation(x), array_module(x).empty_like(x)
    launch("gelu", "gelu_forward", dtype, blocks(x.size, dtype), (THREADS,), x, y, x.size)
    return y


@in_cuda(functional.gelu_backward)
def gelu_backward(grad: Array, x: Array) -> Array:
    dtype, dx = activation(grad, x), array_module(x).empty_like(x)
    grid = blocks(x.size, dtype)
    launch("gelu", "gelu_backward", dtype, grid, (THREADS,), grad, x, dx, x.size)
    return dx


# ------------------------------------------------------------------------------------- attention


@in_cuda(functional.attention_forward)
def attention_forward(q: Array, k: Array, v: Array, p: float, key: Key) -> tuple[Array, Array]:
    """As the definition; the result lies in memory as (B, T, H, D), so joining heads is free."""
    dtype, (b, h, t, d), xp = _heads(q, k, v), q.shape, array_module(q)
    _check_probability(p)
    q, (k, v), keys = *_aligned(q), _aligned(k, v), k.shape[2]
    out, log_total = xp.empty((b, t, h, d), q.dtype), xp.empty((b, h, t), np.float32)
    mixed = out.swapaxes(1, 2)  # (B, H, T, D)
    q_batch, q_head, q_row = _strides(q)
    scale = 1 / math.sqrt(d)
    if t == 1 and not p:
        launch(
            *("attention_decode", "attention_decode", dtype, (b * h,), (512,), q, k, v, out),
            *(log_total, h, keys, q_batch, q_head, *_strides(k), scale),
            head_size=d,
        )
        return mixed, log_total
    tf32 = _in_tf32(dtype)
    rows, threads = cuda_modules.attention_block(dtype, d, tf32)
    launch(
        *("attention", "attention_forward", dtype, (-(-t // rows), b * h), (threads,)),
        *(q, k, v, out, log_total, h, t, keys, q_batch, q_head, q_row, *_strides(k)),
        *(scale, _seed(key) if p else 0, p),
        head_size=d,
        dropout=bool(p),
        tf32=tf32,
    )
    return mixed, log_total


@in_cuda(functional.attention_backward)
def attention_backward(
    grad: Array, q: Array, k: Array, v: Array, out: Array, log_total: Array, p: float, key: Key
) -> Array:
    """As the definition; the kernels write straight into its array where that is aligned."""
    dtype, (b, h, t, d), xp = _heads(q, k, v), q.shape, array_module(q)
    _check_probability(p)
    float32(log_total)
    # The kernels read these two as (B, T, H, D) without gaps, the layout they usually have
    grad, out = (xp.ascontiguousarray(x.swapaxes(1, 2)) for x in (grad, out))
    if activation(grad, out) != dtype:
        raise NotForMe
    q, k, v = _aligned(q, k, v)
    dqkv = xp.empty((b, t, 3, h, d), q.dtype)
    parts = dqkv.transpose(2, 0, 3, 1, 4)  # views, each (B, H, T, D)
    dq, dk, dv = parts if _are_aligned(*parts) else xp.empty((3, b, h, t, d), q.dtype)
    sums = xp.empty((b, h, t, 2), np.float32)
    variant = {"head_size": d, "dropout": bool(p), "tf32": _in_tf32(dtype)}
    rows, threads = cuda_modules.attention_block(dtype, d, variant["tf32"], backward=True)
    seed = _seed(key) if p else 0
    of_queries, of_keys = [out, log_total, sums, dq], [sums, dk, dv]
    for kernel, arrays in (("queries", of_queries), ("keys", of_keys)):  # the first writes the sums
        launch(
            *("attention_backward", f"attention_backward_{kernel}", dtype),
            *((-(-t // rows), b * h), (threads,), grad, q, k, v, *arrays, h, t),
            *(*_strides(q), *_strides(dq), 1 / math.sqrt(d), seed, p),
            **variant,
        )
    if not _are_aligned(*parts):
        parts[0], parts[1], parts[2] = dq, dk, dv
    return dqkv


def _heads(q: Array, k: Array, v: Array) -> str:
    """The type of queries, keys and values; NotForMe where no kernel takes them."""
    dtype, (b, h, _, d) = name_of(q.dtype), q.shape
    alike = q.dtype == k.dtype == v.dtype and type(q) is type(k) is type(v)
    usable = dtype in ACTIVATIONS and cuda_modules.usable()
    if not alike or not usable or d not in HEAD_SIZES or b * h > 65535:
        raise NotForMe
    return dtype


def _check_probability(p: float) -> None:
    """NotForMe for a p outside [0, 1): the definition raises the error."""
    if not 0 <= p < 1:
        raise NotForMe


def _in_tf32(dtype: str) -> bool:
    return dtype == "float32" and cuda_modules.tf32_wanted()


def _strides(x: Array) -> list[int]:
    """How many elements apart batches, heads and rows of x (B, H, T, D) are."""
    return [stride // x.itemsize for stride in x.strides[:3]]


def _are_aligned(*arrays: Array) -> bool:
    """Whether these arrays (B, H, T, D) have the same strides, and rows as 16-byte loads need them.

    Each row must start at a multiple of 16 bytes, and its D numbers must have no gaps. Within a
    tile of rows, offsets are 32-bit integers.
    """
    first = arrays[0]
    starts = [cuda_modules.address(x) for x in arrays]
    return (
        all(x.strides == first.strides for x in arrays)
        and abs(first.strides[2]) < 2**25
        and first.strides[3] == first.itemsize
        and not any(number % 16 for number in (*starts, *first.strides[:3]))
    )


def _aligned(*arrays: Array) -> list[Array]:
    """The arrays as the attention kernels read them: themselves, or copies without gaps."""
    if _are_aligned(*arrays):
        return list(arrays)
    return [array_module(x).array(x, order="C") for x in arrays]


# --------------------------------------------------------------------------------------- dropout


@in_cuda(layers.dropout_forward)
def dropout_forward(x: Array, p: float, key: Key) -> Array:
    """As the definition, without keeping the mask: the backward draws the same numbers again."""
    _check_probability(p)
    x = array_module(x).ascontiguousarray(x)
    dtype, y = activation(x), array_module(x).empty_like(x)
    grid = blocks(x.size, dtype)
    launch("dropout", "dropout", dtype, grid, (THREADS,), x, y, x.size, _seed(key), p)
    return y


# --------------------------------------------------------------------------------- cross-entropy


@in_cuda(functional.cross_entropy_forward)
def cross_entropy_forward(logits: Array, labels: Array) -> tuple[Array, Array]:
    activation(logits)
    dlogits = array_module(logits).empty_like(logits)
    return dlogits, _cross_entropy(logits, labels, dlogits, logits.shape[1])


@in_cuda(linear_cross_entropy.linear_cross_entropy_forward)
def linear_cross_entropy_forward(
    x: Array, weight: Array, labels: Array, with_gradients: bool
) -> tuple[Array | None, Array, Array | None]:
    """As the definition; the logits become their own gradient in place."""
    activation(x, weight)
    vocab_size, padded = len(weight), _padded(weight)
    logits = _product(x, padded.T)
    loss = _cross_entropy(logits, labels, logits, vocab_size)
    if not with_gradients:
        return None, loss, None
    dweight = array_module(weight).empty(padded.shape, np.float32)
    return _product(logits, padded), loss, _product(logits.T, x, dweight)[:vocab_size]


def _padded(weight: Array) -> Array:
    """The head's weight (V, C), filled up to a multiple of ALIGNED rows with zeros.

    cuBLAS multiplies matrices whose rows are not aligned five times more slowly, and the 50,257
    tokens of GPT-2 are an odd number.
    """
    (vocab_size, width), xp = weight.shape, array_module(weight)
    if vocab_size % ALIGNED == 0:
        return weight
    padded = xp.zeros((-(-vocab_size // ALIGNED) * ALIGNED, width), weight.dtype)
    padded[:vocab_size] = weight
    return padded


def _cross_entropy(logits: Array, labels: Array, dlogits: Array, vocab_size: int) -> Array:
    """The summed loss; writes the gradient into `dlogits`, which may be `logits` itself.

    Columns from `vocab_size` on stand for no token. The loss is NaN where a label is outside the
    vocabulary: to see that here would be to wait.
    """
    (n, row_size), xp = logits.shape, array_module(logits)
    if labels.dtype.kind not in "iu":
        raise NotForMe
    labels, losses = xp.ascontiguousarray(labels, dtype=np.int64), xp.empty(n, np.float32)
    # Few long rows at a time, so that each is still in the GPU's cache when it is read again
    dtype, threads = name_of(logits.dtype), 1024 if row_size >= LONG_ROW else THREADS
    launch(
        *("cross_entropy", "cross_entropy_forward", dtype, (n,), (threads,)),
        *(logits, labels, dlogits, losses, vocab_size, row_size),
    )
    return _total(losses)


# ------------------------------------------------------------------------------------- optimizer


@in_cuda(optim.clip_grad_norm)
def clip_grad_norm(parameters: list[Tensor], max_norm: float, loss_scale: float = 1.0) -> Array:
    """As the definition; where the norm is not finite, every gradient is multiplied by 1."""
    grads = [g if g.flags.c_contiguous else g.T for g in gradients(parameters, max_norm)]
    float32(*grads)
    spans = sorted((cuda_modules.address(grad), grad.nbytes) for grad in grads)
    if any(start + size > after for (start, size), (after, _) in pairwise(spans)):
        raise NotForMe  # what is written to twice
    (across,) = blocks(max(grad.size for grad in grads), "float32")
    partials = array_module(grads[0]).empty((len(grads), across), np.float64)
    tables = [
        (
            slice(start, start + TENSORS_AT_ONCE),
            tensor_table(gradients=grads[start:][:TENSORS_AT_ONCE]),
        )
        for start in range(0, len(grads), TENSORS_AT_ONCE)
    ]
    for some, table in tables:
        grid = (across, len(grads[some]))
        launch("optimizer", "sum_of_squares", "float32", grid, (THREADS,), table, partials[some])
    norm, factor = _norm_and_factor(partials, float(max_norm), loss_scale)
    for some, table in tables:
        grid = (across, len(grads[some]))
        launch("optimizer", "scale", "float32", grid, (THREADS,), table, factor)
    return norm


def _norm_and_factor(squares: Array, max_norm: float, loss_scale: float) -> tuple[Array, Array]:
    """The norm before clipping, and what to multiply the gradients by: scalars on the device."""
    norm, factor = (array_module(squares).empty((), np.float32) for _ in range(2))
    arguments = (squares, norm, factor, squares.size, max_norm, loss_scale)
    launch("optimizer", "clip_scale", "float32", (1,), (1024,), *arguments)
    return norm, factor


@in_cuda(optim.adamw_update)
def adamw_update(
    rows: list[Any], lr: float, beta1: float, beta2: float, eps: float, step: int
) -> None:
    if type(rows) not in (list, tuple) or not rows:  # some can be gone through only once
        raise NotForMe
    in_memory = []
    for *arrays, decay in rows:  # arrays stored in columns are passed as their transposes
        check_fit(ROW_OF_ADAMW, arrays)
        p, grad, m, v = arrays if arrays[0].flags.c_contiguous else [a.T for a in arrays]
        in_memory.append((p, array_module(grad).ascontiguousarray(grad), m, v, decay))
    float32(*(array for row in in_memory for array in row[:4]))
    _check_apart([row[:4] for row in in_memory])
    corrections = 1 - beta1**step, 1 - beta2**step
    for start in range(0, len(rows), TENSORS_AT_ONCE):
        parameters, grads, ms, vs, decays = zip(
            *in_memory[start : start + TENSORS_AT_ONCE], strict=True
        )
        table = tensor_table(parameters, grads, ms, vs, decays)
        (across,) = blocks(max(p.size for p in parameters), "float32")
        grid = (across, len(parameters))
        launch(
            *("optimizer", "adamw_update", "float32", grid, (THREADS,)),
            *(table, lr, beta1, beta2, eps, *corrections),
        )


def _check_apart(rows: Sequence[Sequence[Array]]) -> None:
    """NotForMe where AdamW would write to what is also another array."""
    starts = np.array([[cuda_modules.address(a) for a in row] for row in rows], np.uint64)
    sizes = np.array([[a.nbytes for a in row] for row in rows], np.uint64)
    check_apart(starts.T, (starts + sizes).T)


def tensor_table(
    parameters: Sequence[Array] = (),
    gradients: Sequence[Array] = (),
    ms: Sequence[Array] = (),
    vs: Sequence[Array] = (),
    decays: Sequence[float] = (),
) -> np.ndarray:
    """The TensorTable of tensors.cuh, which is passed with the launch."""
    table = np.zeros((), TENSOR_TABLE)
    table["sizes"][: len(gradients)] = [gradient.size for gradient in gradients]
    for role, arrays in enumerate((parameters, gradients, ms, vs)):
        table["arrays"][role, : len(arrays)] = [cuda_modules.address(array) for array in arrays]
    table["decays"][: len(decays)] = decays
    return table
