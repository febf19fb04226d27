"""AdamW, gradient clipping, loss scaling, and the learning-rate schedule of GPT models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from micrograd_gpt.arrays.backend import Array, array_module, device_of
from micrograd_gpt.kernels import accelerated
from micrograd_gpt.tensor import Tensor


@accelerated
def sum_of_squares(arrays: list[Array]) -> Array:
    """The sum of the squares of all elements of all arrays, a scalar."""
    return sum((array * array).sum() for array in arrays)


@accelerated
def clip_scale(squares: Array, max_norm: float, loss_scale: float) -> tuple[Array, Array]:
    """The norm of gradients, and the factor by which clipping to `max_norm` multiplies them.

    `squares`, their `sum_of_squares`, is of gradients that were multiplied by `loss_scale`; the
    norm is without it, and the factor undoes it. Where the norm is not finite the factor is 1.
    """
    xp = array_module(squares)
    norm = xp.sqrt(squares) / loss_scale
    factor = xp.where(norm > max_norm, max_norm / norm, 1.0) / loss_scale
    return norm, xp.where(xp.isfinite(norm), factor, 1.0).astype(squares.dtype)


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
    gradient_scale: Array | None = None,
) -> None:
    """One step of AdamW on all parameters, in place: each p, and the moments m and v of its grad.

    Algorithm 2 of Loshchilov & Hutter 2019 (arXiv:1711.05101), as PyTorch orders it; `step` counts
    from 1 and decay is the weight decay, applied as p -= lr * decay * p. Gradients are read times
    `gradient_scale`, a scalar array, where there is one.
    """
    for p, grad, m, v, decay in zip(parameters, grads, ms, vs, decays, strict=True):
        grad = grad if gradient_scale is None else grad * gradient_scale
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
        self._gradient_scale: Array | None = None  # by which the next step multiplies gradients
        self.m = [array_module(p.data).zeros_like(p.data) for p in self.parameters]
        self.v = [array_module(p.data).zeros_like(p.data) for p in self.parameters]

    def clip(self, max_norm: float, loss_scale: float = 1.0) -> Any:
        """Let the next `step()` use the gradients as `clip_grad_norm` would make them; their norm.

        On the CPU it makes them so. On a GPU they stay as they are until the step multiplies them
        as it reads them: a pass over them less, and nothing is read back. So let nothing change
        them in between. `zero_grad()`, or another `clip`, undoes it.
        """
        self._gradient_scale = None
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads or device_of(grads[0]) == "cpu":
            return clip_grad_norm(self.parameters, max_norm, loss_scale)
        norm, self._gradient_scale = clip_scale(sum_of_squares(grads), max_norm, loss_scale)
        return norm

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
            settings = (self.lr, *self.betas, self.eps, decays, self.steps)
            scale = () if self._gradient_scale is None else (self._gradient_scale,)
            adamw_update(parameters, grads, ms, vs, *settings, *scale)
        self._gradient_scale = None

    def zero_grad(self) -> None:
        """Forget all gradients; the next backward starts them anew."""
        self._gradient_scale = None
        for p in self.parameters:
            p.grad = None


def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float, loss_scale: float = 1.0) -> Any:
    """Scale all gradients in place so that their joint Euclidean norm is at most `max_norm`.

    Gradients of a loss that was multiplied by `loss_scale` are divided by it first. Returns the
    norm before clipping (Pascanu et al. 2013, arXiv:1211.5063): a float, or on a GPU a scalar array
    that is not read yet, since reading it would wait for the GPU. A norm that is not finite is
    returned as it is, and nothing is scaled.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return 0.0
    if device_of(grads[0]) == "gpu":
        return _clip_on_gpu(grads, max_norm, loss_scale)
    norm = math.sqrt(float(sum_of_squares(grads))) / loss_scale
    if math.isfinite(norm):
        factor = (max_norm / norm if norm > max_norm else 1.0) / loss_scale
        for grad in grads if factor != 1 else ():
            grad *= factor
    return norm


def _clip_on_gpu(grads: list[Array], max_norm: float, loss_scale: float) -> Array:
    # The same, without asking the GPU for the norm: it takes the decisions itself.
    norm, factor = clip_scale(sum_of_squares(grads), max_norm, loss_scale)
    for grad in grads:
        grad *= factor
    return norm


@dataclasses.dataclass
class LossScaler:
    """The factor that keeps the gradients of a float16 model within float16's range.

    The loss is multiplied by `scale` before its backward, so that gradients that would round to
    zero do not, and the parameters' gradients are divided by it (`AdamW.clip` does). Where they
    are not finite the scale was too large: the step must not be taken, and half the scale is tried.
    After `growth_interval` steps in a row that were taken it is doubled. Micikevicius et al. 2018
    (arXiv:1710.03740), section 3.2; the defaults are those of PyTorch's GradScaler. Where it is not
    `enabled`, the scale is 1 and every step may be taken.
    """

    scale: float = 65536.0
    growth_interval: int = 2000
    good_steps: int = 0  # taken since the scale last changed
    skipped_steps: int = 0  # tries that came to nothing, in all
    enabled: bool = True

    def __post_init__(self) -> None:
        self.scale = self.scale if self.enabled else 1.0

    def update(self, grad_norm: float) -> bool:
        """Whether the step with this gradient norm may be taken; adapts the scale either way.

        Raises FloatingPointError where the scale would fall below 1: another cause is at work then.
        """
        if not self.enabled:
            return True
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = self.scale * 2, 0
            return True
        if self.scale / 2 < 1:
            raise FloatingPointError(
                f"the gradients overflow float16 even at a loss scale of {self.scale:g}"
            )
        self.scale, self.good_steps = self.scale / 2, 0
        self.skipped_steps += 1
        return False


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
