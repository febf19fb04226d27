"""Each kernel against its definition, at sizes that do not fit its blocks, and with many blocks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import functional as F
from micrograd_gpt import kernels, optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.kernels.in_c import kernels as compiled
from micrograd_gpt.kernels.in_numpy import kernels as cpu
from micrograd_gpt.kernels.in_numpy import threads

TOLERANCE = {"float32": 2e-5, "float64": 1e-13}  # a few hundred roundings


@pytest.fixture(
    params=["C", "C, one thread", "NumPy", "NumPy, many small blocks", "NumPy, one core"]
)
def blocking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kind of kernel, with and without a second thread, and cut in very small blocks."""
    if request.param.startswith("C"):
        library = compiler.library()
        if library is None:
            pytest.skip(f"no compiled kernels: {compiler.report()}")
        library.use_threads(1 if "one thread" in request.param else 3)
        yield
        library.use_threads(threads.cores())
        return
    if "blocks" in request.param:
        monkeypatch.setattr(cpu, "BLOCK", 64)
        monkeypatch.setattr(cpu, "FEW_ELEMENTS", 1)
        monkeypatch.setattr(cpu, "FEW_PRODUCTS", 1)
    elif "one core" in request.param:
        monkeypatch.setattr(threads._pool(os.getpid()), "size", 1)
    with kernels.numpy_only():
        yield


def numbers(*shape: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def assert_same(function: Callable[..., Any], dtype: str, *inputs: Any, **options: Any) -> None:
    """The dispatched function gives what its definition gives, within rounding."""
    definition = function.__wrapped__  # type: ignore[attr-defined]
    assert getattr(cpu, definition.__name__) is not definition
    before = [x.copy() if isinstance(x, np.ndarray) else x for x in inputs]
    ours, oracle = function(*inputs, **options), definition(*inputs, **options)
    for x, old in zip(inputs, before, strict=True):
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, old, err_msg="an input was overwritten")
    ours, oracle = (x if isinstance(x, tuple) else (x,) for x in (ours, oracle))
    for a, b in zip(ours, oracle, strict=True):
        assert np.shape(a) == np.shape(b)
        size = np.abs(b).max(initial=0) + 1e-30
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * size)
        assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "k", "m"), [(1, 3, 5), (17, 300, 401), (130, 65, 33), (64, 1, 64)])
def test_products(n: int, k: int, m: int, dtype: str, blocking: None) -> None:
    x, w, b = (numbers(*s, dtype=dtype) for s in ((n, k), (k, m), (m,)))
    grad = numbers(n, m, dtype=dtype, seed=1)
    assert_same(F.matmul, dtype, x, w)
    assert_same(F.matmul, dtype, x, numbers(m, k, dtype=dtype).T)
    out = np.full((n, m), np.nan, dtype)
    assert F.matmul(x, w, out=out) is out and np.isfinite(out).all()
    assert_same(F.linear_forward, dtype, x, w, b)
    assert_same(F.linear_forward, dtype, x, w, None)
    assert_same(F.linear_backward, dtype, grad, x, w)
    assert_same(F.linear_backward, dtype, grad, x, np.asfortranarray(w))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (13, 5), (100, 768), (257, 130)])
def test_rows(shape: tuple[int, int], dtype: str, blocking: None) -> None:
    x, grad = numbers(*shape, dtype=dtype) * 3 + 1, numbers(*shape, dtype=dtype, seed=1)
    w, b = numbers(shape[1], dtype=dtype), numbers(shape[1], dtype=dtype, seed=2)
    eps = 1e-5
    assert_same(F.layer_norm_forward, dtype, x, w, b, eps)
    _, mean, rstd = F.layer_norm_forward(x, w, b, eps)
    if shape[1] > 1:  # one channel is always 0: the gradient is all cancellation
        assert_same(F.layer_norm_backward, dtype, grad, x, w, mean, rstd)
    assert_same(F.gelu_forward, dtype, x)
    assert_same(F.gelu_backward, dtype, grad, x)
    ids = np.random.default_rng(0).integers(0, 9, shape[0])
    sums = [numbers(11, shape[1], dtype=dtype, seed=3) for _ in range(2)]
    for add, total in zip(
        (F.embedding_backward, F.embedding_backward.__wrapped__), sums, strict=True
    ):  # type: ignore[attr-defined]
        add(grad, ids, total)
    np.testing.assert_allclose(*sums, rtol=0, atol=TOLERANCE[dtype] * np.abs(sums[1]).max())
    targets = np.random.default_rng(1).integers(0, shape[1], shape[0])
    targets[::3] = F.IGNORE
    assert_same(F.cross_entropy_forward, dtype, x, targets)
    assert_same(F.cross_entropy_forward, dtype, x, targets, 0.25)
    in_place = x.copy()
    _, dlogits = F.cross_entropy_forward(in_place, targets, 0.25, out=in_place)
    assert dlogits is in_place
    np.testing.assert_array_equal(dlogits, F.cross_entropy_forward(x, targets, 0.25)[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("b", "h", "t", "d"),
    [(1, 1, 1, 4), (2, 3, 7, 5), (3, 2, 128, 8), (1, 2, 129, 4), (2, 1, 300, 8)],
)
def test_attention(b: int, h: int, t: int, d: int, p: float, dtype: str, blocking: None) -> None:
    qkv = numbers(b, t, 3 * h * d, dtype=dtype) * 2
    q, k, v = F.split_heads(qkv, h)
    assert_same(F.attention_forward, dtype, q, k, v, p, (1, 2))
    out, log_total = F.attention_forward(q, k, v, p, (1, 2))
    grad = numbers(b, t, h, d, dtype=dtype, seed=1)
    results = []
    for function in (F.attention_backward, F.attention_backward.__wrapped__):  # type: ignore[attr-defined]
        dqkv = np.full(qkv.shape, np.nan, dtype)  # poisoned: every element must be written
        parts = F.split_heads(dqkv, h)
        function(grad, q, k, v, out, log_total, *parts, p, (1, 2))
        results.append(dqkv)
    size = np.abs(results[1]).max()
    np.testing.assert_allclose(*results, rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "keys"), [(1, 9), (5, 9), (130, 300), (1, 1)])
def test_attention_over_a_longer_past(t: int, keys: int, dtype: str, blocking: None) -> None:
    q = numbers(2, 3, t, 4, dtype=dtype)
    k, v = (numbers(2, 3, keys, 4, dtype=dtype, seed=s) for s in (1, 2))
    assert_same(F.attention_forward, dtype, q, k, v)


def test_attention_memory_grows_with_t_not_its_square() -> None:
    """The largest array a kernel makes while it works on one head."""
    import tracemalloc

    peaks = []
    for t in (512, 2048):
        qkv = numbers(1, t, 3 * 16, dtype="float32")
        q, k, v = F.split_heads(qkv, 1)
        tracemalloc.start()
        out, log_total = F.attention_forward(q, k, v)
        dqkv = np.empty_like(qkv)
        F.attention_backward(out, q, k, v, out, log_total, *F.split_heads(dqkv, 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 6 * peaks[0]  # 4 times the context: the square would be 16 times


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_optimizer(dtype: str, blocking: None) -> None:
    shapes = [(3,), (5, 7), (), (40, 50)]
    grads = [numbers(*s, dtype=dtype) for s in shapes]
    grads.append(numbers(6, 4, dtype=dtype).T)  # not contiguous, as a gradient may be
    shapes.append((4, 6))
    assert optim.sum_of_squares(grads) == pytest.approx(sum((g**2).sum() for g in grads), rel=1e-6)
    results = []
    for update in (optim.adamw_update, optim.adamw_update.__wrapped__):  # type: ignore[attr-defined]
        p, m, v = ([numbers(*s, dtype=dtype, seed=i) for s in shapes] for i in (1, 2, 3))
        v = [abs(x) for x in v]
        for step in (3, 4):
            update(p, grads, m, v, 1e-2, 0.9, 0.95, 1e-8, [0.1, 0.0, 0.1, 0.2, 0.3], step)
        results.append([*p, *m, *v])
    for ours, oracle in zip(*results, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=100 * TOLERANCE[dtype], atol=1e-6)


def test_results_do_not_depend_on_which_thread_did_what() -> None:
    x, w = numbers(700, 300, dtype="float32"), numbers(300, 400, dtype="float32")
    grad = numbers(700, 400, dtype="float32", seed=1)
    first = F.linear_backward(grad, x, w)
    for _ in range(5):
        for a, b in zip(first, F.linear_backward(grad, x, w), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_same_seed_gives_the_same_losses_bit_for_bit(blocking: None) -> None:
    config = GPT2Config(
        **{"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 67, "n_positions": 150},
        **{"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    )
    ids = np.random.default_rng(0).integers(0, 67, (2, 151))

    def losses() -> list[float]:
        model = GPT2(config, seed=1)
        optimizer = optim.AdamW(model.parameters())
        found = []
        for _ in range(4):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            found += [loss.item(), optim.clip_grad_norm(optimizer.parameters, 1.0)]
            optimizer.step()
            optimizer.zero_grad()
        return found

    assert losses() == losses()


# ------------------------------------------------------------------------------------- threads


def test_parallel_runs_every_task_once() -> None:
    for count in (0, 1, 2, 3, 50):
        done: list[int] = []
        threads.parallel(done.append, count)
        assert sorted(done) == list(range(count))


def test_an_error_in_a_task_is_raised_and_the_threads_live_on() -> None:
    def fail(i: int) -> None:
        if i == 3:
            raise ZeroDivisionError("task 3")

    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="task 3"):
            threads.parallel(fail, 8)
    done: list[int] = []
    threads.parallel(done.append, 4)
    assert sorted(done) == [0, 1, 2, 3]


def test_blas_gets_its_threads_back() -> None:
    pool = threads._pool(os.getpid())
    before = [library.num_threads for library in pool.blas]
    seen: list[int] = []
    threads.parallel(lambda i: seen.extend(b.num_threads for b in pool.blas), 4)
    assert [library.num_threads for library in pool.blas] == before
    if pool.size > 1:
        assert set(seen) <= {1}


@pytest.mark.parametrize(("outer", "inner"), [(4, 3), (1, 3), (4, 1), (1, 1)])
def test_parallel_within_parallel_does_its_tasks_in_turn(outer: int, inner: int) -> None:
    done: list[tuple[int, int]] = []
    threads.parallel(lambda i: threads.parallel(lambda j: done.append((i, j)), inner), outer)
    assert sorted(done) == [(i, j) for i in range(outer) for j in range(inner)]


def test_first_use_from_several_threads_makes_one_pool() -> None:
    """In a process of its own, since here the pool was made long ago."""
    code = """if True:
        import os, threading
        from micrograd_gpt.kernels.in_numpy import threads
        from threadpoolctl import ThreadpoolController
        blas = ThreadpoolController().select(user_api="blas").lib_controllers
        before = [library.num_threads for library in blas]
        barrier, pools = threading.Barrier(8), []
        def first_use():
            barrier.wait()
            threads.parallel(lambda i: None, 4)
            pools.append(threads._pool(os.getpid()))
        callers = [threading.Thread(target=first_use) for _ in range(8)]
        [c.start() for c in callers], [c.join() for c in callers]
        assert len(set(map(id, pools))) == 1
        assert [library.num_threads for library in blas] == before
    """
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_failed_task_leaves_nothing_for_the_garbage_collector() -> None:
    array = np.ones(10)
    alive = weakref.ref(array)

    def fail(i: int, array: np.ndarray = array) -> None:
        raise ValueError(i)

    with pytest.raises(ValueError):
        threads.parallel(fail, 1)
    del array, fail
    assert alive() is None


def test_parallel_may_be_called_from_several_threads() -> None:
    results: list[list[int]] = [[] for _ in range(4)]
    callers = [threading.Thread(target=threads.parallel, args=(r.append, 20)) for r in results]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=30)
    assert all(sorted(r) == list(range(20)) for r in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_makes_its_own_threads() -> None:
    threads.parallel(lambda i: None, 4)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        threads.parallel(done.append, 4)
        os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_each_way_of_computing_runs_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run_in_c = compiled.call
    monkeypatch.setattr(compiled, "call", lambda *a: (ran.append("C"), run_in_c(*a)))
    monkeypatch.setattr(cpu, "parallel", lambda *a: (ran.append("NumPy"), threads.parallel(*a)))
    x = numbers(3, 4, dtype="float32")
    with kernels.definitions_only():
        F.gelu_forward(x)
    assert ran == []
    with kernels.numpy_only():
        F.gelu_forward(x)
    assert ran == ["NumPy"]
    F.gelu_forward(x)
    F.gelu_forward(x.astype("float64"))
    assert ran == ["NumPy", "C" if compiler.library() else "NumPy", "NumPy"]
