"""The page on which a run is watched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from micrograd_gpt.runs import watch as module
from micrograd_gpt.runs.metrics import Metrics
from micrograd_gpt.runs.watch import MOST_POINTS, Watch
from micrograd_gpt.support.errors import UserError


def row(step: int, loss: float = 3.0, **more: float) -> dict[str, Any]:
    return {"step": step, "train_loss": loss, "learning_rate": 1e-3, "grad_norm": 0.5, **more}


def watched(folder: Path, *rows: dict[str, Any], step: int = 0) -> Watch:
    metrics = Metrics(folder, step)
    for each in rows:
        metrics.append(each)
    return Watch(metrics, step, enabled=True)


def lines(html: str) -> list[list[tuple[float, float]]]:
    """The points of each line that is drawn."""
    found = re.findall(r'points="([^"]*)"', html)
    return [
        [(float(x), float(y)) for x, y in (place.split(",") for place in points.split())]
        for points in found
    ]


def test_the_curves_are_those_of_the_metrics(tmp_path: Path) -> None:
    watch = watched(tmp_path, row(10, 4.0), row(20, 3.0, val_loss=3.5), row(30, 2.0, val_loss=2.5))
    html = watch.html(100, running=True)
    training, validation, rate, norm = lines(html)
    assert training == [(0, 0), (500, 50), (1000, 100)]  # from the top left to the bottom right
    assert validation == [(500, 25), (1000, 75)]
    assert len(rate) == len(norm) == 3
    assert "Step 30 of 100: training loss 2.000, validation loss 2.500" in html
    assert "Loss, nats per token: 2 to 4, steps 10 to 30" in html  # for a screen reader


def test_a_loss_that_falls_far_is_drawn_as_in_loss_png(tmp_path: Path) -> None:
    html = watched(tmp_path, row(1, 8.0), row(2, 4.0), row(3, 2.0)).html(9, running=True)
    assert [y for _, y in lines(html)[0]] == [0, 50, 100] and "logarithmic" in html


def test_a_long_run_is_thinned_out_but_for_its_latest_step(tmp_path: Path) -> None:
    html = watched(tmp_path, *(row(i) for i in range(2500))).html(9999, running=True)
    training = lines(html)[0]
    assert MOST_POINTS / 2 < len(training) <= MOST_POINTS
    assert training[-1][0] == 1000 and "step 2,499" in html


def test_samples_come_latest_first_and_stay_text(tmp_path: Path) -> None:
    watch = watched(tmp_path)
    watch.add_sample(10, "<script>alert(1)</script> {{title}}")
    watch.add_sample(20, "second")
    html = watch.html(100, running=True)
    assert html.index("second") < html.index("&lt;script&gt;alert(1)&lt;/script&gt; {{title}}")
    assert "<script" not in html and "No measurement yet" in html


def test_samples_of_steps_that_are_taken_again_are_replaced(tmp_path: Path) -> None:
    first = watched(tmp_path, row(10))
    first.add_sample(10, "kept")
    first.add_sample(20, "lost")
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'damaged\n{"step": 30}\n')
    again = watched(tmp_path, step=10)
    again.add_sample(20, "anew")
    html = again.html(100, running=True)
    assert "kept" in html and "anew" in html and "lost" not in html


def test_a_new_run_s_files_begin_anew(tmp_path: Path) -> None:
    old = watched(tmp_path)
    old.add_sample(10, "old")
    old.draw(100)
    Watch(Metrics(tmp_path), 0, enabled=False)
    assert not (tmp_path / "watch.html").exists() and not (tmp_path / "samples.jsonl").exists()


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "watch.html").mkdir()
    with pytest.raises(UserError, match=r"cannot remove .*watch\.html"):
        watched(tmp_path)


def test_the_page_is_opened_again_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, page = watched(tmp_path, row(1)), tmp_path / "watch.html"
    watch.draw(100)
    assert 'http-equiv="refresh"' in page.read_text("utf-8")
    watch.metrics.append(row(2))
    watch.draw(100)
    assert "Step 1 of" in page.read_text("utf-8")  # drawn a moment ago
    monkeypatch.setattr(module, "OFTEN", 0.0)
    watch.draw(100)
    assert "Step 2 of" in page.read_text("utf-8")
    watch.draw(100, running=False)
    assert "refresh" not in page.read_text("utf-8") and "has ended" in page.read_text("utf-8")


def test_it_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = watched(tmp_path, row(1)).html(100, running=True)
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|<script|<link|<img|\bsrc=|@import|url\(", html)
