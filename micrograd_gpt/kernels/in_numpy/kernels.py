"""Kernels for the CPU in NumPy: the array functions of the layers and the optimizer, made fast.

Three ideas carry all of it. A matrix product is cut into parts, one for each core. Element-wise
work makes one pass over memory: a block that fits a core's cache goes through all its operations,
in place, before the next block begins. Attention never holds all T × T weights, only those of some
rows.

The kernels take float32 or float64 arrays, all of one type, that fit together (shapes.py). For any
others they raise NotForMe. Shapes and results are those of the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt import functional, optim, tensor
from micrograd_gpt.arrays.memory import keep_freed_memory
from micrograd_gpt.arrays.stand_ins import NotForMe, stands_in_for
from micrograd_gpt.checks import check_clipping
from micrograd_gpt.kernels import linear_cross_entropy
from micrograd_gpt.kernels.in_numpy.threads import cores, parallel
from micrograd_gpt.kernels.shapes import (
    FLOAT32,
    FLOAT64,
    check_plain,
    checked_labels,
    checked_rows,
    checked_update,
    fitting,
)
from micrograd_gpt.layers import GELU_CUBIC, GELU_SCALE, Key
from micrograd_gpt.tensor import Tensor

Array = np.ndarray
F = TypeVar("F", bound=Callable[..., Any])

# Elements worked on at a time: few enough to stay in the cache through several operations, and
# enough that the threads, which pass the interpreter's lock around, seldom wait for one another.
BLOCK = 2**18  # 1 MB in float32
# With less work than this, waking another thread takes longer than it saves.
FEW_ELEMENTS = 2**17
FEW_PRODUCTS = 2**21  # multiplications and additions
ROWS_OF_A_SUM = 64  # added up one after another


def in_numpy(definition: Callable[..., Any]) -> Callable[[F], F]:
    """Register a kernel in NumPy for `definition`: NotForMe for arrays that do not fit."""

    def register(kernel: F) -> F:
        return stands_in_for(definition, "numpy")(fitting(definition, FLOAT32, FLOAT64)(kernel))

    return register


def _row_blocks(rows: int, width: int) -> list[slice]:
    """Cut `rows` rows of `width` elements into blocks that fit the cache, equally many a core."""
    return _cut(rows, _block_count(rows * width))


def _block_count(size: int) -> int:
    return 1 if size <= FEW_ELEMENTS else cores() * -(-size // (BLOCK * cores()))


def _cut(length: int, count: int) -> list[slice]:
    """Cut 0 … length into at most `count` equal slices."""
    size = max(1, -(-length // count))
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _row_sums(x: Array) -> Array:
    """Sums along the last axis, kept as 1; a product with ones runs faster than NumPy's sum."""
    return (x @ np.ones(x.shape[-1], x.dtype))[..., None]


def _column_sums(x: Array) -> Array:
    """Sums of x (n, m) along its first axis: (m,).

    Rows are added up by groups, and then the groups, until few are left. Added one after another, a
    million rows would cost float32 three of its seven digits.
    """
    while len(x) > ROWS_OF_A_SUM:
        whole = len(x) // ROWS_OF_A_SUM * ROWS_OF_A_SUM
        groups = x[:whole].reshape(-1, ROWS_OF_A_SUM, x.shape[1])
        x = np.concatenate([np.ones(ROWS_OF_A_SUM, x.dtype) @ groups, x[whole:]])
    return np.ones(len(x), x.dtype) @ x


# ------------------------------------------------------------------------------ matrix products


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a (n, k) @ b (k, m) -> (n, m), the longer side of the result cut for the cores."""
    n, m = a.shape[0], b.shape[1]
    if out is None:
        out = np.empty((n, m), np.result_type(a, b))
    parts = _product_parts(n, m, a.shape[1])
    if len(parts) == 1:
        return np.matmul(a, b, out=out)
    if n >= m:
        parallel(lambda i: np.matmul(a[parts[i]], b, out=out[parts[i]]), len(parts))
    else:
        parallel(lambda i: np.matmul(a, b[:, parts[i]], out=out[:, parts[i]]), len(parts))
    return out


def _product_parts(n: int, m: int, k: int) -> list[slice]:
    """The longer side of an (n, m) product of k terms each, cut for the cores where that pays.

    Where it does not, one part is left to BLAS's own threads. So is a product of few rows or
    columns, whose speed is bound by memory.
    """
    return _cut(max(n, m), cores() if min(n, m) >= 16 and n * m * k > FEW_PRODUCTS else 1)


@in_numpy(functional.linear_forward)
def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    n, m = len(x), weight.shape[1]
    parts = _product_parts(n, m, weight.shape[0])
    if len(parts) == 1:
        y = x @ weight
        return y if bias is None else np.add(y, bias, out=y)
    y = np.empty((n, m), x.dtype)

    def part(i: int) -> None:
        rows, columns = (parts[i], slice(None)) if n >= m else (slice(None), parts[i])
        np.matmul(x[rows], weight[:, columns], out=y[rows, columns])
        if bias is not None:
            y[rows, columns] += bias[columns]

    parallel(part, len(parts))
    return y


@in_numpy(functional.linear_backward)
def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    dx, dweight = np.empty(x.shape, grad.dtype), np.empty_like(weight)
    dbias = np.empty(grad.shape[1], grad.dtype)
    count = cores() if len(x) * weight.size > FEW_PRODUCTS else 1
    row_parts, column_parts = _cut(len(x), count), _cut(grad.shape[1], count)

    def part(i: int) -> None:
        if i < len(row_parts):
            np.matmul(grad[row_parts[i]], weight.T, out=dx[row_parts[i]])
        else:
            columns = column_parts[i - len(row_parts)]
            np.matmul(x.T, grad[:, columns], out=dweight[:, columns])
            dbias[columns] = _column_sums(grad[:, columns])

    parallel(part, len(row_parts) + len(column_parts))
    return dx, dweight, dbias


@in_numpy(tensor.add_at)
def add_at(total: Array, index: Any, part: Array) -> None:
    """As the definition, for rows of a table: rows that go to one place are added up first."""
    check_plain([total, part], [FLOAT32, FLOAT64])
    ids = checked_rows(total, index, part).reshape(-1)
    rows = part.reshape(len(ids), -1)
    order = np.argsort(ids, kind="stable")
    picked, first = np.unique(ids[order], return_index=True)
    total[picked] += np.add.reduceat(rows[order], first, axis=0)


# ----------------------------------------------------------------------------------- layer norm


@in_numpy(functional.layer_norm_forward)
def layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Array, Array]:
    n, width = x.shape
    y = np.empty_like(x)
    mean, rstd = np.empty((n, 1), x.dtype), np.empty((n, 1), x.dtype)
    blocks = _row_blocks(n, width)

    def block(i: int) -> None:
        rows = blocks[i]
        out = y[rows]
        np.divide(_row_sums(x[rows]), width, out=mean[rows])
        np.subtract(x[rows], mean[rows], out=out)
        mean[rows] += _row_sums(out) / width  # refined, so that a constant row is exactly 0
        np.subtract(x[rows], mean[rows], out=out)
        variance = np.vecdot(out, out)[:, None] / width
        np.divide(1, np.sqrt(variance + eps), out=rstd[rows])
        out *= rstd[rows]
        out *= weight
        out += bias

    parallel(block, len(blocks))
    return y, mean, rstd


@in_numpy(functional.layer_norm_backward)
def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    n, width = x.shape
    dx = np.empty_like(x)
    blocks = _row_blocks(n, width)
    dweight = np.empty((len(blocks), width), x.dtype)
    dbias = np.empty((len(blocks), width), x.dtype)

    def block(i: int) -> None:
        rows = blocks[i]
        normed = x[rows] - mean[rows]
        normed *= rstd[rows]
        dbias[i] = _column_sums(grad[rows])
        dweight[i] = _column_sums(np.multiply(grad[rows], normed, out=dx[rows]))
        dnormed = np.multiply(grad[rows], weight, out=dx[rows])
        along_1 = _row_sums(dnormed) / width
        along_n = np.vecdot(dnormed, normed)[:, None] / width
        normed *= along_n
        dnormed -= normed
        dnormed -= along_1
        dnormed *= rstd[rows]

    parallel(block, len(blocks))
    return dx, _column_sums(dweight), _column_sums(dbias)


# ----------------------------------------------------------------------------------------- gelu

GELU_IS_STRAIGHT = 20.0  # from this |x| on its slope is 1 or 0, and powers of a large x overflow


@in_numpy(functional.gelu_forward)
def gelu_forward(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    blocks = _row_blocks(x.size, 1)

    def block(i: int) -> None:
        x, y = flat_x[blocks[i]], flat_y[blocks[i]]
        _gelu_tanh(x, x * x, out=y)
        y += 1
        y *= 0.5
        y *= x

    parallel(block, len(blocks))
    return y


@in_numpy(functional.gelu_backward)
def gelu_backward(grad: Array, x: Array) -> Array:
    dx = np.empty(x.shape, x.dtype)
    flat_grad, flat_x, flat_dx = grad.reshape(-1), x.reshape(-1), dx.reshape(-1)
    blocks = _row_blocks(x.size, 1)

    def block(i: int) -> None:
        grad, slope = flat_grad[blocks[i]], flat_dx[blocks[i]]
        x = np.clip(flat_x[blocks[i]], -GELU_IS_STRAIGHT, GELU_IS_STRAIGHT)
        square = x * x
        t = _gelu_tanh(x, square, out=np.empty_like(x))
        # 0.5 (1 + t) + 0.5 x (1 - t²) (inner)', and (inner)' = scale + 3 scale cubic x²
        square *= 3 * GELU_CUBIC * GELU_SCALE
        square += GELU_SCALE
        square *= x
        np.multiply(t, t, out=slope)
        np.subtract(1, slope, out=slope)
        slope *= square
        slope += t
        slope += 1
        slope *= 0.5
        slope *= grad

    parallel(block, len(blocks))
    return dx


def _gelu_tanh(x: Array, square: Array, out: Array) -> Array:
    """tanh(scale (x + cubic x³)), given x²."""
    np.multiply(square, GELU_CUBIC * GELU_SCALE, out=out)
    out += GELU_SCALE
    out *= x
    return np.tanh(out, out=out)


# ------------------------------------------------------------------------------------ attention

ROWS = 128  # queries at a time


@in_numpy(functional.attention_forward)
def attention_forward(q: Array, k: Array, v: Array, p: float, key: Key) -> tuple[Array, Array]:
    """As the definition; the result lies in memory as (B, T, H, D), so joining heads is free."""
    _check_probability(p)
    b, h, t, d = q.shape
    past = k.shape[2] - t  # keys that stand before the first query
    out, log_total = np.empty((b, t, h, d), q.dtype), np.empty((b, h, t), q.dtype)
    mixed = out.swapaxes(1, 2)  # (B, H, T, D)
    groups = _head_groups(b, h, _block_count(b * h * min(t, ROWS) * k.shape[2]))

    def group(i: int) -> None:
        heads = groups[i]
        for rows in _query_blocks(t):
            end, here = past + rows.stop, (*heads, rows)
            seen = (*heads, slice(end))
            weights, _ = _scores(q[here], k[seen])  # (b, h, R, end)
            largest = weights.max(axis=-1, keepdims=True)
            weights -= largest
            np.exp(weights, out=weights)
            total = _row_sums(weights)
            if p:
                weights *= _dropout_factors(key, (h, t, k.shape[2]), heads, rows, weights, p)
            np.matmul(weights, v[seen], out=mixed[here])
            mixed[here] /= total
            log_total[here] = (largest + np.log(total))[..., 0]

    parallel(group, len(groups))
    return mixed, log_total


@in_numpy(functional.attention_backward)
def attention_backward(
    grad: Array, q: Array, k: Array, v: Array, out: Array, log_total: Array, p: float, key: Key
) -> Array:
    _check_probability(p)
    b, h, t, d = q.shape
    dqkv = np.empty((b, t, 3, h, d), q.dtype)
    dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)  # views, each (B, H, T, D)
    scale = 1 / math.sqrt(d)
    groups = _head_groups(b, h, _block_count(b * h * min(t, ROWS) * t))

    def group(i: int) -> None:
        heads = groups[i]
        for rows in reversed(_query_blocks(t)):
            end, here = rows.stop, (*heads, rows)
            seen = (*heads, slice(end))
            dmix = grad[here]  # (b, h, R, D)
            weights, scaled_q = _scores(q[here], k[seen])  # (b, h, R, end)
            weights -= log_total[here][..., None]
            np.exp(weights, out=weights)
            dscores = dmix @ v[seen].swapaxes(-1, -2)  # (b, h, R, end)
            dropped = weights
            if p:
                factors = _dropout_factors(key, (h, t, t), heads, rows, weights, p)
                dropped = weights * factors
                dscores *= factors
                dscores[factors == 0] = 0  # an infinite gradient too stops at a dropped weight
            dscores -= np.vecdot(dmix, out[here])[..., None]
            dscores *= weights
            np.matmul(dscores, k[seen], out=dq[here])
            dq[here] *= scale
            if end == t:  # the last rows come first, and see every key
                np.matmul(dropped.swapaxes(-1, -2), dmix, out=dv[seen])
                np.matmul(dscores.swapaxes(-1, -2), scaled_q, out=dk[seen])
            else:
                dv[seen] += dropped.swapaxes(-1, -2) @ dmix
                dk[seen] += dscores.swapaxes(-1, -2) @ scaled_q

    parallel(group, len(groups))
    return dqkv


def _scores(q: Array, k: Array) -> tuple[Array, Array]:
    """Masked scores (b, h, R, end) of queries (b, h, R, D) and keys (b, h, end, D), and q / √D.

    The last query stands at the last key.
    """
    rows = q.shape[2]
    scaled_q = q * (1 / math.sqrt(q.shape[-1]))
    scores = scaled_q @ k.swapaxes(-1, -2)
    if rows > 1:  # of the last `rows` keys, query i may see those up to its own
        np.copyto(scores[..., -rows:], -np.inf, where=~np.tri(rows, dtype=bool))
    return scores, scaled_q


def _check_probability(p: float) -> None:
    """NotForMe for a p outside [0, 1): the definition raises the error."""
    if not 0 <= p < 1:
        raise NotForMe


def _query_blocks(t: int) -> list[slice]:
    return [slice(start, min(start + ROWS, t)) for start in range(0, t, ROWS)]


def _head_groups(b: int, h: int, count: int) -> list[tuple[slice, slice]]:
    """Cut B batches of H heads into about `count` groups: whole batches, or heads of one batch."""
    if count <= b:
        return [(batches, slice(0, h)) for batches in _cut(b, count)]
    return [(slice(i, i + 1), heads) for i in range(b) for heads in _cut(h, -(-count // b))]


def _dropout_factors(
    key: Key,
    sizes: tuple[int, int, int],
    heads: tuple[slice, slice],
    rows: slice,
    like: Array,
    p: float,
) -> Array:
    """A part of layers.dropout_factors(weights (B, H, T, S)): these queries of these heads.

    `sizes` are H, T and S. The generator jumps to where the part begins; each of its 64-bit numbers
    makes two factors.
    """
    (h, t, s), end = sizes, like.shape[3]
    n_queries, factors = rows.stop - rows.start, np.empty(like.shape, like.dtype)
    for i, j in np.ndindex(like.shape[:2]):
        head = (heads[0].start + i) * h + heads[1].start + j
        first = (head * t + rows.start) * s
        bits = np.random.PCG64(np.random.SeedSequence(key)).advance(first // 2)
        odd = first % 2
        draws = np.random.Generator(bits).random(odd + n_queries * s, dtype=np.float32)
        kept = draws[odd:].reshape(n_queries, s)[:, :end] >= p
        np.divide(kept, np.float32(1 - p), out=factors[i, j])
    return factors


# -------------------------------------------------------------------------------- cross-entropy


@in_numpy(functional.cross_entropy_forward)
def cross_entropy_forward(logits: Array, labels: Array) -> tuple[Array, Array]:
    labels = checked_labels(labels, logits.shape[1])
    dlogits = np.empty_like(logits)
    return dlogits, _cross_entropy(logits, labels, dlogits)


@in_numpy(linear_cross_entropy.linear_cross_entropy_forward)
def linear_cross_entropy_forward(
    x: Array, weight: Array, labels: Array, with_gradients: bool
) -> tuple[Array | None, Array, Array | None]:
    """As the definition; the logits become their own gradient in place."""
    labels = checked_labels(labels, len(weight))
    logits = matmul(x, weight.T)
    loss = _cross_entropy(logits, labels, logits)
    if not with_gradients:
        return None, loss, None
    return matmul(logits, weight), loss, matmul(logits.T, x)


def _cross_entropy(logits: Array, labels: Array, dlogits: Array) -> Array:
    """The summed loss; writes the gradient into `dlogits`, which may be `logits` itself."""
    n, vocab_size = logits.shape
    losses = np.zeros(n, logits.dtype)
    blocks = _row_blocks(n, vocab_size)

    def block(i: int) -> None:
        rows = blocks[i]
        part, label = dlogits[rows], labels[rows]
        counted = np.flatnonzero(label >= 0)  # a label below 0 is ignored
        at_label = counted, label[counted]
        np.subtract(logits[rows], logits[rows].max(axis=-1, keepdims=True), out=part)
        label_logits = part[at_label]
        np.exp(part, out=part)
        total = _row_sums(part)
        losses[rows][counted] = np.log(total[counted, 0]) - label_logits
        part /= total
        part[at_label] -= 1
        part[label < 0] = 0  # selected, not multiplied: its logits may be infinite

    parallel(block, len(blocks))
    return losses.sum()


# ------------------------------------------------------------------------------------ optimizer


@in_numpy(optim.clip_grad_norm)
def clip_grad_norm(parameters: list[Tensor], max_norm: float, loss_scale: float = 1.0) -> float:
    grads = gradients(parameters, max_norm)
    check_plain(grads, [FLOAT32, FLOAT64])
    norm = math.sqrt(sum_of_squares(grads)) / loss_scale
    factor = scale_of(norm, max_norm, loss_scale)
    for grad in grads if factor != 1 else ():
        grad *= factor
    return norm


def gradients(parameters: list[Tensor], max_norm: float) -> list[Array]:
    """The gradients that exist; NotForMe where there are none, or some that cannot be written.
    Raises what the definition raises for what cannot be clipped."""
    if not isinstance(parameters, list | tuple):  # what can be gone through only once
        raise NotForMe
    check_clipping(parameters, max_norm)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads or not all(getattr(g.flags, "writeable", True) for g in grads):
        raise NotForMe
    return grads


def scale_of(norm: float, max_norm: float, loss_scale: float) -> float:
    """What gradients of this norm, without the loss scale, are multiplied by; 1 if not finite."""
    factor = min(float(max_norm) / max(norm, 1e-30), 1.0) / loss_scale
    return factor if math.isfinite(norm) else 1.0


def sum_of_squares(arrays: Sequence[Array]) -> float:
    """The sum of the squares of all elements, in float64: those of floats may leave its range."""
    size = BLOCK // 4  # so that a copy in float64 stays in the cache as well
    chunks = [chunk for array in arrays for (chunk,) in _chunks([array], size)]
    sums = np.zeros(len(chunks))
    groups = _cut(len(chunks), cores() if sum(a.size for a in arrays) > FEW_ELEMENTS else 1)

    def group(i: int) -> None:
        for j in range(groups[i].start, groups[i].stop):
            wide = chunks[j].astype(np.float64, copy=False)
            sums[j] = np.vdot(wide, wide)

    parallel(group, len(groups))
    return float(sums.sum())


@in_numpy(optim.adamw_update)
def adamw_update(
    rows: list[Any], lr: float, beta1: float, beta2: float, eps: float, step: int
) -> None:
    checked_update(rows, FLOAT32, FLOAT64)
    keep_freed_memory()  # a run has begun: the next step allocates the same arrays again
    correction = math.sqrt(1 - beta2**step)
    # lr * m_hat / (sqrt(v_hat) + eps), with its two bias corrections combined in one factor
    rate = lr * correction / (1 - beta1**step)
    jobs = [(chunk, decay) for *arrays, decay in rows for chunk in _chunks(arrays, BLOCK)]
    together = sum(row[0].size for row in rows) <= FEW_ELEMENTS
    groups = _cut(len(jobs), 1 if together else max(cores(), len(jobs) // 8))

    def group(i: int) -> None:
        for (p, grad, m, v), decay in jobs[groups[i]]:
            change = grad * (1 - beta1)
            m *= beta1
            m += change
            np.multiply(grad, grad, out=change)
            change *= 1 - beta2
            v *= beta2
            v += change
            np.sqrt(v, out=change)
            change += eps * correction
            np.divide(m, change, out=change)
            change *= rate
            if decay:
                p *= 1 - lr * decay
            p -= change

    parallel(group, len(groups))


def _chunks(arrays: Sequence[Array], size: int) -> Iterator[tuple[Array, ...]]:
    """Arrays of one shape, cut at the same places into pieces of `size` elements.

    The pieces are views. Arrays that are not all contiguous in the same order come whole.
    """
    if all(a.flags.f_contiguous for a in arrays):
        arrays = [a.T for a in arrays]
    if all(a.flags.c_contiguous for a in arrays):
        flat = [a.reshape(-1) for a in arrays]
        for start in range(0, flat[0].size, size):
            yield tuple(a[start : start + size] for a in flat)
    else:
        yield tuple(arrays)
