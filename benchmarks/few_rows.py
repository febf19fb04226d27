"""How fast one core multiplies a few rows by a weight matrix, as in a batch of samples or beams.

    python benchmarks/few_rows.py
    python benchmarks/few_rows.py --rows 1 8 16

With r rows each weight of 4 bytes is read once for 2 r operations: so a product can run at r / 2
times the rate, in GB/s, at which memory is read, and never faster than a large product. The lesser
of both is the limit. Memory's rate is the highest at which a single row's product reads. The
matrices of each shape take 150 MB, as in a model, so that they come from memory. Seconds are those
of the one thread's processor time, so that other programs disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from common import median, print_table, processor

from micrograd_gpt.functional import linear_forward
from micrograd_gpt.kernels.in_c.compiler import library, report

SHAPES = ((768, 2304), (768, 3072), (3072, 768), (768, 50257))  # those of GPT-2 124M
BYTES = 150e6
RUNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16, 17, 32])
    rows = sorted({1, *parser.parse_args().rows})
    found = library()
    if found is None:
        raise SystemExit(f"there are no kernels in C to measure: {report()}")
    found.use_cores(1)
    square = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    times = [seconds(lambda: linear_forward(square, square, None)) for _ in range(RUNS)]
    peak = 2 * 1024**3 / median(times) / 1e9
    rates = [rates_of(k, m, rows) for k, m in SHAPES]
    memory = 2 * max(rate[1] for rate in rates)
    print(f"{processor()}; {report()}")
    print(f"one core: large products {peak:.0f} GFLOP/s, memory {memory:.1f} GB/s; in GFLOP/s:\n")
    table = []
    for r in rows:
        limit = min(peak, memory * r / 2)
        cells = [f"{rate[r]:.0f} ({rate[r] / limit:.0%})" for rate in rates]
        table.append([str(r), f"{limit:.0f}", *cells])
    print_table(["rows", "limit", *(f"{k} × {m}" for k, m in SHAPES)], table)


def rates_of(k: int, m: int, rows: list[int]) -> dict[int, float]:
    """GFLOP/s by the number of rows, through all copies of a matrix; the rows take turns."""
    rng = np.random.default_rng(0)
    copies = max(1, round(BYTES / (4 * k * m)))
    weights = [rng.standard_normal((m, k), dtype=np.float32).T for _ in range(copies)]

    def multiply(r: int) -> None:
        x = rng.standard_normal((r, k), dtype=np.float32)
        for weight in weights:
            linear_forward(x, weight, None)

    times: dict[int, list[float]] = {r: [] for r in rows}
    for _ in range(RUNS):
        for r in rows:
            times[r].append(seconds(partial(multiply, r)))
    return {r: 2 * r * k * m * copies / median(times[r]) / 1e9 for r in rows}


def seconds(function: Callable[[], object]) -> float:
    started = time.thread_time()
    function()
    return time.thread_time() - started


if __name__ == "__main__":
    main()
