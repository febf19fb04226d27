"""How well a classifier labels the texts of a file whose labels are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from micrograd_gpt.evaluation.estimates import mean_and_error
from micrograd_gpt.evaluation.records import PICTURE, Row
from micrograd_gpt.evaluation.running import Batch, Task
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.tuning.batches import by_length
from micrograd_gpt.tuning.classification import checked_log_probs, encode
from micrograd_gpt.tuning.classifier import GPT2Classifier
from micrograd_gpt.tuning.labelled import Example, label_numbers
from micrograd_gpt.tuning.scores import Scores, draw_confusion, score

TEXTS_AT_ONCE = 8


class ClassificationTask(Task):
    """Texts with labels that the classifier knows; UserError for one that it does not know."""

    unit = "text"

    def __init__(
        self, examples: Sequence[Example], model: GPT2Classifier, tokenizer: Tokenizer
    ) -> None:
        self.names = model.labels
        self.labels = label_numbers(examples, self.names)  # (texts,)
        self.tokenizer, self.ids = tokenizer, encode(examples, tokenizer, model.longest, "given")

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, model: GPT2Classifier) -> None:
        self.tokenizer.tell_unknown(np.concatenate(self.ids), "the texts")

    def batches(
        self, model: GPT2Classifier, items: Sequence[int], batch_size: int | None
    ) -> Iterator[Batch]:
        lengths = np.array([len(self.ids[item]) for item in items])
        for places in by_length(lengths, batch_size or TEXTS_AT_ONCE):
            yield partial(self._label, model, [items[place] for place in places])

    def _label(self, model: GPT2Classifier, items: list[int]) -> list[tuple[int, Row]]:
        texts = [self.ids[item] for item in items]
        log_probs = checked_log_probs(model, texts, len(texts))  # (texts, N)
        return [(item, self._row(item, row)) for item, row in zip(items, log_probs, strict=True)]

    def _row(self, item: int, log_probs: np.ndarray) -> Row:
        probabilities = dict(zip(self.names, np.exp(log_probs).tolist(), strict=True))
        label, answer = self.names[self.labels[item]], self.names[int(log_probs.argmax())]
        return {"label": label, "answer": answer, "probabilities": probabilities}

    def report(self, rows: Sequence[Row]) -> Row:
        """Accuracy with its standard error, and all that tuning/scores.py knows."""
        accuracy, error = mean_and_error([row["answer"] == row["label"] for row in rows])
        places = {name: i for i, name in enumerate(self.names)}
        label, answer = ([places[row[name]] for row in rows] for name in ("label", "answer"))
        scores = score(label, answer, self.names).as_dict()
        return {"accuracy": accuracy, "accuracy_stderr": error} | scores

    def lines(self, report: Row) -> list[str]:
        lines = self.scores(report).report().split("\n")
        error = report["accuracy_stderr"]
        return lines if error is None else [*lines, f"standard error of the accuracy: {error:.1%}"]

    def draw(self, report: Row, folder: Path) -> None:
        """Draw the confusion matrix of a report, as a picture in a folder."""
        draw_confusion(self.scores(report), folder / PICTURE)

    def scores(self, report: Row) -> Scores:
        """The scores that a report tells of."""
        return Scores(self.names, np.array(report["confusion"]))
