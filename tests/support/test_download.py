"""One file from the web, from servers on 127.0.0.1 that do everything wrong."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
from faults import Fault, Server, fill_disk, serving

from micrograd_gpt.support import download as module
from micrograd_gpt.support.download import cache_folder, download
from micrograd_gpt.support.errors import UserError

BODY = random.Random(0).randbytes(300_000)
SIZE, SHA256 = len(BODY), hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving({"/file": BODY}) as server:
        yield server


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------------------------------------
# Whole or not there


@pytest.mark.parametrize("known", [(), (SIZE,), (SIZE, SHA256), (None, SHA256)])
def test_a_download_is_kept_and_not_repeated(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], known: tuple[Any, ...]
) -> None:
    path = tmp_path / "deep" / "file"
    download(f"{server.url}/file", path, *known)
    download(f"{server.url}/file", path, *known)  # there already: asks for nothing
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["file"]
    assert server.ranges("/file") == [None]
    assert capsys.readouterr().err == ""  # no progress bar where there is no terminal


@pytest.mark.parametrize(
    ("damaged", "known"),
    [(BODY[:-1], (SIZE,)), (b"", (SIZE,)), (BODY[:-1] + b"?", (SIZE, SHA256))],
    ids=["cut short", "empty", "changed"],
)
def test_what_is_damaged_is_fetched_again(
    server: Server, tmp_path: Path, damaged: bytes, known: tuple[Any, ...]
) -> None:
    (tmp_path / "file").write_bytes(damaged)
    download(f"{server.url}/file", tmp_path / "file", *known)
    assert (tmp_path / "file").read_bytes() == BODY
    assert names(tmp_path) == ["file"] and server.ranges("/file") == [None]


def test_other_bytes_than_expected_are_thrown_away(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    server.files["/file"] = BODY[:-1] + bytes([BODY[-1] ^ 1])
    with pytest.raises(UserError, match=r"thrown away: .* sha256 differs\); run this again") as no:
        download(f"{server.url}/file", path, SIZE, SHA256)
    assert "\n" not in str(no.value) and list(tmp_path.iterdir()) == []
    server.files["/file"] = BODY
    (tmp_path / "file.part").write_bytes(b"foreign")
    with pytest.raises(UserError, match="thrown away"):
        download(f"{server.url}/file", path, SIZE, SHA256)
    assert list(tmp_path.iterdir()) == []
    download(f"{server.url}/file", path, SIZE, SHA256)
    assert path.read_bytes() == BODY
    assert server.ranges("/file") == [None, "bytes=7-", None]


def test_what_was_there_stays_until_the_new_file_is_verified(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    server.files["/file"] = bytes(SIZE)
    with pytest.raises(UserError, match="thrown away"):
        download(f"{server.url}/file", tmp_path / "file", SIZE, SHA256)
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_file_of_another_length_is_not_fetched(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 300,000 bytes, the published one 300,001"):
        download(f"{server.url}/file", tmp_path / "file", SIZE + 1)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Connections that break


def test_a_dropped_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.faults["/file"] = [Fault(drop_after=100_000), Fault(drop_after=50_000)]
    download(f"{server.url}/file", tmp_path / "file", SIZE, SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.ranges("/file") == [None, "bytes=100000-", "bytes=150000-"]


def test_a_connection_that_is_reset_is_taken_up(server: Server, tmp_path: Path) -> None:
    server.faults["/file"] = [Fault(drop_after=100_000, reset=True)]
    try:
        download(f"{server.url}/file", tmp_path / "file")
    except UserError as error:  # the reset overtook all of the bytes
        assert "connection broke after 0 bytes" in str(error)
        download(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_download_that_stopped_goes_on_at_the_next_try(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    server.faults["/file"] = [Fault(drop_after=240_000), Fault(drop_after=0)]
    message = "connection broke after 240,000 bytes, which are kept: run this again"
    with pytest.raises(UserError, match=message):
        download(f"{server.url}/file", path)
    assert names(tmp_path) == ["file.part"]
    download(f"{server.url}/file", path)
    assert path.read_bytes() == BODY
    assert server.ranges("/file") == [None, "bytes=240000-", "bytes=240000-"]


def test_a_server_that_knows_no_range_starts_again(server: Server, tmp_path: Path) -> None:
    server.faults["/file"] = [Fault(drop_after=200_000), Fault(ignore_range=True)]
    download(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.ranges("/file") == [None, "bytes=200000-"]


def test_a_server_that_knows_no_range_and_never_finishes_is_given_up(
    server: Server, tmp_path: Path
) -> None:
    server.faults["/file"] = [Fault(drop_after=100_000, ignore_range=True)] * 9
    with pytest.raises(UserError, match="connection broke after 100,000 bytes"):
        download(f"{server.url}/file", tmp_path / "file")
    assert server.ranges("/file") == [None, "bytes=100000-"]


def test_another_part_than_asked_for_is_refused(server: Server, tmp_path: Path) -> None:
    server.faults["/file"] = [Fault(drop_after=200_000), Fault(other_range=True)]
    with pytest.raises(
        UserError, match="asked for bytes from 200000 on, the server sent bytes 200001-"
    ):
        download(f"{server.url}/file", tmp_path / "file")


@pytest.mark.parametrize("known", [(), (SIZE,), (SIZE, SHA256)])
@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (BODY, ["bytes=300000-"]),  # stopped between the last byte and the renaming
        (BODY[:7], ["bytes=7-"]),
        (bytes(400_000), ["bytes=400000-", None]),  # of another file
    ],
    ids=["whole", "begun", "too long"],
)
def test_a_part_is_used_for_what_it_is(
    server: Server, tmp_path: Path, part: bytes, asked: list[str | None], known: tuple[Any, ...]
) -> None:
    (tmp_path / "file.part").write_bytes(part)
    download(f"{server.url}/file", tmp_path / "file", *known)
    assert (tmp_path / "file").read_bytes() == BODY
    assert names(tmp_path) == ["file"] and server.ranges("/file") == asked


@contextlib.contextmanager
def answering(handle: Callable[[StreamRequestHandler], None]) -> Iterator[str]:
    """The URL of a server that reads a request and leaves the whole answer to `handle`."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            with contextlib.suppress(ConnectionError):
                handle(self)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])  # seconds between polls
        thread.start()
        try:
            yield "http://{}:{}/".format(*server.server_address)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("count", "known", "error"),
    [
        (1, (), None),
        (1, (SIZE, SHA256), None),
        (200, (SIZE, SHA256), "thrown away"),  # endless, as it were
        (2, (SIZE,), "thrown away"),
        (1, (SIZE + 1,), "connection broke after 300,000 bytes"),
    ],
)
def test_a_server_that_tells_no_length(
    tmp_path: Path, count: int, known: tuple[Any, ...], error: str | None
) -> None:
    sent = 0

    def bodies(connection: StreamRequestHandler) -> None:
        nonlocal sent
        connection.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        for _ in range(count):
            connection.wfile.write(BODY)
            sent += 1

    path = tmp_path / "file"
    with answering(bodies) as url:  # whose end waits until every answer has ended
        if error:
            with pytest.raises(UserError, match=error):
                download(url, path, *known)
            assert names(tmp_path) == ([] if error == "thrown away" else ["file.part"])
        else:
            download(url, path, *known)
            assert path.read_bytes() == BODY and names(tmp_path) == ["file"]
    assert sent < 200


# ---------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=404), "the server answered 404"),
        (Fault(status=403), "the server answered 403"),
        (Fault(status=500), "the server answered 500"),
        (Fault(status=200), "a web page instead of the file"),
    ],
)
@pytest.mark.parametrize("have", [0, 1000])
def test_refusals_leave_what_was_there(
    server: Server, tmp_path: Path, fault: Fault, message: str, have: int
) -> None:
    if have:
        (tmp_path / "file.part").write_bytes(BODY[:have])
    server.faults["/file"] = [fault]
    with pytest.raises(UserError, match=message) as caught:
        download(f"{server.url}/file", tmp_path / "file", SIZE, SHA256)
    assert "\n" not in str(caught.value) and server.url in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == (
        {"file.part": BODY[:have]} if have else {}
    )


def test_no_network(tmp_path: Path) -> None:
    with serving({}) as server:
        url = server.url  # nobody listens there once the block has ended
    with pytest.raises(UserError, match=f"cannot fetch {url}/x: .*refused"):
        download(f"{url}/x", tmp_path / "x")
    with pytest.raises(UserError, match="cannot fetch nonsense: unknown url type"):
        download("nonsense", tmp_path / "x")
    missing = (tmp_path / "no such file").as_uri()
    with pytest.raises(UserError, match=f"cannot fetch {missing}: "):
        download(missing, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_speaks_no_http_is_one_line(tmp_path: Path) -> None:
    with (
        answering(lambda connection: connection.wfile.write(b"go away " * 100 + b"\r\n")) as url,
        pytest.raises(UserError, match=f"cannot fetch {url}: go away .*…$") as caught,
    ):
        download(url, tmp_path / "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_mirror_in_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_bytes(BODY)
    download((tmp_path / "mirror").as_uri(), tmp_path / "file", SIZE, SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_the_environment_s_proxy_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # which keeps what it once read
    with serving({"http://elsewhere.invalid/file": BODY}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        download("http://elsewhere.invalid/file", tmp_path / "file", SIZE, SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


# ---------------------------------------------------------------------------------------------
# Disks


def test_a_full_disk_and_a_forbidden_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, module, 1000)
    with pytest.raises(UserError, match=r"cannot write .*file\.part: No space left on device"):
        download(f"{server.url}/file", tmp_path / "file")
    assert not (tmp_path / "file").exists()

    def forbidden(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "open", forbidden)
    with pytest.raises(UserError, match=r"cannot write .*file\.part: Permission denied"):
        download(f"{server.url}/file", tmp_path / "file")
    (tmp_path / "plain").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot write"):
        download(f"{server.url}/file", tmp_path / "plain" / "file")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_it_gets_its_name_once_it_is_on_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(UserError, match=r"cannot write .*file\.part: Input/output error"):
            download(f"{server.url}/file", tmp_path / "file", SIZE, SHA256)
    assert names(tmp_path) == ["file.part"]
    download(f"{server.url}/file", tmp_path / "file", SIZE, SHA256)  # there was nothing left to do
    assert server.ranges("/file") == [None, "bytes=300000-"]


def test_the_progress_bar_begins_where_the_download_does(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[list[int]] = []

    class Bar(contextlib.AbstractContextManager["Bar"]):
        def __init__(self, total: int, initial: int, disable: None, **_: Any) -> None:
            assert disable is None  # silent where stderr is no terminal
            bars.append([total, initial, 0])

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            bars[-1][-1] += count

    monkeypatch.setattr("tqdm.tqdm", Bar)
    server.faults["/file"] = [Fault(drop_after=120_000)]
    download(f"{server.url}/file", tmp_path / "file")
    assert bars == [[SIZE, 0, 120_000], [SIZE, 120_000, 180_000]]


def test_the_cache_is_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "micrograd-gpt"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "micrograd-gpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "micrograd-gpt"
