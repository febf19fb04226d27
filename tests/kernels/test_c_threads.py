"""The threads of the C kernels: what they do when memory or cores are short."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from micrograd_gpt.kernels.in_c import compiler

pytestmark = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)

# Run in a process of its own. Its memory is limited to what it has and a little more, then to more
# and more, so that each of the kernels' allocations is the first to fail at some time.
SHORT_OF_MEMORY = """if True:
    import ctypes, resource
    import numpy as np
    from micrograd_gpt import Tensor, functional, no_grad
    from micrograd_gpt.generation.kv_cache import KVCache
    from micrograd_gpt.gpt2 import GPT2, GPT2Config
    from micrograd_gpt.kernels.in_c import compiler, kernels, token_step

    compiler.library().use_threads(ctypes.c_int64(3))

    def limit(more):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        most = resource.RLIM_INFINITY if more is None else used + more
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def numbers(*shape):
        return np.random.default_rng(0).standard_normal(shape).astype("float32")

    x, weight, grad = numbers(2000, 300), numbers(300, 67), numbers(2000, 67)
    many, many_weights = numbers(3, 40_000), numbers(40_000)
    q = numbers(1, 4, 1500, 8)
    model = GPT2(GPT2Config(n_layer=2, n_head=1, n_embd=2, vocab_size=5, n_positions=200_000))
    cache = KVCache(model, 1, 200_000)
    cache.data[...] = 0
    new = Tensor(numbers(1, 1, 2))

    def layer_norm():
        statistics = np.ones((2, 3, 1), "float32")
        return kernels.layer_norm_backward(many, many, many_weights, *statistics)

    def attention():
        return kernels.attention_forward(q, q, q, 0.0, ())

    def attention_backward():
        return [kernels.attention_backward(q, q, q, q, *attention(), 0.0, ())]

    def attention_in_half():
        narrow = q.astype("bfloat16")
        found = functional.attention_forward(narrow, narrow, narrow, 0.0, ())
        return [functional.attention_backward(narrow, narrow, narrow, narrow, *found, 0.0, ())]

    def step():
        cache.lengths[:] = 199_990
        try:
            with no_grad():
                return [token_step.through_blocks(new, model.transformer.h, cache).data]
        except MemoryError:
            assert cache.lengths[0] == 199_990
            raise

    works = [
        lambda: kernels.linear_backward(grad, x, weight),
        layer_norm,
        attention,
        attention_backward,
        attention_in_half,
        step,
    ]
    for work in works:
        said = set()
        for more in range(0, 30_000_000, 50_000):
            limit(more)
            try:
                results = work()
                break
            except MemoryError as error:
                said.add(str(error))
            finally:
                limit(None)
        for a, b in zip(results, work(), strict=True):
            np.testing.assert_array_equal(a, b)
        ours = [line for line in said if "not enough memory for intermediate results" in line]
        assert ours and not any("\\n" in line for line in ours), said
        print("refused, then computed")
"""


def run_apart(code: str, **environment: str) -> list[str]:
    """The lines that this code prints, run in a process of its own; AssertionError if it fails."""
    command, settings = [sys.executable, "-c", code], os.environ | environment
    result = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{result.returncode} {result.stderr[-2000:]}"
    return result.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_too_little_memory_is_an_error_and_the_threads_live_on() -> None:
    # No kernel is to find a large block that was freed, nor memory that is set aside for a thread.
    settings = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    printed = run_apart(SHORT_OF_MEMORY, **settings)
    assert printed == ["refused, then computed"] * 6


def test_a_thread_may_get_an_empty_part() -> None:
    """Three threads share 67 columns, 64 at a time: one of them gets none."""
    code = """if True:
        import ctypes
        import numpy as np
        from micrograd_gpt.kernels.in_c import compiler, kernels
        compiler.library().use_threads(ctypes.c_int64(3))
        x, weight, grad = (np.ones(shape, "float32") for shape in ((99, 90), (90, 67), (99, 67)))
        for _ in range(100):
            dx, dweight, dbias = kernels.linear_backward(grad, x, weight)
            assert (dx == 67).all() and (dweight == 99).all() and (dbias == 99).all()
        print("so it is")
    """
    assert run_apart(code) == ["so it is"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_there_are_no_more_threads_than_cores() -> None:
    """Threads that have to take turns on a core only wait for each other."""
    code = """if True:
        import ctypes, os
        from micrograd_gpt.kernels.in_c import compiler
        library = compiler.library()
        cores = sorted(os.sched_getaffinity(0))
        for some in (cores, cores[:1]):
            os.sched_setaffinity(0, some)
            most = library.use_cores(ctypes.c_int64(1000))
            assert 1 <= most <= len(some), most
            assert library.use_cores(ctypes.c_int64(1)) == 1
        print("so it is")
    """
    assert run_apart(code) == ["so it is"]
