"""Files of records, of which one field is a text: .jsonl, .json, .csv, .tsv and .parquet.

.jsonl, .ndjson   an object a line
.json             a list of objects, one object, or an object a line
.csv              a header, then records, with quotes where needed (RFC 4180)
.tsv              a header, then a record a line, fields between tabs, no quotes
.parquet          a column of strings (pyarrow reads it)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from micrograd_gpt.support.cli import counted
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.decoding import CHUNK, Form, Notes, text_chunks

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ROWS = 256  # of a .parquet file, read at a time
LONGEST_FIELD = 1 << 30  # characters of a field in a .csv file
NO_TEXT = "without a text (null)"
NO_CHARACTER = "with half a character (a lone surrogate)"

OnRead = Callable[[int], object]
Values = Iterator[tuple[str, Any]]  # where a value stands ("line 3"), and the value


def record_texts(path: Path, form: Form, on_read: OnRead, notes: Notes) -> Iterator[str]:
    """The text of each record of a file, in order: that of its field `form.field`.

    A record whose text is null, or no Unicode because it has a lone surrogate, is left out, and
    `notes` counts it. Raises UserError, naming the place, for what is not a record, for one that
    lacks the field, and for a value that is not a text.
    """
    for place, text in _values(path, form, on_read, notes):
        if text is None:
            notes.skipped[NO_TEXT] += 1
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{path}, {place}: {form.field!r} is {_short(text)}, not a text: correct it, or "
                "name another with --text-field"
            )
        if not _is_unicode(text):
            notes.skipped[NO_CHARACTER] += 1
            continue
        if form.line_ends == "lf" and "\r" in text:
            notes.mended.add(path)
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _values(path: Path, form: Form, on_read: OnRead, notes: Notes) -> Values:
    if path.suffix.lower() == ".parquet":
        return _parquet_values(path, form.field, on_read, notes)
    # Line ends are changed in the texts alone: what is between records is no text
    chunks = text_chunks(path, Form(form.encoding), on_read, notes)
    match path.suffix.lower():
        case ".csv":
            return _table_values(path, form.field, lines(chunks), {"strict": True})
        case ".tsv":
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            return _table_values(path, form.field, lines(chunks), tabs)
        case ".json":
            return _json_values(path, form.field, chunks)
    return _jsonl_values(path, form.field, chunks)


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
    for number, line in enumerate(lines(chunks), start=1):
        if line.strip():
            place = f"line {number}"
            yield place, _in_record(path, place, field, _parsed(path, place, line))


def _json_values(path: Path, field: str, chunks: Iterable[str]) -> Values:
    text = "".join(chunks)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise _not_json(path, "the list", error) from error
        yield from _jsonl_values(path, field, [text])  # many call a file of lines .json
        return
    records = content if isinstance(content, list) else [content]
    for number, record in enumerate(records, start=1):
        yield f"record {number}", _in_record(path, f"record {number}", field, record)


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(path, place, error) from error


def _not_json(path: Path, place: str, error: Exception) -> UserError:
    reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
    return UserError(f"{path}, {place}: this is not JSON ({reason}): correct it, or remove it")


def _in_record(path: Path, place: str, field: str, record: Any) -> Any:
    """The value of the field in a record; None for a record that is null."""
    if record is None:
        return None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}, {place}: this is {_short(record)}, not an object with the key {field!r}: "
            "correct it, or remove it"
        )
    if field not in record:
        raise _no_field(f"{path}, {place}", field, list(record))
    return record[field]


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"


def _no_field(where: str, field: str, names: list[str]) -> UserError:
    found = ", ".join(map(_short, names[:10])) or "none"
    return UserError(
        f"{where} has no {field!r}, only {found}: name what holds the text with --text-field, or "
        "remove the file"
    )


# ---------------------------------------------------------------------------------------- tables


def _table_values(path: Path, field: str, rows: Iterable[str], how: dict[str, Any]) -> Values:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader((row + "\n" for row in rows), **how)
    names: list[str] | None = None
    try:
        for fields in reader:
            place = f"line {reader.line_num}"
            if not any(fields):
                continue
            if names is None:
                names = fields
                if field not in names:
                    raise _no_field(f"{path}: its header", field, names)
            elif len(fields) != len(names):
                found = counted(len(fields), "field")
                raise UserError(
                    f"{path}, {place}: {found} under a header of {len(names)}: correct it"
                )
            else:
                yield place, fields[names.index(field)]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}: correct the quotes") from error


def _parquet_values(path: Path, field: str, on_read: OnRead, notes: Notes) -> Values:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow: pip install 'micrograd-gpt[parquet]'"
        ) from error
    try:
        size = path.stat().st_size
        with ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise _no_field(str(path), field, names)
            if str(kind := file.schema_arrow.field(field).type) not in ("string", "large_string"):
                raise UserError(
                    f"{path}: the column {field!r} holds {kind} and no texts: name another with "
                    "--text-field"
                )
            rows = done = 0
            for batch in file.iter_batches(ROWS, columns=[field]):
                first, rows = rows + 1, rows + len(batch)
                before, done = done, size * rows // file.metadata.num_rows
                on_read(done - before)
                for number, value in enumerate(batch.column(0), first):
                    yield f"row {number}", _python_text(value)
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _python_text(value: Any) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError:  # some writers let half a character through
        return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
