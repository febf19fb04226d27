"""What several devices take for the steps that they share: what they send each other, and the time.

Each of N devices, GPUs or machines of their own, has a rank (runs/ranks.py) and a link, by which it
sends and at the same time receives. In a step it

    computes   the gradients of its 1/N of the windows,
    reduces    gets its part of the gradients from all others, and adds them up: (N - 1)/N of all
               gradients go through its link, each way (a reduce-scatter),
    updates    the parameters by AdamW,
    gathers    gets the other parts: (N - 1)/N of all numbers again (an all-gather). These are the
               sums, before the update; or, where moments are sharded and each rank updates its own
               part only, the parameters, after it.

No way of adding up needs less traffic (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002);
sharded moments are stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), with as much. The
time until the first byte arrives is left out, as is what the processor does for a message.

Gradients may travel while the backward of the last micro-batch still runs (Li et al. 2020,
arXiv:2006.15704). The backward of each of L blocks takes b seconds, and then the block's gradients
travel for t seconds, one block's after another's: all have arrived after b + (L - 1) max(b, t) + t.
Those of the embeddings are complete only at the very end, since a model begins with them. Ranks on
several machines and GPUs that have NCCL send during the backward, others after it (runs/mpi.py).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence

from micrograd_gpt.gpt2 import GPT2Config
from micrograd_gpt.runs.checkpoint import saved_step
from micrograd_gpt.runs.plan import Plan, StepTime, duration, megabytes
from micrograd_gpt.runs.ranks import numbers_of_ranks
from micrograd_gpt.support.cli import counted

EFFICIENT = 0.8  # fewer devices are better used than more where these reach less
WIRE = {"float32": 4, "bfloat16": 2}  # bytes of a gradient on its way, by --reduce-dtype

HEADER = (
    *("moments", "gradients travel", "each sends", "its memory", "a step", "all steps"),
    *("efficiency", f"under {EFFICIENT:.0%}"),
)


@dataclasses.dataclass(frozen=True)
class SharedStep:
    """A step that the devices of a plan share, and that takes one device `time`.

    `interconnect` is what each sends, and receives, in GB/s; `wire` are the bytes of a gradient on
    its way. If it `overlaps`, gradients travel while the backward runs.
    """

    plan: Plan
    time: StepTime
    interconnect: float
    wire: int
    overlaps: bool = False

    @property
    def reduced(self) -> float:
        """Bytes that each device sends, and receives, until it has added up its part."""
        return self._elsewhere * self.plan.n_parameters * self.wire

    @property
    def gathered(self) -> float:
        """Bytes that each device sends, and receives, until it has the other parts."""
        return self._elsewhere * self.plan.weights if self.plan.sharded else self.reduced

    @property
    def _elsewhere(self) -> float:
        """Which part of all numbers is added up by other devices."""
        return (self.plan.devices - 1) / self.plan.devices

    @property
    def waiting(self) -> float:
        """Seconds of a step in which a device only sends and receives."""
        link, plan = self.interconnect * 1e9, self.plan
        if not self.overlaps:
            return (self.reduced + self.gathered) / link
        during = self.reduced if plan.sharded else self.reduced + self.gathered
        early = during * (1 - plan.n_in_embeddings / plan.n_parameters)
        return (self.reduced + self.gathered - early) / link + self._after_backward(early / link)

    def _after_backward(self, travel: float) -> float:
        """Seconds that the blocks' gradients, which travel so long in all, still take after it."""
        plan, n_layer = self.plan, self.plan.config.n_layer
        micro_batch = self.time.gradients / (plan.devices * plan.grad_accum_steps)
        backward = micro_batch * plan.backward_of_blocks
        arrived = (backward + (n_layer - 1) * max(backward, travel) + travel) / n_layer
        return arrived - backward

    @property
    def seconds(self) -> float:
        return self.plan.seconds_per_step(self.time) + self.waiting

    @property
    def efficiency(self) -> float:
        """Which part of all devices' time one device would need for the step."""
        return (self.time.gradients + self.time.update) / (self.plan.devices * self.seconds)


def report(config: GPT2Config, settings: argparse.Namespace, device: str) -> str:
    """What --plan prints; UserError where --devices cannot share the step of the settings."""
    s = settings
    plan = Plan.of(config, s, device, s.devices)
    time = plan.step_time(s.rate)
    done = saved_step(s.out) if s.resume else 0
    text = plan.report(s.max_steps, time, done)
    if s.interconnect is None:
        return text
    plans = [Plan.of(config, s, device, n) for n in numbers_of_ranks(s)]
    rows: list[Sequence[str]] = [HEADER]
    left = max(0, s.max_steps - done)
    for sharded in (False, True):
        for overlaps in (False, True):
            steps = {
                p.devices: SharedStep(
                    dataclasses.replace(p, sharded=sharded),
                    *(time, s.interconnect, WIRE[s.reduce_dtype], overlaps),
                )
                for p in plans
            }
            rows.append(row(steps[s.devices], left, where_inefficient(steps.values())))
    link = f"Each device sends, and receives, {s.interconnect:g} GB/s:"
    if s.devices == 1:  # for which the rows are alike, but for what they say of more devices
        speed = f"{s.interconnect:g} GB/s"
        link = f"One device sends nothing. Of several that send, and receive, {speed} each:"
        rows = [(*row[:2], row[-1]) for row in rows]
    return "\n".join([text, "", link, *in_columns(rows)])


def row(step: SharedStep, steps: int, inefficient: str) -> tuple[str, ...]:
    plan = step.plan
    part = "a part" if plan.devices == 1 else f"1/{plan.devices}"
    return (
        f"{part} on each (--shard-optimizer)" if plan.sharded else "all on each",
        "during the backward" if step.overlaps else "after the backward",
        megabytes(step.reduced + step.gathered),
        megabytes(plan.peak),
        f"{step.seconds:.3g} s",
        duration(step.seconds * steps),
        f"{step.efficiency:.0%}",
        inefficient,
    )


def where_inefficient(steps: Iterable[SharedStep]) -> str:
    """From how many devices on the efficiency is too low, in words; `steps` have more and more."""
    for step in steps:
        if step.efficiency < EFFICIENT:
            return f"from {step.plan.devices} devices"
    return f"not up to {counted(step.plan.devices, 'device')}"


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, each column as wide as its longest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
