"""An evaluation from its first item to its last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from micrograd_gpt.evaluation.records import Records, Row
from micrograd_gpt.evaluation.scoring import TOKENS_AT_ONCE, Request, Score, score
from micrograd_gpt.gpt2 import GPT2

ITEMS_AT_ONCE = 128  # sorted by length together; results appear no later than these are done


class Task(Protocol):
    """Items that are scored by the probabilities of tokens."""

    unit: str  # what an item is called

    def __len__(self) -> int:
        """How many items there are."""

    def requests(self, item: int) -> list[Request]:
        """What is to be scored for an item."""

    def row(self, item: int, scores: Sequence[Score]) -> Row:
        """What is kept of an item's scores, as JSON."""

    def report(self, rows: Sequence[Row]) -> Row:
        """The results, from the rows of all items."""


def run(model: GPT2, task: Task, records: Records, tokens_at_once: int = TOKENS_AT_ONCE) -> Row:
    """Score the items that are not done yet; returns the report on all of them.

    About `tokens_at_once` tokens are read at a time. A progress bar shows on a terminal. Raises
    what `score` raises, and UserError where the records cannot be written.
    """
    from tqdm import tqdm

    left = [item for item in range(len(task)) if item not in records.rows]
    title, done = "evaluating", len(task) - len(left)
    with tqdm(
        total=len(task), initial=done, desc=title, unit=task.unit, delay=1, disable=None
    ) as bar:
        for start in range(0, len(left), ITEMS_AT_ONCE):
            part = left[start : start + ITEMS_AT_ONCE]
            requests = [task.requests(item) for item in part]
            for place, scores in score(model, requests, tokens_at_once):
                records.add({"item": part[place], **task.row(part[place], scores)})
                bar.update()
    report = task.report([records.rows[item] for item in range(len(task))])
    records.finish(report)
    return report
