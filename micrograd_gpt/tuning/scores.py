"""How good a classifier is: accuracy, F1 of each label, and which labels it confuses.

N is the number of labels. All numbers come from the confusion matrix, whose row is the label that
a text has and whose column the one that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.support.cli import counted
from micrograd_gpt.support.files import written_whole
from micrograd_gpt.support.pictures import drawing, say_what_is_not_drawn

Array = np.ndarray
TEXT_COLUMNS = 16  # so many labels' matrix is still readable as text; loss.png's neighbour has all


@dataclass(frozen=True)
class Scores:
    """The result of labelling some texts: `labels`, their names, and `confusion`, counts (N, N).

    Precision, recall and F1 are as scikit-learn defines them, with 0 where a ratio is 0 / 0.
    """

    labels: Sequence[str]
    confusion: Array

    @property
    def count(self) -> int:
        """How many texts were labelled."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The part of the texts that got the right label; nan where there are none."""
        return float(np.trace(self.confusion)) / self.count if self.count else float("nan")

    @property
    def majority(self) -> float:
        """The accuracy of always saying the label that is most frequent in these texts."""
        return float(self.support.max()) / self.count if self.count else float("nan")

    @property
    def support(self) -> Array:
        """How many texts have each label, (N,)."""
        return self.confusion.sum(1)

    @property
    def precision(self) -> Array:
        """The part that is right of the texts that were given each label, (N,)."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(0))

    @property
    def recall(self) -> Array:
        """The part that was found of the texts that have each label, (N,)."""
        return _ratio(np.diag(self.confusion), self.support)

    @property
    def f1(self) -> Array:
        """The harmonic mean of precision and recall for each label, (N,)."""
        return _ratio(2 * np.diag(self.confusion), self.confusion.sum(0) + self.support)

    @property
    def macro_f1(self) -> float:
        """The mean F1 over the labels that some text has or was given; nan where there are none."""
        seen = self.confusion.sum(0) + self.support > 0
        return float(self.f1[seen].mean()) if seen.any() else float("nan")

    def of_labels(self) -> dict[str, dict[str, Any]]:
        """Precision, recall, F1 and the number of texts, by label."""
        numbers = np.stack([self.precision, self.recall, self.f1], 1).tolist()  # (N, 3)
        names = ("precision", "recall", "f1")
        return {
            label: {**dict(zip(names, row, strict=True)), "count": int(count)}
            for label, row, count in zip(self.labels, numbers, self.support, strict=True)
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "count": self.count,
            "accuracy": self.accuracy,
            "majority": self.majority,
            "macro_f1": self.macro_f1,
            "labels": self.of_labels(),
            "confusion": self.confusion.tolist(),
        }

    def report(self) -> str:
        """A line with the accuracy, a table of the labels, and the matrix unless it is too wide."""
        width = max(5, *(len(label) for label in self.labels))
        lines = [
            f"accuracy {self.accuracy:.1%} of {counted(self.count, 'text')} "
            f"(the most frequent label alone: {self.majority:.1%}), macro F1 {self.macro_f1:.3f}",
            f"{'label':{width}}  precision  recall     F1  texts",
        ]
        for label, row in self.of_labels().items():
            lines.append(
                f"{label:{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}  "
                f"{row['f1']:5.3f}  {row['count']:5d}"
            )
        return "\n".join(lines + self._matrix_lines(width))

    def _matrix_lines(self, width: int) -> list[str]:
        if len(self.labels) > TEXT_COLUMNS:
            return []
        columns = [f"({i + 1})" for i in range(len(self.labels))]
        cell = max(4, len(str(self.confusion.max())))
        corner = r"has \ given"
        width = max(width + 5, len(corner))
        lines = [f"{corner:{width}}" + _cells(columns, cell)]
        for column, label, row in zip(columns, self.labels, self.confusion, strict=True):
            lines.append(f"{column + ' ' + label:{width}}" + _cells(row.tolist(), cell))
        return lines


def score(true: Any, given: Any, labels: Sequence[str]) -> Scores:
    """The scores of labels `given` to texts whose labels are `true`: numbers 0 … N-1, (texts,).

    `labels` names them. Raises ValueError for a number that names none, and unless the two have the
    same length.
    """
    true, given = np.asarray(true, np.int64), np.asarray(given, np.int64)
    count = len(labels)
    if true.shape != given.shape or true.ndim != 1:
        raise ValueError(f"labels of shape {true.shape} and given ones of shape {given.shape}")
    numbers = np.concatenate([true, given])
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
        raise ValueError(f"a label's number is outside 0 … {count - 1}")
    pairs = np.bincount(true * count + given, minlength=count * count)
    return Scores(list(labels), pairs.reshape(count, count))


def draw_confusion(scores: Scores, path: str | Path) -> None:
    """Write the confusion matrix as a picture (PNG): each row's colours are parts of its texts.

    Raises UserError if the file cannot be written.
    """
    with drawing(path):
        _draw_confusion(scores, path)
        say_what_is_not_drawn(scores.labels, path)


def _draw_confusion(scores: Scores, path: str | Path) -> None:
    from matplotlib.figure import Figure

    count = len(scores.labels)
    parts = _ratio(scores.confusion, scores.support[:, None])  # (N, N)
    size = min(20.0, 3 + 0.5 * count)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="part of the texts with this label", shrink=0.8)
    axes.set_xticks(range(count), scores.labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(count), scores.labels, parse_math=False)
    axes.set_xlabel("label given")
    axes.set_ylabel("label of the text")
    axes.set_title(f"accuracy {scores.accuracy:.1%} of {counted(scores.count, 'text')}")
    if count <= TEXT_COLUMNS:
        for (i, j), part in np.ndenumerate(parts):
            colour = "white" if part > 0.5 else "black"
            axes.text(j, i, str(scores.confusion[i, j]), ha="center", va="center", color=colour)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole, and 0 where both are 0."""
    return part / np.maximum(whole, 1)


def _cells(values: Sequence[Any], width: int) -> str:
    return "".join(f"  {value:>{width}}" for value in values)
