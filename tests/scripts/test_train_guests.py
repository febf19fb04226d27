"""A training among others: two with one folder, one in a notebook or a thread, one interrupted
before it has begun."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from faults import fill_disk, needs_fork
from training import ROOT, SCRIPT, SMALL, run

from micrograd_gpt.runs import lock
from micrograd_gpt.runs.lock import LOCK, only_writer, present_writer
from micrograd_gpt.support.errors import UserError

HOLD = """
import sys, time
from micrograd_gpt.runs.lock import only_writer
with only_writer(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that writes to the folder until it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == "mine\n"
    return process


@pytest.mark.slow
def test_a_second_training_in_a_folder_is_refused(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = holder(out)
    try:
        second = run("--data", text, "--out", out, *SMALL, "--max-steps", "1")
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.startswith("error: another process writes to ")
        assert f"process {first.pid} on " in second.stderr
        assert sorted(path.name for path in out.iterdir()) == [LOCK]
    finally:
        first.kill()
        first.wait()
    # The dead one's lock does not block
    assert run("--data", text, "--out", out, *SMALL, "--max-steps", "1").returncode == 0
    assert not (out / LOCK).exists()


def test_a_lock_ends_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with only_writer(out):
        with pytest.raises(UserError, match="another process"), only_writer(out):
            pass
        assert (out / LOCK).exists()
    with only_writer(out):
        (out / "model").touch()
    assert [path.name for path in out.iterdir()] == ["model"]
    with pytest.raises(RuntimeError), only_writer(tmp_path / "c" / "d"):
        raise RuntimeError
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write .*file/out: Not a directory"),
        only_writer(tmp_path / "file" / "out"),
    ):
        pass


def test_a_notebook_trains(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stdout is a StringIO, and afterwards its own handlers of signals are there again."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    before = signal.getsignal(signal.SIGINT)
    flags = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, "--max-steps", "2"]
    assert train_gpt2.main(flags) == 0
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(UserError):
        train_gpt2.main(flags)  # it holds a run already
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_trains(train_gpt2: ModuleType, text: Path, tmp_path: Path) -> None:
    flags = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, "--max-steps", "2"]
    results: list[int] = []
    for more in ([], ["--overwrite"]):
        train = partial(train_gpt2.main, flags + more)
        thread = threading.Thread(target=lambda train=train: results.append(train()))
        thread.start()
        thread.join()
    assert results == [0, 0]
    assert (tmp_path / "out" / "model.safetensors").exists()


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(
    "name", ["train_gpt2", "finetune_gpt2", "generate", "load_gpt2", "evaluate_gpt2"]
)
def test_ctrl_c_during_the_imports_is_quiet(name: str) -> None:
    """The first of our imports sends the signal: so it surely comes while they run."""
    script = str(ROOT / f"{name}.py")
    code = (
        "import os, runpy, signal, sys\n"
        "class Stall:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'micrograd_gpt':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stall())\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=_heed_interrupts,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.slow
def test_an_interrupt_that_is_ignored_stays_so(text: Path, tmp_path: Path) -> None:
    """As a shell starts a program in the background: Ctrl-C is meant for another."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    out = tmp_path / "out"
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--max-steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(SCRIPT), *flags], stderr=subprocess.DEVNULL
    )
    try:
        steps = _wait_for_steps(process, out, 1)
        process.send_signal(signal.SIGINT)
        _wait_for_steps(process, out, steps + 20)
        assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()


def _wait_for_steps(process: subprocess.Popen[bytes], out: Path, count: int) -> int:
    """Wait until the run has taken as many steps, or has ended; returns how many it has taken."""
    steps, deadline = 0, time.monotonic() + 60
    while steps < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        path = out / "metrics.jsonl"
        steps = len(path.read_bytes().splitlines()) if path.exists() else 0
    return steps


def test_each_step_is_in_the_metrics_once(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """After a kill too, whose later steps are taken again; and time goes on."""
    out = tmp_path / "out"
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--save-interval", "3"]
    train_gpt2.main([*flags, "--max-steps", "3"])
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    later = [rows[-1] | {"step": step, "elapsed_seconds": 1000.0 + step} for step in (4, 5)]
    rows[-1]["elapsed_seconds"] = 900.0
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *later)))
    train_gpt2.main(["--resume", "--out", str(out), "--max-steps", "6"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert 900 <= rows[3]["elapsed_seconds"] <= rows[5]["elapsed_seconds"] < 1000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="on Windows every user has a home")
def test_a_user_without_a_home_trains(text: Path, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(2000))
    sources = ([str(text)], [str(tmp_path), "--tokenizer", "byte"])
    for number, source in enumerate(sources):
        flags = ["--data", *source, "--out", str(tmp_path / f"out{number}"), *SMALL]
        result = homeless(SCRIPT, *flags, "--max-steps", "1", MPLCONFIGDIR=str(tmp_path))
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="on Windows every user has a home")
@pytest.mark.parametrize("weights", [["--size", "124M"], ["--from", "a/b"]], ids=" ".join)
def test_a_user_without_a_home_is_told_what_to_set(weights: list[str]) -> None:
    nowhere = "http://127.0.0.1:9"
    result = homeless(ROOT / "load_gpt2.py", *weights, HF_ENDPOINT=nowhere, HTTPS_PROXY=nowhere)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    if weights[0] == "--size":
        assert (
            "; this user has no home folder: set XDG_CACHE_HOME to a folder for downloads"
            in result.stderr
        )


def homeless(script: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run by a user as a container has one: a number that no name and no folder belongs to."""
    code = (
        "import pwd, runpy, sys\n"
        "def nobody(number):\n"
        "    raise KeyError(number)\n"
        "pwd.getpwuid = nobody\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    homes = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in homes}
    return subprocess.run(
        [sys.executable, "-c", code, str(script), *flags],
        capture_output=True,
        text=True,
        env=environment | variables,
    )


@needs_fork
def test_a_fork_has_the_lock_as_long_as_it_runs(tmp_path: Path) -> None:
    """Though the process that took it has left the block."""
    reading, writing = os.pipe()
    assert not present_writer(tmp_path)
    with only_writer(tmp_path):
        assert present_writer(tmp_path)
        if not (fork := os.fork()):
            os.close(writing)
            os.read(reading, 1)  # returns when the other end is closed
            os._exit(0)
    assert present_writer(tmp_path)
    with pytest.raises(UserError, match="another process writes"), only_writer(tmp_path):
        pass
    os.close(writing)
    os.waitpid(fork, 0)
    assert not present_writer(tmp_path)
    with only_writer(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]
    os.close(reading)


def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and an empty file often find room where a line of text does not."""
    fill_disk(monkeypatch, lock, 0)
    out = tmp_path / "a" / "b"
    with pytest.raises(UserError, match=f"cannot write {out}: No space left"), only_writer(out):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_name_that_is_too_long_leaves_no_folder_above_it(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / ("x" * 300)
    with pytest.raises(UserError, match="cannot write"), only_writer(out):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(UserError, match=rf"cannot write {tmp_path / LOCK}: "),
        only_writer(tmp_path),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["a notebook's backend", "no LaTeX"])
def test_a_picture_that_cannot_be_drawn_ends_no_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    out, settings = tmp_path / "out", tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\ntext.latex.preamble: \\usepackage{none_of_that_name}\n")
    if broken:
        monkeypatch.setenv("MATPLOTLIBRC", str(settings))
    monkeypatch.setenv("MPLBACKEND", "module://not_installed")
    flags = [*SMALL, "--max-steps", "4", "--eval-interval", "1"]
    result = run("--data", text, "--out", out, *flags)
    assert result.returncode == 0, result.stderr
    assert (out / "model.safetensors").exists() and (out / "loss.png").exists() != broken
    assert result.stderr.count("loss.png is not drawn: ") == broken
