"""What stands between a function of kernels/gpu.py and the device: declarations and checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from micrograd_gpt import functional as F
from micrograd_gpt import gpt2, kernels, optim
from micrograd_gpt.kernels.in_cuda import kernels as gpu
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.modules import Parameter


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda_modules, "run", lambda *call: calls.append(call))
    return calls


def test_declarations_are_read_from_the_source() -> None:
    found = cuda_modules.declarations("gelu")
    assert found["gelu_forward"] == (
        Parameter("Activation", True, "x"),
        Parameter("Activation", True, "y"),
        Parameter("long long", False, "n"),
    )
    for file in cuda_modules.FILES:
        declared = cuda_modules.declarations(file)
        assert len(declared) == cuda_modules.source(file).count("__global__") > 0
        known = {*cuda_modules.SCALARS, *cuda_modules.STRUCTURES, "Activation"}
        assert {p.type for ps in declared.values() for p in ps} <= known


def test_sources_stand_alone() -> None:
    """NVRTC is given one text: no header of the CUDA toolkit, nothing included twice."""
    for file in cuda_modules.FILES:
        text = cuda_modules.source(file)
        assert "#include" not in text and "#pragma once" not in text
        assert text.count("constexpr int WARP = 32;") == 1


def test_a_launch_passes_values_of_the_declared_types(launched: list[tuple[Any, ...]]) -> None:
    x, y = np.ones(5, np.float16), np.ones(5, np.float16)
    cuda_modules.launch("gelu", "gelu_forward", "float16", (1,), (256,), x, y, 5)
    file, kernel, options, grid, block, values = launched[0]
    assert (file, kernel, grid, block) == ("gelu", "gelu_forward", (1,), (256,))
    assert options == cuda_modules.options("float16")
    assert values == [x.ctypes.data, y.ctypes.data, 5]
    assert [value.dtype for value in values] == [np.uint64, np.uint64, np.int64]


@pytest.mark.parametrize("file", cuda_modules.FILES)
def test_a_launch_that_does_not_fit_is_refused(file: str, launched: list[tuple[Any, ...]]) -> None:
    """Of every kernel: one argument too few, one too many, and each one of another type."""
    for kernel, parameters in cuda_modules.declarations(file).items():
        good = [_fitting(parameter) for parameter in parameters]

        def start(arguments: list[Any], kernel: str = kernel) -> None:
            cuda_modules.launch(file, kernel, "float16", (1,), (32,), *arguments)

        start(good)
        assert len(launched) == 1
        wrong = [good[:-1], [*good, 1]]
        wrong += [[*good[:i], "one", *good[i + 1 :]] for i in range(len(good))]
        for i, parameter in enumerate(parameters):
            if parameter.is_pointer:
                wrong.append([*good[:i], np.ones(1), *good[i + 1 :]])  # float64
            elif parameter.type != "float":
                wrong.append([*good[:i], 1.5, *good[i + 1 :]])
        for arguments in wrong:
            with pytest.raises(TypeError, match=kernel):
                start(arguments)
        assert len(launched) == 1
        launched.clear()


def _fitting(parameter: Parameter) -> Any:
    if parameter.is_pointer:
        types = {"Activation": np.float16, "float": np.float32, "long long": np.int64}
        return np.ones(1, types[parameter.type])
    if parameter.type in cuda_modules.STRUCTURES:
        return np.zeros((), cuda_modules.STRUCTURES[parameter.type])
    return 1.0 if parameter.type == "float" else 1


def test_the_arguments_fit_into_a_launch() -> None:
    """CUDA takes 4 KB of them."""
    for file in cuda_modules.FILES:
        for parameters in cuda_modules.declarations(file).values():
            by_value = [cuda_modules.STRUCTURES.get(p.type) for p in parameters]
            assert sum(t.itemsize if t else 8 for t in by_value) <= 4096
    source = cuda_modules.source("optimizer")
    assert f"constexpr int TENSORS_AT_ONCE = {cuda_modules.TENSORS_AT_ONCE};" in source


class OnGPU:
    """What dispatch takes for a CuPy array: no NumPy array."""


def test_the_gpu_runs_its_kernel_and_else_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    array, calls = OnGPU(), []

    def gelu_forward(x: Any) -> str:
        calls.append(x)
        return "kernel"

    def unsupported(x: Any) -> str:
        raise gpu.Unsupported

    def definition(x: Any) -> str:
        return "definition"

    definition.__name__ = "gelu_forward"
    dispatch = kernels.accelerated(definition)
    monkeypatch.setattr(gpu, "gelu_forward", gelu_forward)
    assert dispatch(array) == "kernel" and calls == [array]
    with kernels.definitions_only():
        assert dispatch(array) == "definition"
    monkeypatch.setattr(gpu, "gelu_forward", unsupported)
    assert dispatch(array) == "definition"


def test_every_accelerated_definition_has_a_kernel() -> None:
    marked = [f for m in (F, optim, gpt2) for f in vars(m).values() if hasattr(f, "__wrapped__")]
    names = {f.__name__ for f in marked}
    assert {name for name in names if not hasattr(gpu, name)} == set()
    assert len(names) >= 11
