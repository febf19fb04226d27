"""What batching and speculation save in decoding: ratios of runs that alternate in one process.

    python benchmarks/decoding.py                    # a small model, trained on the spot
    python benchmarks/decoding.py --model 124M       # or any checkpoint folder
    python benchmarks/decoding.py --processes 10     # is 124M as fast in every process?
    python benchmarks/decoding.py --together 8       # 124M: so many samples as one batch, and alone

A ratio is the median time of one kind of run divided by that of the other; the range of each is
printed beside it. The processes decode one after another, with weights drawn at random, and each
tells its median milliseconds a token, those of processor time, and how much of its memory lies in
huge pages. Samples of 124M that are decoded together have such weights too, in each type.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import child, median, print_table, processor
from tqdm import tqdm

from micrograd_gpt import optim
from micrograd_gpt.generation.sampling import decode, generate, start_samples
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support import cli
from micrograd_gpt.text.documents import load_documents
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import GPT2Tokenizer, Tokenizer, make_tokenizer
from micrograd_gpt.text.windows import Windows
from micrograd_gpt.weights.pretrained import from_pretrained, unwritten
from micrograd_gpt.weights.saving import save_pretrained

# Text that repeats itself, as code and data do
RECORDS = "".join(
    f'{{"id": {i}, "name": "item {i}", "size": {i * 7919 % 90 + 10}, "in_stock": true}},\n'
    for i in range(1000, 4000)
)


def main() -> int:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a checkpoint folder or a size (a small model, trained here)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "int8"],
        default="float32",
        help="type of the weights of --model (float32)",
    )
    parser.add_argument("--steps", type=cli.positive_int, default=300, help="training steps (300)")
    parser.add_argument("--runs", type=cli.positive_int, default=7, help="runs of each kind (7)")
    parser.add_argument(
        "--new-tokens", type=cli.positive_int, default=150, help="new tokens a run (150)"
    )
    parser.add_argument("--processes", type=cli.positive_int, help="compare so many, at batch 1")
    parser.add_argument("--together", type=cli.positive_int, help="so many samples, beside one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        print(json.dumps(decode_124m()))
        return 0
    if flags.processes:
        compare_processes(flags.processes)
        return 0
    if flags.together:
        compare_together(flags.together, flags.runs)
        return 0
    if flags.model is None:
        model, tokenizer = train(flags.steps)
    else:
        model = from_pretrained(GPT2, flags.model, dtype=flags.dtype)
        folder = Path(flags.model)
        tokenizer = load_tokenizer(folder) if folder.is_dir() else GPT2Tokenizer()

    length = model.config.n_positions // 2
    new = min(flags.new_tokens, length)
    ordinary, repeating = (
        tokenizer.encode(text)[:length] for text in (load_documents("pydocs")[40], RECORDS)
    )

    def run(prompt: np.ndarray, **settings: Any) -> Callable[[], object]:
        return lambda: generate(model, prompt, new, end_of_text=None, **settings)

    count = sum(p.size for p in model.parameters())
    print(f"{count:,} parameters, prompts of {length} tokens, {new} new ones")
    alone = [run(ordinary, temperature=0.8, seed=i) for i in range(8)]
    batch = run(ordinary, temperature=0.8, num_samples=8)
    compare(
        "8 samples", ("one by one", lambda: [f() for f in alone]), ("a batch", batch), flags.runs
    )
    for text, prompt in (("ordinary text", ordinary), ("records", repeating)):
        for mode, temperature in (("greedy", 0.0), ("at temperature 0.8", 0.8)):
            plain = run(prompt, temperature=temperature)
            guess = run(prompt, temperature=temperature, speculate="prompt-lookup")
            title = f"{text}, {mode}"
            compare(title, ("plain", plain), ("prompt-lookup", guess), flags.runs)
    several: dict[str, Any] = {"temperature": 0.8, "num_samples": 8}
    plain, guess = run(repeating, **several), run(repeating, **several, speculate="prompt-lookup")
    title = "records, a batch of 8 samples (which does not speculate)"
    compare(title, ("plain", plain), ("prompt-lookup", guess), flags.runs)
    return 0


def compare_processes(count: int) -> None:
    """One row a process, and the ratio of the slowest to the fastest."""
    print(processor())
    found = []
    for _ in tqdm(range(count), desc="processes", disable=None):
        found.append(child({}))
    names = ["ms a token", "of processor time", "MB in huge pages"]
    rows = [[str(i + 1), *(f"{one[name]:.1f}" for name in names)] for i, one in enumerate(found)]
    print_table(["process", *names], rows)
    for name in names[:2]:
        values = [one[name] for one in found]
        print(f"{name}: the slowest process takes {max(values) / min(values):.2f} × the fastest's")


def compare_together(count: int, runs: int) -> None:
    """Milliseconds for a token of one sample, and for one of each of `count`, in each type."""
    print(processor())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(random_124m(), folder)
        for dtype in ("float32", "bfloat16", "float16", "int8"):
            model = from_pretrained(GPT2, folder, dtype=dtype)
            times: dict[int, list[float]] = {1: [], count: []}
            for _ in tqdm(range(runs), desc=dtype, disable=None):
                for samples, medians in times.items():
                    medians.append(median(times_of_tokens(model, samples)[0]))
            one, all_ = (median(medians) for medians in times.values())
            rows.append([dtype, f"{one:.1f}", f"{all_:.1f}", f"{count * one / all_:.2f} ×"])
    print_table(["124M", "ms for one sample", f"ms for {count}", "as fast as one by one"], rows)


def decode_124m() -> dict[str, float]:
    """Medians, over 40 tokens after 32, of a model of 124M's shape in float32."""
    model = random_124m()
    wall, used = times_of_tokens(model, 1)
    smaps = Path("/proc/self/smaps_rollup")  # Linux's
    huge = smaps.read_text().split("AnonHugePages:")[1].split()[0] if smaps.exists() else "nan"
    return {
        "ms a token": median(wall),
        "of processor time": median(used),
        "MB in huge pages": float(huge) / 1024,
    }


def random_124m() -> GPT2:
    """A model of 124M's shape."""
    model, rng = unwritten(GPT2Config()).eval(), np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data[...] = 0.02 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model


def times_of_tokens(model: GPT2, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds for each of 40 tokens after 32 of so many samples; those of processor time."""
    seen: list[tuple[float, float]] = []
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 32).tolist()
    settings = Settings(max_new_tokens=41, temperature=0.0, end_of_text=None, num_samples=samples)
    for _ in decode(model, start_samples([prompt], settings), settings):
        seen.append((time.perf_counter(), time.process_time()))
    wall, used = (np.diff(times) * 1e3 for times in zip(*seen[::samples], strict=True))
    return wall, used


def train(steps: int) -> tuple[GPT2, Tokenizer]:
    """A small character-level model, trained half on Python's manual and half on records."""
    manual = "\n\n".join(load_documents("pydocs"))
    tokenizer = make_tokenizer("char", manual + RECORDS)
    shape: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 256}
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **shape))
    optimizer = optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    texts = [Windows(tokenizer.encode(text), 256) for text in (manual, RECORDS)]
    for step in tqdm(range(steps), desc="training", disable=None):
        optimizer.lr = optim.cosine_schedule(step, steps, 50, 2e-3, 2e-4)
        (manual_ids, manual_next), (ids, next_ids) = (text.batch(0, step, 4) for text in texts)
        loss = model.loss(manual_ids, manual_next) + model.loss(ids, next_ids)
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def compare(
    title: str,
    first: tuple[str, Callable[[], object]],
    second: tuple[str, Callable[[], object]],
    runs: int,
) -> None:
    """Time both in turns, after one run of each to warm up, and print the ratio of the medians."""
    seconds: dict[str, list[float]] = {}
    for _ in range(runs + 1):
        for name, run in (first, second):
            started = time.perf_counter()
            run()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    medians = []
    for name, (_, *times) in seconds.items():
        medians.append(statistics.median(times))
        name += f" {medians[-1]:.3f} s ({min(times):.3f}–{max(times):.3f})"
        title += f"; {name}"
    print(f"{title}: {medians[0] / medians[1]:.2f} times as fast", flush=True)


if __name__ == "__main__":
    cli.run(main)
