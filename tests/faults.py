"""Things that fail on demand: a web server on 127.0.0.1 that answers as the Hugging Face Hub and
OpenAI's store do, a full disk, and a process that is killed."""

from __future__ import annotations

import builtins
import errno
import hashlib
import os
import re
import socket
import struct
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import ModuleType
from typing import Any

import pytest

from micrograd_gpt.support.errors import UserError

COMMIT = "0123456789abcdef" * 2 + "01234567"  # of the files for which none is named
LOGIN_PAGE = b"<!DOCTYPE html><html><body>Please log in to the hotel's network.</body></html>"


@dataclass(frozen=True)
class Fault:
    """How a request goes wrong."""

    status: int | None = None  # an error, or 200 for a login page
    code: str | None = None  # with the error: what the Hub calls it
    drop_after: int | None = None  # the connection ends after this many bytes of the body,
    reset: bool = False  # with a reset, not an orderly close
    ignore_range: bool = False  # a request for the rest of a file gets all of it,
    other_range: bool = False  # or another part than it asked for
    garbled: bool = False  # as many bytes, but others


class Server:
    """`files` maps paths to bodies; each GET of a path first uses up one of `faults[path]`.

    `head_faults[path]` does the same for HEAD. `requests` lists (method, path, Range header).
    `commits[path]` is the commit that a path's file is of, as the Hub calls it.
    """

    def __init__(self, url: str, files: dict[str, bytes]) -> None:
        self.url, self.files = url, files
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.head_faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.commits: dict[str, str] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the GETs of a path, in order."""
        return [r for method, p, r in self.requests if method == "GET" and p == path]


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """Serve `files` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            wanted = self.headers.get("Range")
            server.requests.append((self.command, self.path, wanted))
            queue = (server.faults if body else server.head_faults)[self.path]
            fault = queue.pop(0) if queue else Fault()
            if fault.status == 200:
                return self.send(200, {"Content-Type": "text/html"}, LOGIN_PAGE, body)
            content = server.files.get(self.path)
            if fault.status is not None or content is None:
                code = fault.code if fault.status else "EntryNotFound"
                commit = server.commits.get(self.path, COMMIT)
                headers = {"X-Error-Code": code, "X-Repo-Commit": commit} if code else {}
                return self.send(fault.status or 404, headers, b"", body)
            headers = {
                "Content-Type": "application/octet-stream",
                # What huggingface_hub asks of a Hub:
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": server.commits.get(self.path, COMMIT),
                "Accept-Ranges": "bytes",
            }
            status, start = 200, 0
            match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
            if match and not fault.ignore_range:
                status, start = 206, int(match[1]) + fault.other_range
                if start >= len(content):
                    headers["Content-Range"] = f"bytes */{len(content)}"
                    return self.send(416, headers, b"", body)
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(status, headers, content[start:], body, fault)

        def send(
            self,
            status: int,
            headers: dict[str, str],
            content: bytes,
            body: bool,
            fault: Fault = Fault(),
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                sent = bytes(len(content)) if fault.garbled else content
                self.wfile.write(sent[: fault.drop_after])
                if fault.reset:
                    self.wfile.flush()
                    no_linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
                    os.close(self.connection.detach())  # before the server can close it politely

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}", files)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class FullDiskFile:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(memoryview(data).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self) -> FullDiskFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fill_disk(monkeypatch: pytest.MonkeyPatch, module: ModuleType, room: int) -> None:
    """Let each file that `module` opens from now on have room for only `room` bytes."""

    def open_full(*args: Any, **kwargs: Any) -> FullDiskFile:
        return FullDiskFile(builtins.open(*args, **kwargs), room)

    monkeypatch.setattr(module, "open", open_full, raising=False)


OPERATIONS = {"open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.listdir"}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def kill() -> None:
    os._exit(9)


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def run_with_fault(action: Callable[[], None], fault: Callable[[], None], number: int) -> int:
    """Run `action` in a child process, and call `fault` at its file operation `number`.

    Where the fault is an error, every later operation fails too. Returns the child's status: 0 if
    done, 1 for a UserError, 9 if killed, 7 for anything else.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    operations = count()

    def hook(event: str, _: object) -> None:
        if event in OPERATIONS and next(operations) >= number:
            fault()

    status = 7
    try:
        sys.addaudithook(hook)
        action()
        status = 0
    except UserError:
        status = 1
    finally:
        os._exit(status)
