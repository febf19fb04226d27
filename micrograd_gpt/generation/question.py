"""What a user asks of a model: texts to continue, or instructions to follow."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import is_stdin, is_stream

BATCH_SIZE = 16


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is asked, from --prompt to --batch-size."""
    question = parser.add_mutually_exclusive_group()
    question.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="a text to continue; repeatable. - or a pipe reads one text, of any number of lines, "
        "from stdin (without the last line end); left out on a terminal: an interactive prompt. "
        "An empty one starts a new text",
    )
    question.add_argument(
        "--prompts",
        type=cli.some_text,
        metavar="FILE",
        help="many texts to continue, one a line (blank lines do not count), or one a record of a "
        ".jsonl, .json, .csv, .tsv or .parquet, or of JSON in a pipe; - reads stdin. The results "
        "come in the same order",
    )
    question.add_argument(
        "--instruction",
        metavar="TEXT",
        action="append",
        help="what a model that was tuned on instructions (finetune_gpt2.py instruct) is to do; "
        "repeatable; - reads it from stdin. Only the answer is shown",
    )
    parser.add_argument(
        "--input",
        metavar="TEXT",
        default="",
        help="with --instruction: what to do it to (default: none)",
    )
    parser.add_argument(
        "--text-field",
        type=cli.some_text,
        metavar="NAME",
        help="the key or column of --prompts that holds a prompt (default: prompt)",
    )
    parser.add_argument(
        "--encoding",
        type=cli.some_text,
        metavar="NAME",
        help="of the file of --prompts; the mark of UTF-8, 16 or 32 is noticed (default: utf-8)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=cli.positive_int,
        help=f"how many of several prompts are decoded at once (default: {BATCH_SIZE})",
    )
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="take <|endoftext|> in a prompt for the token (default: off, these 13 characters)",
    )


def read_questions(given: argparse.Namespace) -> list[str] | None:
    """The texts of --instruction, of --prompt, --prompts or of stdin; None: ask on the terminal.

    Raises UserError where stdin is closed or not text, for a file of prompts that cannot be read or
    holds none, and for an --input alone.
    """
    if given.input and given.instruction is None:
        raise UserError("--input is for an --instruction: give that too")
    if given.batch_size is not None and (getattr(given, "num_beams", None) or 1) > 1:
        raise UserError("--batch-size does nothing with --num-beams: leave one of them out")
    if given.prompts is not None:
        return _read_prompts(given.prompts, given.text_field, given.encoding or "utf-8")
    for flag, value in (("--text-field", given.text_field), ("--encoding", given.encoding)):
        if value is not None:
            raise UserError(f"{flag} is for a file of --prompts: give that too")
    texts = given.prompt if given.instruction is None else given.instruction
    if (given.batch_size or 1) > 1 and len(texts or ()) < 2:
        raise UserError("--batch-size is for several prompts: give more of them, or leave it out")
    if texts is None:
        if sys.stdin is not None and sys.stdin.isatty():
            return None
        texts = ["-"]
    if texts.count("-") > 1:
        raise UserError("- reads all of stdin, so it can be given only once")
    return [_stdin("--prompt") if text == "-" else text for text in texts]


def reads_stdin(given: argparse.Namespace) -> bool:
    """Whether `read_questions` reads stdin, or asks there."""
    if given.prompts is not None:
        return given.prompts == "-" or is_stdin(given.prompts)
    texts = given.prompt if given.instruction is None else given.instruction
    return texts is None or "-" in texts


def _stdin(flag: str, encoding: str = "utf-8") -> str:
    """What stdin holds, without the last line end."""
    from micrograd_gpt.text.decoding import decoded

    if sys.stdin is None:
        raise UserError(f"stdin is closed: give the text with {flag}")
    text = decoded(sys.stdin.buffer.read(), "the prompt", encoding)
    return text.removesuffix("\n").removesuffix("\r")


def _read_prompts(source: str, text_field: str | None, encoding: str) -> list[str]:
    from micrograd_gpt.text.decoding import Form, Notes, text_chunks
    from micrograd_gpt.text.documents import LIKE_JSON
    from micrograd_gpt.text.records import RECORD_SUFFIXES, begins_with_record, record_texts

    path, form, notes = Path(source), Form(encoding, text_field or "prompt"), Notes()
    text, is_piped = None, source == "-" or is_stream(source)
    is_plain = path.suffix.lower() not in RECORD_SUFFIXES
    if is_plain and not is_piped and text_field is not None:
        raise UserError(
            f"--text-field is for records ({', '.join(RECORD_SUFFIXES)}), and {source} is read "
            "line by line: leave it out"
        )
    if source == "-":
        path, text = Path("stdin"), _stdin("--prompt", encoding)
    elif is_plain:
        text = "".join(text_chunks(path, form, lambda _: None, notes))
    if text is None or (is_piped and begins_with_record(text, form.field)):
        texts = list(record_texts(path, form, lambda _: None, notes, text))
    else:
        texts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
        if is_piped and (text_field is not None or LIKE_JSON.match(text)):
            notes.piped.add(path)
        elif LIKE_JSON.match(text):
            notes.like_json.add(path)
    notes.tell(source)
    if not texts:
        raise UserError(f"{source} holds no prompts: write one a line")
    return texts
