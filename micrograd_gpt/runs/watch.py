"""A page on which to watch a run: `watch.html`, which is drawn anew from the run's own files.

    metrics.jsonl    loss, learning rate, gradient norm (metrics.py)
    samples.jsonl    what the model wrote as it learned, {"step": 1000, "text": "…"} on a line

The page is a file and needs no server: while the run goes on, the browser opens it again every few
seconds, and each time it is as the run last wrote it. When the run ends, that stops.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micrograd_gpt.runs.metrics import LOG_AXIS_FROM, Metrics, append_row, current_rows
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading, write_text

TEMPLATE = Path(__file__).parent / "assets" / "watch.html"
PAGE, SAMPLES = "watch.html", "samples.jsonl"

SECONDS = 5  # between two looks of the browser's
OFTEN = 2.0  # seconds between two drawings: a long run has many rows to read
MOST_POINTS = 1000  # of a curve
MOST_SAMPLES = 50
WIDTH, HEIGHT = 1000, 100  # of a chart's coordinates

Curve = Sequence[tuple[int, float]]  # (step, value)


class Watch:
    """The page of the run in the folder of `metrics`; nothing at all unless `enabled`.

    At step 0 the files start anew, and those that an earlier run left are removed; UserError where
    that fails.
    """

    def __init__(self, metrics: Metrics, step: int, enabled: bool, unit: str = "token") -> None:
        self.metrics, self.enabled, self.unit = metrics, enabled, unit
        self.page, self.samples = metrics.folder / PAGE, metrics.folder / SAMPLES
        self._drawn = -math.inf
        if step == 0:
            for left in (self.page, self.samples):
                try:
                    left.unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(f"cannot remove {left}: {error.strerror or error}") from error

    def add_sample(self, step: int, text: str) -> None:
        """Keep a sample that was drawn after `step`; UserError if it can't be written."""
        if self.enabled:
            append_row(self.samples, {"step": step, "text": text})

    def draw(self, max_steps: int, running: bool = True) -> None:
        """Write the page; while running, no more than once in a while. UserError if that fails."""
        if not self.enabled or (running and time.monotonic() < self._drawn + OFTEN):
            return
        write_text(self.page, self.html(max_steps, running))
        self._drawn = time.monotonic()

    def html(self, max_steps: int, running: bool) -> str:
        """The page as it is now."""
        rows = self.metrics.rows()
        refresh = f'<meta http-equiv="refresh" content="{SECONDS}">' if running else ""
        state = f"Drawn anew every {SECONDS} seconds." if running else "The run has ended."
        parts = {
            "refresh": refresh,
            "title": html.escape(f"Training in {self.metrics.folder.resolve().name}"),
            "latest": latest(rows, max_steps),
            "state": state,
            "charts": charts(rows, self.unit),
            "samples": samples(self._samples()),
        }
        page = TEMPLATE.read_text("utf-8")
        before, *pieces = page.split("{{")
        for piece in pieces:  # one by one: a sample may contain what looks like a place
            name, after = piece.split("}}", 1)
            before += parts[name] + after
        return before

    def _samples(self) -> list[dict[str, Any]]:
        """The samples, first to last, without those of steps that a resumed run took again."""
        with reading(self.samples):
            lines = self.samples.read_bytes().splitlines() if self.samples.exists() else []
        return current_rows(row for line in lines if (row := _sample(line)))


def latest(rows: Sequence[dict[str, Any]], max_steps: int) -> str:
    """The newest numbers, in words."""
    if not rows:
        return f"Step 0 of {max_steps:,}."
    row = rows[-1]
    said = f"Step {row['step']:,} of {max_steps:,}: training loss {row['train_loss']:.3f}"
    if measured := [r["val_loss"] for r in rows if "val_loss" in r]:
        said += f", validation loss {measured[-1]:.3f}"
    if speed := row.get("tokens_per_second"):
        said += f", {speed:,.0f} tokens/s"
    return said + "."


def charts(rows: Sequence[dict[str, Any]], unit: str) -> str:
    """The three charts, of those numbers that there are."""
    curves = {name: curve(rows, name) for name in ("train_loss", "val_loss", "grad_norm")}
    training, validation = curves["train_loss"], curves["val_loss"]
    return "\n".join(
        [
            chart(f"Loss, nats per {unit}", {"training": training, "validation": validation}),
            chart("Learning rate", {"learning rate": curve(rows, "learning_rate")}),
            chart("Gradient norm", {"norm before clipping": curves["grad_norm"]}),
        ]
    )


def curve(rows: Sequence[dict[str, Any]], name: str) -> Curve:
    """The values of this name, thinned out evenly where they are too many; the latest stays."""
    points = [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]
    every = math.ceil(len(points) / MOST_POINTS) or 1
    return points[::-1][::every][::-1]


def chart(title: str, curves: dict[str, Curve]) -> str:
    """A chart as HTML: its lines as SVG, and beside them what a reader without eyes is told."""
    curves = {name: points for name, points in curves.items() if points}
    every = [point for points in curves.values() for point in points]
    if not every:
        return f"<section><h2>{html.escape(title)}</h2><p>No measurement yet.</p></section>"
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    is_log = low > 0 and high >= LOG_AXIS_FROM * low and "Loss" in title  # as in loss.png
    scale = math.log if is_log else float
    span, rise = (last - first) or 1, (scale(high) - scale(low)) or 1
    lines, names = [], []
    for colour, (name, points) in zip(("first", "second"), curves.items(), strict=False):
        places = " ".join(
            f"{WIDTH * (step - first) / span:.1f},"
            f"{HEIGHT * (1 - (scale(value) - scale(low)) / rise):.2f}"
            for step, value in points
        )
        lines.append(f'<polyline class="{colour}" points="{places}"/>')
        names.append(f'<span class="{colour}">{html.escape(name)} {points[-1][1]:.4g}</span>')
    axis = ", logarithmic" if is_log else ""
    about = html.escape(f"{title}: {low:.4g} to {high:.4g}, steps {first} to {last}", quote=True)
    return (
        f"<section><h2>{html.escape(title)}</h2><p>{', '.join(names)}</p>"
        f'<p class="quiet">highest {high:.4g}{axis}</p>'
        f'<svg viewBox="0 -2 {WIDTH} {HEIGHT + 4}" preserveAspectRatio="none" role="img" '
        f'aria-label="{about}">{"".join(lines)}</svg>'
        f'<p class="quiet ends"><span>step {first:,}</span><span>lowest {low:.4g}</span>'
        f"<span>step {last:,}</span></p></section>"
    )


def samples(rows: Sequence[dict[str, Any]]) -> str:
    """The latest samples, as HTML."""
    newest = rows[::-1][:MOST_SAMPLES]
    texts = [f"<h3>Step {r['step']:,}</h3><pre>{html.escape(r['text'])}</pre>" for r in newest]
    return "\n".join(texts) or "<p>None yet.</p>"


def _sample(line: bytes) -> dict[str, Any] | None:
    """The sample on a line; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if isinstance(row.get("text"), str) else None
