"""What lm-evaluation-harness finds for a model's folder, as it is, beside what we find.

    pip install -e . "lm_eval[hf]"
    python benchmarks/in_lm_eval.py --model out

The harness is run by its own command, which takes any of its tasks and needs none of ours:

    lm-eval run --model hf --model_args pretrained=out --device cpu \\
        --include_path benchmarks/lm_eval_tasks --tasks python_continuations

The three tasks in benchmarks/lm_eval_tasks are small, and each asks a model in another way: for the
likelihoods of continuations, for that of a whole text, and to generate. Exits with 1 if a figure
differs. The harness ends what it generates at a token, which a tokenizer of characters lacks.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.tokenizer_files import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "benchmarks" / "lm_eval_tasks"
FIGURES = {  # of each task
    "python_continuations": "acc,none",
    "python_bits": "bits_per_byte,none",
    "python_first_word": "exact_match,first_word",
}
GENERATED = 16  # tokens, as the task says


def main() -> int:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="out", help="the folder of a model (out)")
    folder = str(Path(parser.parse_args().model).resolve())
    model, tokenizer = GPT2.from_pretrained(folder), load_tokenizer(folder)
    if not common.installed("lm_eval"):
        return 1
    if tokenizer.end_of_text is None:
        raise UserError(
            f"{folder} has a tokenizer without an end-of-text token, which the harness needs: "
            "train with another, such as --tokenizer byte"
        )
    lines = (TASKS / "continuations.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    figures = (accuracy, bits_per_byte, first_words)
    ours = [figure(model, tokenizer, questions) for figure in figures]
    theirs = in_the_harness(folder)
    rows = [
        [task, figure.partition(",")[0], f"{mine:.4f}", f"{found:.4f}"]
        for (task, figure), mine, found in zip(FIGURES.items(), ours, theirs, strict=True)
    ]
    common.print_table(["task", "figure", "ours", "lm-evaluation-harness"], rows)
    return 0 if np.allclose(ours, theirs, rtol=1e-4) else 1


def in_the_harness(folder: str) -> list[float]:
    """The figures that lm-evaluation-harness prints."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", f"pretrained={folder}", "--batch_size", "8"]
        command += ["--include_path", str(TASKS), "--tasks", ",".join(FIGURES)]
        subprocess.run(
            [*command, "--output_path", work], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        (file,) = Path(work).rglob("results_*.json")
        results: dict[str, Any] = json.loads(file.read_text("utf-8"))["results"]
    return [results[task][figure] for task, figure in FIGURES.items()]


# ------------------------------------------------------------------------------------- our figures

Questions = list[dict[str, Any]]


def accuracy(model: GPT2, tokenizer: Tokenizer, questions: Questions) -> float:
    """How often the right continuation is the likelier one."""

    def likelihood(text: str, choice: str) -> float:
        known = len(tokenizer.encode(text))
        return log_probabilities(model, tokenizer.encode(text + choice))[known - 1 :].sum()

    right = [
        np.argmax([likelihood(q["text"], choice) for choice in q["choices"]]) == q["answer"]
        for q in questions
    ]
    return float(np.mean(right))


def bits_per_byte(model: GPT2, tokenizer: Tokenizer, questions: Questions) -> float:
    """How many bits a byte of the texts with the right continuations takes."""
    nats = size = 0.0
    for question in questions:
        text = question["text"] + question["choices"][question["answer"]]
        ids = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(text)])
        nats -= log_probabilities(model, ids).sum()
        size += len(text.encode())
    return nats / size / math.log(2)


def first_words(model: GPT2, tokenizer: Tokenizer, questions: Questions) -> float:
    """How often the first word of what the model generates is the right one."""
    right = []
    for question in questions:
        ids = tokenizer.encode(question["text"])
        found = model.generate(
            ids, max_new_tokens=GENERATED, temperature=0, end_of_text=tokenizer.end_of_text
        )
        words = tokenizer.decode(found[len(ids) :]).split()
        right.append(words[:1] == [question["choices"][question["answer"]].strip()])
    return float(np.mean(right))


def log_probabilities(model: GPT2, ids: np.ndarray) -> np.ndarray:
    """The log-probability (T - 1,) of each id (T,) but the first, given those before it."""
    with no_grad():
        logits = model(ids[None, :-1])[0].data.astype(np.float64)  # (T - 1, V)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p[np.arange(len(ids) - 1), ids[1:]]


if __name__ == "__main__":
    cli.run(main)
