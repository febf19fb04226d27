"""What a training run will take, before it takes it: parameters, FLOPs, memory, time.

The formulas follow what `functional.py` saves for its backwards; the tests hold them against the
memory and the matrix products of real runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from time import perf_counter
from typing import NamedTuple

import numpy as np

from micrograd_gpt import optim
from micrograd_gpt.arrays.devices import library_for, move, to_device
from micrograd_gpt.arrays.memory import LOGITS_AT_ONCE, ROWS_AT_ONCE, check_room, memory_errors
from micrograd_gpt.arrays.precision import HALF, compute_in, hold_in
from micrograd_gpt.gpt2 import GPT2Config
from micrograd_gpt.runs.ranks import divided
from micrograd_gpt.runs.recompute import recompute_blocks
from micrograd_gpt.support.cli import counted
from micrograd_gpt.support.machine import available_memory
from micrograd_gpt.variants import inner_width
from micrograd_gpt.weights.config import model_class
from micrograd_gpt.weights.pretrained import unwritten

PYTHON = 75_000_000  # bytes: the interpreter, NumPy and the other libraries of a run
MPI = 30_000_000  # bytes that a rank takes beside it: MPI, and buffers for what it sends
MOST_LAID_OUT = 1000  # blocks that are made only to be counted, in under half a second
TIMED_TOKENS = 2048  # so long a context stands for longer ones, and on a CPU so large a micro-batch

# What helps where a run does not fit into memory
SMALLER_MODEL = "choose a smaller --size, --n-layer or --n-embd"
SMALLER_STEP = (
    "lower --batch-size (and raise --grad-accum-steps, which keeps the step), or add --recompute"
)
# What helps where it cannot even be timed here
GIVE_RATE = "give the TFLOP/s of a device with --rate"


class StepTime(NamedTuple):
    """Seconds that one device would take for all of a step, and where they are from."""

    gradients: float  # forward and backward
    update: float  # clipping and AdamW
    source: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a run. Parameters are the model's own, also where its code has been edited; all
    else is reckoned as GPT-2's.

    A step is shared by `devices`, one rank each, which need not wait for each other's cores: GPUs,
    or machines. Each takes `grad_accum_steps` micro-batches of it. Memory is in bytes, on each
    device; AdamW's moments are `sharded` where each holds those of its part of the parameters.
    `n_trained` is how many parameters learn (None: all), and of the first `n_frozen` blocks, below
    all that learns, there is no backward. A model that `classifies` gives a text few logits, which
    are not counted, in place of each token's; at the end the best of it is loaded beside the last.
    LoRA keeps `n_dropped` more numbers of each token in a block, its inputs after dropout.
    """

    config: GPT2Config
    batch_size: int
    block_size: int
    grad_accum_steps: int = 1
    recompute: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    n_trained: int | None = None
    n_frozen: int = 0
    classifies: bool = False
    n_dropped: int = 0
    devices: int = 1
    sharded: bool = False

    @classmethod
    def of(
        cls, config: GPT2Config, settings: argparse.Namespace, device: str, devices: int = 1
    ) -> Plan:
        """The plan of a run of train_gpt2.py, whose settings have another dropout than `config`.

        UserError where so many devices cannot share a step.
        """
        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout)
        shared = divided(settings, devices)
        return cls(
            dataclasses.replace(config, **dropout),
            shared.batch_size,
            shared.block_size,
            shared.grad_accum_steps // devices,
            shared.recompute,
            shared.dtype,
            device,
            devices=devices,
            sharded=shared.shard_optimizer,
        )

    @functools.cached_property
    def n_parameters(self) -> int:
        """Counted in a model without memory; GPT-2's where not even that can be made."""
        if self.config.n_layer > MOST_LAID_OUT:
            return self.n_in_gpt2
        try:
            return sum(parameter.size for parameter in unwritten(self.config).parameters())
        except MemoryError:
            return self.n_in_gpt2

    @property
    def n_in_gpt2(self) -> int:
        """The parameters of a GPT-2 of this shape."""
        c = self.config
        head = 0 if getattr(c, "tie_word_embeddings", True) else c.vocab_size * c.n_embd
        biases = 9 * c.n_embd + inner_width(c)  # qkv 3, proj 1, MLP; LayerNorms 2 + 2
        blocks = c.n_layer * (self._matrices_of_block + biases)
        return self.n_in_embeddings + blocks + 2 * c.n_embd + head  # and the last LayerNorm

    @property
    def n_in_embeddings(self) -> int:
        return (self.config.vocab_size + self.config.n_positions) * self.config.n_embd

    @property
    def tokens_per_step(self) -> int:
        """Of all devices."""
        return self.batch_size * self.block_size * self.grad_accum_steps * self.devices

    @property
    def flops_per_token(self) -> int:
        """Multiplications and additions in the matrix products of a step, for each of its tokens.

        Each weight takes 2 in the forward and 4 in the backward. Attention makes two products over
        the causal half in the forward, and five in the backward, which computes the weights again.
        """
        matrices, product, head = self._forward_flops
        forward = matrices + 2 * product
        backward = 2 * matrices + 5 * product + (forward if self.recompute else 0)
        return forward + backward * self._n_learning // self.config.n_layer + 3 * head

    @property
    def backward_of_blocks(self) -> float:
        """The part of all this work that is done in the backward of the blocks."""
        matrices, product, head = self._forward_flops
        return 1 - (matrices + 2 * product + 3 * head) / self.flops_per_token

    @property
    def _forward_flops(self) -> tuple[int, int, int]:
        """For each token, all blocks' matrices, one of attention's products in each, the head."""
        c = self.config
        matrices = 2 * c.n_layer * self._matrices_of_block
        return matrices, c.n_layer * c.n_embd * self.block_size, 2 * self._n_logits * c.n_embd

    @property
    def weights(self) -> int:
        return self.n_parameters * self._wide

    @property
    def gradients(self) -> int:
        n_trained = self.n_parameters if self.n_trained is None else self.n_trained
        return n_trained * self._wide

    @property
    def moments(self) -> int:
        return -(-2 * self.gradients // (self.devices if self.sharded else 1))

    @property
    def activations(self) -> int:
        """What the forward saves for the backward."""
        per_block = self._stream * self._wide if self.recompute else self._saved_by_block
        before_last_norm = self._stream * self._wide
        return self._n_learning * per_block + before_last_norm + self._stream * self._narrow

    @property
    def working(self) -> int:
        """What lives for a moment only: the logits, or a block's gradients.

        A block that is computed again also saves what its backward needs.
        """
        c = self.config
        tokens = self.batch_size * self.block_size
        parts = max(1, -(-tokens * self._n_logits // LOGITS_AT_ONCE[self.device]))
        at_once = max(1, tokens // parts)
        logits = (min(at_once, ROWS_AT_ONCE) if self.device == "cpu" else at_once) * self._n_logits
        logits *= self._wide if self.device == "cpu" else self._narrow
        head = self._n_logits * c.n_embd
        head_gradient = head * self._wide if parts > 1 else 0  # of one part, beside their sum
        rounded_head = head * self._narrow if self._keeps_rounded or self._is_emulated else 0
        widened_head = head * self._wide if self._is_emulated else 0
        saved = self._saved_by_block if self.recompute and self._n_learning else 0
        loss = logits + head_gradient + rounded_head + widened_head
        return max(loss, saved + self._gradients_in_block)

    @property
    def peak(self) -> int:
        """The most that is held at once: at the beginning of the backward, or at its end.

        At the beginning all activations are there, but only the head's gradient (or all gradients,
        if an earlier micro-batch left them). At the end all gradients are there, but only one
        block's activations.
        """
        head = self._n_logits * self.config.n_embd * self._wide
        before = self.gradients if self.grad_accum_steps > 1 else 0
        beginning = before + head + self.activations + self.working
        saved = self._saved_by_block if self._n_learning else 0
        end = self.gradients + saved + self._gradients_in_block
        best = (self.weights if self.classifies else 0) + self._gradients_in_block
        host = PYTHON + MPI * (self.devices > 1) if self.device == "cpu" else 0
        return host + self.weights + self.moments + max(beginning, end, best)

    @property
    def _n_learning(self) -> int:
        """Of how many blocks there is a backward."""
        return self.config.n_layer - self.n_frozen

    @property
    def _n_logits(self) -> int:
        """Of each token."""
        return 0 if self.classifies else self.config.vocab_size

    @property
    def _is_half(self) -> bool:
        return self.dtype in HALF

    @property
    def _keeps_rounded(self) -> bool:
        """Whether weights are rounded to half precision once, and not wherever they are read."""
        return self._is_half and self.device != "cpu"

    @property
    def _is_emulated(self) -> bool:
        """Whether half precision is computed in copies in float32."""
        return self.dtype == "float16" and self.device == "cpu"

    @property
    def _wide(self) -> int:
        """Bytes of a number that is never in half precision."""
        return np.dtype("float32" if self._is_half else self.dtype).itemsize

    @property
    def _narrow(self) -> int:
        """Bytes of a number in the type of the matrix work."""
        return 2 if self._is_half else self._wide

    @property
    def _stream(self) -> int:
        """Numbers in the residual stream of a micro-batch, (B, T, C)."""
        return self.batch_size * self.block_size * self.config.n_embd

    @property
    def _hidden(self) -> int:
        """Numbers in the hidden layer of an MLP for a micro-batch."""
        return self.batch_size * self.block_size * inner_width(self.config)

    @property
    def _matrices_of_block(self) -> int:
        """Numbers in the matrices of a block: qkv 3 and proj 1 times C², and the MLP's two."""
        c = self.config
        return 4 * c.n_embd**2 + 2 * inner_width(c) * c.n_embd

    @property
    def _saved_by_block(self) -> int:
        """Bytes that the forward of a block saves."""
        c = self.config
        streams = 2  # the block's input and its middle
        sums = self.batch_size * self.block_size * (c.n_head + 4)  # of attention and LayerNorm
        # In the type of the matrix work: the results of two norms, q k v, attention's result, the
        # MLP's hidden layer before and after GELU; and weights that are rounded.
        branches = (2 + 3 + 1) * self._stream + 2 * self._hidden
        branches += self.batch_size * self.block_size * self.n_dropped
        weights = self._matrices_of_block if self._keeps_rounded else 0
        wide = streams * self._stream + sums
        return wide * self._wide + (branches + weights) * self._narrow

    @property
    def _gradients_in_block(self) -> int:
        """Bytes that a block's backward holds beside what its forward saved."""
        copies = 3 * self._hidden * self._wide if self._is_emulated else 0  # in GELU's backward
        return (2 * self._stream + 2 * self._hidden) * self._narrow + copies

    def check_room(self, smaller: str = SMALLER_MODEL, ranks: int = 1) -> None:
        """UserError if a run on the CPU takes more memory than there is, before it takes it.

        `smaller` is what helps where not even the model fits. `ranks` is how many such processes
        will share the machine's memory.
        """
        if self.device != "cpu":  # a GPU's memory is never given out twice: it says when it is full
            return
        model = f"{self.n_parameters:,} parameters with their gradients and moments"
        for_all = f" on each of {ranks} ranks" if ranks > 1 else ""
        size = self.weights + self.gradients + self.moments
        check_room(ranks * size, model + for_all, smaller)
        tokens = f"{self.batch_size:,} × {self.block_size:,} tokens"
        batch = f"{self.n_parameters:,} parameters and micro-batches of {tokens}"
        check_room(ranks * (self.peak - PYTHON), batch + for_all, SMALLER_STEP)

    def step_time(self, rate: float | None = None) -> StepTime:
        """The time of a step on a device that reaches `rate` TFLOP/s; None: as measured here.

        A given rate is that of the whole step. Else a step of a model of one block is timed, and of
        one with two: the difference is what each further block takes. A context of more than
        `TIMED_TOKENS` takes as much longer as it has more FLOPs, and frozen blocks as much less as
        they have fewer. UserError where these models do not fit into memory.
        """
        if rate is not None:
            seconds = self.flops_per_token * self.tokens_per_step / (rate * 1e12)
            return StepTime(seconds, 0.0, "given")
        rows, length = self.batch_size, min(self.block_size, TIMED_TOKENS)
        timed = dataclasses.replace(self, block_size=length, n_frozen=0)
        if self.device == "cpu":  # a GPU needs all rows to be busy
            rows = max(1, min(rows, TIMED_TOKENS // length))
            timed._check_room_for_timing(rows)
        with memory_errors(GIVE_RATE):
            one, two = (timed._timed_step(n_layer, rows) for n_layer in (1, 2))
        gradients, update = one + (self.config.n_layer - 1) * np.maximum(0.0, two - one)
        gradients *= self.tokens_per_step / (rows * length)
        gradients *= self.flops_per_token / timed.flops_per_token
        update *= self.gradients / self.weights
        source = "measured here on one and two blocks"
        source += f" of {length:,} tokens" if length < self.block_size else ""
        return StepTime(float(gradients), float(update), source)

    def seconds_per_step(self, time: StepTime) -> float:
        """Seconds that all devices together compute for a step, which `time` is of one."""
        updates = self.devices if self.sharded else 1  # that are made at the same time
        return time.gradients / self.devices + time.update / updates

    def _check_room_for_timing(self, rows: int) -> None:
        two_blocks = dataclasses.replace(self.config, n_layer=2)
        timed = dataclasses.replace(
            self, config=two_blocks, batch_size=rows, n_trained=None, sharded=False
        )
        check_room(timed.peak - PYTHON, "two blocks of this model, to be timed", GIVE_RATE)

    def _timed_step(self, n_layer: int, rows: int) -> np.ndarray:
        """Seconds of the gradients of a micro-batch, and of the update, (2,)."""
        config = dataclasses.replace(self.config, n_layer=n_layer)
        model = model_class(config)(config)
        move(model, self.device)
        hold_in(model, "float32" if self._is_half else self.dtype)
        if self.recompute:
            recompute_blocks(model)
        optimizer = optim.AdamW(model.parameters())
        ids = np.zeros((rows, self.block_size), int)
        times = []
        for _ in range(3):
            start = perf_counter()
            with compute_in(self.dtype):
                loss = model.hidden(ids).sum() if self.classifies else model.loss(ids, ids)
                loss.backward()
            to_device(optimizer.parameters[0].grad, "cpu")  # a GPU has then done all of it
            middle = perf_counter()
            optim.clip_grad_norm(optimizer.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            to_device(optimizer.parameters[-1].data, "cpu")
            times.append((middle - start, perf_counter() - middle))
        return np.min(times, axis=0)

    def verdict(self) -> str:
        """Whether the run fits into the memory that is free now, in words."""
        if self.device == "cpu":
            free, place = available_memory(), "this machine"
        else:
            free, place = library_for(self.device).cuda.runtime.memGetInfo()[0], "the GPU"
        if free is None:
            return f"unknown: {place} does not say how much memory is free"
        found = f"{megabytes(free)} are free on {place}"
        if self.peak <= free:
            return f"yes: {found}"
        if self.weights + self.gradients + self.moments > free:  # whatever the batch
            return f"no: {found}; choose a smaller model"
        return f"no: {found}; lower --batch-size or --block-size, or add --recompute"

    def caveat(self) -> dict[str, str]:
        """A line of the report, where the model is not GPT-2's own."""
        if self.n_parameters == self.n_in_gpt2:
            return {}
        gpt2 = f"a GPT-2 of this shape has {self.n_in_gpt2:,}"
        return {"note": f"{gpt2}, and compute, activations and work are reckoned for that"}

    def report(self, max_steps: int, time: StepTime | None = None, done: int = 0) -> str:
        """The plan as lines to read; a step takes one device `time` (None: as measured here), and
        `done` of the steps have been taken."""
        c, learn, n = self.config, self.n_trained, self.devices
        time = time or self.step_time()
        seconds = self.seconds_per_step(time)
        step_flops = self.flops_per_token * self.tokens_per_step
        reached = step_flops / seconds / n / 1e12
        blocks = f"{self._n_learning} of {c.n_layer} blocks" if self.n_frozen else "all blocks"
        steps, left = max(0, max_steps - done), f"left after step {done:,}" if done else "in all"
        saved = f"the inputs of {blocks} only" if self.recompute else f"of {blocks}"
        lines = {
            "model": f"{self.n_parameters:,} parameters ({counted(c.n_layer, 'layer')}, "
            f"{counted(c.n_head, 'head')}, {c.n_embd} wide, vocabulary {c.vocab_size:,})"
            + (f"; {learn:,} of them learn" if learn and learn < self.n_parameters else ""),
            **self.caveat(),
            "step": f"{self.tokens_per_step:,} tokens: micro-batches × windows × context = "
            f"{self.grad_accum_steps * n} × {self.batch_size} × {self.block_size}; "
            f"{self.tokens_per_step * steps:,} in {steps:,} steps" + f" {left}" * (done > 0),
            "compute": f"{self.flops_per_token / 1e9:,.3g} GFLOP a token, "
            f"{step_flops / 1e12:,.3g} TFLOP a step",
            "weights": megabytes(self.weights),
            "gradients": megabytes(self.gradients),
            "moments": megabytes(self.moments),
            "activations": f"{megabytes(self.activations)} ({saved})",
            "logits, work": megabytes(self.working),
            "peak memory": f"{megabytes(self.peak)}{' on each device' * (n > 1)}, without the data "
            "(gradients and activations are never all there at once)",
            "fits": self.verdict(),
            "time": f"{seconds:.3g} s a step, {duration(seconds * steps)} {left}, at "
            f"{reached:.3g} TFLOP/s {time.source}, {counted(n, 'device')}"
            + " of their own, without what they send each other"
            * (n > 1),
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """The time in the largest unit of which there are at least two."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def smaller_step(settings: argparse.Namespace) -> str:
    """What helps where a step does not fit into memory."""
    tokens = f"{settings.batch_size} × {settings.block_size} tokens"
    return f"a micro-batch has {tokens}; {SMALLER_STEP}"


def smaller_model(settings: argparse.Namespace) -> str:
    """What helps where the model itself does not, with AdamW's two moments of each parameter."""
    if settings.init_from != "scratch":
        return f"the model {settings.init_from} is too large to train here; give a smaller one"
    return f"the model itself does not fit; {SMALLER_MODEL}"
