"""The loss of a language model without all of its logits: for 1,024 tokens of GPT-2, 200 MB.

C channels   V vocabulary   N rows: any leading dimensions, flattened
"""

from __future__ import annotations

from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.memory import LOGITS_AT_ONCE
from micrograd_gpt.arrays.stand_ins import definition, stands_in_for
from micrograd_gpt.functional import check_shapes, cross_entropy_forward, linear_forward
from micrograd_gpt.layers import IGNORE
from micrograd_gpt.tensor import Array, Tensor, is_recorded, record


@definition
def linear_cross_entropy_forward(
    x: Array, weight: Array, labels: Array, with_gradients: bool
) -> tuple[Array | None, Array, Array | None]:
    """Gradient of x (N, C), the summed loss of logits x @ weight.T, and gradient of weight (V, C).

    The gradients are None unless `with_gradients`. Labels (N,) of -100 are ignored.
    """
    dlogits, loss = cross_entropy_forward(linear_forward(x, weight.T, None), labels)  # (N, V)
    if not with_gradients:
        return None, loss, None
    return dlogits @ weight, loss, dlogits.T @ x


@stands_in_for(layers.linear_cross_entropy, "fused", bypasses=(layers.linear, layers.cross_entropy))
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Any) -> Tensor:
    """cross_entropy(x @ weight.T, targets) for x (…, C), weight (V, C), without keeping the logits.

    The forward works through some rows at a time. It computes their logits and losses and, while it
    has them, their gradients, so that at most LOGITS_AT_ONCE logits (or one row's) exist at any
    moment. The backward only scales those gradients.
    """
    fits = x.ndim >= 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
    check_shapes(fits, "linear_cross_entropy", x, weight)
    (vocab_size, channels), w, shape = weight.shape, weight.data, x.shape
    labels, count = layers.flat_targets(targets, x, vocab_size)
    rows = x.data.reshape(len(labels), channels)  # (N, C)
    some, n = None, len(rows)
    if isinstance(count, np.float32) and count < len(labels):  # known without waiting for a GPU
        ids = layers.checked_ids(targets, vocab_size, or_ignore=True)
        some = np.asarray(np.flatnonzero(ids != IGNORE), like=rows)  # the rows that take work
        rows, labels = rows[some], labels[some]
    wanted = is_recorded(x, weight)
    dx: Any = np.empty_like(rows) if wanted else None
    dweight: Any = None
    loss = 0.0
    size = max(1, len(rows) // -(-len(rows) * vocab_size // LOGITS_AT_ONCE[x.device]))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        dpart, total, dw = linear_cross_entropy_forward(rows[part], w, labels[part], wanted)
        loss = loss + total
        if wanted:
            dx[part] = dpart
            if dweight is None:
                dweight = dw
            else:
                dweight += dw

    def backward(grad: Array) -> tuple[Array, Array]:
        factor = grad / count
        every = dx * factor
        if some is not None:
            counted, every = every, np.zeros_like(every, shape=(n, channels))
            every[some] = counted
        return every.reshape(shape), np.multiply(dweight, factor, out=dweight)

    return record("linear_cross_entropy", loss / count, [x, weight], backward)
