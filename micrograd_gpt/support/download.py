"""One file from the web: resumed where it stopped, and under its name only once it is verified."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

from micrograd_gpt.support import files
from micrograd_gpt.support.errors import UserError

BLOCK = 1 << 18  # bytes asked of the connection at a time
HOMELESS = "this user has no home folder"
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken


def cache_folder() -> Path:
    """The folder for downloads: `micrograd-gpt` in $XDG_CACHE_HOME, or else in ~/.cache."""
    # An empty XDG_CACHE_HOME counts as unset (XDG Base Directory Specification).
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "micrograd-gpt"
    except RuntimeError as error:  # a user without a home, as in a container
        raise UserError(f"{HOMELESS}: set XDG_CACHE_HOME to a folder for downloads") from error


def download(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Fetch `url` to `path`, unless a file of that `size` (in bytes) and `sha256` is there already.

    The bytes go to `path`.part, which is renamed once it is verified, so a file at `path` is whole.
    A .part left by an earlier try is continued (HTTP Range). A dropped connection is resumed at
    once, as long as each try brings at least one byte. Proxies are those of the environment
    (HTTPS_PROXY).

    Raises UserError if the server can't be reached, refuses, sends a web page or another file, or
    drops the connection and sends nothing more; and if the file can't be written.
    """
    part = path.with_name(f"{path.name}.part")
    if _is_published(path, size, sha256):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        while not _receive(url, part, have, size):
            before, have = have, part.stat().st_size
            if have <= before:
                raise UserError(
                    f"cannot fetch {url}: the connection broke after {have:,} bytes, which are"
                    " kept: run this again to continue from there"
                )
        if not _is_published(part, size, sha256):
            part.unlink()
            raise UserError(
                f"the file from {url} was thrown away: it is not the published one (its size or"
                " sha256 differs); run this again"
            )
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {part}: {error.strerror or error}") from error


def _is_published(path: Path, size: int | None, sha256: str | None) -> bool:
    return (
        path.is_file()
        and size in (None, path.stat().st_size)
        and (sha256 is None or sha256 == files.sha256(path))
    )


def _receive(url: str, part: Path, have: int, size: int | None) -> bool:
    """Request the bytes after the first `have`, which `part` has; False if it broke off early."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from tqdm import tqdm

    try:
        request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if error.code != 416 or not have:
                raise UserError(f"cannot fetch {url}: {reason(error)}") from error
            # The server has nothing beyond `have`: the file is complete, or it is another file.
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return True
        return _receive(url, part, 0, size)
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"cannot fetch {url}: {reason(error)}") from error
    with response:
        have, total = _extent(url, response, have, size)
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=total,
                initial=have,
                desc=part.stem,
                unit="B",
                unit_scale=True,
                delay=1,
                disable=None,
            ) as progress,
        ):
            while total is None or have <= total:  # one byte too many shows that it is wrong
                try:
                    block = response.read(BLOCK)
                except (OSError, HTTPException):
                    return False
                if not block:
                    file.flush()
                    os.fsync(file.fileno())
                    return total in (have, None)
                file.write(block)
                have += len(block)
                progress.update(len(block))
            return True


def _extent(url: str, response: Any, have: int, size: int | None) -> tuple[int, int | None]:
    """The byte at which a response to _receive begins, and the file's length, if it is known.

    Raises UserError for an answer that is not the file, or not the part that was asked for.
    """
    if response.headers.get_content_type() == "text/html":
        raise UserError(
            f"cannot fetch {url}: the server answered with a web page instead of the file"
            " (a login page or a proxy?)"
        )
    if response.status == 206:
        sent = response.headers.get("Content-Range", "")
        match = re.fullmatch(rf"bytes {have}-\d+/(\d+)", sent)
        if not match:
            raise UserError(
                f"cannot fetch {url}: asked for bytes from {have} on, the server sent {sent}"
            )
        total: int | None = int(match[1])
    else:  # the whole file from its beginning; not every server says how long it is
        length = getattr(response, "length", None)
        have, total = 0, size if length is None else length
    if size not in (None, total):
        raise UserError(
            f"cannot fetch {url}: the server's file has {total:,} bytes, the published one {size:,}"
        )
    return have, total


def reason(error: BaseException) -> str:
    """Why a request failed, in one short line, whichever library raised the error."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "code", None)
    if status is not None:
        return f"the server answered {status}"
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's
        return f"{HOMELESS}: set HF_HOME to a folder for downloads"
    text = str(getattr(error, "reason", None) or error)
    return textwrap.shorten(text, 200, placeholder=" …") or type(error).__name__
