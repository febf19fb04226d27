"""What the scripts have in common."""

from __future__ import annotations

import io
import sys

import pytest

from micrograd_gpt.support.cli import say


def test_what_is_said_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello ü")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello ü\n")


def test_that_nobody_reads_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", gone := Gone())
    say("hello")
    assert gone.getvalue() == "hello\n"
