"""Each CPU kernel against its definition, at sizes that fit no block, and with many blocks."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kernel_cases import CASES, TOLERANCE
from layer_cases import numbers

from micrograd_gpt import Tensor, optim
from micrograd_gpt import functional as F
from micrograd_gpt.arrays.stand_ins import NotForMe, at_most
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.kernels.in_c import kernels as in_c
from micrograd_gpt.kernels.in_numpy import kernels as in_numpy
from micrograd_gpt.kernels.in_numpy import threads

NAMED = {definition.__name__: definition for definition in CASES}


class Poisoned:
    """NumPy, but new arrays hold NaN until they are written: a kernel must write every element."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, *args: Any, **kwargs: Any) -> np.ndarray:
        array = np.empty(*args, **kwargs)
        array[...] = np.nan
        return array

    def empty_like(self, *args: Any, **kwargs: Any) -> np.ndarray:
        array = np.empty_like(*args, **kwargs)
        array[...] = np.nan
        return array


KINDS = ["C", "C, one thread", "NumPy", "NumPy, many small blocks", "NumPy, one core"]
REGISTERED = [
    (kind, name)
    for kind in KINDS
    for name, definition in NAMED.items()
    if kind.split(",")[0].lower() in definition.stand_ins
]


@pytest.fixture(params=KINDS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every kind of kernel, with one thread and several, and with very small blocks."""
    for kernels in (in_c, in_numpy):
        monkeypatch.setattr(kernels, "np", Poisoned())
    if request.param.startswith("C"):
        library = compiler.library()
        if library is None:
            pytest.skip(f"no compiled kernels: {compiler.report()}")
        library.use_threads(1 if "one thread" in request.param else 3)
        yield "c"
        library.use_threads(threads.cores())
        return
    if "blocks" in request.param:
        monkeypatch.setattr(in_numpy, "BLOCK", 64)
        monkeypatch.setattr(in_numpy, "FEW_ELEMENTS", 1)
        monkeypatch.setattr(in_numpy, "FEW_PRODUCTS", 1)
    elif "one core" in request.param:
        monkeypatch.setattr(threads._pool(os.getpid()), "size", 1)
    with at_most("numpy"):
        yield "numpy"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("level", "name"), REGISTERED, indirect=["level"])
def test_a_kernel_equals_its_definition(name: str, dtype: str, level: str) -> None:
    definition = NAMED[name]
    kernel = definition.stand_ins[level]
    for i, case in enumerate(CASES[definition](dtype)):
        if level in case.not_for or (level == "c" and dtype == "float64"):
            with pytest.raises(NotForMe):
                case.run(kernel)
            continue
        ours, oracle = case.run(kernel), case.run(definition.definition)
        sizes = [largest(b) for b in oracle]
        for a, b, size in zip(ours, oracle, sizes, strict=True):
            assert (a is None) == (b is None) and np.shape(a) == np.shape(b), f"case {i}"
            if isinstance(b, np.ndarray):
                assert a.dtype == b.dtype, f"case {i}"
            if b is not None:
                atol = case.tolerance * TOLERANCE[dtype] * (max(sizes) if case.together else size)
                np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=f"case {i}")


def largest(array: Any) -> float:
    return 0.0 if array is None else np.abs(array).max(initial=0, where=np.isfinite(array))


@pytest.mark.parametrize(("level", "name"), REGISTERED, indirect=["level"])
def test_integers_and_mixed_types_are_left_to_the_definition(name: str, level: str) -> None:
    """A kernel reads memory as one type of float, so it must refuse anything else."""
    kernel = NAMED[name].stand_ins[level]
    case = next(iter(CASES[NAMED[name]]("float32")))
    first, *others = case.arguments
    for dtype in ("float16", "int32"):
        with pytest.raises(NotForMe):
            kernel(as_type(first, dtype), *others)
    if any(isinstance(other, np.ndarray) and other.dtype == np.float32 for other in others):
        with pytest.raises(NotForMe):
            kernel(as_type(first, "float64"), *others)


def as_type(value: Any, dtype: str) -> Any:
    """The value with its arrays in another type: in nested lists too, and tensors' gradients."""
    if isinstance(value, Tensor):
        changed = Tensor(value.data)
        changed.grad = None if value.grad is None else value.grad.astype(dtype)
        return changed
    if isinstance(value, list | tuple):
        return type(value)(as_type(part, dtype) for part in value)
    return value.astype(dtype) if isinstance(value, np.ndarray) else value


def test_attention_memory_grows_with_t_not_its_square(level: str) -> None:
    """Compares the peaks of memory for one head at two lengths."""
    peaks = []
    for t in (512, 2048):
        q, k, v = numbers(3, 1, 1, t, 16, dtype="float32")
        tracemalloc.start()
        out, log_total = F.attention_forward(q, k, v, 0.0, ())
        F.attention_backward(out, q, k, v, out, log_total, 0.0, ())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 6 * peaks[0]  # 4 times the context: the square would be 16 times


def test_results_do_not_depend_on_which_thread_did_what() -> None:
    x, w = numbers(700, 300, dtype="float32"), numbers(300, 400, dtype="float32")
    grad = numbers(700, 400, dtype="float32", seed=1)
    first = F.linear_backward(grad, x, w)
    for _ in range(5):
        for a, b in zip(first, F.linear_backward(grad, x, w), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_same_seed_gives_the_same_losses_bit_for_bit(level: str) -> None:
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
    """In a process of its own, since this one already has its pool."""
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


@pytest.mark.parametrize("count", [1, 2])
def test_a_failed_task_leaves_nothing_for_the_garbage_collector(count: int) -> None:
    array = np.ones(10)
    alive = weakref.ref(array)

    def fail(i: int, array: np.ndarray = array) -> None:
        raise ValueError(i)

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError):
            threads.parallel(fail, count)
        del array, fail
        for _ in range(200):  # the other threads may be about to let go of the task
            if alive() is None:
                break
            time.sleep(0.01)
        assert alive() is None
    finally:
        gc.enable()


def test_tasks_see_the_callers_context_variables() -> None:
    seen: list[str] = []

    def task(i: int) -> None:
        time.sleep(0.01)  # so that every thread gets one
        seen.append(np.geterr()["divide"])

    with np.errstate(divide="raise"):
        threads.parallel(task, 8)
    assert seen == ["raise"] * 8


def test_parallel_may_be_called_from_several_threads() -> None:
    results: list[list[int]] = [[] for _ in range(4)]
    callers = [threading.Thread(target=threads.parallel, args=(r.append, 20)) for r in results]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=30)
    assert all(sorted(r) == list(range(20)) for r in results)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system has no pthread_kill")
def test_an_interrupt_is_raised_once_all_tasks_are_done() -> None:
    done: list[int] = []

    def task(i: int) -> None:
        if i == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        done.append(i)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        threads.parallel(task, 8)
    # With one core the first task, in this thread, is the one that is interrupted
    assert sorted(done) == (list(range(8)) if threads.cores() > 1 else [])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no setitimer")
def test_interrupts_at_any_moment_leave_blas_its_threads() -> None:
    """Thousands of them, within 0.3 ms of one another, so that many calls meet two and more."""
    code = """if True:
        import random, signal, time
        from micrograd_gpt.kernels.in_numpy import threads
        from threadpoolctl import ThreadpoolController
        blas = ThreadpoolController().select(user_api="blas").lib_controllers
        counts = lambda: [library.num_threads for library in blas]
        before, interrupts, done = counts(), 0, []
        threads.parallel(done.append, 4)

        def interrupt(number, frame):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
            while frame:  # this test's own loop is spared
                if frame.f_code.co_filename == threads.__file__:
                    raise KeyboardInterrupt
                frame = frame.f_back

        random.seed(0)
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            try:
                threads.parallel(lambda i: None, 4)
            except KeyboardInterrupt:
                interrupts += 1
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        for _ in range(100):  # a call that was interrupted twice may still be at work
            if counts() == before:
                break
            time.sleep(0.01)
        assert counts() == before, (counts(), before, interrupts)
        threads.parallel(done.append, 4)
        assert counts() == before and sorted(done) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert interrupts > 100, interrupts
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_makes_its_own_threads() -> None:
    threads.parallel(lambda i: None, 4)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        threads.parallel(done.append, 4)
        os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_each_level_runs_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run_in_c = in_c.call
    monkeypatch.setattr(in_c, "call", lambda *a: (ran.append("C"), run_in_c(*a)))
    monkeypatch.setattr(
        in_numpy, "parallel", lambda *a: (ran.append("NumPy"), threads.parallel(*a))
    )
    x = numbers(3, 4, dtype="float32")
    for level in ("definitions", "fused"):
        with at_most(level):
            F.gelu_forward(x)
    assert ran == []
    with at_most("numpy"):
        F.gelu_forward(x)
    assert ran == ["NumPy"]
    F.gelu_forward(x)
    F.gelu_forward(x.astype("float64"))
    assert ran == ["NumPy", "C" if compiler.library() else "NumPy", "NumPy"]
