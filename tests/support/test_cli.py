"""What the scripts have in common."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from tqdm import tqdm

import micrograd_gpt
from micrograd_gpt.support.cli import ArgumentParser, quoted, run, say
from micrograd_gpt.support.errors import UserError


def test_what_is_said_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello ü")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello ü\n")


def test_what_is_said_stands_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, file=terminal) as bar:
        say("the run goes on", bar)
        written = terminal.getvalue()
    assert "the run goes on\n" in written
    assert written.rindex("the run goes on") < written.rindex("0/2")  # the bar is drawn below it


@pytest.mark.parametrize(
    "problem",
    [BrokenPipeError(), OSError(errno.ENOSPC, "full"), RuntimeError("reentrant call")],
)
def test_that_nobody_reads_it_is_no_error(
    monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    class Unwritable(io.StringIO):
        def write(self, text: str) -> int:
            raise problem

    monkeypatch.setattr(sys, "stderr", Unwritable())
    say("nobody reads this")
    with tqdm(total=1, file=io.StringIO()) as bar:
        say("nor this", bar)


@pytest.mark.parametrize("path", ["out", "my run", "it's", 'a "b" $c', "runs/ü", ";", "*"])
def test_a_path_can_be_copied_to_a_command_line(path: str) -> None:
    assert quoted("runs/out-1.2") == "runs/out-1.2"
    if os.name != "nt":
        assert shlex.split(quoted(path)) == [path]


def test_an_advised_command_has_its_paths_so() -> None:
    advised = re.compile(r"--(?:model|from|merge|init-from|\{anew\}) \{([^}]*)\}")
    for source in Path(micrograd_gpt.__file__).parent.rglob("*.py"):
        for path in advised.findall(source.read_text("utf-8")):
            assert "quoted(" in path, (source.name, path)


def test_numpy_s_and_matplotlib_s_words_do_not_come_before_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        figure = Figure(figsize=(0.5, 0.5), layout="constrained")
        figure.subplots().set_xlabel("which leaves no room")
        figure.suptitle("\u6b63")  # a letter that matplotlib's font lacks
        figure.savefig(io.BytesIO())
        large = np.float32([3e38]) * np.float32(10)
        raise UserError(f"the loss is {(large - large)[0]}")

    with pytest.raises(SystemExit), warnings.catch_warnings(record=True) as told:
        run(main)
    assert not told and capsys.readouterr().err == "error: the loss is nan\n"


def test_a_file_that_may_not_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As one in a folder that belongs to another user, in which not even its being there shows."""

    def main() -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "theirs/config.json")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: cannot use theirs/config.json: Permission denied\n"


def test_what_another_library_could_not_do_is_said_in_its_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of an error of the network, say, that it raises as Python's own, and on several lines."""

    def main() -> int:
        raise ConnectionError("Couldn't reach 'someone/texts'\non the Hub")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: Couldn't reach 'someone/texts' on the Hub\n"


def test_an_error_without_words_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise TimeoutError

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == "error: TimeoutError\n"


def test_a_file_that_is_used_the_wrong_way_is_a_bug(tmp_path: Path) -> None:
    def main() -> int:
        with (tmp_path / "file").open("w") as file:
            file.read()
        return 0

    with pytest.raises(io.UnsupportedOperation):
        run(main)


def test_flags_from_python_need_not_be_texts() -> None:
    """A notebook's main(["--out", Path("out"), "--steps", 3])."""
    parser = ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int)
    parsed = parser.parse_args(["--out", Path("out"), "--steps", 3])
    assert (parsed.out, parsed.steps) == (Path("out"), 3)
