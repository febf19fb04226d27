"""The fused operations GPT-2 is made of, each forward beside its backward.

Every operation has the same three parts. `x_forward` takes arrays and returns the result, and what
the backward needs of it. `x_backward` takes the gradient of the result and returns the gradients of
the inputs; its comment says what was saved and what it computes again. Then comes the operation on
tensors, which runs the forward and puts the backward on the tape.

Forward and backward are written for any array library (`xp`), to be read. Those marked
`@accelerated` have a faster equal in `kernels/`, chosen by the device.

In half precision (see precision.py) the results of linear, gelu, attention and dropout are kept in
the type of what they are given, and so are the gradients that pass through them. In between
everything is computed in float32: sums, statistics, softmax, the loss, the gradients of parameters.

Shapes: B batch, T time (tokens), C channels, H heads, D head size, V vocabulary, N rows (any
leading dimensions, flattened).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from micrograd_gpt.arrays import backend
from micrograd_gpt.arrays.backend import Array, Key, array_module
from micrograd_gpt.arrays.precision import (
    array_dtype,
    is_float,
    kept,
    product_in_float32,
    wide,
    widened,
)
from micrograd_gpt.kernels import accelerated
from micrograd_gpt.tensor import AddInto, Tensor, record, recording

IGNORE = -100  # a target that counts for nothing, as in PyTorch and Transformers
LOGITS_AT_ONCE = 2**26  # how many logits linear_cross_entropy holds at a time: 256 MB in float32


def _check_dtype(name: str, first: Tensor, *others: Tensor | None) -> None:
    """ValueError unless all these tensors are of one and the same floating-point type."""
    dtype, half = first.data.dtype, first.half
    alike = is_float(dtype)
    for t in others:
        alike = alike and (t is None or (t.data.dtype == dtype and t.half == half))
    if not alike:
        names = ", ".join(t.half or str(t.dtype) for t in (first, *others) if t is not None)
        raise ValueError(f"{name} needs one float dtype, not {names}: convert with .astype()")


# --------------------------------------------------------------------------------------- linear


@accelerated
def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a (n, k) @ b (k, m) -> (n, m), in `out` where given; rounded only where that is narrower."""
    if out is not None and out.dtype.itemsize > a.dtype.itemsize:
        return product_in_float32(a, b, out)
    return array_module(a).matmul(a, b, out=out)


@accelerated
def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    """x (N, n_in) @ weight (n_in, n_out) + bias (n_out,) -> (N, n_out)."""
    y = x @ weight
    return y if bias is None else y + bias


@accelerated
def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of x, weight and bias, the last two not rounded. Saved: x and weight."""
    dx = grad @ weight.T  # (N, n_in)
    dweight = product_in_float32(x.T, grad)  # (n_in, n_out)
    dbias = widened(grad).sum(axis=0)  # (n_out,)
    return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, n_in) times weight (n_in, n_out) plus bias (n_out,) -> (…, n_out).

    Weights are (in, out), as GPT-2 stores them ("Conv1D" in Transformers), not PyTorch's (out, in).
    For an x of half precision weight and bias are rounded to its type, if they are wider, and their
    gradients are not. Raises ValueError when the shapes do not fit.
    """
    n_in, n_out = weight.shape
    _check_shapes("linear", x, weight, bias)
    w, b = _in_precision_of(x, "linear", weight, bias)
    rows = x.data.reshape(-1, n_in)  # (N, n_in)
    y = linear_forward(rows, w, b)
    x_shape = x.shape

    def backward(grad: Array) -> tuple[Array, ...]:
        dx, dweight, dbias = linear_backward(grad.reshape(-1, n_out), rows, w)
        return (dx.reshape(x_shape), dweight, dbias)[: 2 if bias is None else 3]

    inputs = [x, weight] if bias is None else [x, weight, bias]
    return record("linear", y.reshape(*x_shape[:-1], n_out), inputs, backward, x.half)


def _check_shapes(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    n_in, n_out = weight.shape
    if x.shape[-1] != n_in or (bias is not None and bias.shape != (n_out,)):
        shapes = f"{x.shape} @ {weight.shape}" + (f" + {bias.shape}" if bias is not None else "")
        raise ValueError(f"{name}: shapes do not fit: {shapes}")


def _in_precision_of(x: Tensor, name: str, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The arrays of weight and bias, rounded where x is of half precision and they are wider."""
    if x.half is None:
        _check_dtype(name, x, weight, bias)
        return weight.data, None if bias is None else bias.data
    w, b = weight.data, None if bias is None else bias.data
    w = w if weight.half == x.half else kept(w, x.half)
    b = b if bias is None or bias.half == x.half else kept(b, x.half)
    return w, b


# ------------------------------------------------------------------------------------ embedding


@accelerated
def embedding_forward(weight: Array, ids: Array) -> Array:
    """Rows of weight (V, C) by ids (…) -> (…, C), never in half precision."""
    return widened(weight[ids])


@accelerated
def embedding_backward(grad: Array, ids: Array, dweight: Array) -> None:
    """Add to the gradient of weight (V, C): each row of grad (…, C) where its id (…) says.

    CuPy adds the rows of one id in no fixed order, so that last digits may differ from run to run.
    """
    array_module(grad).add.at(dweight, ids, grad)  # a token that occurs twice gets both


def embedding(ids: Any, weight: Tensor) -> Tensor:
    """Rows of weight (V, C) picked by integer ids (…) -> (…, C), never in half precision.

    Raises ValueError for ids that are not integers and, of ids on the CPU, for one outside 0 … V-1.
    """
    xp = array_module(weight.data)
    ids = ids.data if isinstance(ids, Tensor) else ids
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
    check_ids(ids, weight.shape[0])
    ids = xp.asarray(ids)

    def backward(grad: Array) -> tuple[AddInto]:
        return (lambda dweight: embedding_backward(grad, ids, dweight),)  # few rows of it

    return record("embedding", embedding_forward(weight.data, ids), [weight], backward, None)


def check_ids(ids: Array, vocab_size: int) -> None:
    """Raise ValueError unless `ids` are integers in 0 … vocab_size-1 (on a GPU: integers)."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers, not {ids.dtype}")
    if isinstance(ids, np.ndarray) and ids.size:  # a GPU would have to stop and wait for the answer
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size}")


# ----------------------------------------------------------------------------------- layer norm


@accelerated
def layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float, dtype: Any = None
) -> tuple[Array, Array, Array]:
    """Normalise each row of x (N, C) to mean 0 and variance 1, then scale and shift.

    Returns y (N, C), of the given dtype or x's, and for the backward the rows' means and
    1 / standard deviations (N, 1).
    """
    xp = array_module(x)
    mean = x.mean(axis=-1, keepdims=True)  # (N, 1)
    centred = x - mean
    rstd = 1 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)  # (N, 1)
    y = centred * rstd * weight + bias
    return y if dtype is None else y.astype(dtype, copy=False), mean, rstd


@accelerated
def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    """Gradients of x, weight, bias. Saved: x, mean, rstd; the normalised rows come again from them.

    With n = (x - mean) * rstd and dn = grad * weight, the mean and the deviation move with x, which
    takes the parts of dn along 1 and along n away: dx = rstd * (dn - mean(dn) - n * mean(dn * n)).
    """
    grad = widened(grad)
    normed = (x - mean) * rstd  # (N, C)
    dnormed = grad * weight
    dx = rstd * (
        dnormed
        - dnormed.mean(axis=-1, keepdims=True)
        - normed * (dnormed * normed).mean(axis=-1, keepdims=True)
    )
    return dx, (grad * normed).sum(axis=0), grad.sum(axis=0)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, half: str | None = None
) -> Tensor:
    """Layer normalisation over the last axis: x (…, C), weight and bias (C,) -> (…, C).

    The result is kept in `half`, a half-precision type; left out, in x's type. Ba, Kiros, Hinton
    2016 (arXiv:1607.06450). Raises ValueError when the shapes do not fit.
    """
    channels = x.shape[-1]
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"layer_norm: {x.shape} with weight {weight.shape}, bias {bias.shape}")
    _check_dtype("layer_norm", x, weight, bias)
    rows, w = x.data.reshape(-1, channels), weight.data
    on_gpu = half is not None and x.device == "gpu"  # whose kernel rounds on the way
    dtype = (array_dtype(half, "gpu"),) if on_gpu else ()
    y, mean, rstd = layer_norm_forward(rows, w, bias.data, eps, *dtype)
    shape = x.shape

    def backward(grad: Array) -> tuple[Array, ...]:
        grad_rows = grad.reshape(-1, channels)
        dx, dweight, dbias = layer_norm_backward(grad_rows, rows, w, mean, rstd)
        return dx.reshape(shape), dweight, dbias

    return record("layer_norm", y.reshape(shape), [x, weight, bias], backward, half)


# ----------------------------------------------------------------------------------------- gelu

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


@accelerated
def gelu_forward(x: Array) -> Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))."""
    xp, x = array_module(x), widened(x)
    return 0.5 * x * (1 + xp.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x)))


@accelerated
def gelu_backward(grad: Array, x: Array) -> Array:
    """Gradient of x. Saved: x; the tanh is computed again."""
    xp, x = array_module(x), widened(x)
    t = xp.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))
    dt = (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    return grad * (0.5 * (1 + t) + 0.5 * x * dt)


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation GPT-2 was trained with ("gelu_new"), of any shape.

    Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2.
    """
    _check_dtype("gelu", x)
    rows = x.data
    return record("gelu", gelu_forward(rows), [x], lambda grad: (gelu_backward(grad, rows),))


@accelerated
def linear_gelu_forward(x: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """What goes into GELU, x (N, n_in) @ weight + bias, and what comes out, each (N, n_out)."""
    before = linear_forward(x, weight, bias)
    return before, gelu_forward(before)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(linear(x, weight, bias)), which a GPU does with a pass over its memory less.

    Takes and raises what `linear` does. Saved: x, weight and what goes into GELU.
    """
    if x.device == "cpu":
        return gelu(linear(x, weight, bias))
    (n_in, n_out), shape = weight.shape, x.shape
    _check_shapes("linear_gelu", x, weight, bias)
    w, b = _in_precision_of(x, "linear_gelu", weight, bias)
    rows = x.data.reshape(-1, n_in)  # (N, n_in)
    before, y = linear_gelu_forward(rows, w, b)

    def backward(grad: Array) -> tuple[Array, ...]:
        dbefore = gelu_backward(grad.reshape(-1, n_out), before)
        dbefore = kept(dbefore, x.half) if x.half else dbefore
        dx, dweight, dbias = linear_backward(dbefore, rows, w)
        return dx.reshape(shape), dweight, dbias

    inputs = [x, weight, bias]
    return record("linear_gelu", y.reshape(*shape[:-1], n_out), inputs, backward, x.half)


# -------------------------------------------------------------------------------------- softmax


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last axis, of any shape."""
    xp, rows = array_module(x.data), widened(x.data)
    y = xp.exp(rows - rows.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)

    def backward(grad: Array) -> tuple[Array]:
        return (y * (grad - (grad * y).sum(axis=-1, keepdims=True)),)

    return record("softmax", y, [x], backward)


def log_softmax(x: Tensor) -> Tensor:
    """log(softmax(x)) over the last axis, of any shape, without ever taking the log of a 0."""
    xp, rows = array_module(x.data), widened(x.data)
    shifted = rows - rows.max(axis=-1, keepdims=True)
    y = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))

    def backward(grad: Array) -> tuple[Array]:
        return (grad - xp.exp(y) * grad.sum(axis=-1, keepdims=True),)

    return record("log_softmax", y, [x], backward)


# ------------------------------------------------------------------------------------ attention


def causal_mask(n_queries: int, n_keys: int, xp: Any = np) -> Array:
    """(n_queries, n_keys) booleans, true where a query may look: itself and all before it.

    The last query stands at the last key; with more keys than queries the first are a KV cache's.
    """
    return xp.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)


def attention_dropout(key: Key, shape: tuple[int, ...], p: float, xp: Any = np) -> Array:
    """Factors 0 or 1/(1-p) for attention weights (B, H, T, T), made again alike in the backward.

    Each head's tile of `DROPOUT_ROWS` rows, up to the diagonal, is a draw of its own: a kernel that
    never holds all T × T weights makes just the rows it is at.
    """
    b, h, rows, columns = shape
    factors = xp.ones((b * h, rows, columns), np.float32)
    for head in range(b * h):
        for start in range(0, rows, backend.DROPOUT_ROWS):
            end = start + backend.DROPOUT_ROWS
            tile = factors[head, start:end, :end]
            tile[:] = backend.dropout_factors((*key, head, start), tile.shape, p, xp)
    return factors.reshape(shape)


@accelerated
def attention_forward(
    q: Array, k: Array, v: Array, dropout: float = 0.0, key: Key = ()
) -> tuple[Array, Array]:
    """Causal attention of q (B, H, Tq, D) over k and v (B, H, Tk, D), Tk >= Tq.

    Returns the mixed values (B, Tq, H, D), laid out so that the heads join into (B, Tq, C) without
    a copy, and each row's log of the softmax's denominator (B, H, Tq) for the backward.
    """
    xp = array_module(q)
    q, k, v = widened(q), widened(k), widened(v)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
    scores = xp.where(causal_mask(q.shape[-2], k.shape[-2], xp), scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True)  # (B, H, Tq, 1)
    weights = xp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= total
    if dropout:
        weights = weights * attention_dropout(key, weights.shape, dropout, xp)
    out = xp.ascontiguousarray((weights @ v).swapaxes(1, 2))  # (B, Tq, H, D)
    return out, (largest + xp.log(total))[..., 0]


@accelerated
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
    """Gradients of q, k and v, written into dq, dk and dv, each (B, H, T, D).

    Saved: q, k, v, the output and log_total.

    The weights are computed again from the scores: exp(score - log_total). The softmax's backward
    needs the sum of weight × dweight along each row, which equals output · grad (Dao et al. 2022,
    arXiv:2205.14135, appendix B.2), dropout or not.
    """
    xp = array_module(q)
    grad, q, k, v, out = (widened(array) for array in (grad, q, k, v, out))
    scale = 1 / math.sqrt(q.shape[-1])
    dmixed = grad.swapaxes(1, 2)  # (B, H, T, D)
    scores = q @ k.swapaxes(-1, -2) * scale  # (B, H, T, T)
    weights = xp.exp(scores - log_total[..., None])
    weights = xp.where(causal_mask(q.shape[-2], k.shape[-2], xp), weights, 0)
    dweights = dmixed @ v.swapaxes(-1, -2)  # (B, H, T, T)
    dropped = weights
    if dropout:
        factors = attention_dropout(key, weights.shape, dropout, xp)
        dropped, dweights = weights * factors, dweights * factors
    dv[...] = dropped.swapaxes(-1, -2) @ dmixed
    row_sums = (grad * out).sum(axis=-1).swapaxes(1, 2)[..., None]  # (B, H, T, 1)
    dscores = weights * (dweights - row_sums) * scale
    dq[...] = dscores @ k
    dk[...] = dscores.swapaxes(-1, -2) @ q


def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    """(B, T, 3C) -> queries, keys and values, each (B, H, T, D): views, nothing is copied."""
    b, t, width = qkv.shape
    q, k, v = qkv.reshape(b, t, 3, n_head, width // 3 // n_head).transpose(2, 0, 3, 1, 4)
    return q, k, v


def causal_attention(qkv: Tensor, n_head: int, dropout: float = 0.0, key: Key = ()) -> Tensor:
    """Multi-head causal self-attention: queries, keys and values (B, T, 3C) -> (B, T, C).

    softmax(q k^T / sqrt(D)) v in each head, every token looking at itself and those before it
    (Vaswani et al. 2017, arXiv:1706.03762). `dropout` is the probability of dropping an attention
    weight, `key` the draw it uses. Raises ValueError when the heads do not divide C.
    """
    b, t, width = qkv.shape
    if width % (3 * n_head):
        raise ValueError(f"causal_attention: {n_head} heads do not divide 3C = {width}")
    _check_dtype("causal_attention", qkv)
    q, k, v = split_heads(qkv.data, n_head)
    out, log_total = attention_forward(q, k, v, dropout, key)  # (B, T, H, D), (B, H, T)
    out = kept(out, qkv.half) if qkv.half else out

    def backward(grad: Array) -> tuple[Array]:
        dmixed = grad.reshape(out.shape)
        dqkv = array_module(grad).empty((b, t, width), grad.dtype)
        parts = split_heads(dqkv, n_head)  # dq, dk, dv: views, each (B, H, T, D)
        attention_backward(dmixed, q, k, v, out, log_total, *parts, dropout, key)
        return (dqkv,)

    return record("causal_attention", out.reshape(b, t, width // 3), [qkv], backward)


def check_no_tape(*inputs: Tensor) -> None:
    """RuntimeError where an operation on these goes on the tape: a KV cache has no backward."""
    if recording(*inputs):
        raise RuntimeError("a KV cache is for decoding: use it within no_grad()")


def cached_attention(
    qkv: Tensor, n_head: int, keys: Array, values: Array, starts: np.ndarray
) -> Tensor:
    """Causal self-attention of T new tokens, qkv (B, T, 3C), that also see older ones.

    `keys` and `values` (B, H, capacity, D) hold `starts[b]` older tokens' in row b; the new tokens'
    are written behind them, in place. Returns (B, T, C). For decoding only: raises RuntimeError
    when a gradient is wanted, ValueError when the cache is full.
    """
    check_no_tape(qkv)
    b, t, width = qkv.shape
    if starts.max() + t > keys.shape[2]:
        raise ValueError(f"the KV cache holds {keys.shape[2]} positions, not {starts.max() + t}")
    q, k, v = split_heads(qkv.data, n_head)
    alike = (starts == starts[0]).all()  # rows of one length go together, others one by one
    groups = [slice(0, b)] if alike else [slice(row, row + 1) for row in range(b)]
    outs = []
    for rows in groups:
        start = int(starts[rows.start])
        end = start + t
        keys[rows, :, start:end], values[rows, :, start:end] = k[rows], v[rows]
        outs.append(attention_forward(q[rows], keys[rows, :, :end], values[rows, :, :end])[0])
    out = outs[0] if alike else array_module(outs[0]).concatenate(outs)  # (B, T, H, D)
    return record("cached_attention", out.reshape(b, t, width // 3), [qkv], lambda grad: (None,))


# -------------------------------------------------------------------------------------- dropout


@accelerated
def dropout_forward(x: Array, p: float, key: Key) -> tuple[Array, Any]:
    """x, of any shape, times factors 0 or 1 / (1 - p), and these factors for the backward."""
    factors = backend.dropout_factors(key, x.shape, p, array_module(x))
    factors = factors.astype(wide(x.dtype), copy=False)
    return x * factors, factors


@accelerated
def dropout_backward(grad: Array, factors: Any, p: float, key: Key) -> Array:
    """Gradient of x. Saved: the factors; None from a kernel, which makes them again itself."""
    if factors is None:
        raise RuntimeError(
            "a kernel dropped these numbers out: run its backward outside of definitions_only() too"
        )
    return grad * factors


def dropout(x: Tensor, p: float, key: Key) -> Tensor:
    """Set elements to 0 with probability p and divide the others by 1 - p; any shape.

    Which ones is a function of `key` alone, on each device its own (Srivastava et al. 2014).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must be in [0, 1), not {p}")
    if p == 0:
        return x
    y, factors = dropout_forward(x.data, p, key)
    return record("dropout", y, [x], lambda grad: (dropout_backward(grad, factors, p, key),))


# -------------------------------------------------------------------------------- cross-entropy


@accelerated
def cross_entropy_forward(
    logits: Array, targets: Array, scale: float = 1.0, out: Array | None = None
) -> tuple[Array, Array]:
    """Sum over the rows of logits (N, V) of -log softmax(logits)[target], and its gradient.

    Rows whose target is IGNORE count for nothing. The gradient of a row is softmax(row), minus 1
    at the target: computed here, where the exponentials are at hand, and multiplied by `scale`.
    It goes into `out`, which may be `logits` itself.
    """
    xp, kept_in = array_module(logits), logits.dtype
    logits = widened(logits)
    counted = targets != IGNORE
    rows = xp.arange(len(targets))
    label = xp.where(counted, targets, 0)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    dlogits = xp.exp(shifted)
    total = dlogits.sum(axis=-1, keepdims=True)  # (N, 1)
    losses = xp.where(counted, xp.log(total[:, 0]) - shifted[rows, label], 0)
    dlogits /= total
    dlogits[rows, label] -= 1
    dlogits *= (scale * counted[:, None]).astype(dlogits.dtype)
    if out is None:
        return losses.sum(), dlogits.astype(kept_in, copy=False)
    out[...] = dlogits
    return losses.sum(), out


def cross_entropy(logits: Tensor, targets: Any) -> Tensor:
    """Mean over targets (…) of -log softmax(logits (…, V))[target], in nats; a scalar tensor.

    Targets of -100 are ignored. Raises ValueError when the shapes differ, a target is outside the
    vocabulary, or none counts.
    """
    _check_dtype("cross_entropy", logits)
    vocab_size = logits.shape[-1]
    labels, count = _flat_targets(targets, logits.shape[:-1], vocab_size, logits.data)
    total, dlogits = cross_entropy_forward(logits.data.reshape(-1, vocab_size), labels)
    dlogits = kept(dlogits, logits.half) if logits.half else dlogits
    shape = logits.shape
    return record(
        "cross_entropy",
        total / count,
        [logits],
        lambda grad: ((dlogits * (grad / count)).reshape(shape),),
        half=None,
    )


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Any) -> Tensor:
    """cross_entropy(x @ weight.T, targets) for x (…, C), weight (V, C), without keeping the logits.

    Works through some rows at a time: its logits, their losses, and at once the gradients
    they lead to, so that at most `LOGITS_AT_ONCE` logits exist at any moment. Backward then only
    scales what the forward found. Raises as `cross_entropy` does.
    """
    vocab_size, channels = weight.shape
    w, _ = _in_precision_of(x, "linear_cross_entropy", weight)
    half, rows = x.half, x.data.reshape(-1, channels)  # (N, C)
    labels, count = _flat_targets(targets, x.shape[:-1], vocab_size, x.data)
    want_gradients = recording(x, weight)
    xp = array_module(rows)
    dx: Any = xp.empty_like(rows) if want_gradients else None  # (N, C)
    dweight: Any = None  # (V, C)
    loss = 0.0
    # A share of the mean may be too small for half precision: there it is taken in the backward
    scale = 1 if half else 1 / count
    parts = -(-len(rows) * vocab_size // LOGITS_AT_ONCE)
    size = max(1, len(rows) // parts)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        logits = matmul(rows[part], w.T)  # (size, V)
        logits = kept(logits, half) if half else logits
        total, dlogits = cross_entropy_forward(logits, labels[part], scale, out=logits)
        loss = loss + total
        if want_gradients:
            dlogits = kept(dlogits, half) if half else dlogits
            matmul(dlogits, w, out=dx[part])
            dw = xp.empty((vocab_size, channels), wide(rows.dtype))
            matmul(dlogits.T, rows[part], out=dw)
            dweight = dw if dweight is None else xp.add(dweight, dw, out=dweight)
    shape = x.shape

    def backward(grad: Array) -> tuple[Array, Array]:
        factor = grad / count if half else grad
        for array in (dx, dweight):
            array *= factor
        return dx.reshape(shape), dweight

    return record("linear_cross_entropy", loss / count, [x, weight], backward, half=None)


def _flat_targets(
    targets: Any, shape: tuple[int, ...], vocab_size: int, like: Array
) -> tuple[Array, Any]:
    """Targets (…) as one row (N,) beside `like`, and how many of them count.

    Raises ValueError unless they fit `shape` and, of targets on the CPU, V, and some count: a GPU
    would have to stop and wait to be asked.
    """
    labels = targets.data if isinstance(targets, Tensor) else targets
    labels = labels if hasattr(labels, "dtype") else np.asarray(labels)
    if labels.shape != shape:
        raise ValueError(f"cross_entropy: targets {labels.shape} for rows of shape {shape}")
    labels = labels.reshape(-1)
    counted = labels != IGNORE
    if not isinstance(labels, np.ndarray):
        check_ids(labels, vocab_size)
        return labels, counted.sum()
    check_ids(labels[counted], vocab_size)
    if not counted.any():
        raise ValueError(f"cross_entropy: every target is ignored ({IGNORE})")
    return array_module(like).asarray(labels), int(counted.sum())
