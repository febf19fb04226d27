"""Evaluate a model on a file.

    python evaluate_gpt2.py perplexity --model 124M --data wiki.test.txt --stride 512
    python evaluate_gpt2.py multiple-choice --model 124M --data hellaswag_val.jsonl --limit 1000
    python evaluate_gpt2.py last-word --model 124M --data lambada_test.jsonl
    python evaluate_gpt2.py classify --model spam/best --data spam-test.tsv
    python evaluate_gpt2.py generate --model tuned --data questions.jsonl --out answers
    mpirun -n 2 python evaluate_gpt2.py …               # the same, shared by two processes

The report goes to stdout, everything else to stderr; generate without --out has its answers on
stdout, and the report on stderr. A ± is a standard error: how far chance would move a figure if
other items were drawn. With --out, Ctrl-C loses nothing.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C while the rest is imported ends the script quietly
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from micrograd_gpt.evaluation.flags import make_parser
from micrograd_gpt.runs.ranks import Ranks, check_same_work, started_ranks
from micrograd_gpt.support import cli
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError, about

if TYPE_CHECKING:
    from micrograd_gpt.evaluation.running import Task
    from micrograd_gpt.gpt2 import GPT2
    from micrograd_gpt.nn import Module
    from micrograd_gpt.text.base_tokenizer import Tokenizer
    from micrograd_gpt.text.template import Template

    Result = tuple[Task, dict[str, Any]]  # what was evaluated, and the report on it


def main(argv: list[str] | None = None) -> int:
    cli.write_utf8()
    with started_ranks() as ranks:  # one, unless a launcher such as mpirun started several
        given = make_parser(__doc__).parse_args(argv)
        ranks.check_same(vars(given))
        ranks.way_back = lambda: way_back(given)
        return evaluate(given, ranks)


def evaluate(given: argparse.Namespace, ranks: Ranks) -> int:
    """Do what the flags ask for; returns the script's exit status."""
    # Not for --help, which is to be quick
    from micrograd_gpt.arrays.devices import resolve_device
    from micrograd_gpt.arrays.memory import memory_errors
    from micrograd_gpt.arrays.stand_ins import highest_level
    from micrograd_gpt.runs.lock import only_writer
    from micrograd_gpt.support.files import is_stdin

    if given.out is None:  # which keeps the report
        cli.check_stdout()
    highest_level()  # said now if MICROGRAD_GPT_KERNELS names none
    ranks.check_stdin(is_stdin(given.data))
    commands = {
        "perplexity": perplexity,
        "multiple-choice": multiple_choice,
        "last-word": last_word,
        "classify": classify,
        "generate": generate,
    }
    ranks.use_device(resolve_device(given.device))
    writer = only_writer(given.out) if given.out and ranks.is_first else nullcontext()
    with memory_errors("lower --batch-size"), writer:
        task, report = commands[given.command](given, ranks)
    text = json.dumps(report, ensure_ascii=False) if given.json else "\n".join(task.lines(report))
    if given.command == "generate" and given.out is None:
        say(text)  # stdout has the answers
    else:
        print(text)
    return 0


def way_back(given: argparse.Namespace) -> str:
    """What is said where one of several ranks has ended."""
    if given.out is None:
        return "nothing is kept without --out"
    return f"{given.out} has the results so far: the same command goes on from there"


# ------------------------------------------------------------------------- what can be evaluated


def perplexity(given: argparse.Namespace, ranks: Ranks) -> Result:
    """How well a model predicts a text."""
    from micrograd_gpt.evaluation.detokenize import DETOKENIZERS
    from micrograd_gpt.evaluation.perplexity import PerplexityTask, check_no_shards, window_size
    from micrograd_gpt.text.decoding import Form
    from micrograd_gpt.text.documents import check_text_field, find_files, load_documents

    check_text_field(given.text_field, [given.data])
    check_no_shards(given.data)
    with ranks.first_on_machine():  # which fetches a text
        files = None if given.data == "pydocs" else find_files(given.data)
    model, tokenizer, _ = load(given, ranks)
    form = Form(given.encoding, given.text_field, given.line_ends, given.special_tokens)
    originals = load_documents(given.data, form.for_tokenizer(tokenizer.name), files)
    detokenize = DETOKENIZERS[given.detokenize] if given.detokenize else str
    documents = [detokenize(text) for text in originals]
    width = window_size(model, given.block_size)
    stride = given.stride or max(1, width // 2)
    with about(given.data):
        how_many = width, stride, given.limit
        task = PerplexityTask(documents, originals, tokenizer, *how_many, given.special_tokens)
    how: dict[str, Any] = {"stride": stride, "block_size": width}
    if given.special_tokens:  # only then, so that folders from before there was the flag go on
        how["special_tokens"] = True
    return measure(given, ranks, model, task, documents, how)


def multiple_choice(given: argparse.Namespace, ranks: Ranks) -> Result:
    """How often a model finds the right one of several endings the likeliest."""
    from micrograd_gpt.evaluation.choices import ChoiceTask
    from micrograd_gpt.evaluation.items import read_choices

    items = read_choices(given.data, given.encoding)
    model, tokenizer, _ = load(given, ranks)
    texts = [text for item in items for text in (item.context, *item.endings, str(item.label))]
    return measure(given, ranks, model, ChoiceTask(items[: given.limit], tokenizer), texts)


def last_word(given: argparse.Namespace, ranks: Ranks) -> Result:
    """How often a model would have written the last word of a text."""
    from micrograd_gpt.evaluation.choices import LastWordTask
    from micrograd_gpt.evaluation.items import read_last_words

    items = read_last_words(given.data, given.encoding)
    model, tokenizer, _ = load(given, ranks)
    texts = [f"{item.context} {item.word}" for item in items]
    return measure(given, ranks, model, LastWordTask(items[: given.limit], tokenizer), texts)


def classify(given: argparse.Namespace, ranks: Ranks) -> Result:
    """How often a classifier labels a text as it is labelled, and what it takes for what."""
    from micrograd_gpt.evaluation.labels import ClassificationTask
    from micrograd_gpt.tuning.classifier import load_with_tokenizer
    from micrograd_gpt.tuning.labelled import columns_of, read_examples

    examples = read_examples(given.data, columns_of(given), given.encoding)
    if given.model is None:
        raise UserError("--model is missing: give the folder of a classifier")
    with ranks.first_on_machine():
        model, tokenizer = load_with_tokenizer(given.model, given.device, given.dtype)
    task = ClassificationTask(examples[: given.limit], model, tokenizer)
    texts = [text for example in examples for text in (example.text, example.label or "")]
    _, report = measure(given, ranks, model, task, texts)
    if given.out is not None and ranks.is_first:
        task.draw(report, given.out)
    return task, report


def generate(given: argparse.Namespace, ranks: Ranks) -> Result:
    """What a model answers to prompts or instructions; how often that is the right answer."""
    from micrograd_gpt.evaluation.questions import GenerationTask, read_questions
    from micrograd_gpt.generation.flags import tell_idle
    from micrograd_gpt.generation.settings import Settings

    how = {
        name: getattr(given, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")
    }
    tell_idle(how, Settings(**how))  # what is wrong is said before a large model is loaded
    questions = read_questions(given.data, given.encoding)
    model, tokenizer, template = load(given, ranks)
    settings = Settings(**how, end_of_text=tokenizer.end_of_text, vocab_size=tokenizer.vocab_size)
    task = GenerationTask(questions[: given.limit], tokenizer, template, settings, given.stop)
    texts = [json.dumps(question.fields, ensure_ascii=False) for question in questions]
    template_text = template.text if template else None
    how |= {"stop": given.stop, "template": template_text}
    return measure(given, ranks, model, task, texts, how)


# ---------------------------------------------------------------------- what the commands share


def load(given: argparse.Namespace, ranks: Ranks) -> tuple[GPT2, Tokenizer, Template | None]:
    """The language model, its tokenizer, and its template where it was tuned on instructions."""
    from micrograd_gpt.weights.language_model import load_language_model

    with ranks.first_on_machine():  # which fetches it
        return load_language_model(given.model, given.device, given.dtype)


def measure(
    given: argparse.Namespace,
    ranks: Ranks,
    model: Module,
    task: Task,
    texts: list[str],
    how: dict[str, Any] | None = None,
) -> Result:
    """A task, which is made of all these texts, and the report on it; --out keeps what is done."""
    from micrograd_gpt.evaluation.records import Records, text_checksum
    from micrograd_gpt.evaluation.running import run
    from micrograd_gpt.weights.checksum import weights_checksum

    settings = {}
    if given.out is not None or ranks.size > 1:
        settings = {
            "command": given.command,
            "weights": weights_checksum(model),
            "dtype": given.dtype,
            "data": text_checksum(texts),
            **(how or {}),
        }
    if ranks.size > 1:
        check_same_work(ranks, settings)
    show = print_row if given.command == "generate" and given.out is None else None
    records = Records(given.out if ranks.is_first else None, settings, show)
    records.rows = ranks.collect(records.rows)[0]  # what is done, whichever rank it was done by
    return task, run(model, task, records, given.batch_size, ranks.do)


def print_row(row: dict[str, Any]) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    cli.run(main)
