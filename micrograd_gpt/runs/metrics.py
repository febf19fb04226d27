"""What a run measures as it goes: `metrics.jsonl`, `loss.png`, and TensorBoard's event files.

A row is one object on one line, `{"step": 10, "train_loss": 3.2, …}`. A resumed run may take some
steps again: the rows of these are removed when it starts, so every step is there once.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading, written_whole
from micrograd_gpt.support.pictures import drawing

METRICS, CURVES = "metrics.jsonl", "loss.png"
EVENTS = "tensorboard"  # the folder of its event files
LOG_AXIS_FROM = 4.0  # largest loss / smallest loss; from here on a log axis shows more


class Metrics:
    """The measurements of the run in `folder`.

    Args:
        folder: where the files are; it is made if it does not exist.
        step: the step from which the run continues; at 0 the files start anew.
        tensorboard: write event files under `folder` too (needs tensorboardX).

    Raises UserError if a file cannot be written; its old contents are still there then.
    """

    def __init__(self, folder: str | Path, step: int = 0, tensorboard: bool = False) -> None:
        self.folder, self.path = Path(folder), Path(folder) / METRICS
        self._events = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            events = [*(self.folder / EVENTS).glob("events.out.tfevents.*")]
            if tensorboard:
                self._events = _event_writer(self.folder, step)
            for path in events if step == 0 and self.path.exists() else ():  # of an earlier run
                path.unlink()
            if step == 0:
                self.path.unlink(missing_ok=True)
                if (self.folder / CURVES).is_file():  # of an earlier run
                    (self.folder / CURVES).unlink()
            else:
                _mend_last_line(self.path)
                self._remove_after(step)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, as its last row says; 0 without one."""
        last = self.rows()[-1:]
        found = last[0].get("elapsed_seconds") if last else None
        return float(found) if isinstance(found, int | float) else 0.0

    def _remove_after(self, step: int) -> None:
        """Remove the rows of steps after `step`, which are taken again, and rows that these replace
        already; lines that are not rows stay."""
        lines = self._lines()
        current = {row["step"]: i for i, line in enumerate(lines) if (row := _row(line))}
        kept = [
            line
            for i, line in enumerate(lines)
            if (row := _row(line)) is None or (row["step"] <= step and current[row["step"]] == i)
        ]
        if len(kept) < len(lines):
            with written_whole(self.path) as file:
                file.writelines(line + b"\n" for line in kept)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; once this has returned, killing the process does not lose it."""
        append_row(self.path, row)
        try:
            if self._events:
                self._events.write_event(_event(row))
                self._events.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """The rows that count, in the order of their steps; damaged lines are left out.

        Raises UserError if the file cannot be read.
        """
        return current_rows(row for line in self._lines() if (row := _row(line)))

    def damaged_lines(self) -> list[int]:
        """The numbers, from 1, of the lines that are not rows; they stay, and are ignored."""
        return [i for i, line in enumerate(self._lines(), 1) if _row(line) is None]

    def _lines(self) -> list[bytes]:
        with reading(self.path):
            return self.path.read_bytes().splitlines() if self.path.exists() else []

    def draw(self, unit: str = "token") -> None:
        """Draw loss.png: training and validation loss over the steps, the learning rate below. The
        losses are in nats per `unit`.
        """
        with drawing(self.folder / CURVES):
            self._draw(unit)

    def _draw(self, unit: str) -> None:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

        rows = self.rows()
        figure = Figure(figsize=(8, 6), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        steps, train = [r["step"] for r in rows], [r["train_loss"] for r in rows]
        losses.plot(steps, train, lw=0.8, label="training")
        measured = [r for r in rows if "val_loss" in r]
        validation = [r["val_loss"] for r in measured]
        losses.plot([r["step"] for r in measured], validation, "o-", ms=4, label="validation")
        smallest = min(train + validation, default=0)
        if smallest > 0 and max(train + validation) >= LOG_AXIS_FROM * smallest:
            losses.set_yscale("log")
            losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            losses.yaxis.set_major_formatter(ScalarFormatter())
            losses.yaxis.set_minor_formatter(NullFormatter())
        losses.set_ylabel(f"loss (nats per {unit})")
        losses.legend()
        rates.plot(steps, [r["learning_rate"] for r in rows], color="grey")
        rates.set_ylabel("learning rate")
        rates.set_xlabel("step")
        rates.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axes in (losses, rates):
            axes.grid(which="both", alpha=0.3)
        with written_whole(self.folder / CURVES) as image:
            figure.savefig(image, format="png", dpi=120)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of rows, whole or not at all; UserError if that fails."""
    line = (json.dumps(row) + "\n").encode("utf-8")
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) != len(line):
                os.ftruncate(file.fileno(), end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _cannot_write(path, error) from error


def current_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those that a later one replaces: those of its own step or a later step."""
    current: list[dict[str, Any]] = []
    for row in rows:
        step = row["step"]
        while current and current[-1]["step"] >= step:
            current.pop()
        current.append(row)
    return current


def _row(line: bytes) -> dict[str, Any] | None:
    """The numbers of the row on a line, without what else somebody has put there, such as null.
    None if step, loss or learning rate is not among them.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return numbers if {"step", "train_loss", "learning_rate"} <= numbers.keys() else None


def _mend_last_line(path: Path) -> None:
    """End the last line, or remove it if the process was stopped while writing it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        try:
            json.loads(content[whole:])
            file.write(b"\n")
        except ValueError:
            file.truncate(whole)


def _event_writer(folder: Path, step: int) -> Any:
    """A new event file for the steps after `step`, which TensorBoard shows in place of earlier
    ones. tensorboardX's SummaryWriter would write in a thread, a row late."""
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
    except ImportError:
        raise UserError(
            '--tensorboard needs tensorboardX: pip install "micrograd-gpt[tensorboard]"'
        ) from None
    path = folder / EVENTS
    try:
        path.mkdir(exist_ok=True)
        writer = EventsWriter(str(path / "events"), f".{os.urandom(8).hex()}")
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        writer.flush()
    except OSError as error:
        raise _cannot_write(path, error) from error
    return writer


def _event(row: dict[str, Any]) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=row[name]) for name in row if name != "step"]
    return Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
    )
