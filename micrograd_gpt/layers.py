"""The layers of GPT-2 as mathematics: operations whose backwards the tape finds, dropout apart.

`functional.py` has the same layers with forward and backward worked out by hand. Those run in place
of these, equal within rounding, unless you edit these or set MICROGRAD_GPT_KERNELS=definitions.

    B batch   T time (tokens)   C channels   H heads   D head size   V vocabulary
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from micrograd_gpt.arrays.habits import from_list, is_plain
from micrograd_gpt.arrays.stand_ins import definition
from micrograd_gpt.tensor import Array, Tensor, as_tensor, record, where

Key = tuple[int, ...]  # names one random draw: the same key gives the same numbers

IGNORE = -100  # a target that counts for nothing, as in PyTorch and Transformers
GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


@definition
def embedding(ids: Any, weight: Tensor) -> Tensor:
    """Rows of weight (V, C) picked by integer ids (…) -> (…, C); ValueError for an id outside."""
    return weight[checked_ids(ids, len(weight))]


@definition
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, n_in) @ weight (n_in, n_out) + bias (n_out,) -> (…, n_out). Weights are (in, out), as
    GPT-2 stores them ("Conv1D" in Transformers), not PyTorch's (out, in)."""
    y = x @ weight
    return y if bias is None else y + bias


@definition
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of x (…, C) to mean 0 and variance 1, then scaled and shifted by weight, bias (C,).
    Ba, Kiros, Hinton 2016 (arXiv:1607.06450)."""
    centred = x - x.mean(-1, keepdims=True)
    centred = centred - centred.mean(-1, keepdims=True)  # again: equal numbers become exact zeros
    variance = (centred * centred).mean(-1, keepdims=True)  # (…, 1)
    return centred / (variance + eps).sqrt() * weight + bias


@definition
def gelu(x: Tensor) -> Tensor:
    """x times the probability that a normal variable is below x, in the tanh approximation that
    GPT-2 was trained with ("gelu_new"). Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2."""
    near = where(x > 20, 20, where(x < -20, -20, x))  # beyond, tanh is ±1, and x³ may overflow
    return 0.5 * x * (1 + (GELU_SCALE * (near + GELU_CUBIC * near**3)).tanh())


@definition
def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last axis; the largest is taken off so that none overflows."""
    exp = (x - x.detach().max(-1, keepdims=True)).exp()  # a constant off changes no softmax
    return exp / exp.sum(-1, keepdims=True)


@definition
def log_softmax(x: Tensor) -> Tensor:
    """log(softmax(x)) over the last axis, without ever taking the logarithm of a 0."""
    shifted = x - x.detach().max(-1, keepdims=True)
    return shifted - shifted.exp().sum(-1, keepdims=True).log()


@definition
def attention(q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, key: Key = ()) -> Tensor:
    """Causal attention, softmax(q kᵀ / √D) v: queries (B, H, T, D), keys and values (B, H, S, D).
    The last query stands at the last key, and each sees the keys up to its own place. Attention
    weights are dropped with probability p. Vaswani et al. 2017 (arXiv:1706.03762)."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    may_look = causal_mask(q.shape[-2], k.shape[-2], q.data)  # (T, S)
    weights = softmax(where(may_look, scores, -np.inf))
    return (dropout(weights, p, key) if p else weights) @ v  # (B, H, T, D)


@definition
def self_attention(qkv: Tensor, p: float = 0.0, key: Key = (), past: Any = None) -> Tensor:
    """Each token's attention to itself and all before it: (B, T, 3, H, D) -> (B, T, H, D)."""
    q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # each (B, H, T, D)
    attend = attention if past is None else past.attention  # generation/kv_cache.py: older tokens
    return attend(q, k, v, p, key).swapaxes(1, 2)


@definition
def dropout_forward(x: Array, p: float, key: Key) -> Array:
    """x times factors 0, with probability p, or 1 / (1 - p); 0 is 0, also of infinity."""
    factors = dropout_factors(x, p, key)
    return np.where(factors, x, 0) * factors


def dropout(x: Tensor, p: float, key: Key) -> Tensor:
    """Zero each element of x with probability p and divide the others by 1 - p (Srivastava et al.
    2014). `key` decides which (on each device others), so that the backward can draw them again."""
    x = as_tensor(x)
    y = dropout_forward(x.data, p, key)
    return record("dropout", y, [x], lambda grad: (dropout_forward(grad, p, key),))


@definition
def cross_entropy(logits: Tensor, targets: Any) -> Tensor:
    """Mean of -log softmax(logits (…, V))[target], in nats, over the targets (…) but those of -100.
    ValueError where the shapes differ, a target is outside the vocabulary, or none counts."""
    labels, count = flat_targets(targets, logits, logits.shape[-1])  # (N,)
    log_probs = log_softmax(logits.reshape(len(labels), -1))  # (N, V)
    is_target = labels[:, None] == np.arange(logits.shape[-1], like=labels)  # (N, V)
    return -where(is_target, log_probs, 0).sum() / count


@definition
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Any) -> Tensor:
    """cross_entropy(x @ weight.T, targets) for x (…, C) and weight (V, C)."""
    return cross_entropy(linear(x, weight.T), targets)


def causal_mask(t: int, s: int, like: Array) -> Array:
    """(t, s) booleans, true where a query may look: at its own place and at all before it."""
    return np.tri(t, s, s - t, dtype=bool, like=like)


def dropout_factors(x: Array, p: float, key: Key) -> Array:
    """What dropout multiplies x by: 0 with probability p, else 1 / (1 - p)."""
    if not 0 <= p < 1:
        raise ValueError(f"the probability must be in [0, 1), not {p}")
    kept = np.random.default_rng(key).random(x.shape, dtype=np.float32) >= p
    return np.asarray(kept / np.float32(1 - p), x.dtype, like=x)


def checked_ids(ids: Any, vocab_size: int, or_ignore: bool = False) -> Array:
    """A copy of the ids, an array; ValueError unless they are integers in 0 … vocab_size-1 (or
    IGNORE). Of ids on a GPU only the type is checked: Python would have to wait to see more."""
    ids = ids.data if isinstance(ids, Tensor) else ids
    ids = ids.copy() if is_plain(ids) else from_list(ids)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers, not {ids.dtype}: a list or array of int")
    if isinstance(ids, np.ndarray):
        outside = (ids < 0) | (ids >= vocab_size)
        wrong = ids[outside & (ids != IGNORE) if or_ignore else outside]
        if wrong.size:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
    return ids


def flat_targets(targets: Any, rows: Tensor, vocab_size: int) -> tuple[Array, Array]:
    """Targets (…) of logits or hidden rows, flat (N,) on their device; how many are not IGNORE."""
    labels = checked_ids(targets, vocab_size, or_ignore=True)
    if labels.shape != rows.shape[:-1]:
        raise ValueError(f"targets of shape {labels.shape} for rows of shape {rows.shape[:-1]}")
    count = (labels != IGNORE).sum(dtype=np.float32)  # a float32, so that a mean is one
    if isinstance(labels, np.ndarray) and count == 0:
        raise ValueError(f"every target is ignored ({IGNORE})")
    return np.asarray(labels.reshape(-1), like=rows.data), count
