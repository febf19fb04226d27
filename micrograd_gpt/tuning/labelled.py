"""Texts with labels: read from a table or from lines of JSON, checked, and split in three."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading
from micrograd_gpt.text import tables
from micrograd_gpt.text.decoding import decoded
from micrograd_gpt.text.documents import LIKE_JSON, read_text
from micrograd_gpt.text.json_objects import read_objects
from micrograd_gpt.text.records import RECORD_SUFFIXES
from micrograd_gpt.text.tables import Fields, table_rows

UNBALANCED = 3.0  # warn where a label is so many times as frequent as another
MOST_GRADES = 11  # more numbers with decimals than this, as 0, 0.5, …, 5, are no grades
SPLIT_SEED = 0  # one split for all runs on the same data, whatever their --seed
FLAGS = "--text-field, or --label-field for labels"  # which name the columns


class Example(NamedTuple):
    """A text, its label (None where only texts were read), and where it stands, for messages."""

    text: str
    label: str | None
    place: str


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `given` has the names of the flags that the user chose them by."""

    text: str = "text"
    label: str = "label"
    given: bool = field(default=False)


def columns_of(settings: argparse.Namespace) -> Columns:
    """The columns that --text-field and --label-field name."""
    names = (settings.text_field, settings.label_field)
    return Columns(*names, given=names != ("text", "label"))


class Parts(NamedTuple):
    """Examples to learn from, to validate on, and for the final scores, and the labels' names."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: list[str]


# --------------------------------------------------------------------------------- reading files


def read_examples(
    path: str | Path, columns: Columns, encoding: str = "utf-8", with_labels: bool = True
) -> list[Example]:
    """The examples in a file, none of them empty, in its order.

    - .tsv: fields between tabs, one example a line, no quotes. Without a header it has two columns:
      the one with fewer different values is the label (the SMS Spam Collection's `ham<TAB>text`).
    - .csv: with a header and quotes, as RFC 4180 has it. .parquet.
    - .jsonl, .ndjson, .json: an object a line, or a list of objects.
    - `with_labels=False`: labels are not looked for, and any other file has a text a line.

    Labels are words, or all of them numbers. Raises UserError, naming the file and the place, for a
    missing column, an empty text, a missing label, and labels of both kinds.
    """
    path = Path(path)
    with reading(path):
        if not path.exists():
            kinds = ", ".join(RECORD_SUFFIXES)
            other = "" if with_labels else ", or of any other text, a line each"
            raise UserError(
                f"{path} does not exist: give the path of a table of texts ({kinds}){other}"
            )
    rows = list(_rows(path, columns, encoding, with_labels))
    if not rows:
        raise UserError(f"{path} holds no examples: give a file with texts")
    examples = [Example(*_checked(row, path, with_labels)) for row in rows]
    if with_labels:
        _check_same_kind(rows, path)
    return examples


def read_texts(source: str, columns: Columns, encoding: str = "utf-8") -> list[Example]:
    """The texts of a file, without labels, or of stdin where the source is "-", a line each."""
    if columns.given and Path(source).suffix.lower() not in RECORD_SUFFIXES:
        raise UserError(
            f"--text-field is for tables ({', '.join(RECORD_SUFFIXES)}), and --predict {source} "
            "has a text a line: leave it out"
        )
    if source != "-":
        return read_examples(source, columns, encoding, with_labels=False)
    if sys.stdin is None:
        raise UserError("stdin is closed: name a file with --predict FILE")
    text = decoded(sys.stdin.buffer.read(), "stdin", encoding)
    examples = [Example(row.text, None, f"stdin, {row.place}") for row in text_lines(text, "stdin")]
    if not examples:
        raise UserError(
            "stdin holds no texts: send some, a line each, or name a file with --predict FILE (to "
            "learn, give --data FILE)"
        )
    return examples


class Row(NamedTuple):
    place: str  # "line 3"
    text: Any
    label: Any


def _rows(path: Path, columns: Columns, encoding: str, with_labels: bool) -> Iterator[Row]:
    wanted = [columns.text, *([columns.label] if with_labels else [])]
    match path.suffix.lower():
        case ".tsv":
            records = _tsv_records(path, wanted, columns.given, encoding)
        case ".csv":
            rows = table_rows(path, _text(path, encoding).split("\n"))
            records = tables.columns(path, rows, wanted, FLAGS)
        case ".jsonl" | ".ndjson" | ".json":
            records = _jsonl_records(path, wanted, encoding)
        case ".parquet":
            records = tables.parquet_columns(path, wanted, FLAGS)
        case _ if with_labels:
            raise UserError(f"{path} is not a table of texts: give {', '.join(RECORD_SUFFIXES)}")
        case _:
            yield from text_lines(_text(path, encoding), path)
            return
    for place, (text, *label) in records:
        yield Row(place, text, label[0] if label else None)


def text_lines(text: str, source: str | Path) -> Iterator[Row]:
    """The lines of a text that are not blank, without labels; says how many others there are, and
    if their beginning looks like JSON.

    Raises UserError for lines that end in \\r alone.
    """
    if "\n" not in text and "\r" in text.rstrip():
        raise UserError(f"{source}: {tables.OLD_LINE_ENDS}")
    if LIKE_JSON.match(text):
        say(
            f"note: {source} looks like JSON and is read as it stands, a text a line, braces and "
            "all; records are read from a file called .jsonl"
        )
    blank = 0
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Row(f"line {number}", line.removesuffix("\r"), None)
        else:
            blank += 1
    if blank:
        say(f"note: {source}: {counted(blank, 'blank line')} left out")


def _text(path: Path, encoding: str) -> str:
    return read_text(path, encoding).removeprefix("\ufeff")


def _tsv_records(
    path: Path, wanted: list[str], has_header: bool, encoding: str
) -> Iterator[Fields]:
    """The wanted fields of a .tsv file, in this order. Without a header there are two columns."""
    table = list(table_rows(path, _text(path, encoding).split("\n")))
    if not table:
        return
    first = table[0][1]
    if has_header or len(first) != 2 or set(wanted) <= set(first):
        yield from tables.columns(path, iter(table), wanted, FLAGS)
        return
    if odd := next(((place, fields) for place, fields in table if len(fields) != 2), None):
        raise UserError(
            f"{path}, {odd[0]}: {counted(len(odd[1]), 'field')} between tabs where the first line "
            "has 2: correct it, or begin with a header"
        )
    values = [Counter(fields[i] for _, fields in table) for i in (0, 1)]
    label = 0 if len(values[0]) <= len(values[1]) else 1
    is_once = values[label][first[label]] == 1  # as a header's would be
    if is_once and len(wanted) > 1 and len(table) > 1:
        missing = wanted[0] if wanted[1] in first else wanted[1]
        raise tables.no_column(path, missing, first, FLAGS)
    if is_once and len(wanted) == 1:
        say(
            f"note: {path}: column {2 - label} is taken for the texts, from the first line on: if "
            "that line is a header, give --text-field the name of theirs"
        )
    for place, fields in table:
        yield place, [fields[1 - label], fields[label]]


def _jsonl_records(path: Path, wanted: list[str], encoding: str) -> Iterator[Fields]:
    for where, value in read_objects(path, encoding):
        for name in wanted:
            if name not in value:
                raise tables.no_field(where, name, list(value), FLAGS)
        yield where.removeprefix(f"{path}, "), [value[name] for name in wanted]


# -------------------------------------------------------------------------------------- checking


def _checked(row: Row, path: Path, with_labels: bool) -> tuple[str, str | None, str]:
    place = f"{path}, {row.place}"
    if not isinstance(row.text, str):
        raise UserError(f"{place}: the text is {_shown(row.text)}, not a string: correct it")
    if not row.text.strip():
        raise UserError(f"{place}: the text is empty: remove the example")
    if not with_labels:
        return row.text, None, place
    if not isinstance(row.label, str | int | float) or row.label != row.label:
        shown = _shown(row.label)
        raise UserError(f"{place}: the label is {shown}, not a word or a number: correct it")
    label = _label(row.label)
    if not label:
        raise UserError(f"{place}: the label is empty: give one, or remove the example")
    return row.text, label, place


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _label(value: str | int | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if is_whole else value).strip()


def is_number(label: Any) -> bool:
    """Whether a label is a number, or the text of one."""
    if isinstance(label, bool):
        return False
    try:
        return not math.isnan(float(label))
    except ValueError:
        return False
    except OverflowError:  # a whole number that is too large for a float
        return True


def _check_same_kind(rows: Sequence[Row], path: Path) -> None:
    first = rows[0]
    other = next((r for r in rows if is_number(r.label) != is_number(first.label)), None)
    if other:
        number, word = (first, other) if is_number(first.label) else (other, first)
        raise UserError(
            f"{path}: the label is a number in {number.place} ({number.label!r}) and a word in "
            f"{word.place} ({word.label!r}): make all labels numbers or all words"
        )


def label_names(examples: Sequence[Example]) -> list[str]:
    """The different labels: numbers by their size, words by their letters; UserError for one."""
    labels = {example.label for example in examples if example.label is not None}
    if len(labels) < 2:
        file = examples[0].place.rpartition(", ")[0]
        raise UserError(
            f"{file}: {counted(len(examples), 'text')} and one label, {min(labels, default='')!r}: "
            "give texts of two labels or more"
        )
    if not all(map(is_number, labels)):
        return sorted(labels)
    return sorted(labels, key=lambda label: (float(label), label))


def label_numbers(examples: Sequence[Example], labels: Sequence[str]) -> np.ndarray:
    """The numbers of the examples' labels, (N,) int64; UserError for a label that is not known."""
    places = {label: i for i, label in enumerate(labels)}
    unknown = next((example for example in examples if example.label not in places), None)
    if unknown:
        some = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
        raise UserError(
            f"{unknown.place}: the label {unknown.label!r} is unknown: the labels learned are "
            f"{some}; correct it, or remove the example"
        )
    return np.array([places[example.label or ""] for example in examples], np.int64)


def warn_if_unbalanced(examples: Sequence[Example], balanced: bool) -> None:
    """Say on stderr if some label is far more frequent than another and --balance is off."""
    counts = Counter(example.label for example in examples).most_common()
    (most, often), (least, seldom) = counts[0], counts[-1]
    if often >= UNBALANCED * seldom and not balanced:
        say(
            f"warning: {often:,} texts have the label {most!r} and {seldom:,} the label {least!r}: "
            "accuracy alone says little; --balance learns from each label equally often"
        )


# ------------------------------------------------------------------------------------- splitting


def split(examples: Sequence[Example], parts: Sequence[float]) -> list[list[Example]]:
    """Cut examples up by chance, the same on every machine: the rest, and then `parts` of them.

    Each part has the same share of each label, and at least one example where there are enough. The
    same text is never in two of the results, which would be learning by heart; one with several
    labels counts as one with the first of them.
    """
    results: list[list[int]] = [[] for _ in range(len(parts) + 1)]
    of_text: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        of_text.setdefault(example.text, []).append(i)
    of_label: dict[str | None, list[list[int]]] = {}
    for same in of_text.values():
        of_label.setdefault(examples[same[0]].label, []).append(same)
    for number, label in enumerate(sorted(of_label, key=str)):
        texts = of_label[label]  # indices of equal texts
        order = np.random.default_rng((SPLIT_SEED, number)).permutation(len(texts))
        end = 0
        for result, part in zip(results[1:], parts, strict=True):
            wanted = max(round(part * len(texts)), 1 if part else 0)
            begin, end = end, min(end + wanted, max(end, len(texts) - 1))
            result += [i for place in order[begin:end] for i in texts[place]]
        results[0] += [i for place in order[end:] for i in texts[place]]
    return [[examples[i] for i in sorted(result)] for result in results]


def _how_few(examples: Sequence[Example], labels: Sequence[str]) -> str:
    """How many texts there are of how many labels, and what to do."""
    different = len({example.text for example in examples})
    unlike = "" if different == len(examples) else f" ({different:,} different)"
    found = f"{len(examples):,} texts{unlike} have {len(labels):,} labels"
    if len(labels) > len(examples) / 2 and all(map(is_number, labels)):
        return f"{found}, which look like measurements: give labels that several texts share"
    return f"{found}: give more texts of each, or a file of them"


def _warn_if_no_classes(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Say on stderr if labels look like something else, as grades with decimals or as names."""
    texts = Counter(example.label for example in examples)
    once = [label for label in labels if texts[label] == 1]
    are_numbers = all(map(is_number, labels))
    has_decimals = are_numbers and not all(float(label).is_integer() for label in labels)
    twice = next((label for label in labels if are_numbers and f"{label}.0" in texts), None)
    if twice:
        say(
            f"warning: the labels '{twice}' and '{twice}.0' are learned as two: write both as "
            f"{twice} if they are one number"
        )
    if 2 * len(once) > len(labels):
        say(
            f"warning: {len(once):,} of {len(labels):,} labels, such as {once[0]!r}, have one text "
            "each, from which none can be learned: give labels that several texts share"
        )
    elif has_decimals and len(labels) > MOST_GRADES:
        say(
            f"warning: {len(labels):,} labels such as {labels[0]!r} look like measurements: each "
            "is learned as a class of its own, and none as more or less than another"
        )


def read_parts(
    data: str,
    validation: str | None,
    test: str | None,
    columns: Columns,
    encoding: str = "utf-8",
    fraction: float = 0.1,
) -> Parts:
    """The three parts, each from its file, or `fraction` of `data` where there is none.

    Raises UserError for what `read_examples`, `label_names` and `label_numbers` cannot take.
    """
    examples = read_examples(data, columns, encoding)
    labels = label_names(examples)
    shares = [0.0 if given else fraction for given in (validation, test)]
    train, *cut = split(examples, shares)
    given = [validation, test]
    for i, file in enumerate(given):
        if file:
            cut[i] = read_examples(file, columns, encoding)
            label_numbers(cut[i], labels)
    learned = {example.text for example in train}
    for name, part in (("validate on", cut[0]), ("test on", cut[1])):
        if not part:
            raise UserError(f"{data} has too few texts to {name}: {_how_few(examples, labels)}")
        if again := sum(example.text in learned for example in part):
            say(f"warning: {again:,} of {len(part):,} texts to {name} are learned from as well")
    _warn_if_no_classes(examples, labels)
    return Parts(train, cut[0], cut[1], labels)
