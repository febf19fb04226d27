"""What a run measures: rows that are never lost, and a curve of those that count."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from micrograd_gpt.runs import metrics
from micrograd_gpt.runs.metrics import Metrics, current_rows
from micrograd_gpt.runs.watch import Watch
from micrograd_gpt.support.errors import UserError


def row(step: int, loss: float = 1.0, **more: float) -> dict[str, Any]:
    return {"step": step, "train_loss": loss, "learning_rate": 0.1, **more}


def test_each_step_has_one_row(tmp_path: Path) -> None:
    log = Metrics(tmp_path)
    for step in (1, 2, 3):
        log.append(row(step))
    log = Metrics(tmp_path, step=1)
    log.append(row(2, 5.0))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # as any reader sees them
    assert list(map(json.loads, lines)) == log.rows() == [row(1), row(2, 5.0)]
    assert current_rows([]) == []
    assert Metrics(tmp_path).rows() == []  # a new run


@pytest.mark.parametrize(
    ("tail", "kept"),
    [(b'{"step": 2, "tr', 1), (json.dumps(row(2)).encode(), 2), (b"\xc3", 1), (b"", 1)],
)
def test_a_torn_last_line_is_mended(tmp_path: Path, tail: bytes, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(row(1)).encode() + b"\n"
    path.write_bytes(whole + tail)
    log = Metrics(tmp_path, step=2)
    assert path.read_bytes() == whole + (tail + b"\n" if kept == 2 else b"")
    assert len(log.rows()) == kept


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Metrics(tmp_path)
    log.append(row(1))
    before = log.path.read_bytes()

    class HalfFile:
        """Takes half of what it is given, as the system does where the disk is full."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = open(*args, **kwargs)  # noqa: SIM115

        def write(self, data: bytes) -> int:
            return self.file.write(data[: len(data) // 2])

        def __enter__(self) -> HalfFile:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open", HalfFile, raising=False)
        with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"):
            log.append(row(2))
    assert log.path.read_bytes() == before
    log.append(row(3))
    assert [r["step"] for r in log.rows()] == [1, 3]


def test_files_that_cannot_be_written_or_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(UserError, match=r"^cannot write .*plain/out/metrics\.jsonl: .*irectory"):
        Metrics(tmp_path / "plain" / "out")
    log = Metrics(tmp_path)
    log.path.mkdir()
    with pytest.raises(UserError, match=r"^cannot read .*metrics\.jsonl: Is a directory$"):
        log.rows()
    log.path.rmdir()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(metrics, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"metrics\.jsonl: Permission denied; what was there"):
        log.append(row(1))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([5.0, 2.0], "linear"), ([8.0, 1.0], "log"), ([8.0, 0.0], "linear"), ([], "linear")],
)
def test_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], scale: str
) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    log = Metrics(tmp_path)
    for step, loss in enumerate(losses, 1):
        log.append(row(step, loss, **({"val_loss": 3.0} if step == 2 else {})))
    log.draw()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    top, bottom = figures[0].axes
    assert top.get_yscale() == scale and top.get_ylabel() == "loss (nats per token)"
    assert [line.get_label() for line in top.lines] == ["training", "validation"]
    assert list(top.lines[0].get_ydata()) == losses
    assert list(top.lines[1].get_ydata()) == [3.0] * (len(losses) > 1)
    assert bottom.get_ylabel() == "learning rate" and bottom.get_xlabel() == "step"


def events_in(path: Path) -> list[Any]:
    """The events of a file, each with its length and two checksums around it (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    content, events = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return events


def test_event_files_have_each_row_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    log, threads = Metrics(tmp_path, tensorboard=True), threading.active_count()
    for step in (1, 2, 3):
        log.append(row(step, 2.0 / step))
        (path,) = (tmp_path / "tensorboard").iterdir()
        last = events_in(path)[-1]
        values = {value.tag: value.simple_value for value in last.summary.value}
        assert last.step == step and threading.active_count() == threads
        assert values == pytest.approx({"train_loss": 2.0 / step, "learning_rate": 0.1})
    Metrics(tmp_path, 2, tensorboard=True).append(row(3))
    (new,) = set((tmp_path / "tensorboard").iterdir()) - {path}
    version, start, last = events_in(new)
    assert version.file_version and start.HasField("session_log")
    assert (start.step, last.step) == (3, 3)  # TensorBoard forgets what it had from there on
    Metrics(tmp_path, tensorboard=True)  # anew, in the same second
    (only,) = (tmp_path / "tensorboard").iterdir()
    assert only not in (path, new)


def test_tensorboard_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboardX", "tensorboardX.event_file_writer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"--tensorboard needs tensorboardX: pip install"):
        Metrics(tmp_path, tensorboard=True)


@pytest.mark.parametrize("tensorboard_is", ["a file", "beside a file"])
def test_event_files_that_cannot_be_written(tmp_path: Path, tensorboard_is: str) -> None:
    pytest.importorskip("tensorboardX")
    out = tmp_path / "out"
    if tensorboard_is == "a file":
        out.mkdir()
        (out / "tensorboard").write_text("mine")
        (out / "metrics.jsonl").write_text("an earlier run's")
    else:
        out.write_text("mine")
    with pytest.raises(UserError, match=rf"^cannot write {out}/(tensorboard|metrics)") as caught:
        Metrics(out, tensorboard=True)
    assert "\n" not in str(caught.value)
    if out.is_dir():
        assert (out / "metrics.jsonl").read_text() == "an earlier run's"


@pytest.mark.parametrize(
    "damage",
    [
        *(b"\xff\xfe", b"[]", b"", b'{"step": 2', b'{"step": 2, "learning_rate": 0.1}', b"7"),
        b'{"step": "2", "train_loss": 1, "learning_rate": 0.1}',
        b'{"step": 2, "train_loss": null, "learning_rate": 0.1}',
        b"[" * 100_000,
    ],
    ids=lambda damage: repr(damage[:40]),
)
def test_a_damaged_line_is_passed_over_and_stays(tmp_path: Path, damage: bytes) -> None:
    lines = [json.dumps(row(1)).encode(), damage, json.dumps(row(3)).encode()]
    before = b"\n".join(lines) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(before)
    log = Metrics(tmp_path, step=3)
    assert log.damaged_lines() == [2] and log.rows() == [row(1), row(3)]
    log.append(row(4))
    log.draw()
    assert log.path.read_bytes().startswith(before) and len(log.rows()) == 3


def test_what_others_wrote_into_a_row_is_no_number(tmp_path: Path) -> None:
    edited = row(1) | {"val_loss": None, "grad_norm": None, "tokens_per_second": "fast", "by": "me"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(edited) + "\n")
    log = Metrics(tmp_path, step=3)
    assert log.rows() == [row(1)] and log.damaged_lines() == []
    assert "Step 1 of 4" in Watch(log, 3, True).html(4, running=True)
    log.draw()


def test_a_new_run_has_no_curve_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "loss.png").touch()
    Metrics(tmp_path, step=3)
    assert (tmp_path / "loss.png").exists()
    Metrics(tmp_path)
    assert not (tmp_path / "loss.png").exists()
