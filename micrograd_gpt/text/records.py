"""Files of records, of which one field is a text: .jsonl, .json, .csv, .tsv and .parquet.

.jsonl .ndjson       an object a line, or a list of objects
.json                the same, or one object
.csv .tsv .parquet   tables (tables.py)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from micrograd_gpt.support.cli import is_utf8
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import with_lf
from micrograd_gpt.text.decoding import Form, Notes, text_chunks
from micrograd_gpt.text.tables import columns, no_field, parquet_columns, short, table_rows

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FLAG = "--text-field, or remove the file"  # what helps where the field is not there
NO_TEXT = "without a text (null)"
NO_CHARACTER = "with half a character (a lone surrogate)"

OnRead = Callable[[int], object]
Values = Iterator[tuple[str, Any]]  # where a value stands ("line 3"), and the value


def record_texts(
    path: Path, form: Form, on_read: OnRead, notes: Notes, piped: str | None = None
) -> Iterator[str]:
    """The text of each record of a file, in order: that of its field `form.field`.

    `piped` is all that a stream held, which is JSON as in a file called .json.

    A record whose text is null, or no Unicode because it has a lone surrogate, is left out, and
    `notes` counts it. Raises UserError, naming the place, for what is not a record, for one that
    lacks the field, and for a value that is not a text.
    """
    if piped is None:
        values = _values(path, form, on_read, notes)
    else:
        values = _json_values(path, form.field, piped)
    for place, text in values:
        if text is None:
            notes.skipped[NO_TEXT] += 1
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{path}, {place}: {form.field!r} is {short(text)}, not a text: correct it, or "
                "name another with --text-field"
            )
        if not is_utf8(text):
            notes.skipped[NO_CHARACTER] += 1
            continue
        if form.line_ends == "lf" and "\r" in text:
            notes.mended.add(path)
            text = with_lf(text)
        yield text


def _values(path: Path, form: Form, on_read: OnRead, notes: Notes) -> Values:
    if path.suffix.lower() == ".parquet":
        return _only_value(parquet_columns(path, [form.field], FLAG, on_read))
    # Line ends are changed in the texts alone: what is between records is no text
    chunks = text_chunks(path, Form(form.encoding), on_read, notes)
    match path.suffix.lower():
        case ".csv" | ".tsv":
            rows = table_rows(path, lines(chunks))
            return _only_value(columns(path, rows, [form.field], FLAG))
        case ".json":
            return _json_values(path, form.field, "".join(chunks))
    return _jsonl_values(path, form.field, chunks)


def _only_value(records: Iterable[tuple[str, list[Any]]]) -> Values:
    for place, (value,) in records:
        yield place, value


def lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text, without their line ends."""
    begun: list[str] = []  # the parts of a line that is not complete yet
    for chunk in chunks:
        *complete, rest = chunk.split("\n")
        for line in complete:
            yield "".join([*begun, line])
            begun = []
        begun.append(rest)
    yield "".join(begun)


# ------------------------------------------------------------------------------------------ JSON


def _jsonl_values(path: Path, field: str, chunks: Iterable[str]) -> Values:
    rows = lines(chunks)
    first = next(rows)
    if first.lstrip().startswith("["):  # some call a list .jsonl
        yield from _json_values(path, field, "\n".join([first, *rows]))
    else:
        yield from _line_values(path, field, chain([first], rows))


def _line_values(path: Path, field: str, rows: Iterable[str]) -> Values:
    for number, line in enumerate(rows, start=1):
        if line.strip():
            place = f"line {number}"
            yield place, _in_record(path, place, field, _parsed(path, place, line))


def _json_values(path: Path, field: str, text: str) -> Values:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("[") and not is_line_by_line(text):
            raise _not_json(path, "the list", error) from error
        yield from _line_values(path, field, text.split("\n"))  # many call a file of lines .json
        return
    records = content if isinstance(content, list) else [content]
    for number, record in enumerate(records, start=1):
        yield f"record {number}", _in_record(path, f"record {number}", field, record)


def is_line_by_line(text: str) -> bool:
    """Whether a text is of several JSON values, each on a line of its own, as its first one is."""
    first, _, others = text.strip().partition("\n")
    if not others.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def begins_with_record(text: str, field: str) -> bool:
    """Whether a text is a JSON value, or has one on its first line, that is an object with this
    field, or a list whose first is.
    """
    for part in (text.strip().partition("\n")[0], text):
        with suppress(ValueError, RecursionError):
            value = json.loads(part)
            first = value[0] if isinstance(value, list) and value else value
            return isinstance(first, dict) and field in first
    return False


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(path, place, error) from error


def json_problem(error: ValueError | RecursionError) -> str:
    """What is wrong with a JSON text, without Python's advice on how to program around it."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition("; use sys.")[0]


def _not_json(path: Path, place: str, error: ValueError | RecursionError) -> UserError:
    reason = json_problem(error)
    return UserError(f"{path}, {place}: this is not JSON ({reason}): correct it, or remove it")


def _in_record(path: Path, place: str, field: str, record: Any) -> Any:
    """The value of the field in a record; None for a record that is null."""
    if record is None:
        return None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}, {place}: this is {short(record)}, not an object with the key {field!r}: "
            "correct it, or remove it"
        )
    if field not in record:
        raise no_field(f"{path}, {place}", field, list(record), FLAG)
    return record[field]
