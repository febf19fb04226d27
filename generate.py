"""Prompt in, text out.

    python generate.py --prompt "The"                      # with what train_gpt2.py trained
    echo "Once upon a time" | python generate.py --model 124M --temperature 0.7
    python generate.py --prompts FILE --json               # a line each
    python generate.py --model tuned --instruction "Add." --input "2 and 3"
    python generate.py --prompt "The" --microscope page.html      # and how it came about
    python generate.py                                     # an interactive prompt
    mpirun -n 2 python generate.py --prompts FILE          # batches shared by two processes

Text goes to stdout as it is decided, whole characters only; everything else goes to stderr.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C while the rest is imported ends the script quietly
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
from typing import TYPE_CHECKING

from micrograd_gpt.generation import flags
from micrograd_gpt.generation.question import (
    BATCH_SIZE,
    add_question_flags,
    read_questions,
    reads_stdin,
)
from micrograd_gpt.runs.ranks import Ranks, check_same_work, launched, started_ranks
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError

if TYPE_CHECKING:
    from micrograd_gpt.gpt2 import GPT2
    from micrograd_gpt.text.base_tokenizer import Tokenizer
    from micrograd_gpt.text.template import Template

# This script's own defaults, and why; all others are the library's
DEFAULTS: flags.Defaults = {
    "max_new_tokens": (200, "a paragraph"),
    "temperature": (0.8, "to keep a small model's words whole"),
    "top_k": (40, "as for the samples in GPT-2's paper"),  # Radford et al. 2019, section 3.8
}


def main(argv: list[str] | None = None) -> int:
    with started_ranks() as ranks:  # one, unless a launcher such as mpirun started several
        given = make_parser().parse_args(argv)
        ranks.check_same(vars(given))
        ranks.way_back = lambda: "start generate.py again"
        return generate(given, ranks)


def generate(given: argparse.Namespace, ranks: Ranks) -> int:
    """Do what the flags ask for; returns the script's exit status."""
    # Not for --help, which is to be quick
    from micrograd_gpt.arrays.stand_ins import highest_level
    from micrograd_gpt.generation import microscope_page
    from micrograd_gpt.generation.output import Writer
    from micrograd_gpt.generation.prompt import converse

    cli.check_stdout()
    decoding = {name: value for name, value in vars(given).items() if name in flags.NAMES}
    choices = flags.Choices(decoding, DEFAULTS)
    choices.settings()  # what is wrong with them is said before a large model is loaded
    highest_level()  # and so is a mistake in MICROGRAD_GPT_KERNELS
    ranks.check_stdin(reads_stdin(given))
    questions = ranks.collect(read_questions(given) if ranks.is_first else [])[0]
    if ranks.size > 1:
        check_shared(given, questions)
    if given.microscope is not None:
        microscope_page.check_page(given.microscope, questions)
    model, tokenizer, template = load(given, ranks)
    cli.write_utf8()
    how = given.json, template, given.special_tokens, given.batch_size or BATCH_SIZE
    if template and questions is not None and given.instruction is None:
        cli.say(
            "note: this model was tuned on instructions, and a prompt is continued without their "
            "template: --instruction has one answered, evaluate_gpt2.py generate a file of them"
        )
    writer = Writer(model, tokenizer, *how, ranks.do)
    if questions is None:
        return converse(writer, choices)
    settings = choices.settings(tokenizer.end_of_text)
    flags.tell_idle(decoding, settings)
    if given.instruction is not None:
        finished = writer.answer(questions, given.input, settings, choices.stop_texts)
    else:
        finished = writer.write(questions, settings, choices.stop_texts)
    if finished and given.microscope is not None:
        microscope_page.write_page(given.microscope, model, tokenizer, writer.texts)
    if ranks.size > 1 and not finished:
        raise KeyboardInterrupt  # which ends all ranks
    return 0 if finished else 130


def check_shared(given: argparse.Namespace, questions: list[str] | None) -> None:
    """UserError for what several ranks cannot share."""
    launcher, size, _ = launched()
    others = f": start generate.py without {launcher}"
    if questions is None:
        whole = "the interactive prompt"
    elif given.microscope is not None:
        whole = "--microscope"
    elif len(questions) == 1:
        whole, others = "one prompt, with all of its samples,", f"{others}, or give several prompts"
    else:
        return
    raise UserError(f"{launcher} started {size} processes, and {whole} runs in one{others}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(description="Prompt in, text out.")
    add_question_flags(parser)
    flags.add_model_flags(parser)
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="with --device gpu: round products to 11 bits (default: off)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a sample: prompt, text, token_ids, log_probs (the model's, natural "
        "logarithms), stopped (why), tokens_per_second (default: off, plain text)",
    )
    parser.add_argument(
        "--microscope",
        type=cli.some_text,
        metavar="PAGE",
        help="also write an HTML file that shows how the text came about: probabilities, attention,"
        " what each layer said, what moved which logit (default: off)",
    )
    flags.add_flags(parser, DEFAULTS)
    return parser


def load(given: argparse.Namespace, ranks: Ranks) -> tuple[GPT2, Tokenizer, Template | None]:
    """The model, its tokenizer, and its template where it was tuned on instructions."""
    from micrograd_gpt.arrays.devices import resolve_device, set_tf32
    from micrograd_gpt.weights.checksum import weights_checksum
    from micrograd_gpt.weights.language_model import load_language_model

    ranks.use_device(resolve_device(given.device))
    set_tf32(given.tf32, given.device)
    answers = given.instruction is not None
    with ranks.first_on_machine():
        loaded = load_language_model(given.model, given.device, given.dtype, answers, decoding=True)
    model, tokenizer, template = loaded
    tokenizer.check_special(given.special_tokens)
    if ranks.size > 1:
        check_same_work(ranks, {"weights of CRC-32": weights_checksum(model)})
    return model, tokenizer, template


if __name__ == "__main__":
    cli.run(main)
