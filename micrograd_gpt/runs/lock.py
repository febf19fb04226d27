"""One training, or one evaluation, at a time writes a folder; whoever reads it needs no lock."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import refuse_tilde

LOCK = ".lock"  # in the folder while a process writes it: that process's number and its machine
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # some network file systems


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Within this block no other process writes to `folder`, which is made if it does not exist.

    The system itself holds the lock, and ends it with the process, however that ends. Raises
    UserError, naming the other process, if there is one, and where the folder cannot be written.
    """
    folder, absent = Path(folder), []
    refuse_tilde(folder)
    try:
        absent = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    except FileExistsError as error:
        raise UserError(
            f"{folder} is a file, or a link that leads nowhere: give another --out"
        ) from error
    except OSError as error:
        _leave(folder, absent)
        place = error.filename or folder
        raise UserError(f"cannot write {place}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.close()
        _leave(folder, absent)


def present_writer(folder: str | Path) -> str:
    """The process, in words, that has come to `only_writer` and not ended, nor has a fork of it; ""
    if there is none.

    Where files cannot be locked, or other machines do not see it, one that has ended may be named.
    """
    who = _writer_of(Path(folder))
    try:
        with open(Path(folder) / LOCK, "r+b") as lock:
            _lock(lock)
    except FileNotFoundError:
        return ""
    except BlockingIOError:
        return who
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return who
    # On some network file systems a lock holds on its own machine only.
    return "" if who.endswith(f" on {platform.node()}") else who


def _writer_of(folder: Path) -> str:
    """Who trains in the folder, as its lock says; "" where nobody does."""
    try:
        return (folder / LOCK).read_text("utf-8", "replace").strip()
    except OSError:  # there is no lock, or it cannot be read
        return ""


class OwnFolder:
    """The folder of a run that has begun: its path leads to another when that one was moved away.

    The lock of the folder goes with it, and so does what a path stands for on most file systems.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._writer = path, _writer_of(path)
        self._was: os.stat_result | None = path.stat()

    def check(self) -> None:
        """UserError where another run has come to be in the place of this one's folder."""
        if (writer := _writer_of(self.path)) == self._writer:
            return
        if not self.path.exists() or not any(self.path.iterdir()):
            self._was = None  # what comes there next is this run's, though it is not what it was
        elif writer or (self._was and not os.path.samestat(self._was, self.path.stat())):
            raise UserError(
                f"{self.path} has become another training's, as it was moved or its {LOCK} "
                "removed: --resume this one where its checkpoints are"
            )


def _locked(folder: Path) -> BinaryIO:
    while True:
        lock = open(folder / LOCK, "a+b", buffering=0)  # noqa: SIM115  # it is locked as long as it is open
        try:
            _lock(lock)
        except BlockingIOError:
            lock.close()
            who = _writer_of(folder) or "which has just started"
            raise UserError(
                f"another process writes to {folder} ({who}): wait for it or stop it, or give "
                "another --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(f"note: {folder} is where files cannot be locked: write there once at a time")
        if _is_still(lock, folder / LOCK):  # or its holder removed it in between
            break
        lock.close()
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    except OSError:
        lock.close()
        raise
    return lock


def _leave(folder: Path, absent: Sequence[Path]) -> None:
    """Remove the lock, and the folders that were `absent` before it and hold nothing now."""
    with suppress(OSError):  # the folder was removed meanwhile, or nothing can be written now
        _remove(folder / LOCK)
    for place in absent:
        with suppress(OSError):  # there is a run in it now, or it could not be made
            place.rmdir()


def _remove(path: Path) -> None:
    """Remove a lock that nobody has; a fork of this process may still have it."""
    with open(path, "r+b") as lock:
        try:
            _lock(lock)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if _is_still(lock, path):
            path.unlink()


def _is_still(lock: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(lock: BinaryIO) -> None:
    """Lock the file for this process; BlockingIOError if another has it."""
    if os.name == "nt":
        import msvcrt

        lock.seek(1 << 30)  # beyond what others read
        try:
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            raise BlockingIOError from error
        lock.seek(0)
        return
    import fcntl

    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
