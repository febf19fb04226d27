"""An evaluation from its first item to its last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from micrograd_gpt.evaluation.output import report_lines
from micrograd_gpt.evaluation.records import Records, Row
from micrograd_gpt.evaluation.scoring import TOKENS_AT_ONCE, Request, Score, score
from micrograd_gpt.gpt2 import GPT2

ITEMS_AT_ONCE = 128  # sorted by length together


class Task(ABC):
    """Items that a model is given, and what is made of its answers."""

    unit = "item"  # what an item is called

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are."""

    @abstractmethod
    def rows(
        self, model: Any, items: Sequence[int], batch_size: int | None
    ) -> Iterator[tuple[int, Row]]:
        """The results of the items with these numbers, as JSON, in whatever order they come."""

    @abstractmethod
    def report(self, rows: Sequence[Row]) -> Row:
        """The results of the whole evaluation, as JSON, from the rows of all items in order."""

    def lines(self, report: Row) -> list[str]:
        """A report for people to read."""
        return report_lines(report)


class ScoredTask(Task):
    """Items whose results follow from the probabilities of tokens.

    `batch_size` is how many contexts of the model have the tokens that are read at a time.
    """

    @abstractmethod
    def requests(self, item: int) -> list[Request]:
        """What is to be scored for an item."""

    @abstractmethod
    def row(self, item: int, scores: Sequence[Score]) -> Row:
        """What is kept of an item's scores, as JSON."""

    def rows(
        self, model: GPT2, items: Sequence[int], batch_size: int | None
    ) -> Iterator[tuple[int, Row]]:
        at_once = batch_size * model.config.n_positions if batch_size else TOKENS_AT_ONCE
        requests = [self.requests(item) for item in items]
        for place, scores in score(model, requests, at_once):
            yield items[place], self.row(items[place], scores)


def run(model: Any, task: Task, records: Records, batch_size: int | None = None) -> Row:
    """Do the items that are not done yet; returns the report on all of them.

    A progress bar shows on a terminal. Raises what the task raises, and UserError where the records
    cannot be written.
    """
    from tqdm import tqdm

    left = [item for item in range(len(task)) if item not in records.rows]
    done, title = len(task) - len(left), "evaluating"
    with tqdm(
        total=len(task), initial=done, desc=title, unit=task.unit, delay=1, disable=None
    ) as bar:
        for start in range(0, len(left), ITEMS_AT_ONCE):
            part = left[start : start + ITEMS_AT_ONCE]
            for item, row in task.rows(model, part, batch_size):
                records.add({"item": item, **row})
                bar.update()
    report = task.report([records.rows[item] for item in range(len(task))])
    records.finish(report)
    return report
