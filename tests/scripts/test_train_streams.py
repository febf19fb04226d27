"""A training run's exit status and what it saves do not depend on who reads its output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from micrograd_gpt.runs import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such streams")

SCRIPT = Path(__file__).parents[2] / "train_gpt2.py"
SHAPE = ["--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--block-size", 8, "--batch-size", 4]
INTERVALS = ["--log-interval", 1, "--eval-interval", 5, "--eval-batches", 1]
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    flags = ["--data", text, "--out", tmp_path / "out", *SHAPE, *INTERVALS]
    return [sys.executable, str(SCRIPT), *map(str, flags), "--sample-interval", "5"]


@contextmanager
def unread(stream: str) -> Iterator[int]:
    """Something to write to that takes nothing: a pipe without a reader, or a full disk."""
    if stream == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


def status_after(number: int, process: subprocess.Popen[bytes], out: Path) -> int:
    """Send the signal once the run is on its way; its status, and only whole things left."""
    log = out / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    status = process.wait(timeout=60)
    rows = [json.loads(line) for line in log.read_bytes().splitlines()]
    state = json.loads((out / checkpoint.STATE).read_text())
    assert state["step"] == rows[-1]["step"] and (out / "loss.png").exists()
    return status


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), SIGNALS)
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_signal_with_closed_streams(
    command: list[str], tmp_path: Path, number: int, status: int, closed: str
) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert status_after(number, process, tmp_path / "out") == status
        assert process.stdout and process.stderr
        assert process.stdout.read() == b""  # nor is stdout given what was meant for stderr
        assert (process.stderr.read() == b"") == ("2>&-" in closed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), SIGNALS)
@pytest.mark.parametrize("stream", ["pipe", "full"])
@pytest.mark.parametrize("names", [["stderr"], ["stdout", "stderr"]], ids="+".join)
def test_a_signal_with_streams_that_take_nothing(
    command: list[str], tmp_path: Path, number: int, status: int, stream: str, names: list[str]
) -> None:
    if stream == "full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with unread(stream) as descriptor:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        streams |= dict.fromkeys(names, descriptor)
        process = subprocess.Popen(command, **streams)
        assert status_after(number, process, tmp_path / "out") == status


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_with_the_output_cut_off(
    command: list[str], tmp_path: Path, number: int, status: int
) -> None:
    """As with `2>&1 | head -1`: the reader leaves in the middle of the run."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    assert process.stdout.readline().startswith(b"training ")
    process.stdout.close()
    assert status_after(number, process, tmp_path / "out") == status


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("stdout", "stderr", "status"),
    [
        ("pipe", None, 0),
        ("full", None, 2),
        (None, "full", 0),
        (None, "pipe", 0),
        ("full", "full", 2),
    ],
)
def test_the_status_of_a_run_that_ends(
    command: list[str], tmp_path: Path, stdout: str | None, stderr: str | None, status: int
) -> None:
    """Its results that can't be written are an error, but for a reader that wants no more."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with unread(stdout or "pipe") as out, unread(stderr or "pipe") as err:
        result = subprocess.run(
            [*command, "--max-steps", "2"],
            stdout=out if stdout else subprocess.DEVNULL,
            stderr=err if stderr else subprocess.PIPE,
            timeout=120,
        )
    assert result.returncode == status
    if stderr is None:
        assert b"Traceback" not in result.stderr and b"Exception ignored" not in result.stderr
    assert (tmp_path / "out" / checkpoint.STATE).exists()


@pytest.mark.parametrize("stream", ["pipe", "full"])
def test_a_mistake_is_status_2_where_nobody_reads_of_it(command: list[str], stream: str) -> None:
    if stream == "full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with unread(stream) as descriptor:
        result = subprocess.run([*command, "--batch-size", "0"], stderr=descriptor, timeout=60)
    assert result.returncode == 2
