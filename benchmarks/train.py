"""Training speed and memory beside PyTorch's, on this machine, in one run.

    python benchmarks/train.py                          # 124M at 2 × 512 and 1 × 1024, and tiny
    python benchmarks/train.py --work tiny --rounds 5
    python benchmarks/train.py --processor-time         # on a machine that others use: one core
    python benchmarks/train.py --growth growth.png      # tokens/s by context and size

A step is the one that users run: forward, backward, clipping, AdamW. "limit" is how many tokens/s
the measured rate of NumPy's matrix product, in float32, would allow if nothing else took time. Rows
in bfloat16 (ours with `--dtype bfloat16`, PyTorch's under autocast) are compared with each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from common import (
    AVX2,
    IN_NUMPY,
    child,
    hold_to_one_core,
    in_turns,
    installed,
    machine_limits,
    median,
    peak_megabytes,
    print_table,
    processor,
    seconds,
)

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support import cli
from micrograd_gpt.weights.config import SIZES

BFLOAT16 = "ours, bfloat16"

SHAPES = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 65, "n_positions": 64},
    **{name: {**shape, "vocab_size": 50257, "n_positions": 1024} for name, shape in SIZES.items()},
}
# name: (size, batch, context, steps measured in each child)
WORK = {
    "124M, 2 × 512": ("124M", 2, 512, 3),
    "124M, 1 × 1024": ("124M", 1, 1024, 3),
    "tiny, 12 × 64": ("tiny", 12, 64, 100),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=["124M", "tiny", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="WORD", default="", help="only sides with this in a name")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-avx2", action="store_true", help="leave the AVX2 rows out")
    parser.add_argument("--only-avx2", action="store_true", help="leave the other rows out")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="on one core, count the seconds that it works and not those it waits for (Linux)",
    )
    parser.add_argument("--growth", metavar="PNG", help="measure how cost grows instead, and plot")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(json.loads(args.child))))
        return 0
    print(f"{processor()}; Python {sys.version.split()[0]}, NumPy {np.__version__}")
    if args.growth:
        plot_growth(args.growth)
        return 0
    if args.processor_time:
        hold_to_one_core()
    sides = ["ours", BFLOAT16, "ours, in NumPy alone"]
    if installed("torch"):
        sides += ["PyTorch eager", "PyTorch eager, fused AdamW"]
        sides += ["PyTorch eager, fused AdamW, bfloat16"]
        if not args.no_compile:
            sides += ["PyTorch compiled, fused AdamW", "PyTorch compiled, fused AdamW, bfloat16"]
    sides = [side for side in sides if args.only in side]
    for pins, title in (({}, "all the processor has"), (AVX2, "held to AVX2, both sides")):
        if args.no_avx2 if pins else args.only_avx2:
            continue
        limits = child({"side": "limits"}, pins)
        print(
            f"\n**{title}** (NumPy's BLAS: {limits['blas']}, {limits['threads']} threads; our "
            f"kernels: {limits['kernels']}): matrix product {limits['gflops']:.0f} GFLOP/s, "
            f"matrix-vector {limits['bandwidth']:.0f} GB/s\n"
        )
        rows = []
        for name, (size, batch, context, steps) in WORK.items():
            if args.work not in ("all", size):
                continue
            shape = {"size": size, "batch": batch, "context": context, "steps": steps}
            shape["processor_time"] = args.processor_time
            tasks = {
                side: {"side": side, **shape, "env": IN_NUMPY if "NumPy" in side else {}}
                for side in sides
            }
            rows += table_rows(name, in_turns(tasks, args.rounds, pins), limits, shape)
        print_table(["work", "side", "tokens/s", "% of limit", "peak MB", "ours is"], rows)
    return 0


def table_rows(
    name: str, results: dict[str, list[dict[str, Any]]], limits: dict[str, Any], shape: dict
) -> list[list[str]]:
    """One row a side: the median, over the rounds, of the median step of each."""
    speed = {side: median(r["tokens_per_second"] for r in runs) for side, runs in results.items()}
    limit = limits["gflops"] * 1e9 / flops_per_token(shape["size"], shape["context"])
    ours = {side: BFLOAT16 if "bfloat16" in side else "ours" for side in speed}
    return [
        [
            name,
            side,
            f"{speed[side]:,.0f}",
            f"{speed[side] / limit:.0%}",
            f"{median(r['peak_megabytes'] for r in runs):,.0f}",
            ""
            if side == ours[side] or ours[side] not in speed
            else f"**{speed[ours[side]] / speed[side]:.2f} ×**",
        ]
        for side, runs in results.items()
    ]


def flops_per_token(size: str, context: int) -> float:
    """Multiplications and additions in the matrix products of a training step, per token.

    Each weight takes 2 in the forward and 4 in the backward. Attention's products, over the causal
    half, are 2 in the forward and 5 in the backward, of which one recomputes the scores.
    """
    s = SHAPES[size]
    weights = 12 * s["n_layer"] * s["n_embd"] ** 2 + s["vocab_size"] * s["n_embd"]
    attention = s["n_layer"] * s["n_embd"] * context / 2
    return 6 * weights + 7 * 2 * attention


# ------------------------------------------------------------------------------ in the children


def measure(task: dict[str, Any]) -> dict[str, Any]:
    if task["side"] == "limits":
        return machine_limits()
    config = SHAPES[task["size"]]
    ids = np.random.default_rng(0).integers(
        0, config["vocab_size"], (task["batch"], task["context"] + 1)
    )
    ours = task["side"].startswith("ours")
    step = (our_step if ours else peer_step)(config, ids, task["side"])
    clock = time.process_time if task.get("processor_time") else time.perf_counter
    times = seconds(step, task["steps"], clock)
    tokens = task["batch"] * task["context"]
    return {"tokens_per_second": tokens / median(times), "peak_megabytes": peak_megabytes()}


def our_step(config: dict[str, int], ids: np.ndarray, side: str) -> Any:
    from micrograd_gpt import optim
    from micrograd_gpt.arrays.precision import compute_in

    model = GPT2(GPT2Config(**config))
    optimizer = optim.AdamW(model.parameters(), lr=6e-4)

    def step() -> None:
        with compute_in("bfloat16" if side == BFLOAT16 else "float32"):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
        optim.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def peer_step(config: dict[str, int], ids: np.ndarray, side: str) -> Any:
    import torch
    from peer_gpt2 import PeerGPT2

    model = PeerGPT2(**config)
    optimizer = model.optimizer(fused="fused" in side)
    run = torch.compile(model) if "compiled" in side else model
    inputs, targets = torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in side):
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


# --------------------------------------------------------------------------- how the cost grows


def plot_growth(path: str) -> None:
    """Plot tokens/s of 124M and 355M at contexts of 128 to 1024, with 1,024 tokens a step."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    contexts, limits = [128, 256, 512, 1024], child({"side": "limits"})
    for size in ("124M", "355M"):
        speeds = []
        for context in contexts:
            shape = {"size": size, "batch": 1024 // context, "context": context, "steps": 3}
            result = child({"side": "ours", **shape})
            speeds.append(result["tokens_per_second"])
            print(
                f"{size}, {1024 // context} × {context}: {speeds[-1]:,.0f} tokens/s, "
                f"{result['peak_megabytes']:,.0f} MB"
            )
        (line,) = axes.plot(contexts, speeds, "o-", label=f"{size}, measured")
        allowed = [limits["gflops"] * 1e9 / flops_per_token(size, c) for c in contexts]
        axes.plot(contexts, allowed, ":", color=line.get_color(), label=f"{size}, limit")
    axes.set(xlabel="context (tokens)", ylabel="training speed (tokens/s)", xticks=contexts)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{processor()}: matrix product {limits['gflops']:.0f} GFLOP/s", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
