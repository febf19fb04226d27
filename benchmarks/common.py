"""What the benchmarks share: child processes that measure, the machine's limits, and tables.

Each side runs in a process of its own, and the sides take turns, so that each meets the machine in
the same states; figures are medians. Children start without the environment's settings for BLAS,
which then chooses its kernels for the processor, as on a user's machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an install, too
from micrograd_gpt.support.errors import UserError

# As if without AVX-512: settings of NumPy's BLAS, of our kernels' compiler, of PyTorch's libraries.
AVX2 = {
    "OPENBLAS_CORETYPE": "Haswell",
    "CC": "cc -mno-avx512f",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
PINS = (*AVX2, "OPENBLAS_L2_SIZE", "MKL_CBWR", "MICROGRAD_GPT_KERNELS")
IN_NUMPY = {"MICROGRAD_GPT_KERNELS": "numpy"}  # our side as it runs without a C compiler


def installed(name: str) -> bool:
    """Whether a package is installed; prints a line on stderr if not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed: its side is left out", file=sys.stderr)
    return found


def child(
    task: dict[str, Any], pins: dict[str, str] | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """Run this very script as a child process on `task`, and return what it measured.

    Of the settings in PINS, its environment has only those in `pins` and in the task's "env".
    Raises subprocess.CalledProcessError where it fails, TimeoutExpired after `timeout` seconds.
    """
    env = {k: v for k, v in os.environ.items() if k not in PINS}
    env |= (pins or {}) | task.get("env", {})
    script = sys.modules["__main__"].__file__
    command = [sys.executable, str(script), "--child", json.dumps(task)]
    result = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout
    )
    return json.loads(result.stdout.splitlines()[-1])


def in_turns(
    sides: dict[str, dict[str, Any]], rounds: int, pins: dict[str, str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run every side's task `rounds` times: first, second, …, first, second, …"""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, task in sides.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(child(task, pins))
    return results


def hold_to_one_core() -> None:
    """Let this process and the children that it starts run on one core alone, so that processor
    time is the same however many threads there are. UserError where the system cannot do that."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--processor-time needs Linux, which can hold a process to one core")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def median(values: Any) -> float:
    return float(np.median(list(values)))


def seconds(
    function: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The seconds that each of `repeats` calls takes, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return times


def peak_megabytes() -> float:
    """The most memory that this process has had resident so far, in MB of 2**20 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage() would also count what the parent held when it started this
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine_limits() -> dict[str, Any]:
    """NumPy's float32 rates: "gflops" (GFLOP/s) of a matrix product, "bandwidth" (GB/s) of a
    matrix-vector product; and which BLAS and which kernels of ours run.
    """
    from threadpoolctl import threadpool_info

    import micrograd_gpt  # registers the kernels  # noqa: F401
    from micrograd_gpt.arrays.stand_ins import report

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2048, 2048), dtype=np.float32) for _ in range(2))
    product = median(seconds(lambda: a @ b, 7))
    matrix = rng.standard_normal((50257, 768), dtype=np.float32)
    vector = rng.standard_normal((1, 768), dtype=np.float32)
    matvec = median(seconds(lambda: vector @ matrix.T, 15))
    blas = [i for i in threadpool_info() if i["user_api"] == "blas"]
    return {
        "gflops": 2 * 2048**3 / product / 1e9,
        "bandwidth": matrix.nbytes / matvec / 1e9,
        "blas": ", ".join(f"{i['internal_api']} {i.get('architecture', '')}".strip() for i in blas),
        "threads": max((i["num_threads"] for i in blas), default=1),
        "kernels": report(),
    }


def processor() -> str:
    """The processor's name, its cores, and the widest vectors it has."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    vectors = next((v for v in ("avx512f", "avx2") if v in text), platform.machine())
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {vectors}"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table: the first column aligned left, the others right."""
    print("| " + " | ".join(header) + " |")
    print("| --- " + "| ---: " * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
