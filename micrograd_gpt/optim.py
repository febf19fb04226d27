"""AdamW, gradient clipping, and the learning-rate schedule of GPT models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from micrograd_gpt.arrays.stand_ins import definition
from micrograd_gpt.tensor import Tensor


@definition
def adamw_update(rows: list, lr: float, beta1: float, beta2: float, eps: float, step: int) -> None:
    """One step (counted from 1) of AdamW, in place; a row is p, grad, its moments m and v, decay.
    Algorithm 2 of Loshchilov & Hutter 2019 (arXiv:1711.05101), as PyTorch orders it."""
    for p, grad, m, v, decay in rows:
        m *= beta1
        m += (1 - beta1) * grad
        v *= beta2
        v += (1 - beta2) * grad * grad
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        p *= 1 - lr * decay
        p -= lr * m_hat / (np.sqrt(v_hat) + eps)


class AdamW:
    """Adam with decoupled weight decay, in place; a tensor whose `.grad` is None is left alone.
    `lr` may change between steps. `weight_decay` is for matrices, not for biases and LayerNorm, as
    GPT-2 and GPT-3 were trained. TypeError and ValueError: see checks.py."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        from micrograd_gpt.checks import check_numbers, check_trainable

        self.parameters = check_trainable(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        check_numbers(self)
        self.steps = 0  # in all; and how many of them each parameter had no gradient in:
        self.missed = [0] * len(self.parameters)
        self.m = [np.zeros_like(p.data) for p in self.parameters]
        self.v = [np.zeros_like(p.data) for p in self.parameters]

    def step(self) -> None:
        """Update all that have a gradient; ValueError, before any is changed, if one cannot be."""
        from micrograd_gpt.checks import check_numbers, check_update

        lr, beta1, beta2, eps, weight_decay = check_numbers(self)
        rows: dict[int, list[Any]] = {}  # by how many steps a parameter missed, which is mostly 0
        for i, (p, m, v) in enumerate(zip(self.parameters, self.m, self.v, strict=True)):
            if p.grad is not None:
                check_update(i, p, m, v)
                decay = weight_decay if p.ndim >= 2 else 0.0
                rows.setdefault(self.missed[i], []).append((p.data, p.grad, m, v, decay))
                p.data = p.data  # tells the tape that it changes
        self.missed = [self.missed[i] + (p.grad is None) for i, p in enumerate(self.parameters)]
        self.steps += 1
        for missed, group in rows.items():
            adamw_update(group, lr, beta1, beta2, eps, self.steps - missed)

    def zero_grad(self) -> None:
        """Forget all gradients; the next backward starts them anew."""
        for p in self.parameters:
            p.grad = None


@definition
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, loss_scale: float = 1.0) -> Any:
    """Divide all gradients by `loss_scale`, the factor of the loss, then scale them, in place, so
    that their joint Euclidean norm is at most `max_norm` (Pascanu et al. 2013, arXiv:1211.5063).
    Returns the norm before, a float, on a GPU an array; where it is not finite, nothing changes."""
    from micrograd_gpt.checks import check_clipping

    grads: list[Any] = [p.grad for p in check_clipping(parameters, max_norm) if p.grad is not None]
    norm = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in grads)) / loss_scale
    factor = np.minimum(float(max_norm) / np.maximum(norm, 1e-30), 1.0) / loss_scale
    for grad in grads:
        grad *= np.where(np.isfinite(norm), factor, 1.0).astype(grad.dtype)
    return float(norm) if isinstance(norm, np.generic) else norm


def cosine_schedule(
    step: int, max_steps: int, warmup_steps: int, learning_rate: float, min_lr: float
) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then half a cosine down to `min_lr`, where
    it stays (Loshchilov & Hutter 2017, arXiv:1608.03983, one period)."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)  # never 0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
