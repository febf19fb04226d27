"""Files are written whole or not at all, and what cannot be read is named."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import fill_disk

from micrograd_gpt.runs.lock import only_writer
from micrograd_gpt.support import files
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import written_as_set
from micrograd_gpt.support.files import written_whole

UNCHANGED = "; what was there before is unchanged$"


def test_what_is_read_is_all_of_it_or_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert files.read_json(path) is None
    path.write_text('{"ü": [1, null]}', encoding="utf-8")
    assert files.read_json(path) == files.read_json(str(path)) == {"ü": [1, None]}
    assert files.read_json(path / "inside of a file") is None
    for read in (files.read_json, files.sha256):
        with pytest.raises(UserError, match=f"cannot read {re.escape(str(tmp_path))}: "):
            read(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    files.write_text(target, "old")
    with pytest.raises(ZeroDivisionError), files.written_whole(target) as file:
        file.write(b"half")
        assert target.read_text() == "old"
        _ = 1 / 0
    assert target.read_text() == "old" and [f.name for f in target.parent.iterdir()] == ["file.txt"]
    files.write_text(target, "new ü")
    assert target.read_text("utf-8") == "new ü"
    assert [f.name for f in target.parent.iterdir()] == ["file.txt"]


def test_writers_with_the_same_process_id_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two containers that share a folder, where ids begin at 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "file.txt"
    with files.written_whole(path) as first, files.written_whole(path) as second:
        for written in (b"one ", b"whole"):
            first.write(written)
        second.write(b"another")
        first.flush(), second.flush()
        contents = sorted(p.read_bytes() for p in tmp_path.iterdir())
        assert contents == [b"another", b"one whole"]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file.txt": b"one whole"}


def test_what_killed_writers_left_is_removed_in_time(tmp_path: Path) -> None:
    path = tmp_path / "file[1].txt"
    stopped = "import os, sys; from micrograd_gpt.support import files\n"
    stopped += "with files.written_whole(sys.argv[1]) as file: file.write(b'half'); os._exit(0)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", stopped, str(path)], check=True)
    old, recent = tmp_path.iterdir()
    for name in (".file[1].txt.mine.tmp", ".file1.txt.0123456789abcdef.tmp", "file[1].txt.tmp"):
        (tmp_path / name).write_text("not left by a writer of this file")
        os.utime(tmp_path / name, (1, 1))
    os.utime(old, (1, 1))
    files.write_text(path, "new")
    assert not old.exists() and recent.exists() and path.read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("room", [0, 3])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, before: bytes | None
) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_bytes(before)
    fill_disk(monkeypatch, files, room)
    message = f"^cannot write {re.escape(str(path))}: No space left on device{UNCHANGED}"
    with pytest.raises(UserError, match=message) as caught:
        files.write_text(path, "more than there is room for")
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == (
        {} if before is None else {path.name: before}
    )


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    files.write_text(tmp_path / "file.txt", "old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError, match=rf"file\.txt: Input/output error{UNCHANGED}"):
        files.write_text(tmp_path / "file.txt", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file.txt": "old"}


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"cannot write .*folder: .*{UNCHANGED}"):
        files.write_text(tmp_path / "folder", "a file where a folder is: renaming fails")
    (tmp_path / "plain").write_text("old")
    for path in (tmp_path / "plain" / "x", tmp_path / "plain" / "deep" / "x"):
        with pytest.raises(UserError, match=f"cannot write {re.escape(str(path))}: .*{UNCHANGED}"):
            files.write_text(path, "a folder where a file is: none can be made")

    def forbidden(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "open", forbidden, raising=False)
    with pytest.raises(UserError, match=f"cannot write .*plain: Permission denied{UNCHANGED}"):
        files.write_text(tmp_path / "plain", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain"]
    assert (tmp_path / "plain").read_text() == "old"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, UserError])
def test_what_is_no_oserror_stays_what_it_is(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(failure, match=r"^mine$"), files.written_whole(path) as file:
        file.write(b"half")
        raise failure("mine")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file.txt": "old"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_a_file_does_not_take_the_place_of_a_device_or_a_link(tmp_path: Path) -> None:
    """/dev/stdout is such a link: whoever may would replace it for all."""
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    link.symlink_to(file)
    with pytest.raises(UserError, match=r"cannot write .*pipe: it is a device or a pipe; name a f"):
        files.write_text(pipe, "text")
    assert pipe.is_fifo()
    for text in ("new", "newer"):
        files.write_text(link, text)
        assert link.is_symlink() and file.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_a_home_that_no_shell_has_filled_in_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of --out=~/runs, which a shell leaves as it is."""
    monkeypatch.chdir(tmp_path)
    for write in (written_whole, written_as_set, only_writer):
        for path in ("~", "~/runs", "~me/runs"):
            with pytest.raises(UserError, match=f"^{path} begins with ~.*: write"), write(path):
                pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "~").mkdir()  # somebody wants it
    with written_whole("~/file"):
        pass
    assert (tmp_path / "~" / "file").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("is_file", [False, True])
def test_the_names_of_stdin(monkeypatch: pytest.MonkeyPatch, is_file: bool) -> None:
    """A file that a shell opened as stdin is read as any other."""
    monkeypatch.setattr(os.path, "isfile", lambda path: is_file)
    for path in ("/dev/stdin", "/dev//fd/0", "/proc/self/fd/0"):
        assert files.is_stdin(path) is not is_file
    for path in ("-", "stdin", "/dev/fd/3", "/dev/null", "0.1"):
        assert not files.is_stdin(path)
