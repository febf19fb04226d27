"""What a training run will take, before it takes it: parameters, FLOPs, memory, time.

The formulas follow what `functional.py` saves for its backwards, and are held against the memory of
real runs in the tests. N is the tokens of a micro-batch, B × T; the other letters are gpt2.py's.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from micrograd_gpt import optim
from micrograd_gpt.arrays.precision import half_name, wide
from micrograd_gpt.functional import LOGITS_AT_ONCE
from micrograd_gpt.gpt2 import GPT2, GPT2Config

PYTHON = 75_000_000  # bytes: the interpreter, NumPy and the other libraries of a run
TIMED_TOKENS = 2048  # a micro-batch of about this many is timed, and stands for larger ones


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's sizes. Memory is in bytes, on each device; on a CPU half precision saves none."""

    config: GPT2Config
    batch_size: int
    block_size: int
    grad_accum_steps: int = 1
    recompute: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def n_parameters(self) -> int:
        c = self.config
        embeddings = c.vocab_size + (c.n_positions if c.position_embedding == "learned" else 0)
        block = 12 * c.n_embd**2 + 13 * c.n_embd  # qkv 3, proj 1, MLP 4 + 4; biases and LayerNorms
        final_norm = 2 * c.n_embd if c.norm_position == "pre" else 0
        return embeddings * c.n_embd + c.n_layer * block + final_norm

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size * self.grad_accum_steps

    @property
    def flops_per_token(self) -> int:
        """Multiplications and additions in the matrix products of a step.

        2 for each weight in the forward, 4 in the backward; and attention's two products over the
        causal half, of which the backward makes five, two of them again.
        """
        c = self.config
        blocks = 12 * c.n_layer * c.n_embd**2
        attention = c.n_layer * c.n_embd * self.block_size // 2
        again = 2 * blocks + 2 * 2 * attention if self.recompute else 0
        return 6 * (blocks + c.vocab_size * c.n_embd) + 7 * 2 * attention + again

    @property
    def weights(self) -> int:
        return self.n_parameters * self._wide

    @property
    def gradients(self) -> int:
        return self.weights

    @property
    def moments(self) -> int:
        return 2 * self.weights

    @property
    def activations(self) -> int:
        """What the forward saves for the backward."""
        c = self.config
        blocks = c.n_layer * (self._row * self._wide if self.recompute else self._block)
        before_last_norm = self._row * self._wide * (1 + self._keeps_factors(c.embd_pdrop))
        return blocks + before_last_norm + self._row * self._kept

    @property
    def working(self) -> int:
        """What lives for a moment only: the logits, or one block on its way back."""
        c = self.config
        rows = self.batch_size * self.block_size
        parts = -(-rows * c.vocab_size // LOGITS_AT_ONCE)
        logits = max(1, rows // parts) * c.vocab_size
        head = c.vocab_size * c.n_embd
        head_gradient = head * self._wide if parts > 1 else 0  # part by part
        rounded_head = head * self._kept if self._is_half else 0
        loss = logits * self._kept + head_gradient + rounded_head
        return max(loss, self._on_its_way if self.recompute else 0)

    @property
    def peak(self) -> int:
        """The most that is held at once: where the backward begins, or where it ends.

        At its beginning all activations are there, of the gradients only the head's, and all of the
        micro-batch's before. At its end it is the other way round.
        """
        c = self.config
        head = c.vocab_size * c.n_embd * self._wide
        before = self.gradients if self.grad_accum_steps > 1 else 0
        beginning = before + head + self.activations + self.working
        end = self.gradients + self._on_its_way
        host = PYTHON if self.device == "cpu" else 0
        return host + self.weights + self.moments + max(beginning, end)

    @property
    def _is_half(self) -> bool:
        return half_name(self.dtype) is not None

    @property
    def _wide(self) -> int:
        """Bytes of a number that is never in half precision."""
        return np.dtype(wide(self.dtype)).itemsize

    @property
    def _kept(self) -> int:
        """Bytes of a number in the type of the matrix work."""
        return 2 if self._is_half and self.device == "gpu" else self._wide

    def _keeps_factors(self, p: float) -> bool:
        """Whether dropout saves what it multiplied by."""
        return p > 0 and self.device == "cpu"

    @property
    def _row(self) -> int:
        return self.batch_size * self.block_size * self.config.n_embd  # elements of (B, T, C)

    @property
    def _block(self) -> int:
        """Bytes a block saves: of the residual stream its input and its middle; in the type of the
        matrix work two norms' results, q k v, attention's result, the MLP's hidden layer before and
        after GELU, and half-precision weights; and dropout's factors, which a GPU draws again."""
        c = self.config
        stream = 2 + 2 * self._keeps_factors(c.resid_pdrop)
        branches = 2 + 3 + 1 + 4 + 4
        sums = self.batch_size * self.block_size * (c.n_head + 4)  # of attention and LayerNorm
        weights = 12 * c.n_embd**2 if self._is_half else 0
        return (stream * self._row + sums) * self._wide + (
            branches * self._row + weights
        ) * self._kept

    @property
    def _on_its_way(self) -> int:
        """Bytes a block holds while its backward runs: what it saved, and gradients."""
        return self._block + 10 * self._row * self._kept

    def seconds_per_step(self, rate: float | None = None, devices: int = 1) -> float:
        """Time of a step at `rate` TFLOP/s a device; None: as measured here, with smaller models.

        A step of one block and one of two are timed; the difference is what each block takes.
        """
        if rate is not None:
            return self.flops_per_token * self.tokens_per_step / (rate * 1e12 * devices)
        rows = max(1, min(self.batch_size, TIMED_TOKENS // self.block_size))
        one, two = (self._timed_step(n_layer, rows) for n_layer in (1, 2))
        micro_batches = self.grad_accum_steps * self.batch_size / rows
        return (one + (self.config.n_layer - 1) * max(0.0, two - one)) * micro_batches / devices

    def _timed_step(self, n_layer: int, rows: int) -> float:
        config = dataclasses.replace(self.config, n_layer=n_layer)
        model = GPT2(config, dtype=wide(self.dtype), compute=self.dtype)
        model.transformer.recompute = self.recompute
        optimizer = optim.AdamW(model.parameters())
        ids = np.zeros((rows, self.block_size), int)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model.loss(ids, ids).backward()
            optim.clip_grad_norm(optimizer.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
        return min(times)

    def report(self, max_steps: int, rate: float | None = None, devices: int = 1) -> str:
        """The plan as lines to read; `rate` and `devices` as in `seconds_per_step`."""
        c = self.config
        seconds = self.seconds_per_step(rate, devices)
        step_flops = self.flops_per_token * self.tokens_per_step
        reached = step_flops / seconds / devices / 1e12
        source = "measured here on one and two blocks" if rate is None else "given"
        saved = "inputs of blocks" if self.recompute else "all activations"
        lines = {
            "model": f"{self.n_parameters:,} parameters ({c.n_layer} layers, {c.n_head} heads, "
            f"{c.n_embd} wide, vocabulary {c.vocab_size:,})",
            "step": f"{self.tokens_per_step:,} tokens: micro-batches × windows × context = "
            f"{self.grad_accum_steps} × {self.batch_size} × {self.block_size}; "
            f"{self.tokens_per_step * max_steps:,} in {max_steps:,} steps",
            "compute": f"{self.flops_per_token / 1e9:,.3g} GFLOP a token, "
            f"{step_flops / 1e12:,.3g} TFLOP a step",
            "weights": _megabytes(self.weights),
            "gradients": _megabytes(self.gradients),
            "moments": _megabytes(self.moments),
            "activations": f"{_megabytes(self.activations)} ({saved})",
            "logits, work": _megabytes(self.working),
            "peak memory": f"{_megabytes(self.peak)}, without the data (gradients and activations "
            "are never all there at once)",
            "time": f"{seconds:.3g} s a step, {_duration(seconds * max_steps)} in all, at "
            f"{reached:.3g} TFLOP/s {source}, {devices} device{'s' * (devices > 1)}",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    """The time in the largest unit of which it is at least two."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
