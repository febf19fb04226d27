"""What an evaluation has done so far, kept in a folder, so that it goes on after being stopped.

settings.json    what is evaluated, and how
items.jsonl      one object a line for each item that is done, in the order in which they were
report.json      the results, once all items are done
confusion.png    the confusion matrix of a classifier
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, reading, write_text
from micrograd_gpt.weights.formats import has_begun, holds_model

SETTINGS, ITEMS, REPORT = "settings.json", "items.jsonl", "report.json"
PICTURE = "confusion.png"

Row = dict[str, Any]


class Records:
    """The rows of the items that are done, by the number of the item; in memory, or in a folder.
    `show` is called with each new one.

    A folder that holds the same evaluation goes on: its rows are there already. Raises UserError
    for a folder that holds another one, and where a file cannot be read or written.
    """

    def __init__(
        self,
        folder: str | Path | None,
        settings: Row,
        show: Callable[[Row], None] | None = None,
    ) -> None:
        self.show = show
        self.folder = None if folder is None else Path(folder)
        self.rows: dict[int, Row] = {}
        if self.folder is None:
            return
        if holds_model(self.folder):
            raise UserError(f"{self.folder} holds a model: choose another --out")
        if has_begun(self.folder):
            raise UserError(f"{self.folder} is where a run has begun: choose another --out")
        try:
            before = read_json(self.folder / SETTINGS)
        except UserError as error:
            raise UserError(f"{error}: choose another --out") from error
        if before is None:
            for path in (self.folder / name for name in (ITEMS, REPORT, PICTURE)):
                if path.exists():
                    raise UserError(f"{path} is in the way: choose another --out")
            write_text(self.folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
        elif before != settings:
            names = [n for n in {**before, **settings} if before.get(n) != settings.get(n)]
            raise UserError(
                f"{self.folder} holds an evaluation with other settings "
                f"({', '.join(sorted(names))}): choose another --out"
            )
        self.rows = self._read(self.folder / ITEMS)

    def add(self, row: Row) -> None:
        """Note the result of an item; once this has returned, a kill does not lose it."""
        if self.folder is not None:
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
            path = self.folder / ITEMS
            try:
                with open(path, "ab", buffering=0) as file:
                    if file.write(line) != len(line):
                        raise OSError(0, "the disk is full")
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        self.rows[row["item"]] = row
        if self.show is not None:
            self.show(row)

    def finish(self, report: Row) -> None:
        """Keep the results of the whole evaluation."""
        if self.folder is not None:
            write_text(self.folder / REPORT, json.dumps(report, indent=1) + "\n")

    def _read(self, path: Path) -> dict[int, Row]:
        """The rows of a file, without a line that a kill has cut short; that one goes."""
        if not path.exists():
            return {}
        with reading(path):
            *lines, rest = path.read_bytes().split(b"\n")
        if rest:
            os.truncate(path, sum(len(line) + 1 for line in lines))
        try:
            rows = [json.loads(line) for line in lines]
            return {int(row["item"]): row for row in rows}
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): choose another --out") from error


def text_checksum(texts: list[str]) -> str:
    """What tells two lists of texts apart: how many they are, and the CRC-32 of all."""
    checksum = 0
    for text in texts:
        checksum = zlib.crc32(text.encode("utf-8") + b"\0", checksum)
    return f"{len(texts)} texts, {checksum:08x}"
