"""Where compiled libraries are kept, and which of them may be loaded: loading one runs its code.

Only what this user or root wrote is loaded, and only whole:

- The folder and the files belong to this user or to root, and nobody else can write them. A group
  counts as somebody else. The folders above are free to be links, or anyone's: what is loaded is a
  copy of the bytes that were read and checked.
- Beside each library lies its SHA-256, as `sha256sum` writes it. A library that was truncated or
  changed does not match, and is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from micrograd_gpt.support.download import cache_folder
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import written_whole

# Windows loads only *.dll. Elsewhere threadpoolctl fails on a path with .so that is not UTF-8.
COPY = "kernels.dll" if os.name == "nt" else "kernels"
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def places() -> list[Path]:
    """The folders that libraries may be kept in: the user's cache, or else a temporary folder."""
    user = f"-{os.geteuid()}" if hasattr(os, "geteuid") else ""  # Windows: each has a folder
    found = []
    with suppress(UserError):  # this user has no home
        found.append(cache_folder() / "kernels")
    with suppress(FileNotFoundError):  # no folder for temporary files can be written
        found.append(Path(tempfile.gettempdir()) / f"micrograd-gpt{user}")
    return found


# --------------------------------------------------------------------------------- keep, and find


def kept(name: str) -> bytes | None:
    """The library that is kept under this name, or None if there is none that may be loaded."""
    return next(filter(None, (_kept_in(place, name) for place in places())), None)


def keep(name: str, library: bytes) -> bool:
    """Keep the library for the next process; False where nothing can be kept safely."""
    return any(_keep_in(place, name, library) for place in places())


def _kept_in(place: Path, name: str) -> bytes | None:
    try:
        if not _is_safe_folder(place):
            return None
        library, checksum = (_read_safely(place / file) for file in (name, _checksum_file(name)))
    except OSError:  # nothing is kept here, or it cannot be read
        return None
    return library if checksum == _checksum(name, library) else None


def _keep_in(place: Path, name: str, library: bytes) -> bool:
    try:
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        _close_to_others(place)
        if not _is_safe_folder(place):
            return False
        for file, content in ((name, library), (_checksum_file(name), _checksum(name, library))):
            with written_whole(place / file) as opened:
                _close_to_others(Path(opened.name))
                opened.write(content)
    except (OSError, UserError):
        return False
    return _kept_in(place, name) == library  # not every file system keeps owners and modes


def _checksum_file(name: str) -> str:
    return f"{name}.sha256"


def _checksum(name: str, library: bytes) -> bytes:
    return f"{hashlib.sha256(library).hexdigest()}  {name}\n".encode()


# -------------------------------------------------------------------------------- who may write it


def _is_safe_folder(folder: Path) -> bool:
    """Whether it is a folder, not a link to one, that only this user and root can write."""
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and _is_safe(status)


def _read_safely(file: Path) -> bytes:
    with open(file, "rb") as opened:
        if not _is_safe(os.fstat(opened.fileno())):
            raise PermissionError(f"others can write {file}")
        return opened.read()


def _is_safe(status: os.stat_result) -> bool:
    if not hasattr(os, "geteuid"):  # on Windows, others cannot write to a user's folders
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & WRITABLE_BY_OTHERS


def _close_to_others(path: Path) -> None:
    """Let nobody else write our own file or folder, whatever the umask is."""
    status = os.lstat(path)
    if not _is_safe(status) and status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode):
        os.chmod(path, stat.S_IMODE(status.st_mode) & ~WRITABLE_BY_OTHERS)


# ---------------------------------------------------------------------------------------- load it


def load(library: bytes) -> ctypes.CDLL:
    """Load a copy of the library that nobody can change; OSError where the system allows none.

    The copy is in memory, or else in a file of a private folder: a folder that is mounted `noexec`
    forbids loading from it. The file is removed again where the system allows it (not on Windows).
    """
    if hasattr(os, "memfd_create"):  # Linux
        with suppress(OSError):  # the system forbids it: try a file
            return _load_from_memory(library)
    safe = [place for place in places() if place.is_dir() and _is_safe_folder(place)]
    for folder in (Path(tempfile.gettempdir()), *safe):
        try:
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as private:
                copy = Path(private) / COPY
                copy.write_bytes(library)
                return ctypes.CDLL(str(copy))
        except OSError as error:
            problem = error
    raise problem


def _load_from_memory(library: bytes) -> ctypes.CDLL:
    descriptor = os.memfd_create("micrograd-gpt")
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(library)
        # It stays open: the loader would take another library under this path for this one.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise
