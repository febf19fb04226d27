"""What --plan says of several devices."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import ModuleType

import pytest
from mpi_launch import mpirun, needs_mpi
from training import SCRIPT, run, script

from micrograd_gpt.gpt2 import GPT2Config
from micrograd_gpt.runs.plan import Plan, StepTime
from micrograd_gpt.runs.plan_ranks import SharedStep
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.config import SIZES

CONFIG = GPT2Config(**SIZES["124M"])  # of 124,439,808 parameters: 497.8 MB in float32


def step(devices: int, sharded: bool = False, overlaps: bool = False, **more: float) -> SharedStep:
    """A step of 124M that takes one device 10 s and 1 s; a device sends 0.5 GB/s, if not `more`."""
    plan = Plan(CONFIG, 2, 1024, grad_accum_steps=2, devices=devices, sharded=sharded)
    given = {"interconnect": 0.5, "wire": 4, "overlaps": overlaps} | more
    return SharedStep(plan, StepTime(10.0, 1.0, "given"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("devices", "sharded", "wire", "megabytes"),
    [
        (1, False, 4, 0.0),
        (2, False, 4, 497.8),  # half of the gradients there, half of the sums back
        (4, False, 4, 746.6),
        (2, False, 2, 248.9),
        (2, True, 4, 497.8),
        (2, True, 2, 124.4 + 248.9),  # parameters are not rounded
    ],
)
def test_what_a_device_sends(devices: int, sharded: bool, wire: int, megabytes: float) -> None:
    found = step(devices, sharded, wire=wire)
    assert found.reduced + found.gathered == pytest.approx(megabytes * 1e6, rel=1e-3)
    assert found.seconds == pytest.approx(
        10 / devices + (1 / devices if sharded else 1) + megabytes / 500, rel=1e-3
    )


def test_one_device_waits_for_none() -> None:
    for sharded in (False, True):
        for overlaps in (False, True):
            alone = step(1, sharded, overlaps)
            assert (alone.seconds, alone.efficiency) == (11.0, 1.0)


@pytest.mark.parametrize("interconnect", [0.01, 0.1, 0.2, 0.5, 10.0])
def test_gradients_that_travel_during_the_backward(interconnect: float) -> None:
    """Followed block by block: each travels when its backward is done and the link is free."""
    found = step(4, overlaps=True, interconnect=interconnect)
    plan, share = found.plan, 2 * 3 / 4 * 4 / 1e9  # a gradient's seconds on a link of 1 GB/s
    embeddings = (CONFIG.vocab_size + CONFIG.n_positions) * CONFIG.n_embd
    travel = (plan.n_parameters - embeddings) * share / interconnect / CONFIG.n_layer
    forward_and_head = 1 - plan.backward_of_blocks  # of a micro-batch, which takes 10 s / 8
    backward = 10 / 8 * plan.backward_of_blocks / CONFIG.n_layer
    clock = link_is_free = 10 / 8 * forward_and_head
    for _ in range(CONFIG.n_layer):
        clock += backward
        link_is_free = max(link_is_free, clock) + travel
    last_micro_batch = link_is_free + embeddings * share / interconnect
    first_micro_batch = 10 / 8
    assert found.seconds == pytest.approx(first_micro_batch + last_micro_batch + 1)
    assert found.seconds < step(4, interconnect=interconnect).seconds


def test_most_of_a_micro_batch_s_work_is_the_backward_of_its_blocks() -> None:
    for recompute, least in ((False, 0.4), (True, 0.5)):
        plan = Plan(CONFIG, 2, 1024, recompute=recompute)
        assert least < plan.backward_of_blocks < 2 / 3 + 0.1 * recompute


def test_shared_moments_save_memory() -> None:
    whole, shared = step(4).plan, step(4, sharded=True).plan
    assert whole.moments == 2 * whole.weights and shared.moments * 4 == whole.moments
    assert whole.peak - shared.peak == whole.moments - shared.moments
    assert step(2).plan.peak > dataclasses.replace(step(2).plan, devices=1).peak  # MPI takes some


@pytest.fixture
def train_gpt2() -> ModuleType:
    return script("train_gpt2")


FLAGS = ["--size", "124M", "--batch-size", "6", "--grad-accum-steps", "2", "--plan", "--rate", "1"]


def rows(text: str) -> list[list[str]]:
    """The table's lines: when gradients travel, seconds, efficiency in percent, the last column."""
    found = re.findall(
        r"on each .*(after|during) the backward .* ([\d.e+]+) s  .* (\d+)% +(.*)$",
        text,
        re.MULTILINE,
    )
    return [list(row) for row in found]


def planned(
    train_gpt2: ModuleType, capsys: pytest.CaptureFixture[str], devices: int, *more: str
) -> list[list[str]]:
    flags = [*FLAGS, "--interconnect", "0.2", "--devices", str(devices), *more]
    assert train_gpt2.main(flags) == 0
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table] == ["after", "during", "after", "during"]
    return table


def test_the_table_says_from_which_number_on_devices_wait_too_long(
    train_gpt2: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {n: planned(train_gpt2, capsys, n) for n in (2, 3, 4, 6, 12)}
    for way in range(4):
        efficient = [n for n, table in tables.items() if int(table[way][2]) >= 80]
        limit = {tables[n][way][3] for n in tables}
        first = next(n for n in tables if n not in efficient)
        assert limit == {f"from {first} devices"}  # whatever --devices is
        assert efficient == [n for n in tables if n < first]
    rounded = planned(train_gpt2, capsys, 4, "--reduce-dtype", "bfloat16")
    assert all(float(r[1]) < float(t[1]) for r, t in zip(rounded, tables[4], strict=True))


def test_one_device_is_told_what_more_would_take_and_nothing_twice(
    train_gpt2: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [row[3] for row in planned(train_gpt2, capsys, 2)]
    assert train_gpt2.main([*FLAGS, "--interconnect", "0.2", "--devices", "1"]) == 0
    *_, title, header, first, second, third, last = capsys.readouterr().out.splitlines()
    assert title == "One device sends nothing. Of several that send, and receive, 0.2 GB/s each:"
    assert re.split("  +", header) == ["moments", "gradients travel", "under 80%"]
    table = [re.split("  +", row) for row in (first, second, third, last)]
    assert [row[2] for row in table] == expected and len({tuple(row) for row in table}) == 4


def test_a_network_that_is_fast_enough_for_any_number(
    train_gpt2: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    table = planned(train_gpt2, capsys, 2, "--interconnect", "1000")
    assert {row[3] for row in table} == {"not up to 12 devices"}


def test_devices_that_cannot_share_a_step_are_refused_as_ranks_are(
    train_gpt2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="which 5 ranks cannot share: start 1, 2, 3, 4, 6, 12 rank"):
        train_gpt2.main([*FLAGS, "--devices", "5"])
    with pytest.raises(UserError, match="which 4 ranks cannot share: give --grad-accum-steps 4"):
        train_gpt2.main([*FLAGS, "--devices", "4", "--dropout", "0.1"])
    assert not [*tmp_path.iterdir()]


# Runs the script whose flags it gets, and writes down the most memory that this rank had.
MEASURED = """
import os, runpy, sys
sys.argv.pop(0)
folder = sys.argv.pop()
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
open(os.path.join(folder, str(os.getpid())), "w").write(peak)
"""


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("devices", "more"),
    [(1, []), (2, []), (4, []), (2, ["--shard-optimizer"]), (4, ["--shard-optimizer"])],
)
def test_memory_of_each_rank_within_10_percent_of_a_real_run(
    tmp_path: Path, devices: int, more: list[str]
) -> None:
    text, peaks = tmp_path / "text.txt", tmp_path / "peaks"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    peaks.mkdir()
    flags = ["--data", text, "--tokenizer", "byte", "--eval-batches", 1, "--max-steps", 2, *more]
    flags += ["--n-layer", 6, "--n-head", 8, "--n-embd", 512, "--block-size", 128]
    flags += ["--batch-size", 4, "--grad-accum-steps", 2]
    result = run(*flags, "--plan", "--rate", 1, "--devices", devices)
    assert result.returncode == 0, result.stderr
    (expected,) = re.findall(r"peak memory +([\d,]+) MB", result.stdout)
    done = mpirun(devices, "-c", MEASURED, SCRIPT, *flags, "--out", tmp_path / "out", peaks)
    assert done.returncode == 0, done.stderr
    found = [int(file.read_text()) * 1024 / 1e6 for file in peaks.iterdir()]
    assert len(found) == devices
    planned = float(expected.replace(",", ""))
    assert max(found) == pytest.approx(planned, rel=0.1)
    assert min(found) > 0.85 * planned  # of ranks that neither draw samples nor write files
