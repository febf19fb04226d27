"""Between a function of kernels/in_cuda/ and the device: declarations, checks and dispatch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from micrograd_gpt import functional, gpt2, layers, optim, tensor
from micrograd_gpt.arrays.stand_ins import CUDA, NotForMe, at_most, definition, stands_in_for
from micrograd_gpt.kernels import linear_cross_entropy
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
    """For every kernel: one argument too few, one too many, and each of a wrong type."""
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
                wrong.append([*good[:i], np.ones(1, np.int8), *good[i + 1 :]])
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
        types["double"] = np.float64
        return np.ones(1, types[parameter.type])
    if parameter.type in cuda_modules.STRUCTURES:
        return np.zeros((), cuda_modules.STRUCTURES[parameter.type])
    return 1.0 if parameter.type == "float" else 1


def test_the_arguments_fit_into_a_launch() -> None:
    """CUDA takes at most 4 KB of them."""
    for file in cuda_modules.FILES:
        for parameters in cuda_modules.declarations(file).values():
            by_value = [cuda_modules.STRUCTURES.get(p.type) for p in parameters]
            assert sum(t.itemsize if t else 8 for t in by_value) <= 4096
    source = cuda_modules.source("optimizer")
    assert f"constexpr int TENSORS_AT_ONCE = {cuda_modules.TENSORS_AT_ONCE};" in source


class OnGPU:
    """Something that dispatch takes for a CuPy array, since it is not a NumPy array."""


def test_the_gpu_runs_its_kernel_and_else_the_definition() -> None:
    array, calls = OnGPU(), []

    @definition
    def layer(x: Any) -> str:
        return "definition"

    def kernel(x: Any) -> str:
        calls.append(x)
        return "kernel"

    def not_for_me(x: Any) -> str:
        raise NotForMe

    stands_in_for(layer, "numpy")(lambda x: pytest.fail("a kernel of the CPU"))
    stands_in_for(layer, "c")(lambda x: pytest.fail("a kernel of the CPU"))
    stands_in_for(layer, CUDA)(kernel)
    assert layer(array) == layer([array]) == "kernel" and calls == [array, [array]]
    with at_most("fused"):
        assert layer(array) == "definition"
    stands_in_for(layer, CUDA)(not_for_me)
    assert layer(array) == "definition"


def test_every_definition_that_the_cpu_has_a_kernel_for_has_one_here() -> None:
    marked = [
        function
        for module in (tensor, layers, functional, linear_cross_entropy, optim, gpt2)
        for function in vars(module).values()
        if {"numpy", "c"} & set(getattr(function, "stand_ins", ()))
        and function is not layers.embedding  # whose first argument, ids, is on the host
    ]
    assert [f.__name__ for f in marked if CUDA not in f.stand_ins] == []
    assert len(marked) >= 13
