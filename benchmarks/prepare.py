"""Rate and memory of preparing a large text, beside tiktoken alone in as many processes.

    python benchmarks/prepare.py --text tinyshakespeare.txt --megabytes 2000

The text is a small one repeated with its paragraphs shuffled. Every side is timed from the start of
its processes. The sides of tiktoken only cut the text at every megabyte, encode it to a list or an
array, and discard the ids. Other work on the machine disturbs the CPU time, which is that of all
processes, less than the rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import in_turns, median, print_table, processor

MEGABYTE = 1_000_000
OURS = "micrograd-gpt"
TO_LIST, TO_ARRAY = "tiktoken's encode_ordinary", "tiktoken's encode_to_numpy"
SAMPLING = 0.1  # seconds between two looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="the text to repeat")
    parser.add_argument("--megabytes", type=int, default=200, help="of text to prepare (200)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="how many (one a core)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(json.loads(args.child))))
        return
    if args.text is None:
        parser.error("--text is needed")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        make_text(args.text, text, args.megabytes * MEGABYTE)
        task = {"text": str(text), "processes": args.processes}
        sides = {side: {**task, "side": side} for side in (OURS, TO_LIST, TO_ARRAY)}
        results = in_turns(sides, args.rounds)
    print(f"\n{processor()}; {args.megabytes} MB of text, {args.processes} processes\n")
    rates = {side: median(r["rate"] for r in results[side]) for side in sides}
    rows = [
        [
            side,
            f"{rates[side]:.1f}",
            *(f"{rates[side] / rates[alone]:.0%}" for alone in (TO_LIST, TO_ARRAY)),
            f"{median(r['cpu'] for r in results[side]):.1f}",
            f"{max(r['memory'] for r in results[side]):.0f}",
        ]
        for side in sides
    ]
    header = ["", "MB/s", "of the list", "of the array", "CPU ms/MB", "peak memory of all, MB"]
    print_table(header, rows)


def make_text(source: Path, path: Path, size: int) -> None:
    """Write at least `size` bytes: the paragraphs of `source` in another order each time."""
    paragraphs = source.read_text("utf-8").split("\n\n")
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8", newline="") as file:
        while file.tell() < size:
            rng.shuffle(paragraphs)
            file.write("\n\n".join(paragraphs) + "\n\n")


def measure(task: dict[str, Any]) -> dict[str, float]:
    """Time one side in this process and its children."""
    memory = Memory()
    start = time.perf_counter()
    if task["side"] == OURS:
        prepare_ours(task)
    else:
        encode_alone(task)
    elapsed = time.perf_counter() - start
    peak = memory.stop()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    megabytes = Path(task["text"]).stat().st_size / MEGABYTE
    return {
        "rate": megabytes / elapsed,
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in usages) / megabytes * 1000,
        "memory": peak,
    }


def prepare_ours(task: dict[str, Any]) -> None:
    from micrograd_gpt.text.prepare import prepare

    text = Path(task["text"])
    with tempfile.TemporaryDirectory(dir=text.parent) as cache:
        prepare(text, [text], "gpt2", "utf-8", Path(cache), task["processes"])


def encode_alone(task: dict[str, Any]) -> None:
    count = task["processes"]
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        pool.map(encode_part, [(task, i) for i in range(count)], chunksize=1)


def encode_part(part: tuple[dict[str, Any], int]) -> None:
    """Encode one process's part of the text, with tiktoken's encoder for GPT-2."""
    from micrograd_gpt.text.byte_pairs import gpt2_encoding

    task, i = part
    path, count = task["text"], task["processes"]
    encoding, _ = gpt2_encoding()
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        file.seek(size * i // count)
        left = size * (i + 1) // count - size * i // count
        while left > 0 and (block := file.read(min(MEGABYTE, left))):
            text = block.decode("utf-8", errors="replace")
            if task["side"] == TO_LIST:
                encoding.encode_ordinary(text)
            else:
                encoding.encode_to_numpy(text, disallowed_special=())
            left -= len(block)


class Memory:
    """Watches the memory of this process and its children until `stop`; 0 except on Linux.

    For each process it counts what that holds alone and a share of what it shares (PSS).
    """

    def __init__(self) -> None:
        self._peak = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Stop watching; returns the most that was seen, in MB."""
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLING):
            self._peak = max(self._peak, tree_megabytes(os.getpid()))


def tree_megabytes(pid: int) -> float:
    """The memory, in MB, of a process and of those it started."""
    total = 0.0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += tree_megabytes(int(child))
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024 / MEGABYTE
    except OSError:  # the process has ended, or this is not Linux
        pass
    return total


if __name__ == "__main__":
    main()
