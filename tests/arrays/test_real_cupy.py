"""What fake_cupy.py accepts, compared with CuPy itself; most of it runs without a GPU."""

from __future__ import annotations

import inspect
import re
from typing import Any

import fake_cupy
import fake_nccl
import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason='CuPy is not installed: pip install -e ".[cuda13]"')


def parameters(function: Any) -> list[str]:
    """The names of a function's parameters: from its signature, else from its docstring."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        line = (function.__doc__ or "").strip().splitlines()[0]
        names = re.search(r"\((.*)\)", line)
        assert names, f"{function} says nothing of its arguments: {line!r}"
        given = re.sub(r"\\?\*,|/,|self,?", "", names[1])
        return [part.split("=")[0].split()[-1] for part in given.split(",") if part.strip()]


@pytest.mark.parametrize("name", sorted({**fake_cupy.UFUNCS, **fake_cupy.FUNCTIONS}))
def test_a_function_takes_these_arguments(name: str) -> None:
    ours = {**fake_cupy.UFUNCS, **fake_cupy.FUNCTIONS}[name].split()
    theirs = parameters(getattr(cupy, name))
    assert theirs[: len(ours)] == ours


@pytest.mark.parametrize("name", sorted(fake_cupy.METHODS))
def test_a_method_takes_these_arguments(name: str) -> None:
    ours, theirs = fake_cupy.METHODS[name].split(), parameters(getattr(cupy.ndarray, name))
    assert theirs[: len(ours)] == ours


@pytest.mark.parametrize("name", sorted(fake_cupy.FUNCTIONS))
def test_numpys_function_is_found_by_its_name(name: str) -> None:
    """CuPy's __array_function__ looks for it in this way (NEP 18)."""
    assert getattr(np, name).__module__ == "numpy" and getattr(cupy, name) is not getattr(np, name)


@pytest.mark.gpu
def test_numpys_functions_work_on_cupys_arrays() -> None:
    """Those of NEP 13, 18 and 35 that the core relies on and fake_cupy.py has."""
    x = cupy.arange(6, dtype="float32").reshape(2, 3)
    results = [
        *(np.exp(x), np.add(x, x, out=x.copy()), np.where(x > 2, x, -np.inf), np.zeros_like(x)),
        *(np.zeros((2, 3), "float32", like=x), np.asarray([[1, 2, 3]], "float32", like=x)),
        *(
            np.array(1, "float32", like=x),
            np.tri(2, 3, 1, dtype=bool, like=x),
            np.arange(3, like=x),
        ),
        *(np.full_like(x, 2), np.expand_dims(x, 0), np.clip(x, 1, 4), np.sign(x)),
        *(np.broadcast_to(x, (2, 2, 3)), np.concatenate([x, x], axis=1), np.flatnonzero(x > 2)),
        *np.split(x, [1], axis=1),
    ]
    assert all(isinstance(result, cupy.ndarray) for result in results)
    assert np.tri(2, 3, 1, like=x).shape == (2, 3) and np.asarray(2.0, like=x).shape == ()
    np.add.at(x, cupy.asarray([0, 0]), cupy.ones((2, 3), "float32"))
    assert x.get().tolist() == [[2, 3, 4], [3, 4, 5]]
    for wrong in (lambda: np.add(x, np.ones(3)), lambda: np.where(np.ones(3, bool), x, x)):
        with pytest.raises(TypeError):
            wrong()


def test_what_else_the_gpu_path_uses_is_there() -> None:
    operators = [f"__{name}__" for name in (*fake_cupy.OPERATORS, "matmul", "imul", "iadd")]
    methods = (
        *fake_cupy.READS,
        *fake_cupy.ANY_NUMBER,
        *fake_cupy.ATTRIBUTES,
        "get",
        "set",
        "T",
        "base",
    )
    missing = [name for name in (*operators, *methods) if not hasattr(cupy.ndarray, name)]
    assert not missing
    assert "out" in parameters(cupy.matmul) and callable(cupy.add.at)
    assert not isinstance(cupy.ndarray, np.ndarray) and issubclass(
        cupy.cuda.memory.OutOfMemoryError, MemoryError
    )
    assert cupy.cuda.memory.OutOfMemoryError.__module__ == "cupy.cuda.memory"
    assert parameters(cupy.cuda.Stream.begin_capture)[-1] == "mode"
    assert callable(cupy.cuda.Stream.end_capture) and parameters(cupy.cuda.Graph.launch)[-1:] == [
        "stream"
    ]
    assert cupy.cuda.runtime.streamCaptureModeThreadLocal == 1
    assert cupy.ndarray.__weakrefoffset__, "token_step.py refers to arrays weakly"
    runtime = cupy.cuda.runtime
    assert issubclass(runtime.CUDARuntimeError, Exception)
    assert runtime.runtimeGetVersion() > 12000 and isinstance(runtime.driverGetVersion(), int)


@pytest.mark.filterwarnings("ignore:\nnccl library could not be loaded")
def test_nccl_takes_these_arguments() -> None:
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("CuPy finds no NCCL: pip install nvidia-nccl-cu13")
    assert vars(fake_nccl.nccl).keys() <= vars(nccl).keys()
    assert issubclass(nccl.NcclError, Exception) and nccl.NCCL_UINT8 == fake_nccl.nccl.NCCL_UINT8
    assert len(nccl.get_unique_id()) == 128 and nccl.get_version() > 20700  # the first with send
    assert parameters(nccl.NcclCommunicator) == parameters(fake_nccl.NcclCommunicator)
    for name in ("send", "recv", "allGather", "check_async_error"):
        ours, theirs = (getattr(module.NcclCommunicator, name) for module in (fake_nccl, nccl))
        assert parameters(theirs) == [p for p in parameters(ours) if p != "self"], name


def test_streams_know_of_each_other_what_events_tell() -> None:
    stream, event = cupy.cuda.Stream, cupy.cuda.Event
    assert parameters(stream)[:2] == ["null", "non_blocking"]
    assert parameters(stream.record)[-1] == "event" == parameters(stream.wait_event)[-1]
    assert hasattr(event, "done") and callable(cupy.cuda.get_current_stream)
