"""Multiple choice and last words beside lm-evaluation-harness, on this machine, in one run.

    python benchmarks/evaluation.py                  # 124M with random weights, 8 items of a kind
    python benchmarks/evaluation.py --items 24 --rounds 3
    python benchmarks/evaluation.py --processor-time  # on a machine that others use: one core

Both sides score the same items with the same weights: ours by evaluate_gpt2.py's own parts, the
harness with `--model hf`, PyTorch in float32, at its default of one text at a time and at 16. The
items are made here, of random words, about as long as those of the tasks they are named after.
Accuracies must agree, or the benchmark fails. Loading is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    child,
    hold_to_one_core,
    in_turns,
    installed,
    median,
    peak_megabytes,
    print_table,
    processor,
)

from micrograd_gpt.evaluation.choices import ChoiceTask, LastWordTask
from micrograd_gpt.evaluation.items import Choice, LastWord
from micrograd_gpt.evaluation.records import Records
from micrograd_gpt.evaluation.running import Task, run
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support import cli
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer

# Words of a context and of an ending, and how many endings: about the means of each task's items
SHAPES = {"HellaSwag": (60, 22, 4), "PIQA": (14, 18, 2), "LAMBADA": (70, 1, 1)}
HARNESS = {"harness, batch 1": 1, "harness, batch 16": 16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=8, help="of each kind")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="on one core, count the seconds that it works and not those it waits for (Linux)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**json.loads(args.child))))
        return 0
    print(f"{processor()}; Python {sys.version.split()[0]}, NumPy {np.__version__}\n")
    if args.processor_time:
        hold_to_one_core()
    sides = ["ours"]
    if installed("lm_eval") and installed("torch") and installed("transformers"):
        sides += HARNESS
    with tempfile.TemporaryDirectory() as folder:
        shared = {"folder": folder, "items": args.items, "processor_time": args.processor_time}
        child({"side": "weights", **shared})
        tasks = {side: {"side": side, **shared} for side in sides}
        results = in_turns(tasks, args.rounds)
    report(results)
    return 0


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """A table of items per second; raises SystemExit where accuracies differ."""
    rate = {
        (side, kind): median(run[kind]["rate"] for run in runs)
        for side, runs in results.items()
        for kind in SHAPES
    }
    rows = []
    for side, runs in results.items():
        row = [side]
        for kind in SHAPES:
            ours = f" ({rate['ours', kind] / rate[side, kind]:.2f} ×)" if side != "ours" else ""
            row.append(f"{rate[side, kind]:.2f}{ours}")
        rows.append([*row, f"{median(run['peak_megabytes'] for run in runs):,.0f}"])
    print_table(["items/s (ours is … times as fast)", *SHAPES, "peak MB"], rows)
    for kind in SHAPES:
        found = {json.dumps(run[kind]["accuracies"]) for runs in results.values() for run in runs}
        if len(found) > 1:
            raise SystemExit(f"{kind}: accuracies differ: {', '.join(sorted(found))}")


def measure(side: str, folder: str, items: int, processor_time: bool) -> dict[str, Any]:
    """Items per second and accuracies of one side, by the kind of the items."""
    if side == "weights":
        GPT2(GPT2Config()).save_pretrained(folder, GPT2Tokenizer())
        return {}
    evaluate = our_side(folder) if side == "ours" else their_side(folder, HARNESS[side])
    clock = time.process_time if processor_time else time.perf_counter
    found: dict[str, Any] = {}
    for kind in SHAPES:
        made = make_items(kind, items)
        evaluate(kind, made[:1])  # what is done once, such as starting threads
        start = clock()
        accuracies = evaluate(kind, made)
        rate = items / (clock() - start)
        found[kind] = {"rate": rate, "accuracies": accuracies}
    return found | {"peak_megabytes": peak_megabytes()}


def make_items(kind: str, count: int) -> list[Choice | LastWord]:
    """Items of random common words, whose lengths vary by a third around the mean."""
    rng = np.random.default_rng(0)
    words = np.array((Path(__file__).parents[1] / "README.md").read_text("utf-8").split())
    words = np.unique([word.lower() for word in words if word.isalpha()])
    of_context, of_ending, endings = SHAPES[kind]

    def sentence(mean: float) -> str:
        length = max(1, round(mean * rng.uniform(2 / 3, 4 / 3)))
        return " ".join(rng.choice(words, length))

    made: list[Choice | LastWord] = []
    for _ in range(count):
        context = sentence(of_context)
        if endings == 1:
            made.append(LastWord(context, str(rng.choice(words))))
            continue
        texts = tuple(sentence(of_ending) for _ in range(endings))
        made.append(Choice(context, texts, int(rng.integers(endings))))
    return made


def our_side(folder: str) -> Any:
    model, tokenizer = GPT2.from_pretrained(folder), GPT2Tokenizer()

    def evaluate(kind: str, items: list[Any]) -> list[float]:
        make: Any = LastWordTask if kind == "LAMBADA" else ChoiceTask
        task: Task = make(items, tokenizer)
        found = run(model, task, Records(None, {}))
        return [found[name] for name in ("accuracy", "accuracy_by_length") if name in found]

    return evaluate


def their_side(folder: str, batch_size: int) -> Any:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch_size)

    def evaluate(kind: str, items: list[Any]) -> list[float]:
        """The accuracies that the harness works out, without its reading of a task."""
        asked = [
            (item.context, f" {ending}")
            for item in items
            for ending in (item.endings if isinstance(item, Choice) else [item.word])
        ]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
        scores = iter(model.loglikelihood(requests, disable_tqdm=True))
        if kind == "LAMBADA":
            return [float(np.mean([next(scores)[1] for _ in items]))]
        right, by_length = [], []
        for item in items:
            log_probs = np.array([next(scores)[0] for _ in item.endings])
            right.append(log_probs.argmax() == item.label)
            per_character = log_probs / [len(ending) for ending in item.endings]
            by_length.append(per_character.argmax() == item.label)
        return [float(np.mean(right)), float(np.mean(by_length))]

    return evaluate


if __name__ == "__main__":
    cli.run(main)
