"""How fast one core multiplies a few rows by a weight matrix, as in a batch of samples or beams.

    python benchmarks/few_rows.py
    python benchmarks/few_rows.py --kinds float32 int8 --rows 1 8 16

With r rows each weight is read once for 2 r operations. So where a weight takes b bytes, a product
can run at 2 r / b times the rate, in GB/s, at which memory is read, and never faster than a large
product of its kind. The lesser of both is the limit. Memory's rate is the highest at which a single
row's product in float32 reads. Weights of float16 become float32 before they are multiplied: their
large product is float32's. A weight of int8 takes 1.0625 bytes with its share of a scale.

The matrices of each shape take 150 MB, so that they come from memory, and lie in huge pages, as
those of a model that is loaded. Up to 16 rows meet the kernels in C directly, as where decode.c
takes a token through all blocks: called from Python, each product takes some 20 to 35 microseconds
more. Seconds are those of the one thread's processor time, so that other programs disturb less. The
shapes are those of GPT-2 124M; PyTorch multiplies by the last of them, its head, where it is
installed, with weights where it puts them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import installed, median, print_table, processor, seconds

from micrograd_gpt.arrays.int8 import GROUP, arriving, product, quantised
from micrograd_gpt.arrays.memory import HugePages
from micrograd_gpt.functional import linear_forward
from micrograd_gpt.kernels.in_c.arguments import address, call
from micrograd_gpt.kernels.in_c.compiler import library, report
from micrograd_gpt.kernels.in_c.half import FEW_ROWS, KINDS, FewRows, NarrowRows

HEAD = (768, 50257)
SHAPES = ((768, 2304), (768, 3072), (3072, 768), HEAD)
BYTES_OF_A_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 4 / GROUP}
OF_PYTORCH = ("float32", "bfloat16")
BYTES = 150e6
RUNS = 7

Rates = dict[int, float]  # GFLOP/s by the number of rows
Multiply = Callable[[int], object]  # multiplies so many rows by all copies of a matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 5, 6, 8, 12, 16, 17, 32])
    kinds = list(BYTES_OF_A_WEIGHT)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    args = parser.parse_args()
    rows = sorted({1, *args.rows})
    found = library()
    if found is None:
        raise SystemExit(f"there are no kernels in C to measure: {report()}")
    found.use_cores(1)
    peaks = {kind: peak_of(kind) for kind in ("float32", "bfloat16", "int8")}
    rates = {kind: [rates_of(kind, k, m, rows) for k, m in SHAPES] for kind in args.kinds}
    single = rates.get("float32") or [rates_of("float32", k, m, [1]) for k, m in SHAPES]
    memory = BYTES_OF_A_WEIGHT["float32"] / 2 * max(rate[1] for rate in single)
    print(f"{processor()}; {report()}")
    print(
        f"one core: large products in float32 {peaks['float32']:.0f} GFLOP/s, in bfloat16 "
        f"{peaks['bfloat16']:.0f}, in int8 {peaks['int8']:.0f}; memory {memory:.1f} GB/s"
    )
    peers = {}
    if installed("torch"):
        peers = {kind: rates_of_pytorch(kind, rows) for kind in args.kinds if kind in OF_PYTORCH}
    for kind, of_shapes in rates.items():
        peak = peaks.get(kind, peaks["float32"])
        limits = {r: min(peak, memory * 2 * r / BYTES_OF_A_WEIGHT[kind]) for r in rows}
        print(f"\nGFLOP/s in {kind}:\n")
        print_rates(limits, of_shapes, peers.get(kind))


def print_rates(limits: Rates, of_shapes: list[Rates], peer: Rates | None) -> None:
    """A line for each number of rows."""
    header = ["rows", "limit", *(f"{k} × {m}" for k, m in SHAPES)]
    table = []
    for r, limit in limits.items():
        cells = [f"{rates[r]:.0f} ({rates[r] / limit:.0%})" for rates in of_shapes]
        beside = [f"{peer[r]:.0f} ({of_shapes[-1][r] / peer[r]:.2f} ×)"] if peer else []
        table.append([str(r), f"{limit:.0f}", *cells, *beside])
    print_table(header + (["PyTorch's head (ours is)"] if peer else []), table)


def peak_of(kind: str) -> float:
    """GFLOP/s of a large product."""
    square = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    x, weight = (square, quantised(square, 0)) if kind == "int8" else [square.astype(kind)] * 2
    multiply = product if kind == "int8" else partial(linear_forward, bias=None)
    times = seconds(lambda: multiply(x, weight), RUNS, time.thread_time)
    return 2 * 1024**3 / median(times) / 1e9


def rates_of(kind: str, k: int, m: int, rows: list[int]) -> Rates:
    rng, pages = np.random.default_rng(0), HugePages()
    rows_of_weights = rng.standard_normal((m, k), dtype=np.float32)
    weights = [matrix_of(kind, rows_of_weights, pages) for _ in copies(kind, k, m)]
    xs = {r: rng.standard_normal((r, k), dtype=np.float32) for r in rows}
    y = np.empty((max(rows), m), np.float32)
    products = {r: [product_of(kind, x, weight, y) for weight in weights] for r, x in xs.items()}

    def multiply(r: int) -> None:
        for product_with_one in products[r]:
            product_with_one()

    return rates_by_rows(multiply, 2 * k * m * len(weights), rows)


def product_of(kind: str, x: np.ndarray, weight: Any, y: np.ndarray) -> Callable[[], object]:
    """A function that multiplies x by a matrix, and where x has few rows writes to y."""
    (r, k), m = x.shape, weight.shape[1]
    if r > FEW_ROWS:
        if kind == "int8":
            return partial(product, x, weight)
        return partial(linear_forward, x.astype(kind), weight, None)
    numbers, scales = (weight.values, weight.scales) if kind == "int8" else (weight, None)
    places = address(x), address(numbers)
    if kind == "float32":
        return partial(call, "few_rows", FewRows(r, k, m, *places, None, address(y)))
    sizes = KINDS.index(np.dtype(kind)), r, k, m
    name = "multiply_int8" if kind == "int8" else "few_narrow_rows"
    return partial(call, name, NarrowRows(*sizes, *places, address(scales), None, address(y)))


def matrix_of(kind: str, rows: np.ndarray, pages: HugePages) -> Any:
    """The transpose of these rows, (M, K), with no gaps along the axis that products add up."""
    if kind == "int8":
        held = arriving(rows.shape, 1, pages.zeros)
        held.set(rows)
        return held.matrix.T
    matrix = pages.zeros(rows.shape, np.dtype(kind))
    matrix[...] = rows
    return matrix.T


def copies(kind: str, k: int, m: int) -> range:
    """Of a matrix, so that all of them take BYTES."""
    return range(max(1, round(BYTES / (BYTES_OF_A_WEIGHT[kind] * k * m))))


def rates_of_pytorch(kind: str, rows: list[int]) -> Rates:
    """Of products with the head."""
    import torch

    torch.set_num_threads(1)
    (k, m), dtype = HEAD, getattr(torch, kind)
    weights = [torch.randn(m, k).to(dtype) for _ in copies(kind, k, m)]

    def multiply(r: int) -> None:
        x = torch.randn(r, k).to(dtype)
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(x, weight)

    return rates_by_rows(multiply, 2 * k * m * len(weights), rows)


def rates_by_rows(multiply: Multiply, operations: int, rows: list[int]) -> Rates:
    """Of medians over RUNS, in which the numbers of rows take turns; `operations` are a row's."""
    times: dict[int, list[float]] = {r: [] for r in rows}
    for _ in range(RUNS):
        for r in rows:
            started = time.thread_time()
            multiply(r)
            times[r].append(time.thread_time() - started)
    return {r: r * operations / median(times[r]) / 1e9 for r in rows}


if __name__ == "__main__":
    main()
