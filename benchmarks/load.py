"""How much time and memory loading a model takes, with random weights of OpenAI's sizes.

    python benchmarks/load.py                 # 124M
    python benchmarks/load.py --size 1558M    # that size too: 6.2 GB of disk and of memory
    python benchmarks/load.py --dtype int8    # held in less memory

Writing and loading run in processes of their own. The file is loaded twice, and the second time
counts: by then it is in the system's file cache, if it fits there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import common

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support import cli
from micrograd_gpt.weights.config import SIZES
from micrograd_gpt.weights.pretrained import from_pretrained
from micrograd_gpt.weights.saving import save_pretrained


def main() -> int:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="measure this size too, beside 124M")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "int8"],
        default="float32",
        help="what the weights become as they are loaded (float32)",
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child is not None:
        task = flags.child
        print(json.dumps(write(task) if "write" in task else load(task)))
        return 0
    print(common.processor())
    header = ["model", "MB", "seconds", "peak resident MB", "limit"]
    sizes = dict.fromkeys(["124M", flags.size or "124M"])
    common.print_table(header, [measure(size, flags.dtype) for size in sizes])
    return 0


def measure(size: str, dtype: str) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        common.child({"write": size, "folder": folder})
        common.child({"folder": folder, "dtype": dtype})
        found = common.child({"folder": folder, "dtype": dtype})
    megabytes, peak = found["megabytes"], found["peak"]
    limit = 1.15 * megabytes + 150
    return [size, f"{megabytes:,.0f}", f"{found['seconds']:.2f}", f"{peak:,.0f}", f"{limit:,.0f}"]


def write(task: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint folder with random weights of this size."""
    shape: dict[str, Any] = dict(SIZES[task["write"]])
    save_pretrained(GPT2(GPT2Config(**shape)), task["folder"])
    return {}


def load(task: dict[str, Any]) -> dict[str, Any]:
    """The seconds to load the model, its size and the peak of memory, in MB of 2**20 bytes."""
    start = time.perf_counter()
    model = from_pretrained(GPT2, task["folder"], dtype=task["dtype"])
    seconds = time.perf_counter() - start
    megabytes = sum(p.data.nbytes for p in model.parameters()) / 2**20
    return {"megabytes": megabytes, "seconds": seconds, "peak": common.peak_megabytes()}


if __name__ == "__main__":
    cli.run(main)
