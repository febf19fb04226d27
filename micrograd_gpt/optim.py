"""AdamW, gradient clipping, and the learning-rate schedule GPT models are trained with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from micrograd_gpt.backend import Array, array_module
from micrograd_gpt.kernels import accelerated
from micrograd_gpt.tensor import Tensor


@accelerated
def sum_of_squares(arrays: list[Array]) -> Array:
    """The sum of the squares of all elements of all arrays, a scalar."""
    return sum((array * array).sum() for array in arrays)


@accelerated
def adamw_update(
    parameters: list[Array],
    grads: list[Array],
    ms: list[Array],
    vs: list[Array],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decays: list[float],
    step: int,
) -> None:
    """One step of AdamW on all parameters, in place: each p, and the moments m and v of its grad.

    Algorithm 2 of Loshchilov & Hutter 2019 (arXiv:1711.05101), as PyTorch orders it; `step` counts
    from 1 and decay is the weight decay, applied as p -= lr * decay * p.
    """
    for p, grad, m, v, decay in zip(parameters, grads, ms, vs, decays, strict=True):
        m *= beta1
        m += (1 - beta1) * grad
        v *= beta2
        v += (1 - beta2) * grad * grad
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        p *= 1 - lr * decay
        p -= lr * m_hat / (array_module(p).sqrt(v_hat) + eps)


class AdamW:
    """Adam with decoupled weight decay.

    Args:
        parameters: the tensors to train, each updated in place. One whose `.grad` is None is left
            alone by `step()`, its moments too.
        lr: the learning rate; set `optimizer.lr` to change it between steps.
        betas: decay rates of the moments of the gradient.
        weight_decay: applied to tensors of two or more dimensions only, so not to biases and
            LayerNorm's, as GPT-2 and GPT-3 were trained.

    The moments `m` and `v` are lists of arrays in the order of `parameters`, zero at the start.
    Raises ValueError for parameters held in half precision, where most updates round to nothing.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.parameters = list(parameters)
        if half := next((p.half for p in self.parameters if p.half), None):
            raise ValueError(
                f"parameters held in {half} cannot be trained: hold them in float32 and compute in "
                f'{half}, as GPT2(config, dtype="float32", compute="{half}") does'
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.m = [array_module(p.data).zeros_like(p.data) for p in self.parameters]
        self.v = [array_module(p.data).zeros_like(p.data) for p in self.parameters]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.steps += 1
        rows = [
            (p.data, p.grad, m, v, self.weight_decay if p.ndim >= 2 else 0.0)
            for p, m, v in zip(self.parameters, self.m, self.v, strict=True)
            if p.grad is not None
        ]
        if rows:
            parameters, grads, ms, vs, decays = (list(column) for column in zip(*rows, strict=True))
            adamw_update(
                parameters, grads, ms, vs, self.lr, *self.betas, self.eps, decays, self.steps
            )

    def zero_grad(self) -> None:
        """Forget all gradients; the next backward starts them anew."""
        for p in self.parameters:
            p.grad = None


def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale all gradients in place so that their joint Euclidean norm is at most `max_norm`.

    Returns the norm before scaling (Pascanu et al. 2013, arXiv:1211.5063). A norm that is not
    finite is returned as it is, and nothing is scaled.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(float(sum_of_squares(grads))) if grads else 0.0
    if math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            grad *= max_norm / norm
    return norm


def cosine_schedule(
    step: int, max_steps: int, warmup_steps: int, learning_rate: float, min_lr: float
) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then half a cosine down to `min_lr`.

    Loshchilov & Hutter 2017 (arXiv:1608.03983), one period; after `max_steps` it stays at `min_lr`.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
