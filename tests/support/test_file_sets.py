"""Files that change together, wherever the process is stopped and whatever the disk refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from faults import fail, kill, needs_fork, run_with_fault

from micrograd_gpt.support import file_sets
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import (
    finish_set,
    link_set,
    remove_folder,
    without,
    written_as_set,
)
from micrograd_gpt.support.files import write_text


def write(folder: Path, text: str) -> None:
    with written_as_set(folder) as new:
        for name in ("a", "b", "c"):
            write_text(new / name, text)


def read(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def whole(text: str) -> dict[str, str]:
    return dict.fromkeys(("a", "b", "c"), text)


@needs_fork
@pytest.mark.parametrize(("fault", "status"), [(kill, 9), (fail, 1)])
def test_a_set_is_the_old_or_the_new_one_wherever_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], status: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only time would be lost
    outcomes = []
    for number in count():
        folder = tmp_path / str(number)
        write(folder, "old")
        got = run_with_fault(lambda folder=folder: write(folder, "new"), fault, number)
        finish_set(folder)
        found = read(folder)
        assert found in (whole("old"), whole("new")), number
        outcomes.append((got, found["a"]))
        write(folder, "next")
        assert read(folder) == whole("next")
        assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "c"]
        if got == 0:
            break
        assert got == status
    # First it stays the old one, from one moment on it is the new one.
    texts = [text for _, text in outcomes]
    assert texts == sorted(texts, reverse=True) and set(texts) == {"old", "new"}
    assert len(outcomes) > 12


def test_a_new_set_may_have_fewer_files(tmp_path: Path) -> None:
    write(tmp_path, "old")
    (tmp_path / "d").write_text("not of the set")
    with written_as_set(tmp_path) as new:
        write_text(new / "a", "new")
        for name in ("b", "e"):  # whether it is there or not
            without(new / name)
    assert read(tmp_path) == {"a": "new", "c": "old", "d": "not of the set"}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_was_not_there_is_not_there_after_a_failure(tmp_path: Path) -> None:
    deep = tmp_path / "x" / "y"
    with pytest.raises(UserError, match=rf"^cannot write {deep}/a: "), written_as_set(deep) as new:
        (new / "a").mkdir()
        write_text(new / "a", "a file where a folder is")
    assert list(tmp_path.iterdir()) == []


def test_what_the_block_raises_leaves_the_old_set(tmp_path: Path) -> None:
    write(tmp_path, "old")
    with pytest.raises(KeyboardInterrupt), written_as_set(tmp_path) as new:
        (new / "a").write_text("new")
        raise KeyboardInterrupt
    assert read(tmp_path) == whole("old") and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("call", "works", "left"),
    [  # the three files are flushed and named one by one, then the set
        ("fsync", 0, "old"),
        ("fsync", 3, "old"),
        ("fsync", 4, "new"),
        ("rename", 0, "old"),
        ("replace", 0, "old"),
        ("replace", 3, "new"),
        ("replace", 4, "new"),
    ],
)
def test_a_disk_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, works: int, left: str
) -> None:
    write(tmp_path, "old")
    calls, real = count(), getattr(os, call)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *args: real(*args) if next(calls) < works else fail())
        with pytest.raises(UserError, match=r"^cannot write .*: No space left on device"):
            write(tmp_path, "new")
    finish_set(tmp_path)
    assert read(tmp_path) == whole(left)


def test_a_reader_may_finish_the_set_while_the_writer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def replace_twice(source: Path, target: Path) -> None:
        replace(source, target)
        monkeypatch.setattr(os, "replace", replace)
        finish_set(tmp_path)  # the other process, in the middle of ours

    monkeypatch.setattr(os, "replace", replace_twice)
    write(tmp_path, "new")
    assert read(tmp_path) == whole("new") and not (tmp_path / ".saved").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_set_outlives_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(file_sets.os, "link", lambda *_: fail())
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, "old")
    link_set([first / name for name in ("a", "b", "c")], second)
    assert (first / "a").samefile(second / "a") == links
    link_set([first / name for name in ("a", "b", "c")], second)
    assert sorted(p.name for p in second.iterdir()) == ["a", "b", "c"]
    write(first, "new")
    assert read(second) == whole("old") and read(first) == whole("new")


def test_a_folder_is_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", "old")
    with monkeypatch.context() as patch:
        patch.setattr(file_sets.shutil, "rmtree", lambda _: fail())
        with pytest.raises(UserError, match="cannot write to"):
            remove_folder(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    write(tmp_path / "y", "old")
    remove_folder(tmp_path / "y")
    remove_folder(tmp_path / "y")
    assert list(tmp_path.iterdir()) == []


def test_no_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"^cannot write to .*run: Permission denied$"):
        write(tmp_path / "run", "new")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_of_a_link_to_a_folder_only_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    for link in ("folder", ".removing"):  # a kill left the second
        (tmp_path / link).symlink_to("elsewhere")
    remove_folder(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "file").exists()
