"""Evaluate a model on a file.

    python evaluate_gpt2.py perplexity --model 124M --data wiki.test.txt --stride 512
    python evaluate_gpt2.py multiple-choice --model 124M --data hellaswag_val.jsonl --limit 1000
    python evaluate_gpt2.py last-word --model 124M --data lambada_test.jsonl

The report goes to stdout, everything else to stderr. A ± is a standard error: how far chance would
move a figure if other items were drawn. With --out, Ctrl-C loses nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from micrograd_gpt.evaluation.flags import make_parser
from micrograd_gpt.support import cli
from micrograd_gpt.support.cli import say

if TYPE_CHECKING:
    from micrograd_gpt.evaluation.running import Task
    from micrograd_gpt.gpt2 import GPT2
    from micrograd_gpt.text.base_tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    given = make_parser(__doc__).parse_args(argv)
    # Not for --help, which is to be quick
    from micrograd_gpt.arrays.memory import memory_errors
    from micrograd_gpt.arrays.stand_ins import highest_level

    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    highest_level()  # said now if MICROGRAD_GPT_KERNELS names none
    with memory_errors("lower --batch-size"):
        report = COMMANDS[given.command](given)
    print(as_text(report, given.json))
    return 0


def perplexity(given: argparse.Namespace) -> dict[str, Any]:
    """How well a model predicts a text."""
    from micrograd_gpt.evaluation.detokenize import DETOKENIZERS
    from micrograd_gpt.evaluation.perplexity import PerplexityTask, window_size
    from micrograd_gpt.text.documents import load_documents

    originals = load_documents(given.data, given.encoding)
    detokenize = DETOKENIZERS[given.detokenize] if given.detokenize else str
    documents = [detokenize(text) for text in originals]
    model, tokenizer = load(given)
    width = window_size(model, given.block_size)
    stride = given.stride or max(1, width // 2)
    task = PerplexityTask(documents, originals, tokenizer, width, stride, given.limit)
    how = {"stride": stride, "block_size": width}
    return measure(given, model, task, documents, how)


def multiple_choice(given: argparse.Namespace) -> dict[str, Any]:
    """How often a model finds the right one of several endings the likeliest."""
    from micrograd_gpt.evaluation.choices import ChoiceTask
    from micrograd_gpt.evaluation.items import read_choices

    items = read_choices(given.data)
    model, tokenizer = load(given)
    texts = [text for item in items for text in (item.context, *item.endings)]
    return measure(given, model, ChoiceTask(items[: given.limit], tokenizer), texts)


def last_word(given: argparse.Namespace) -> dict[str, Any]:
    """How often a model would have written the last word of a text."""
    from micrograd_gpt.evaluation.choices import LastWordTask
    from micrograd_gpt.evaluation.items import read_last_words

    items = read_last_words(given.data)
    model, tokenizer = load(given)
    texts = [f"{item.context} {item.word}" for item in items]
    return measure(given, model, LastWordTask(items[: given.limit], tokenizer), texts)


COMMANDS = {
    "perplexity": perplexity,
    "multiple-choice": multiple_choice,
    "last-word": last_word,
}


# ---------------------------------------------------------------------- what the commands share


def load(given: argparse.Namespace) -> tuple[GPT2, Tokenizer]:
    """The model and its tokenizer."""
    from micrograd_gpt.arrays.precision import emulation_note
    from micrograd_gpt.evaluation import loading

    if note := emulation_note(given.dtype, given.device):
        say(note)
    return loading.load(given.model, given.device, given.dtype)


def measure(
    given: argparse.Namespace,
    model: GPT2,
    task: Task,
    texts: list[str],
    how: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The report on a task, whose items are made of these texts; --out keeps what is done."""
    from micrograd_gpt.evaluation.records import Records, text_checksum, weights_checksum
    from micrograd_gpt.evaluation.running import run
    from micrograd_gpt.evaluation.scoring import TOKENS_AT_ONCE

    settings = {}
    if given.out is not None:
        settings = {
            "command": given.command,
            "weights": weights_checksum(model),
            "dtype": given.dtype,
            "data": text_checksum(texts),
            **(how or {}),
        }
    at_once = (given.batch_size or 0) * model.config.n_positions or TOKENS_AT_ONCE
    return run(model, task, Records(given.out, settings), at_once)


def as_text(report: dict[str, Any], as_json: bool) -> str:
    """What is printed: one JSON object, or a line for each figure."""
    from micrograd_gpt.evaluation.output import report_lines

    return json.dumps(report) if as_json else "\n".join(report_lines(report))


if __name__ == "__main__":
    cli.run(main)
