"""Files of JSON objects: a list of them, or one a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.documents import read_text
from micrograd_gpt.text.records import json_problem

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a pair, which JSON can have without the other


TABLES = (".csv", ".tsv", ".parquet")


def read_objects(path: str | Path, encoding: str = "utf-8") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .json file, which holds a list of them, or of any other, which has one a
    line, as many a .json file too; each with where it stands, as "data.jsonl, line 3".

    Raises UserError for what is something else, for half a character, and for a file without any.
    """
    path = Path(path)
    if path.suffix.lower() in TABLES:
        raise UserError(f"{path} is a table: convert it to .jsonl, an object a line")
    text = read_text(path, encoding).removeprefix("\ufeff")
    if path.suffix.lower() == ".json" and not _is_line_by_line(text):
        listed = _parsed(text, str(path)) if text.strip() else []
        if not isinstance(listed, list):
            raise UserError(
                f"{path} holds no list: give a JSON list, or a .jsonl file with an object a line"
            )
        values = [(f"{path}, item {number}", value) for number, value in enumerate(listed, 1)]
    else:
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
        values = [(place, _parsed(line, place)) for place, line in lines if line.strip()]
    if not values:
        raise UserError(f"{path} has no items: give a JSON list, or a file with an object a line")
    for place, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{place}: this is not a JSON object: correct it")
        if half := HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False)):
            raise UserError(f"{place}: there is half a character, {half[0]!r}: remove it")
        yield place, value


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: this is not JSON ({json_problem(error)}): correct it") from error


def _is_line_by_line(text: str) -> bool:
    """Whether a text is of several objects, each on a line of its own, as its first one is."""
    first, _, others = text.strip().partition("\n")
    if not first.startswith("{") or not others.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True
