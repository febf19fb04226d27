"""Several files of a folder that change together: all of them new, or all as they were.

    .saving/    the new files while they are written: worth nothing until they are all there
    .saved/     the new files, whole and on the disk: renaming .saving to it is the decision

From .saved/ they are moved one by one over the old ones. Wherever a process is stopped, the folder
holds the old set, or the new one with its last files still in .saved/; `finish_set` moves those.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import written_whole

SAVING, SAVED = ".saving", ".saved"


@contextmanager
def written_as_set(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write files into, which take their places in `folder` when the block ends.

    If the block raises, `folder` stays as it was. Raises UserError where the set can't be written.
    """
    folder = Path(folder)
    finish_set(folder)
    saving = folder / SAVING
    try:
        remove_folder(saving)
        with _named(folder):
            saving.mkdir(parents=True)
        yield saving
        with _named(folder):
            _sync(saving)
            os.rename(saving, folder / SAVED)
            _sync(folder)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)  # its room on the disk may be what is missing
        raise
    finish_set(folder)


def finish_set(folder: str | Path) -> None:
    """Complete a set that was decided on but not moved to its places before the process stopped.

    Any process that wants to read the set may do this, even while another one does.
    Raises UserError where the files can't be moved: they are still whole in .saved/.
    """
    folder = Path(folder)
    saved = folder / SAVED
    with _named(folder), suppress(FileNotFoundError):  # then another process has moved it
        if not saved.is_dir():
            return
        for file in sorted(saved.iterdir()):
            with suppress(FileNotFoundError):
                os.replace(file, folder / file.name)
                # Still there: both were names of one file, and then renaming does nothing.
                if file.samefile(folder / file.name):
                    file.unlink()
        _sync(folder)
        saved.rmdir()


def link_set(files: Iterable[Path], folder: str | Path) -> None:
    """Make `files` the set in `folder` too, as second names of the same bytes.

    That takes no room and no time, and is safe because files are replaced, never changed. Where the
    file system knows no second names, they are copied. Raises UserError where that fails.
    """
    with written_as_set(folder) as saving:
        for file in files:
            try:
                os.link(file, saving / file.name)
            except OSError:
                with written_whole(saving / file.name) as copy, open(file, "rb") as original:
                    shutil.copyfileobj(original, copy)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, if it is there; UserError where that fails.

    It is renamed first: stopped on the way, it leaves no folder that looks like a whole one.
    """
    removing = folder.with_name(".removing")
    with _named(folder):
        if removing.exists():
            shutil.rmtree(removing)
        if folder.exists():
            os.rename(folder, removing)
            shutil.rmtree(removing)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk too (Windows has no such call, nor the need)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
