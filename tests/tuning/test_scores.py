"""Accuracy, F1 and the confusion matrix, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tuning.scores import draw_confusion, score

LABELS = ["ham", "spam", "other"]
TRUE, GIVEN = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    scores = score(TRUE, GIVEN, LABELS)
    assert scores.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert (scores.count, scores.accuracy, scores.majority) == (6, 0.5, 0.5)
    np.testing.assert_allclose(scores.precision, [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(scores.recall, [2 / 3, 1 / 2, 0])
    np.testing.assert_allclose(scores.f1, [2 / 3, 2 / 5, 0])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 5) / 3)


def test_a_label_that_does_not_occur_does_not_lower_the_macro_f1() -> None:
    assert score([0, 1], [0, 1], LABELS).macro_f1 == 1


def test_no_texts_have_no_accuracy() -> None:
    scores = score([], [], LABELS)
    assert np.isnan(scores.accuracy) and np.isnan(scores.macro_f1)


@pytest.mark.parametrize(("true", "given"), [([0, 3], [0, 0]), ([0], [-1]), ([0, 1], [0])])
def test_numbers_that_name_no_label(true: list[int], given: list[int]) -> None:
    with pytest.raises(ValueError, match="label"):
        score(true, given, LABELS)


def test_the_report_shows_every_label_and_the_matrix() -> None:
    lines = score(TRUE, GIVEN, LABELS).report().splitlines()
    assert lines[0].startswith("accuracy 50.0% of 6 texts (the most frequent label alone: 50.0%)")
    assert score([0], [0], LABELS).report().startswith("accuracy 100.0% of 1 text (")
    assert [line.split()[0] for line in lines[2:5]] == LABELS
    assert [line.split()[-3:] for line in lines[6:9]] == [
        ["2", "1", "0"],
        ["1", "1", "0"],
        ["0", "1", "0"],
    ]
    many = score([0], [0], [str(i) for i in range(40)]).report().splitlines()
    assert len(many) == 42  # a matrix of 40 columns would not be readable


def test_the_dictionary_has_the_same_numbers() -> None:
    scores = score(TRUE, GIVEN, LABELS)
    found = scores.as_dict()
    assert found["labels"]["spam"] == {"precision": 1 / 3, "recall": 0.5, "f1": 0.4, "count": 2}
    assert found["accuracy"] == 0.5 and found["confusion"] == scores.confusion.tolist()


def test_the_picture(tmp_path: Path) -> None:
    scores = score(TRUE, GIVEN, ["ham", "spam", "costs $5_^ or $6"])  # which is no formula
    draw_confusion(scores, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        draw_confusion(scores, tmp_path / "file" / "confusion.png")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_labels_that_the_font_cannot_draw_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_confusion(score(TRUE, GIVEN, ["\ue000", "spam", "other"]), tmp_path / "confusion.png")
    assert "has boxes for letters that matplotlib's font lacks" in capsys.readouterr().err
