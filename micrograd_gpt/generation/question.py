"""What a user asks of a model: a text to continue, or an instruction to follow."""

from __future__ import annotations

import argparse
import sys

from micrograd_gpt.support.errors import UserError


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags --prompt, --instruction and --input."""
    question = parser.add_mutually_exclusive_group()
    question.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; - or a pipe reads it from stdin (without the last line end); "
        "left out on a terminal: an interactive prompt. An empty one starts a new text",
    )
    question.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what a model that was tuned on instructions (finetune_gpt2.py instruct) is to do; "
        "- reads it from stdin. Only the answer is shown",
    )
    parser.add_argument(
        "--input",
        metavar="TEXT",
        default="",
        help="with --instruction: what to do it to (default: none)",
    )


def read_question(given: argparse.Namespace) -> str | None:
    """The text of --instruction, of --prompt or of stdin; None: ask on the terminal.

    Raises UserError where stdin is closed or does not hold UTF-8, and for an --input alone.
    """
    if given.input and given.instruction is None:
        raise UserError("--input is for an --instruction: give that too")
    text = given.prompt if given.instruction is None else given.instruction
    if text is not None and text != "-":
        return text
    if sys.stdin is None:
        raise UserError("stdin is closed: give the text with --prompt")
    if text is None and sys.stdin.isatty():
        return None
    data = sys.stdin.buffer.read()
    try:
        read = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; convert it to UTF-8"
        ) from None
    return read.removesuffix("\n").removesuffix("\r")
