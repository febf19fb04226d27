"""The layers of `layers.py` fused: under the same names, each forward beside its backward.

`linear_forward` and the like return the result, then what their backward needs; `linear_backward`
takes the gradient of the result, returns those of the inputs, and says what was saved. The layer on
tensors puts both on the tape. Sizes have the letters of `layers.py`, and N is B × T, the rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.stand_ins import NotForMe, definition, stands_in_for
from micrograd_gpt.layers import GELU_CUBIC, GELU_SCALE, IGNORE, Key, causal_mask, dropout_factors
from micrograd_gpt.tensor import Array, Tensor, is_recorded, record, total

dropout, embedding, softmax = layers.dropout, layers.embedding, layers.softmax  # not fused
log_softmax, linear_cross_entropy = layers.log_softmax, layers.linear_cross_entropy


def check_shapes(fits: bool, name: str, *tensors: Tensor | None) -> None:
    """ValueError, with the tensors' shapes, unless they fit."""
    if not fits:
        raise ValueError(f"{name}: shapes {[t.shape for t in tensors if t is not None]} do not fit")


@definition
def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    """x (N, n_in) @ weight (n_in, n_out) + bias (n_out,) -> (N, n_out)."""
    y = x @ weight
    return y if bias is None else y + bias


@definition
def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of x, weight and bias. Saved: x and weight."""
    dx = grad @ weight.T  # (N, n_in)
    dweight = x.T @ grad  # (n_in, n_out)
    dbias = total(grad, axis=0)  # (n_out,)
    return dx, dweight, dbias


@stands_in_for(layers.linear, "fused")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    fits = weight.ndim == 2 and x.shape[-1:] == weight.shape[:1]
    fits = fits and (bias is None or bias.shape == weight.shape[1:])
    check_shapes(fits, "linear", x, weight, bias)
    n_in, n_out = weight.shape
    rows, w, shape = x.data.reshape(-1, n_in), weight.data, x.shape
    y = linear_forward(rows, w, None if bias is None else bias.data)

    def backward(grad: Array) -> tuple[Array, ...]:
        dx, dweight, dbias = linear_backward(grad.reshape(-1, n_out), rows, w)
        return (dx.reshape(shape), dweight, dbias)[: 2 if bias is None else 3]

    inputs = [x, weight] if bias is None else [x, weight, bias]
    return record("linear", y.reshape(*shape[:-1], n_out), inputs, backward)


@definition
def layer_norm_forward(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, ...]:
    """Normalised, scaled and shifted rows of x (N, C); their means and 1 / deviations (N, 1)."""
    mean = x.mean(axis=-1, keepdims=True)  # (N, 1)
    mean = mean + (x - mean).mean(axis=-1, keepdims=True)  # again, as in layers.py
    centred = x - mean
    rstd = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + float(+eps))  # (N, 1)
    return centred * rstd * weight + bias, mean, rstd


@definition
def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    """Gradients of x, weight, bias. Saved: x, mean, rstd (the normalised rows n again), weight.
    Mean and deviation move with x, which takes away the parts of dn = grad * weight along 1 and
    along n: dx = rstd * (dn - mean(dn) - n * mean(dn * n))."""
    normed = (x - mean) * rstd  # (N, C)
    dnormed = grad * weight
    along_1 = dnormed.mean(axis=-1, keepdims=True)  # (N, 1)
    along_n = (dnormed * normed).mean(axis=-1, keepdims=True)  # (N, 1)
    dx = rstd * (dnormed - along_1 - normed * along_n)
    return dx, total(grad * normed, axis=0), total(grad, axis=0)


@stands_in_for(layers.layer_norm, "fused")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    fits = weight.shape == bias.shape == x.shape[-1:] != ()
    check_shapes(fits, "layer_norm", x, weight, bias)
    width, shape = x.shape[-1], x.shape
    rows, w = x.data.reshape(-1, width), weight.data
    y, mean, rstd = layer_norm_forward(rows, w, bias.data, eps)

    def backward(grad: Array) -> tuple[Array, ...]:
        dx, dweight, dbias = layer_norm_backward(grad.reshape(-1, width), rows, w, mean, rstd)
        return dx.reshape(shape), dweight, dbias

    return record("layer_norm", y.reshape(shape), [x, weight, bias], backward)


@definition
def gelu_forward(x: Array) -> Array:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return 0.5 * x * (1 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x)))


@definition
def gelu_backward(grad: Array, x: Array) -> Array:
    """Gradient of x. Saved: x; the tanh is computed again."""
    x = np.clip(x, -20, 20)  # beyond, the slope is 0 or 1, and infinite powers of x make it NaN
    t = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))
    dt = (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    return grad * (0.5 * (1 + t) + 0.5 * x * dt)


@stands_in_for(layers.gelu, "fused")
def gelu(x: Tensor) -> Tensor:
    data = x.data
    return record("gelu", gelu_forward(data), [x], lambda grad: (gelu_backward(grad, data),))


@definition
def attention_forward(q: Array, k: Array, v: Array, p: float, key: Key) -> tuple[Array, Array]:
    """Causal attention of q (B, H, T, D) over k and v (B, H, S, D), S >= T -> (B, H, T, D); and the
    logarithm of each row's softmax denominator, (B, H, T), for the backward."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    scores = np.where(causal_mask(q.shape[-2], k.shape[-2], q), scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True)  # (B, H, T, 1)
    exp = np.exp(scores - largest)
    total = exp.sum(axis=-1, keepdims=True)
    weights = exp / total
    if p:
        weights = weights * dropout_factors(weights, p, key)
    return weights @ v, (largest + np.log(total))[..., 0]


@definition
def attention_backward(
    grad: Array, q: Array, k: Array, v: Array, out: Array, log_total: Array, p: float, key: Key
) -> Array:
    """Gradients of q, k and v, as one array (B, T, 3, H, D). Saved: q, k, v, out and log_total,
    from which the weights are computed again. The softmax's backward needs each row's sum of weight
    × dweight, which equals output · grad (Dao et al. 2022, arXiv:2205.14135, appendix B.2)."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T), as in the forward
    scores = np.where(causal_mask(q.shape[-2], k.shape[-2], q), scores, -np.inf)
    weights = np.exp(scores - log_total[..., None])
    dropped, dweights = weights, grad @ v.swapaxes(-1, -2)  # (B, H, T, T)
    if p:
        factors = dropout_factors(weights, p, key)
        dropped, dweights = weights * factors, np.where(factors, dweights, 0) * factors
    row_sums = (grad * out).sum(axis=-1, keepdims=True)  # (B, H, T, 1)
    dscores = weights * (dweights - row_sums) / math.sqrt(q.shape[-1])
    dq, dk = dscores @ k, dscores.swapaxes(-1, -2) @ q  # (B, H, T, D)
    dv = dropped.swapaxes(-1, -2) @ grad
    return np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4)


@stands_in_for(layers.self_attention, "fused")
def self_attention(qkv: Tensor, p: float = 0.0, key: Key = (), past: Any = None) -> Tensor:
    if past is not None:
        raise NotForMe  # the definition takes it
    check_shapes(qkv.ndim == 5 and qkv.shape[2] == 3, "self_attention", qkv)
    q, k, v = qkv.data.transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
    out, log_total = attention_forward(q, k, v, p, key)

    def backward(grad: Array) -> tuple[Array]:
        return (attention_backward(grad.swapaxes(1, 2), q, k, v, out, log_total, p, key),)

    return record("self_attention", out.swapaxes(1, 2), [qkv], backward)


@stands_in_for(layers.attention, "fused")
def attention(q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, key: Key = ()) -> Tensor:
    check_shapes(q.shape[-2:-1] <= k.shape[-2:-1] == v.shape[-2:-1], "attention", q, k, v)
    alike = q.ndim == 4 and (*q.shape[:2], *k.shape[-2:]) == k.shape == v.shape
    if not alike or is_recorded(q, k, v):
        raise NotForMe  # this is for decoding, of heads with keys of their own
    return Tensor(attention_forward(q.data, k.data, v.data, p, key)[0])


@definition
def cross_entropy_forward(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Gradient of logits (N, V), then the sum over the rows of -log softmax(row)[label]. The former
    is softmax(row), minus 1 at the label: computed here, where the exponentials are at hand."""
    counted, places = labels != IGNORE, np.arange(len(labels), like=labels)
    label = np.where(counted, labels, 0)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    dlogits = np.exp(shifted)
    total = dlogits.sum(axis=-1, keepdims=True)  # (N, 1)
    losses = np.where(counted, np.log(total[:, 0]) - shifted[places, label], 0)
    dlogits /= total
    dlogits[places, label] -= 1
    return np.where(counted[:, None], dlogits, 0), losses.sum()


@stands_in_for(layers.cross_entropy, "fused")
def cross_entropy(logits: Tensor, targets: Any) -> Tensor:
    labels, count = layers.flat_targets(targets, logits, logits.shape[-1])
    rows, shape = logits.data.reshape(len(labels), -1), logits.shape
    dlogits, loss_sum = cross_entropy_forward(rows, labels)

    def backward(grad: Array) -> tuple[Array]:
        return ((dlogits * (grad / count)).reshape(shape),)

    return record("cross_entropy", loss_sum / count, [logits], backward)
