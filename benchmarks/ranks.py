"""Training by two ranks of one thread each beside one process of two threads, in one run.

    python benchmarks/ranks.py                       # 124M at 2 × 512, and tiny at 12 × 64
    python benchmarks/ranks.py --work tiny --ranks 4

All sides take the same step, of the same windows, which the ranks share: forward, backward, the sum
of all ranks' gradients, clipping, AdamW; with a sharded optimizer each rank updates its part, and
all gather the parts. Needs mpi4py and mpirun.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import median, peak_megabytes, print_table, processor
from train import SHAPES

from micrograd_gpt import optim
from micrograd_gpt.arrays.memory import keep_freed_memory
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs.ranks import Ranks, started_ranks
from micrograd_gpt.runs.sharding import ShardedAdamW, clip_grad_norm
from micrograd_gpt.support.machine import usable_cores

# size: (windows in a step, context, steps measured in each child)
WORK = {"124M": (2, 512, 3), "tiny": (12, 64, 100)}
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=[*WORK, "all"], default="all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=list(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.sharded)
        return
    cores = usable_cores()
    print(f"{processor()}; Python {sys.version.split()[0]}, NumPy {np.__version__}\n")
    threads = max(1, cores // args.ranks)
    several = f"{args.ranks} ranks × {threads}"
    sides = {
        f"1 process × {cores} threads": (1, cores, False),
        several: (args.ranks, threads, False),
        f"{several}, sharded": (args.ranks, threads, True),
    }
    rows = []
    for size, (windows, context, _) in WORK.items():
        if args.work in (size, "all"):
            results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for number in range(args.rounds):
                for side, how in sides.items():
                    print(f"round {number + 1} of {args.rounds}: {size}, {side}", file=sys.stderr)
                    results[side].append(measured(size, *how))
            rows += table_rows(f"{size}, {windows} × {context}", results)
    heads = ["work", "side", "tokens/s", "adding up", "update", "peak MB of a rank", "is"]
    print_table(heads, rows)


def table_rows(work: str, results: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """One row a side: the median, over the rounds, of the median step of each."""
    first = median(r["tokens_per_second"] for r in next(iter(results.values())))
    rows = []
    for side, runs in results.items():
        speed = median(r["tokens_per_second"] for r in runs)
        shares = [f"{median(r[part] for r in runs):.0%}" for part in ("adding_up", "update")]
        memory = median(r["peak_megabytes"] for r in runs)
        ratio = f"{speed / first:.2f} ×"
        rows.append([work, side, f"{speed:,.0f}", *shares, f"{memory:,.0f}", ratio])
    return rows


def measured(size: str, ranks: int, threads: int, sharded: bool) -> dict[str, float]:
    """What rank 0 of so many ranks, or the only process, measured."""
    command = [sys.executable, __file__, "--child", size, *["--sharded"] * sharded]
    if ranks > 1:
        command = [mpirun(), "-n", str(ranks), *command]
    env = os.environ | ALLOWED | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def mpirun() -> str:
    """The launcher, in the path or beside this Python."""
    return shutil.which("mpirun") or str(Path(sys.executable).with_name("mpirun"))


# ------------------------------------------------------------------------------ in the children


def child(size: str, sharded: bool) -> None:
    with started_ranks() as ranks:
        found = measure(size, ranks, sharded)
        print(json.dumps(found))


def measure(size: str, ranks: Ranks, sharded: bool) -> dict[str, Any]:
    windows, context, steps = WORK[size]
    config = SHAPES[size]
    model = GPT2(GPT2Config(**config))
    adamw = partial(ShardedAdamW, ranks) if sharded else optim.AdamW
    optimizer = adamw(model.parameters(), lr=6e-4)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (windows, context + 1))
    ours = ids[list(ranks.share(range(windows)))]
    keep_freed_memory()
    times, adding, updating = [], [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = model.loss(ours[:, :-1], ours[:, 1:]) * (1 / ranks.size)
        loss.backward()
        before = time.perf_counter()
        ranks.add_up(model.parameters())
        ranks.join([loss.data])
        adding.append(time.perf_counter() - before)
        before = time.perf_counter()
        clip_grad_norm(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        updating.append(time.perf_counter() - before)
        times.append(time.perf_counter() - start)
    step = median(times[1:])
    return {
        "tokens_per_second": windows * context / step,
        "adding_up": median(adding[1:]) / step,
        "update": median(updating[1:]) / step,
        "peak_megabytes": peak_megabytes(),
    }


if __name__ == "__main__":
    main()
