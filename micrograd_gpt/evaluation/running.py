"""An evaluation from its first item to its last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from micrograd_gpt.evaluation.output import report_lines
from micrograd_gpt.evaluation.records import Records, Row
from micrograd_gpt.evaluation.scoring import (
    TOKENS_AT_ONCE,
    Group,
    Request,
    Score,
    in_batches,
    score_batch,
)
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.work import Do, one_by_one

ITEMS_AT_ONCE = 128  # sorted by length together

Batch = Callable[[], list[tuple[int, Row]]]  # does some items; returns their numbers and results


class Task(ABC):
    """Items that a model is given, and what is made of its answers."""

    unit = "item"  # what an item is called

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are."""

    def check(self, model: Any) -> None:  # noqa: B027 - most tasks have been checked already
        """Raise UserError for an item that the model cannot be given, before the first one is, and
        say how many it does not see as they are.
        """

    def tell(self, what: str, too_long: int, longest: int, unknown: int) -> None:
        """Say on stderr how many of what the model is given have more tokens than its context of
        `longest`, or text that the tokenizer does not know.
        """
        for count, trouble in (
            (too_long, f"more tokens than the model's context of {longest:,}: it reads their ends"),
            (unknown, "words that the tokenizer does not know: the model sees none of these"),
        ):
            if count:
                say(f"note: {count:,} of {len(self):,} {what}s have {trouble}")

    @abstractmethod
    def batches(self, model: Any, items: Sequence[int], batch_size: int | None) -> Iterator[Batch]:
        """The items with these numbers in batches, each of which gives its results as JSON."""

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

    def batches(self, model: GPT2, items: Sequence[int], batch_size: int | None) -> Iterator[Batch]:
        at_once = batch_size * model.config.n_positions if batch_size else TOKENS_AT_ONCE
        requests = [self.requests(item) for item in items]
        for groups in in_batches(requests, model.config.n_positions, at_once):
            yield partial(self._score, model, items, groups, at_once)

    def _score(
        self, model: GPT2, items: Sequence[int], groups: list[Group], at_once: int
    ) -> list[tuple[int, Row]]:
        scored = score_batch(model, groups, at_once)
        return [(items[place], self.row(items[place], scores)) for place, scores in scored]


def run(
    model: Any,
    task: Task,
    records: Records,
    batch_size: int | None = None,
    do: Do = one_by_one,
) -> Row:
    """Do the items that are not done yet; returns the report on all of them.

    `do` does the batches, as several processes may. A progress bar shows on a terminal. Raises what
    the task raises, and UserError where the records cannot be written.
    """
    from tqdm import tqdm

    task.check(model)
    left = [item for item in range(len(task)) if item not in records.rows]
    done, title = len(task) - len(left), "evaluating"
    with tqdm(
        total=len(task), initial=done, desc=title, unit=task.unit, delay=1, disable=None
    ) as bar:
        parts = (left[i : i + ITEMS_AT_ONCE] for i in range(0, len(left), ITEMS_AT_ONCE))
        batches = (batch for part in parts for batch in task.batches(model, part, batch_size))
        for rows in do(batches):
            for item, row in rows:
                records.add({"item": item, **row})
                bar.update()
    try:
        report = task.report([records.rows[item] for item in range(len(task))])
    except (LookupError, TypeError) as error:
        if not done:
            raise
        raise UserError(f"the items in --out are damaged ({error!r}): choose another") from error
    records.finish(report)
    return report
