"""What `train_gpt2.py --plan` says of several ranks beside what they take, in one run.

    python benchmarks/plan.py                        # 1, 2 and 4 ranks on this machine

Ranks have one thread each, and what is planned is timed with one thread. The interconnect is what
they reach while they do nothing but add up gradients. Where there are more ranks than cores, each
counts as its part of one. On one machine gradients travel after the backward.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import median, print_table, processor
from ranks import ALLOWED, mpirun

from micrograd_gpt.gpt2 import GPT2Config
from micrograd_gpt.runs.plan import Plan, StepTime
from micrograd_gpt.runs.plan_ranks import WIRE, SharedStep
from micrograd_gpt.runs.ranks import started_ranks
from micrograd_gpt.runs.settings import resolve_settings
from micrograd_gpt.support.machine import usable_cores
from micrograd_gpt.tensor import Tensor

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt2.py"
FLAGS = {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 128, "tokenizer": "byte"}
STEP = {"batch_size": 4, "grad_accum_steps": 4, "eval_batches": 1, "log_interval": 1}
N_STEPS = 12  # of a real run
ENVIRONMENT = os.environ | ALLOWED | {"OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="on this machine")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        CHILDREN[args.child]()
        return
    print(f"{processor()}; Python {sys.version.split()[0]}, NumPy {np.__version__}\n")
    rows = []
    for ranks in args.ranks:
        start = [mpirun(), "-n", str(ranks)]
        rows += compared(start, ranks, args.rounds)
    header = ["ranks", "GB/s", "moments", "planned", "measured", "planned / measured"]
    print_table(header, rows)


def compared(start: Sequence[str], ranks: int, rounds: int) -> list[list[str]]:
    """A row with moments whole on each rank, and one where they are sharded.

    `start` starts the ranks.
    """
    ways = (False, True) if ranks > 1 else (False,)
    found: dict[bool, list[tuple[float, float, float]]] = {sharded: [] for sharded in ways}
    for number in range(rounds):
        for sharded, results in found.items():
            side = f"{ranks} ranks, moments {'shared' if sharded else 'on each'}"
            print(f"round {number + 1} of {rounds}: {side}", file=sys.stderr)
            rate = float(output([*start, *this("rate")]))
            expected = planned(ranks, rate, sharded)
            results.append((rate, expected, measured(start, sharded)))
    rows = []
    for sharded, results in found.items():
        rates, plans, times = zip(*results, strict=True)
        ratio = median(p / t for p, t in zip(plans, times, strict=True))
        moments = "shared" if sharded else "on each"
        seconds = [f"{median(column):.2f} s" for column in (plans, times)]
        rate = f"{median(rates):.3g}" if ranks > 1 else ""
        rows.append([str(ranks), rate, moments, *seconds, f"{ratio:.2f} ×"])
    return rows


def planned(ranks: int, interconnect: float, sharded: bool) -> float:
    """Seconds of a step."""
    settings = resolve_settings({**FLAGS, **STEP, "plan": True, "shard_optimizer": sharded})
    plan = Plan.of(config_of(settings), settings, "cpu", ranks)
    gradients, update = json.loads(output(this("time")))
    slower = max(1.0, ranks / usable_cores())
    time = StepTime(gradients * slower, update * slower, "measured here")
    return SharedStep(plan, time, interconnect, WIRE["float32"]).seconds


def measured(start: Sequence[str], sharded: bool) -> float:
    """Seconds of the fastest step of a run of train_gpt2.py; --plan times the fastest, too."""
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "text.txt"), Path(folder, "out")
        text.write_text("The quick brown fox jumps over the lazy dog. " * 2000, "utf-8")
        settings = {**FLAGS, **STEP, "data": text, "out": out, "max_steps": N_STEPS}
        flags = [word for k, v in settings.items() for word in ("--" + k.replace("_", "-"), str(v))]
        more = ["--shard-optimizer"] if sharded else []
        output([*start, sys.executable, str(SCRIPT), *flags, *more])
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        tokens = STEP["batch_size"] * STEP["grad_accum_steps"] * FLAGS["block_size"]
        return tokens / max(row["tokens_per_second"] for row in rows)


def this(child: str) -> list[str]:
    return [sys.executable, __file__, "--child", child]


def output(command: Sequence[str]) -> str:
    """What it prints, in the last line."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def config_of(settings: argparse.Namespace) -> GPT2Config:
    shape = {name: FLAGS[name] for name in ("n_layer", "n_head", "n_embd")}
    return GPT2Config(**shape, vocab_size=257, n_positions=settings.block_size)


# ------------------------------------------------------------------------------ in the children


def step_time() -> None:
    """Seconds that a step's gradients and its update take one process."""
    settings = resolve_settings({**FLAGS, **STEP, "plan": True})
    time = Plan.of(config_of(settings), settings, "cpu").step_time()
    print(json.dumps([time.gradients, time.update]))


def sending_rate() -> None:
    """GB/s that a rank sends, and receives, while gradients are added up and all else waits."""
    numbers = 10_000_000
    with started_ranks() as ranks:
        parameter = Tensor(np.ones(numbers, np.float32), requires_grad=True)
        times = []
        for _ in range(6):
            parameter.grad = np.ones(numbers, np.float32)
            ranks.join([0.0])
            start = time.perf_counter()
            ranks.add_up([parameter])
            times.append(time.perf_counter() - start)
        sent = 2 * (ranks.size - 1) / ranks.size * parameter.data.nbytes
        print(sent / median(times[1:]) / 1e9 if sent else 1.0)


CHILDREN = {"time": step_time, "rate": sending_rate}


if __name__ == "__main__":
    main()
