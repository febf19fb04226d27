"""Ranks with a GPU each, which send each other gradients by NCCL (both are fakes: fake_nccl.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nccl
import numpy as np
import pytest
from fake_cupy import asarray
from ml_dtypes import bfloat16
from mpi_launch import mpirun, needs_mpi
from training import ROOT, SCRIPT, SMALL, metrics

from micrograd_gpt.arrays.devices import library_for
from micrograd_gpt.runs.nccl import GPUExchange, NCCLFailed, nccl_version, without_nccl
from micrograd_gpt.support.errors import UserError

CHILD = ROOT / "tests" / "nccl_child.py"
RUN = [*SMALL, "--dropout", "0.1", "--grad-accum-steps", "4", "--max-steps", "8"]

# A rank on its own, which sends itself what it sends
ALONE = SimpleNamespace(rank=0, size=1, bcast=lambda x: x, allgather=lambda x: [x], alltoall=list)


def poll(request: Any) -> None:
    assert any(request.Test() for _ in range(100)), "it would wait for ever"


# ------------------------------------------------------------------------------- on one rank


def sum_of(numbers: Any, exchange: GPUExchange) -> np.ndarray:
    return exchange.gather(exchange.scatter_sum(numbers)).get()


def test_streams_wait_for_each_other() -> None:
    with fake_nccl.installed(ALONE) as cupy:
        exchange = GPUExchange(ALONE, poll, 100)
        gradients = asarray(np.ones(5, "f4"))
        for _ in range(2):
            gradients += gradients
            with exchange.beside():
                assert cupy.cuda.get_current_stream() != fake_nccl.Stream.current[0]
                gradients[:] = exchange.gather(exchange.scatter_sum(gradients))
            gradients += gradients
        np.testing.assert_array_equal(gradients.get(), np.full(5, 16, "f4"))
        exchange.finish()


@pytest.mark.parametrize("default", [True, False])
def test_a_missing_wait_would_be_noticed(monkeypatch: pytest.MonkeyPatch, default: bool) -> None:
    """Of the default stream, which computes gradients, or of the one that exchanges them."""
    wait_event = fake_nccl.Stream.wait_event

    def forget(self: fake_nccl.Stream, event: fake_nccl.Event) -> None:
        if (self is fake_nccl.Stream.current[0]) != default:
            wait_event(self, event)

    monkeypatch.setattr(fake_nccl.Stream, "wait_event", forget)
    with fake_nccl.installed(ALONE):
        exchange = GPUExchange(ALONE, poll, 100)
        with pytest.raises(fake_nccl.MissingWait):
            sum_of(asarray(np.ones(5, "f4")), exchange)


def test_other_work_may_go_on_beside_an_exchange() -> None:
    with fake_nccl.installed(ALONE):
        exchange = GPUExchange(ALONE, poll, 100)
        with exchange.beside(catch_up=False):
            sums = exchange.scatter_sum(asarray(np.ones(5, "f4")))
        with pytest.raises(fake_nccl.MissingWait):
            sums.get()
        exchange.catch_up()
        np.testing.assert_array_equal(sums.get(), np.ones(5, "f4"))


def refuse(*_: object) -> None:
    raise fake_nccl.NcclError(fake_nccl.ERROR)


@pytest.mark.parametrize("call", ["send", "recv", "allGather"])
def test_an_exchange_that_fails(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with fake_nccl.installed(ALONE):
        exchange = GPUExchange(ALONE, poll, 100)
        monkeypatch.setattr(fake_nccl.NcclCommunicator, call, refuse)
        with pytest.raises(NCCLFailed, match="cannot reach the other ranks: NCCL_ERROR_SYSTEM"):
            sum_of(asarray(np.ones(5, "f4")), exchange)


def test_a_failure_that_shows_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that waits for a rank which has ended waits for ever, and Python must not."""
    monkeypatch.setattr(fake_nccl.Event, "done", False)
    with fake_nccl.installed(ALONE):
        exchange = GPUExchange(ALONE, poll, 100)
        exchange.scatter_sum(asarray(np.ones(5, "f4")))
        monkeypatch.setattr(fake_nccl.NcclCommunicator, "check_async_error", refuse)
        with pytest.raises(NCCLFailed, match="NCCL_ERROR_SYSTEM"):
            exchange.finish()


def test_gpus_that_nccl_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_nccl.NcclCommunicator, "__init__", refuse)
    with fake_nccl.installed(ALONE), pytest.raises(UserError, match="connect the GPUs of 1 ranks"):
        GPUExchange(ALONE, poll, 100)


@pytest.mark.gpu
@pytest.mark.parametrize("wire", [None, "float16", bfloat16])
def test_the_real_nccl_brings_the_bits_back(wire: Any) -> None:
    """One rank on one GPU, so what it sends arrives here, rounded to the type it was sent in."""
    if nccl_version() is None:
        pytest.skip(without_nccl())
    cupy, deadline = library_for("gpu"), time.monotonic() + 60

    def wait(request: Any) -> None:
        while not request.Test():
            assert time.monotonic() < deadline, "it would wait for ever"

    exchange = GPUExchange(ALONE, wait, 100)
    numbers = np.random.default_rng(0).normal(size=1_000_003).astype("f4")
    gradients = cupy.asarray(numbers)
    gradients += gradients
    with exchange.beside(catch_up=False):
        sums = exchange.gather(exchange.scatter_sum(gradients, wire), wire)
    exchange.catch_up()
    sums += sums
    exchange.finish()
    sent = (numbers * 2).astype(wire or "f4").astype("f4")
    np.testing.assert_array_equal(sums.get(), sent * 2)


# ------------------------------------------------------------------------------ on several ranks


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("what", ["sums", "gradients"])
@pytest.mark.parametrize("count", [2, 3])
def test_nccl_brings_the_bits_that_mpi_brings(count: int, what: str) -> None:
    result = mpirun(count, CHILD, what)
    assert (result.returncode, result.stdout) == (0, f"the same {what}\n"), result.stderr


@pytest.fixture
def train(text: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A run of two ranks with fake GPUs: its folder, and what it printed."""

    def run(*how: str) -> tuple[Path, Any]:
        out = tmp_path / "-".join(how)
        return out, mpirun(2, CHILD, *how, "--data", text, *RUN, "--out", out)

    return run


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["train_loss"], row["grad_norm"]) for row in metrics(folder)]


def only_error(result: Any) -> str:
    lines = result.stderr.replace("\0", "").splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    return line


@needs_mpi
@pytest.mark.slow
def test_gpus_with_and_without_nccl_train_the_same(
    train: Callable[..., tuple[Path, Any]], text: Path, tmp_path: Path
) -> None:
    cpu = tmp_path / "cpu"
    assert mpirun(2, SCRIPT, "--data", text, *RUN, "--out", cpu).returncode == 0
    for how, says in (("train", False), ("without_nccl", True)):
        out, result = train(how)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("CuPy finds no NCCL: gradients go through the host") == says
        np.testing.assert_allclose(losses(out), losses(cpu), rtol=1e-5)
    assert losses(tmp_path / "train") == losses(tmp_path / "without_nccl")


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard-optimizer"], ["--reduce-dtype", "bfloat16"]])
def test_gradients_travel_during_the_backward(
    train: Callable[..., tuple[Path, Any]], flags: list[str]
) -> None:
    out, result = train("overlapped", *flags)
    assert result.returncode == 0, result.stderr
    assert "during the backward: True" in result.stdout
    after, result = train("without_nccl", *flags)
    assert result.returncode == 0, result.stderr
    # Ranks that share the optimizer add up the norm of their pieces, which buckets cut otherwise.
    tolerance = 1e-6 if "--shard-optimizer" in flags else 0
    np.testing.assert_allclose(losses(out), losses(after), rtol=tolerance)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"),
    [
        (["one_gpu"], "2 ranks on a machine with 1 GPU: start no more than one rank a GPU"),
        (["no_connection"], "NCCL cannot connect the GPUs of 2 ranks: " + fake_nccl.ERROR),
        (["other_version"], "rank 1 has NCCL 22701, rank 0 has 22700: all ranks need the same"),
    ],
)
def test_ranks_whose_gpus_cannot_work_together(
    train: Callable[..., tuple[Path, Any]], how: list[str], says: str
) -> None:
    _, result = train(*how)
    assert result.returncode == 2
    assert only_error(result) == f"error: {says}"


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("when", ["allGather", "check_async_error"])
def test_nccl_that_fails_during_a_run_ends_all_ranks(
    train: Callable[..., tuple[Path, Any]], when: str
) -> None:
    out, result = train("fails", when, "--save-interval", "2")
    assert result.returncode == 1
    message = only_error(result)
    assert message.startswith(f"error: NCCL cannot reach the other ranks: {fake_nccl.ERROR}; ")
    assert f"the last good checkpoint: {out}, of step " in message
