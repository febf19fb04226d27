"""Several files of a folder that change together: all of them are new, or all as they were.

    .saving/    the new files while they are being written: worth nothing until all are there
    .saved/     the new files, whole and on the disk: renaming .saving to it is the decision

From .saved/ they are moved one by one over the old ones. Wherever a process is stopped, the folder
holds the old set, or the new one with its last files still in .saved/; `finish_set` moves those. An
empty folder in .saved/ stands for a file that the new set does not have.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading, refuse_tilde, written_whole

SAVING, SAVED = ".saving", ".saved"


@contextmanager
def written_as_set(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write files into, which take their places in `folder` when the block ends.

    If the block raises, `folder` stays as it was, or absent. Raises UserError if the set can't be
    written.
    """
    folder = Path(folder)
    refuse_tilde(folder)
    finish_set(folder)
    saving = folder / SAVING
    with _named(folder):
        absent = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        remove_folder(saving)
        with _named(folder):
            saving.mkdir(parents=True)
        yield saving
        with _named(folder):
            _sync(saving)
            os.rename(saving, folder / SAVED)
            _sync(folder)
    except BaseException as error:
        shutil.rmtree(saving, ignore_errors=True)  # its room on the disk may be what is missing
        with suppress(OSError):  # it was not made, or something else was put into it
            for place in absent:
                place.rmdir()
        if isinstance(error, UserError):  # names the file by the place it would have had
            raise UserError(str(error).replace(str(saving), str(folder))) from error
        raise
    finish_set(folder)


def without(file: Path) -> None:
    """Within the block of `written_as_set`: have the set end without this file of its folder."""
    with _named(file.parent):
        if (file.parent.parent / file.name).exists():
            file.mkdir()


def finish_set(folder: str | Path) -> None:
    """Complete a set that was decided on but not yet moved to its place when the process stopped.

    Any process that wants to read the set may do this, even while another one does. Raises
    UserError if the files can't be moved; they are then still whole in .saved/.
    """
    folder = Path(folder)
    saved = folder / SAVED
    with reading(folder):
        if not saved.is_dir():
            return
    with _named(folder), suppress(FileNotFoundError):  # then another process has moved it
        for file in sorted(saved.iterdir()):
            with suppress(FileNotFoundError):
                if file.is_dir():
                    (folder / file.name).unlink(missing_ok=True)
                    file.rmdir()
                    continue
                os.replace(file, folder / file.name)
                # If it is still there, both were names of one file, and renaming did nothing.
                if file.samefile(folder / file.name):
                    file.unlink()
        _sync(folder)
        saved.rmdir()


def link_set(files: Iterable[Path], folder: str | Path) -> None:
    """Make `files` the set in `folder` too, by hard links.

    Links take no room and no time, and are safe because files are replaced, never changed. On a
    file system that has no links the files are copied. Raises UserError if that fails.
    """
    with written_as_set(folder) as saving:
        for file in files:
            try:
                os.link(file, saving / file.name)
            except OSError:
                with written_whole(saving / file.name) as copy, open(file, "rb") as original:
                    shutil.copyfileobj(original, copy)


def remove_folder(folder: Path) -> None:
    """Remove a folder and everything in it, if it is there; UserError if that fails.

    It is renamed first, so that a process stopped halfway leaves no folder that looks whole. Of a
    link to a folder only the link goes.
    """
    removing = folder.with_name(".removing")
    with _named(folder):
        _remove(removing)  # a kill left it
        if os.path.lexists(folder):
            os.rename(folder, removing)
            _remove(removing)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk (Windows has no such call, and does not need it)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
