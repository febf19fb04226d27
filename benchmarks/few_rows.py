"""How fast a few rows meet a weight matrix, as in a batch of samples, beams and guesses.

    python benchmarks/few_rows.py
    python benchmarks/few_rows.py --rows 1 8 16

With r rows each weight is read once for 2 r operations: so a product can run at r / 2 times the
rate, in GB/s, at which memory is read, and never faster than the rate of large products. The
lesser of both is the limit. Memory's rate is that of one row here or of NumPy's matrix-vector
product, whichever is higher. The weights of each shape take 150 MB, as in a model, so that they
come from memory.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from common import child, machine_limits, median, print_table, processor

from micrograd_gpt.functional import linear_forward

SHAPES = ((768, 2304), (768, 3072), (3072, 768), (768, 50257))  # those of GPT-2 124M
BYTES = 150e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 6, 8, 12, 16, 17, 32])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(machine_limits()))
        return
    limits = child({})
    print(f"{processor()}; {limits['kernels']}")
    rates = {shape: rates_of(*shape, args.rows) for shape in SHAPES}
    read = max(limits["bandwidth"], *(2 * rates[shape].get(1, 0) for shape in SHAPES))
    peak = limits["gflops"]
    print(f"large products {peak:.0f} GFLOP/s, memory {read:.1f} GB/s; below, GFLOP/s\n")
    lines = []
    for rows in args.rows:
        limit = min(peak, read * rows / 2)
        found = [rates[shape][rows] for shape in SHAPES]
        cells = [f"{rate:.0f} ({rate / limit:.0%})" for rate in found]
        lines.append([str(rows), f"{limit:.0f}", *cells])
    print_table(["rows", "limit", *(f"{k} × {m}" for k, m in SHAPES)], lines)


def rates_of(k: int, m: int, rows: list[int]) -> dict[int, float]:
    """GFLOP/s by the number of rows: the median of seven runs through all copies of a matrix."""
    rng = np.random.default_rng(0)
    copies = max(1, round(BYTES / (4 * k * m)))
    weights = [rng.standard_normal((m, k), dtype=np.float32).T for _ in range(copies)]
    times: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(8):
        for count in rows:
            x = rng.standard_normal((count, k), dtype=np.float32)
            start = time.perf_counter()
            for weight in weights:
                linear_forward(x, weight, None)
            times[count].append(time.perf_counter() - start)
    return {r: 2 * r * k * m * copies / median(seconds[1:]) / 1e9 for r, seconds in times.items()}


if __name__ == "__main__":
    main()
