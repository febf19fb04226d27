"""Decoding speed beside Transformers', on this machine, in one run, with random weights.

    python benchmarks/generate.py                   # 124M: token by token, and a long prompt
    python benchmarks/generate.py --rounds 5
    python benchmarks/generate.py --sides "ours, int8" "Transformers bfloat16"
    python benchmarks/generate.py --processor-time  # on a machine that others use: one core

"limit" is the measured rate at which NumPy's matrix-vector product reads a matrix, divided by the
bytes of the float32 weights, all of which have to be read for every token; narrower weights have as
many fewer bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from common import (
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

from micrograd_gpt import no_grad
from micrograd_gpt.arrays.int8 import hold_in_int8
from micrograd_gpt.arrays.precision import HALF, hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support import cli

PROMPT, NEW, LONG = 32, 64, 512  # tokens
NARROW = ("ours, bfloat16", "ours, float16", "ours, int8")
OURS = ("ours", *NARROW, "ours, in NumPy alone", "ours, without cache")
THEIRS = ("Transformers float32", "Transformers bfloat16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=OURS + THEIRS, help="all that are installed")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="on one core, count the seconds that it works and not those it waits for (Linux)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(json.loads(args.child))))
        return 0
    if args.processor_time:
        hold_to_one_core()
    print(f"{processor()}; Python {sys.version.split()[0]}, NumPy {np.__version__}")
    theirs = THEIRS if installed("transformers") and installed("torch") else ()
    sides = [side for side in OURS + theirs if args.sides is None or side in args.sides]
    limits = child({"side": "limits"})
    print(
        f"NumPy's BLAS: {limits['blas']}, {limits['threads']} threads; our kernels: "
        f"{limits['kernels']}: matrix product {limits['gflops']:.0f} GFLOP/s, matrix-vector "
        f"{limits['bandwidth']:.0f} GB/s\n"
    )
    tasks = {
        side: {
            "side": side,
            "processor_time": args.processor_time,
            "env": IN_NUMPY if "NumPy" in side else {},
        }
        for side in sides
    }
    results = in_turns(tasks, args.rounds)
    rate = {side: median(r["tokens_per_second"] for r in runs) for side, runs in results.items()}
    first = {side: median(r["first_token"] for r in runs) for side, runs in results.items()}
    limit = limits["bandwidth"] * 1e9 / (124_439_808 * 4)
    rows = []
    for side, runs in results.items():
        peak = f"{median(r['peak_megabytes'] for r in runs):,.0f}"
        ours = f"{rate[sides[0]] / rate[side]:.2f} ×"
        ours_first = f"{first[side] / first[sides[0]]:.2f} ×"
        share = f"{rate[side] / limit:.0%}"
        rows.append(
            [side, f"{rate[side]:.1f}", share, ours, f"{first[side]:.3f} s", ours_first, peak]
        )
    decoding = f"tokens/s after {PROMPT}"
    print_table(
        [
            "124M, batch 1",
            decoding,
            "% of limit",
            f"{sides[0]} is",
            f"{LONG} to first",
            f"{sides[0]} is",
            "peak MB",
        ],
        rows,
    )
    return 0


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of NEW greedy tokens after a prompt, and seconds to the first after a long one."""
    side = task["side"]
    if side == "limits":
        return machine_limits()
    ids = np.random.default_rng(0).integers(0, 50257, LONG)
    generate = our_generate(side) if side.startswith("ours") else their_generate(side)
    new = NEW // 8 if "without" in side else NEW
    clock = time.process_time if task.get("processor_time") else time.perf_counter
    prompt = median(seconds(lambda: generate(ids[:PROMPT], 1), 5, clock))
    whole = median(seconds(lambda: generate(ids[:PROMPT], 1 + new), 3, clock))
    first = median(seconds(lambda: generate(ids, 1), 5, clock))
    return {
        "tokens_per_second": new / (whole - prompt),  # the prompt's own time left out
        "first_token": first,
        "peak_megabytes": peak_megabytes(),
    }


def our_generate(side: str) -> Any:
    model = GPT2(GPT2Config()).eval()
    for dtype in HALF:
        if side == f"ours, {dtype}":
            hold_in(model, dtype)
    if "int8" in side:
        for name, parameter in model.named_parameters():
            hold_in_int8(name, parameter)
    with no_grad():
        return lambda ids, count: model.generate(
            ids, max_new_tokens=count, temperature=0, use_cache="without" not in side
        )


def their_generate(side: str) -> Any:
    import torch
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    dtype = torch.bfloat16 if "bfloat16" in side else torch.float32
    model = GPT2LMHeadModel(TheirConfig()).eval().to(dtype)

    def generate(ids: np.ndarray, count: int) -> Any:
        with torch.inference_mode():
            prompt = torch.tensor(ids[None])
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=50256,
            )

    return generate


if __name__ == "__main__":
    cli.run(main)
