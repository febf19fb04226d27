"""Where the time of a training step goes.

    python benchmarks/profile_step.py                              # GPT-2 124M, 2 × 512 tokens
    python benchmarks/profile_step.py --size tiny --batch 12 --context 64
    python benchmarks/profile_step.py --dtype bfloat16 --processor-time   # beside other programs

Times every kernel of the package's own training step from outside, forward and backward, and
divides the work it does by that time: floating-point operations where it multiplies matrices, else
the bytes that have to be read and written at least once. Conversions, to half precision and back,
are those between the kernels.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from micrograd_gpt import functional as F
from micrograd_gpt import optim, tensor
from micrograd_gpt.arrays import precision
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.kernels import linear_cross_entropy as loss
from micrograd_gpt.text.windows import Windows
from micrograd_gpt.weights.config import SIZES

SHAPES = {**SIZES, "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 65}}


def attention_flops(products: int, q: np.ndarray) -> float:
    """The operations of `products` causal T × T × D matrix products in every head."""
    b, h, t, d = q.shape
    return products * 2 * b * h * t * t * d / 2


# (module or class, function): the work of a call, in floating-point operations (flops) or bytes
WORK: dict[tuple[Any, str], tuple[str, Callable[..., float]]] = {
    (F, "linear_forward"): ("flops", lambda x, w, b: 2 * len(x) * w.size),
    (F, "linear_backward"): ("flops", lambda g, x, w: 4 * len(x) * w.size),
    (loss, "linear_cross_entropy_forward"): ("flops", lambda x, w, *_: 6 * len(x) * w.size),
    (F, "attention_forward"): ("flops", lambda q, *_: attention_flops(2, q)),
    (F, "attention_backward"): ("flops", lambda g, q, *_: attention_flops(5, q)),
    (F, "layer_norm_forward"): ("bytes", lambda x, *_: 2 * x.nbytes),
    (F, "layer_norm_backward"): ("bytes", lambda g, x, *_: 3 * x.nbytes),
    (F, "gelu_forward"): ("bytes", lambda x: 2 * x.nbytes),
    (F, "gelu_backward"): ("bytes", lambda g, x: 3 * x.nbytes),
    (tensor, "add_at"): ("bytes", lambda total, index, part: 3 * part.nbytes),
    (optim, "clip_grad_norm"): ("bytes", lambda p, *_: sum(x.grad.nbytes for x in p)),
    (optim, "adamw_update"): ("bytes", lambda rows, *_: 7 * sum(row[0].nbytes for row in rows)),
}
CONVERSIONS = "conversions"
CHANGE_IN_PLACE = ("add_at", "adamw_update")  # and return nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="124M")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--processor-time", action="store_true", help="of all threads together")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter

    seconds: dict[str, list[float]] = defaultdict(list)
    work: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    now = {"step": 0}

    def timed(name: str, function: Callable[..., Any], amount: Callable[..., float]) -> Any:
        """`function`, timed but for a call that it leaves to another: that raises NotForMe."""

        def call(*inputs: Any) -> Any:
            start = clock()
            result = function(*inputs)
            if result is not None or name in CHANGE_IN_PLACE:
                seconds[name][now["step"]] += clock() - start
                work[name] += amount(*inputs)
                calls[name] += 1
            return result

        seconds[name] = [0.0] * (args.steps + 1)
        return call

    # The stand-ins are timed: a definition that was wrapped would count as edited, and run itself
    for (module, name), (_, amount) in WORK.items():
        stand_ins = getattr(module, name).stand_ins
        for level, stand_in in stand_ins.items():
            stand_ins[level] = timed(name, stand_in, amount)
        getattr(module, name).choices.cache_clear()
    precision._CONVERSIONS[:] = [
        timed(CONVERSIONS, conversion, lambda array, dtype: array.size * 6)
        for conversion in precision._CONVERSIONS
    ]

    model = GPT2(GPT2Config(**SHAPES[args.size]))
    optimizer = optim.AdamW(model.parameters())
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 10**6)
    windows = Windows(tokens.astype(np.uint16), args.context)
    phases: dict[str, list[float]] = defaultdict(list)
    for step in range(args.steps + 1):  # the first one fetches memory, and is not counted
        now["step"] = step
        times = [clock()]
        ids, targets = windows.batch(0, step, args.batch)
        with precision.compute_in(args.dtype):
            batch_loss = model.loss(ids, targets)
            times.append(clock())
            batch_loss.backward()
        times.append(clock())
        optim.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
        for phase, a, b in zip(("forward", "backward", "update"), times, times[1:], strict=False):
            phases[phase].append(b - a)

    def median(values: list[float]) -> float:
        return float(np.median(values[1:]))

    total = sum(median(times) for times in phases.values())
    per_step = args.batch * args.context
    print(
        f"{args.size}, {args.batch} × {args.context} tokens: {total * 1e3:.1f} ms a step, "
        f"{per_step / total:,.0f} tokens/s, median of {args.steps}\n"
    )
    print("| operation | calls | ms | % of step | rate |\n| --- | ---: | ---: | ---: | ---: |")
    units = {name: unit for (_, name), (unit, _) in WORK.items()} | {CONVERSIONS: "bytes"}
    for name, unit in sorted(units.items(), key=lambda u: -median(seconds[u[0]])):
        spent = median(seconds[name])
        rate = work[name] / (args.steps + 1) / max(spent, 1e-12) / 1e9
        shown = f"{rate:.0f} GFLOP/s" if unit == "flops" else f"{rate:.0f} GB/s"
        row = (name, calls[name] // (args.steps + 1), f"{spent * 1e3:.1f}", f"{spent / total:.1%}")
        print("| " + " | ".join(map(str, (*row, shown))) + " |")
    rest = total - sum(median(times) for times in seconds.values())
    print(f"| everything else | | {rest * 1e3:.1f} | {rest / total:.1%} | |")
    parts = ", ".join(f"{name} {median(times) * 1e3:.1f} ms" for name, times in phases.items())
    print(f"\n{parts}")


if __name__ == "__main__":
    main()
