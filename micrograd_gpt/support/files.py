"""Files: written whole or not at all, and read with errors that name the file."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from micrograd_gpt.support.errors import UserError

BEST = "best"  # the folder in a run's that has its best checkpoint
RANDOM = "[0-9a-f]" * 16  # the part of a temporary file's name that makes it unique
ABANDONED = 24 * 3600  # seconds after which a temporary file is taken to be a killed writer's


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears complete or not at all.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed
    over `path` when the block ends; where that is a link, over the file that it leads to. If the
    block raises, the temporary file is removed and what was at `path` stays untouched. An OSError,
    also one from the block, becomes a UserError, and so does a device or a pipe (/dev/stdout),
    which a file must not take the place of.
    """
    path = Path(path)
    refuse_tilde(path)
    try:
        _refuse_device(path)
        target = path.resolve() if path.is_symlink() else path
        # Not the process id: it is the same in two containers that share a folder.
        temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def refuse_tilde(path: str | Path) -> None:
    """UserError for a path that begins with ~, which a shell leaves there behind a = or in quotes:
    it would be a new folder of that name. One that exists is meant.
    """
    first = Path(path).parts[:1]
    if first and first[0].startswith("~") and not os.path.exists(first[0]):
        raise UserError(
            f"{path} begins with {first[0]}, which no shell has replaced by a home folder: write "
            "the whole path"
        )


def _refuse_device(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"cannot write {path}: it is a device or a pipe; name a file")


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left."""
    pattern = f".{glob.escape(path.name)}.{RANDOM}.tmp"
    with suppress(OSError):  # another process removes it too, or it belongs to another user
        for left in path.parent.glob(pattern):
            if left.stat().st_mtime < time.time() - ABANDONED:
                left.unlink()


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a killed writer left in a folder in which nobody else writes."""
    for left in Path(folder).glob(f".*.{RANDOM}.tmp"):
        left.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; UserError if it can't be written."""
    with written_whole(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around code that reads `path` or looks for it: an OSError becomes a UserError naming it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def is_stream(path: str | Path) -> bool:
    """Whether a path that exists is a pipe or a file that a process has open, as /dev/stdin and
    <(…) are, whose name says nothing about what is in it."""
    is_open = str(path).startswith(("/dev/stdin", "/dev/fd/", "/proc/"))
    is_named = os.path.isdir(path) or (os.path.isfile(path) and not is_open)
    return os.path.exists(path) and not is_named


def is_stdin(path: str | Path) -> bool:
    """Whether a path is a name of stdin, and that is a pipe or the like rather than a file."""
    names = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
    return os.path.normpath(path) in names and not os.path.isfile(path)


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no file; UserError if it is damaged."""
    with reading(path):
        try:
            content = Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object")
    return value


def _damaged(path: str | Path, why: str) -> UserError:
    other = other_checkpoint(path)
    return UserError(f"{path} is damaged: {why}" + (f": {other}" if other else ""))


def are_one_file(a: str | Path, b: str | Path) -> bool:
    """Whether these are names of the same file, as of a step that is the latest and the best."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def other_checkpoint(path: str | Path) -> str:
    """What helps where a file of a run is damaged, in words: its latest checkpoint, or where this
    is the damaged one, the latest that was kept, or its best. Nothing ("") for any other file.
    """
    folder, name = Path(path).parent, Path(path).name
    run = folder.parent if folder.name == BEST or folder.name.startswith("step-") else folder
    kept = sorted(run.glob("step-*"), key=lambda place: (len(place.name), place.name), reverse=True)
    places = [place for place in (run, *kept, run / BEST) if (place / name).is_file()]
    if len(places) < 2:
        return ""
    for other in places:
        if not are_one_file(other / name, path):
            return f"copy the files of {other} into {folder}"
    return "start again: this run kept no other checkpoint"


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; UserError if it can't be read."""
    digest = hashlib.sha256()
    with reading(path), open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
