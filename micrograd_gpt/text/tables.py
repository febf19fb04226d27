"""Tables: the wanted columns of a .csv, .tsv or .parquet file, record by record.

.csv       a header, then records, with quotes where needed (RFC 4180)
.tsv       a header, then a record a line, fields between tabs, no quotes
.parquet   columns of values (pyarrow reads it)
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from micrograd_gpt.support.cli import counted
from micrograd_gpt.support.errors import UserError

BUFFER = 1 << 20  # bytes of a .parquet file in memory
BATCH = 256  # its rows that are read at a time
LONGEST_FIELD = 1 << 30  # characters of a field in a .csv file
OLD_LINE_ENDS = "its lines end in \\r alone, as on old Macs: convert them to \\n"

Fields = tuple[str, list[Any]]  # where a record stands ("line 3"), and its fields


def table_rows(path: Path, lines: Iterable[str]) -> Iterator[Fields]:
    """All records of a .csv file, or else a .tsv file, the header too; `lines` have no line ends.

    Raises UserError, naming the line, for quotes that do not fit.
    """
    is_csv = path.suffix.lower() == ".csv"
    how: dict[str, Any] = {} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader((line + "\n" for line in lines), strict=is_csv, **how)
    begin = 1  # of the next record, which may go over several lines
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield f"line {reader.line_num}", fields
            begin = reader.line_num + 1
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(f"{path}: {OLD_LINE_ENDS}") from error
        where = (
            f"line {begin}" if begin >= reader.line_num else f"the record that line {begin} begins"
        )
        raise UserError(f"{path}, {where}: {error}: correct the quotes") from error


def columns(
    path: Path, rows: Iterator[Fields], wanted: Sequence[str], flags: str
) -> Iterator[Fields]:
    """Of each record under the header, which is the first one, the fields of these names.

    Raises UserError for a name that the header lacks, advising the `flags` that give others, and
    for a record with more or fewer fields than the header.
    """
    _, names = next(rows, ("", []))
    if not names:
        return
    for name in wanted:
        if name not in names:
            raise no_column(path, name, names, flags)
        if names.count(name) > 1:
            raise UserError(f"{path}: its header has {name!r} twice: rename or remove one")
    places = [names.index(name) for name in wanted]
    for place, fields in rows:
        if len(fields) != len(names):
            found = counted(len(fields), "field")
            raise UserError(f"{path}, {place}: {found} under a header of {len(names)}: correct it")
        yield place, [fields[i] for i in places]


def parquet_columns(
    path: Path, wanted: Sequence[str], flags: str, on_read: Callable[[int], object] | None = None
) -> Iterator[Fields]:
    """Of each row of a .parquet file the fields of these names, of which the first is a text.

    `on_read` is told how many bytes of the file are done with. Raises UserError as `columns` does,
    for a text column of another type, and where pyarrow is missing or cannot read the file.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
        from pyarrow.types import is_dictionary
    except ImportError as error:
        raise UserError(
            f'reading {path} needs pyarrow: pip install "micrograd-gpt[parquet]"'
        ) from error
    try:
        size = path.stat().st_size
        with ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            _check_schema(path, file.schema_arrow, wanted, flags)
            rows = done = 0
            for batch in file.iter_batches(BATCH, columns=list(wanted)):
                first, rows = rows + 1, rows + len(batch)
                before, done = done, size * rows // file.metadata.num_rows
                if on_read:
                    on_read(done - before)
                columns = map(batch.column, wanted)
                plain = [c.dictionary_decode() if is_dictionary(c.type) else c for c in columns]
                for number, fields in enumerate(zip(*plain, strict=True), first):
                    yield f"row {number}", [_python_value(value) for value in fields]
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _check_schema(path: Path, schema: Any, wanted: Sequence[str], flags: str) -> None:
    """UserError unless the file has each of these columns once, and texts in the first."""
    from pyarrow.types import is_dictionary

    for name in wanted:
        if name not in schema.names:
            raise no_field(str(path), name, schema.names, flags)
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has {name!r} twice: rename or remove one")
    kind = schema.field(wanted[0]).type
    held = kind.value_type if is_dictionary(kind) else kind  # of categories
    if str(held) not in ("string", "large_string", "string_view"):
        raise UserError(
            f"{path}: the column {wanted[0]!r} holds {kind} and no texts: name another "
            "with --text-field"
        )


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:  # some writers let half a character through
        return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def no_column(path: Path, name: str, names: Sequence[str], flags: str) -> UserError:
    """What to say where the first record of a table does not name such a column."""
    or_none = f"{flags}; or, if these are a record and no names, put a header above them"
    return no_field(f"{path}: its header", name, names, or_none)


def no_field(where: str, name: str, names: Sequence[str], flags: str) -> UserError:
    """What to say where there is no such column or key, only these."""
    found = ", ".join(map(short, names[:10])) or "none"
    if len(names) == 1 and ";" in names[0]:  # as spreadsheets write it in much of Europe
        return UserError(f"{where} has semicolons between the names: put commas in their place")
    if len(names) == 1 and "\t" in names[0]:
        return UserError(f"{where} has tabs between the names: call the file .tsv")
    if {"instruction", "messages"} & {*names}:  # each would be a plain text, without a template
        flags += (
            "; or, if these are instructions, learn from them with finetune_gpt2.py instruct,"
            " and have them answered with evaluate_gpt2.py generate, each from a .jsonl"
        )
    return UserError(f"{where} has no {name!r}, only {found}: name what holds it with {flags}")


def short(value: Any) -> str:
    """A value as a message shows it."""
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"
