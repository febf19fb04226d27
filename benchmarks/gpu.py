"""The GPU path in one run: compiled, tested, timed beside PyTorch and Transformers, and profiled.

    python benchmarks/gpu.py                     # on an NVIDIA GPU: under nine minutes
    python benchmarks/gpu.py --check-only        # only tests: that it compiles, and is correct
    python benchmarks/gpu.py --rehearse          # tiny shapes on the CPU, to test the benchmark

Every measurement is a process of its own. If one fails or takes too long, that is reported, the
others go on, and the exit status is 1. The table comes last. The full numbers are written to the
file of --out after every part, so that nothing measured is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import child, print_table

from micrograd_gpt.arrays.devices import library_for
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import written_whole

ROOT = Path(__file__).resolve().parents[1]
MOST_FOR_TESTS = 200  # seconds; a test that hangs must not use up the measurements' time
NAMES = ("compiles", "launches", "kernels", "model", "graph")
TESTS = [f"tests/kernels/test_gpu_{name}.py" for name in NAMES]
TESTS += ["tests/kernels/test_gpu.py", "tests/kernels/test_cuda_emulator.py"]
TESTS += ["tests/arrays/test_real_cupy.py"]

# The model and the amounts of work; a rehearsal only shows whether everything runs
FULL = {
    "device": "gpu",
    "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024},
    "learner": {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 256, "n_positions": 256},
    "batch": 16,
    "steps": 10,
    "prompt": 32,
    "new": 128,
    "loss_steps": 200,
}
REHEARSAL = {
    "device": "cpu",
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 301, "n_positions": 64},
    "learner": {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 256, "n_positions": 32},
    "batch": 2,
    "steps": 2,
    "prompt": 8,
    "new": 8,
    "loss_steps": 5,
}
EAGER, COMPILED = "PyTorch eager", "PyTorch compiled"

# name: (measurement, its settings), the most important first
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "limits": ("limits", {}),
    "training bfloat16, ours": ("training", {"side": "ours", "dtype": "bfloat16"}),
    "training bfloat16, eager": ("training", {"side": EAGER, "dtype": "bfloat16"}),
    "decoding 1, ours": ("decoding", {"side": "ours", "batch": 1}),
    "decoding 1, Transformers": ("decoding", {"side": "Transformers", "batch": 1}),
    "decoding 1, launch by launch": ("decoding", {"side": "ours", "batch": 1, "graph": False}),
    "profile": ("profile", {}),
    "loss float32, CPU": ("losses", {"device": "cpu", "dtype": "float32"}),
    "loss float32, ours": ("losses", {"dtype": "float32"}),
    "loss bfloat16, ours": ("losses", {"dtype": "bfloat16"}),
    "training TF32, ours": ("training", {"side": "ours", "dtype": "float32"}),
    "training TF32, eager": ("training", {"side": EAGER, "dtype": "float32"}),
    "decoding 64, ours": ("decoding", {"side": "ours", "batch": 64}),
    "decoding 64, Transformers": ("decoding", {"side": "Transformers", "batch": 64}),
    "training bfloat16, compiled": ("training", {"side": COMPILED, "dtype": "bfloat16"}),
}


def main() -> int:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check-only", action="store_true", help="compile and test, but time nothing"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--minutes", type=float, default=8.5, help="minutes to stop after (8.5)")
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        metavar="NAME",
        help="only this part; may be repeated",
    )
    parser.add_argument("--out", metavar="JSON", help="the full numbers ($OUT/gpu.json, gpu.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        import gpu_measures  # only here, so that --help answers at once

        task = json.loads(flags.child)
        print(json.dumps(getattr(gpu_measures, task["measure"])(task)))
        return 0
    if not flags.rehearse and not flags.check_only:
        library_for("gpu")  # where there is no GPU, a UserError before anything takes time
    out = Path(flags.out or Path(os.environ.get("OUT", "."), "gpu.json"))
    return Run(flags, out).go()


def has_gpu() -> bool:
    try:
        library_for("gpu")
    except UserError:
        return False
    return True


class Run:
    """Runs the parts one after another; `results` and `failures` (messages) are by part."""

    def __init__(self, flags: argparse.Namespace, out: Path) -> None:
        self.flags, self.out = flags, out
        self.deadline = time.monotonic() + 60 * flags.minutes
        self.results: dict[str, Any] = {}
        self.failures: dict[str, str] = {}

    def go(self) -> int:
        if not self.flags.rehearse and not self.flags.part:
            self.attempt("tests", self.tests)
        if not self.flags.check_only:
            scale = REHEARSAL if self.flags.rehearse else FULL
            for name in self.flags.part or PARTS:
                measure, given = PARTS[name]
                task = {"measure": measure, **scale, **given}
                self.attempt(name, lambda task=task: child(task, timeout=self.seconds_left()))
            self.print_tables()
        for name, problem in self.failures.items():
            print(f"failed: {name}: {problem}")
        return 1 if self.failures else 0

    def seconds_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left < 5:
            raise TimeoutError("no time was left for it (see --minutes)")
        return left

    def attempt(self, name: str, measure: Any) -> None:
        print(f"{name} …", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            self.results[name] = measure()
        except subprocess.CalledProcessError as problem:
            self.failures[name] = f"exit status {problem.returncode}, see above"
        except subprocess.TimeoutExpired:
            self.failures[name] = "it took longer than was left (see --minutes)"
        except (TimeoutError, ValueError, IndexError) as problem:  # no time left, or bad output
            self.failures[name] = str(problem)
        print(f"    {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        with written_whole(self.out) as file:
            document = {"results": self.results, "failures": self.failures}
            file.write(json.dumps(document, indent=1).encode())

    def tests(self) -> dict[str, str]:
        """On a GPU, run the tests that need one; elsewhere those that emulate the kernels."""
        command = [sys.executable, "-m", "pytest", "-q", "-rs", *TESTS]
        command += ["-m", "gpu" if has_gpu() else "not gpu"]
        said = self.out.with_suffix(".tests.txt")  # has all the output, whatever happens
        with open(said, "w", encoding="utf-8") as file:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, timeout=min(self.seconds_left(), MOST_FOR_TESTS)
            )
        lines = said.read_text("utf-8").splitlines()
        print("\n".join(lines[-30:]), flush=True)
        if done.returncode:
            raise ValueError(f"pytest's exit status is {done.returncode}; see {said}")
        return {"summary": lines[-1]}

    def print_tables(self) -> None:
        limits = self.results.get("limits", {})
        print("\n" + ", ".join(f"{name} {value}" for name, value in limits.items()) + "\n")
        if profile := self.results.get("profile"):
            header = ["kernel", "ms", "GB", "GFLOP", "GB/s", "GFLOP/s", "of the limit"]
            print_table(header, [_profile_row(row, limits) for row in profile["kernels"]])
            print()
        rows = [row for row in map(self.row, COMPARISONS) if row]
        print_table(["work", "ours", "peer", "peer's", "ours is", "must"], rows)

    def row(self, comparison: tuple[str, str, str, str, str]) -> list[str] | None:
        title, field, ours, peer, must = comparison
        if ours not in self.results or peer not in self.results:
            return None
        a, b = self.results[ours][field], self.results[peer][field]
        share = f"{a / b:.2f} ×" if field != "loss" else f"{a / b - 1:+.3%}"
        return [title, f"{a:,.4g}", peer.split(", ")[1], f"{b:,.4g}", f"**{share}**", must]


# (title, field compared, our part, the peer's part, what the ratio must be)
COMPARISONS = [
    *(
        (
            f"training {dtype}, {field.replace('_', ' ')}",
            field,
            f"training {dtype}, ours",
            peer,
            must,
        )
        for dtype, field, peer, must in (
            ("bfloat16", "tokens_per_second", "training bfloat16, eager", "≥ 1 ×"),
            ("bfloat16", "tokens_per_second", "training bfloat16, compiled", "reach for 1 ×"),
            ("TF32", "tokens_per_second", "training TF32, eager", "≥ 1 ×"),
            ("bfloat16", "peak_allocated_megabytes", "training bfloat16, eager", "≤ 1 ×"),
            ("bfloat16", "device_megabytes", "training bfloat16, eager", ""),
        )
    ),
    *(
        (
            f"decoding, batch {batch}, tokens per second",
            "tokens_per_second",
            f"decoding {batch}, ours",
            f"decoding {batch}, Transformers",
            must,
        )
        for batch, must in ((1, "≥ 5 ×"), (64, "≥ 2 ×"))
    ),
    (
        "decoding, batch 1, by the CUDA graph",
        "tokens_per_second",
        "decoding 1, ours",
        "decoding 1, launch by launch",
        "> 1 ×",
    ),
    ("loss after the steps, bfloat16", "loss", "loss bfloat16, ours", "loss float32, CPU", "± 1%"),
    ("loss after the steps, float32", "loss", "loss float32, ours", "loss float32, CPU", "± 0.1%"),
]


def _profile_row(row: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """A row of the table for one kernel; the last cell is the share of its nearer limit."""
    bandwidth, rate = row["gigabytes"] / row["seconds"], row["gigaflops"] / row["seconds"]
    shares = [
        (bandwidth / limits[name] if name == "copy GB/s" else rate / limits[name], name)
        for name in ("copy GB/s", row["limit"])
        if limits.get(name)
    ]
    share, name = max(shares, default=(float("nan"), "?"))
    return [
        row["kernel"],
        f"{row['seconds'] * 1e3:.3f}",
        f"{row['gigabytes']:.3f}",
        f"{row['gigaflops']:.1f}",
        f"{bandwidth:,.0f}",
        f"{rate:,.0f}",
        f"{share:.0%} {name.split()[0]}",
    ]


if __name__ == "__main__":
    cli.run(main)
