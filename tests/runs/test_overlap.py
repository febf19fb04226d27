"""Gradients that are worked on while the backward still computes others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from mpi_launch import mpirun, needs_mpi
from training import ROOT, SCRIPT, SMALL, assert_same, metrics

from micrograd_gpt import Tensor
from micrograd_gpt.arrays.precision import compute_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs import overlap
from micrograd_gpt.runs.overlap import Bucket, Overlap
from micrograd_gpt.runs.recompute import recompute_blocks

CHILD = ROOT / "tests" / "ranks_child.py"
DROPOUT = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.2)
CONFIG = GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=11, n_positions=8, **DROPOUT)
IDS = np.random.default_rng(0).integers(0, 11, (2, 2, 3, 8))  # two micro-batches
EMBEDDINGS = 2  # the first parameters, which the backward comes to last


class AtOnce:
    """Does the work where it is handed over: the thread could not be faster."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(work())
        return future


def halves(parameters: list[Tensor]) -> list[Bucket]:
    """The parameters in buckets that end, all but the last, in the middle of one."""
    middles = [parameter.size // 2 for parameter in parameters]
    buckets: list[Bucket] = [[(0, 0, middles[0])]]
    for i in range(len(parameters) - 1):
        buckets.append([(i, middles[i], parameters[i].size), (i + 1, 0, middles[i + 1])])
    return [*buckets, [(len(parameters) - 1, middles[-1], parameters[-1].size)]]


@pytest.mark.parametrize("level", ["definitions", "numpy", "c"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_handed_over_as_soon_as_they_are_complete(
    monkeypatch: pytest.MonkeyPatch, dtype: str, recompute: bool, level: str
) -> None:
    """The last ones first, with dropout, tied embeddings and an earlier micro-batch."""
    monkeypatch.setattr(overlap, "ThreadPoolExecutor", AtOnce)
    model, early = GPT2(CONFIG), Overlap()
    if recompute:
        recompute_blocks(model)
    parameters, seen = model.parameters(), []
    buckets = halves(parameters)

    def keep(bucket: Bucket) -> None:
        for i, start, end in bucket:
            seen.append((i, start, parameters[i].grad.reshape(-1)[start:end].copy()))

    with compute_in(dtype), at_most(level):
        first, last = (model.loss(*batch) for batch in IDS)
        first.backward()
        early.begin(last, parameters, buckets, keep)
        (last * 8.0).backward()  # as where the loss is scaled
    without_embeddings = [bucket for bucket in buckets if all(i >= EMBEDDINGS for i, *_ in bucket)]
    assert len(seen) >= sum(map(len, without_embeddings))
    early.finish()
    assert [piece[:2] for piece in seen] == [
        (i, start) for bucket in reversed(buckets) for i, start, _ in bucket
    ]
    for i, start, grad in seen:
        whole = parameters[i].grad.reshape(-1)
        np.testing.assert_array_equal(grad, whole[start : start + len(grad)])


def test_a_parameter_without_a_gradient_in_this_backward_comes_last() -> None:
    a, b = (Tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    a.grad = b.grad = np.ones(2, np.float32)
    early, seen = Overlap(), []
    loss = (a * 3.0).sum()
    early.begin(loss, [a, b], [[(0, 0, 2)], [(1, 0, 2)]], seen.append)
    loss.backward()
    assert not seen
    early.finish()
    assert seen == [[(1, 0, 2)], [(0, 0, 2)]]


def small_loss() -> tuple[Tensor, list[Tensor], list[Bucket]]:
    """A loss, the parameters it depends on, and one bucket for each."""
    parameters = [Tensor(np.ones(3), requires_grad=True) for _ in range(3)]
    x = parameters[0]
    for parameter in parameters[1:]:
        x = (x * parameter).tanh()
    return x.sum(), parameters, [[(i, 0, 3)] for i in range(3)]


def test_the_work_is_done_in_one_thread_beside_the_backward() -> None:
    loss, parameters, buckets = small_loss()
    early, threads, gate = Overlap(), [], threading.Event()

    def work(bucket: Bucket) -> None:
        assert gate.wait(60)  # the backward ends though no work does
        threads.append(threading.current_thread())

    early.begin(loss, parameters, buckets, work)
    loss.backward()
    assert early.has_begun and not threads
    gate.set()
    early.finish()
    assert len(threads) == len(buckets) and len(set(threads)) == 1
    assert threads[0] is not threading.current_thread() and not early.has_begun


def test_what_goes_wrong_in_the_thread_is_raised() -> None:
    loss, parameters, buckets = small_loss()
    early = Overlap()

    def work(bucket: Bucket) -> None:
        raise ZeroDivisionError("in the thread")

    early.begin(loss, parameters, buckets, work)
    with pytest.raises(ZeroDivisionError, match="in the thread"):  # in the one or in the other
        loss.backward()
        early.finish()


@needs_mpi
@pytest.mark.slow
def test_adding_up_needs_little_memory() -> None:
    result = mpirun(2, CHILD, "memory")
    assert result.returncode == 0, result.stderr


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, ["--dropout", "0.1", "--grad-accum-steps", "6"]),
        (3, ["--dropout", "0.1", "--grad-accum-steps", "6", "--recompute"]),
        (2, ["--grad-accum-steps", "2", "--reduce-dtype", "bfloat16"]),
        (3, ["--grad-accum-steps", "3", "--dtype", "float16", "--shard-optimizer"]),
    ],
)
def test_a_run_is_the_same_bit_for_bit(
    text: Path, tmp_path: Path, count: int, flags: list[str]
) -> None:
    run = ["--data", text, *SMALL, "--n-layer", 2, "--max-steps", 10, "--save-interval", 5, *flags]
    for name, program in {"after": [SCRIPT], "during": [CHILD, "overlapped"]}.items():
        result = mpirun(count, *program, *run, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "during", tmp_path / "after")
    after, during = (metrics(tmp_path / name) for name in ("after", "during"))
    assert [row["train_loss"] for row in after] == [row["train_loss"] for row in during]
    # A sharded optimizer adds up squares by pieces of buckets, which are smaller here.
    norms = [[row["grad_norm"] for row in rows] for rows in (after, during)]
    np.testing.assert_allclose(*norms, rtol=1e-12)


@needs_mpi
@pytest.mark.slow
def test_a_loss_that_is_not_a_number_ends_the_run(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *SMALL, "--max-steps", 9, "--learning-rate", 1e30]
    result = mpirun(2, CHILD, "overlapped", *flags, "--warmup-steps", 0, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1 and "the loss is nan" in result.stderr
