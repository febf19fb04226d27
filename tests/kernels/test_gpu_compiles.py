"""Every CUDA kernel compiles with the compiler and the options that CuPy uses on a GPU."""

from __future__ import annotations

import re
from typing import Any

import nvrtc
import pytest

from micrograd_gpt.kernels.in_cuda import modules as cuda_modules

if nvrtc.library() is None:
    pytest.skip(nvrtc.MISSING, allow_module_level=True)

ARCHITECTURES = (80, 90)  # Ampere, Hopper; a kernel that needs more than Ampere fails on the first
TILED = ("attention", "attention_backward")
BY_HEAD_SIZE = (*TILED, "attention_decode")
OF_TWO_BYTES = ("batch_rows", "residual")  # files for these types alone
FILES = [
    (file, dtype)
    for file in cuda_modules.FILES
    for dtype in cuda_modules.ACTIVATIONS
    if not (file in OF_TWO_BYTES and dtype == "float32")
]


def case(architecture: int, file: str, dtype: str, *variant: int) -> Any:
    """Only one architecture and one type, at GPT-2's head size, are not marked as slow."""
    of_gpt2 = variant[0] in (0, 64) and not any(variant[1:])
    fast = of_gpt2 and (architecture, dtype) == (80, "bfloat16")
    marks = () if fast else pytest.mark.slow
    return pytest.param(architecture, file, dtype, *variant, marks=marks)


INSTANCES = [
    case(architecture, file, dtype, size, dropout, tf32)
    for architecture in ARCHITECTURES
    for file, dtype in FILES
    for size in ((16, 64, 128) if file in BY_HEAD_SIZE else (0,))
    for dropout in ((False, True) if file in TILED and size == 64 else (False,))
    for tf32 in ((False, True) if file in TILED and dtype == "float32" else (False,))
]


def compiled(file: str, options: tuple[str, ...], arch: str) -> tuple[str, str]:
    """PTX and log, with -ftz=true, which CuPy adds."""
    flags = [*options, "-ftz=true", f"-arch={arch}", "--ptxas-options=-v"]
    return nvrtc.compile_to_ptx(cuda_modules.source(file), f"{file}.cu", flags)


@pytest.mark.parametrize(
    ("architecture", "file", "dtype", "head_size", "dropout", "tf32"), INSTANCES
)
def test_it_compiles(
    architecture: int, file: str, dtype: str, head_size: int, dropout: bool, tf32: bool
) -> None:
    backward = file == "attention_backward"
    options = cuda_modules.options(dtype, head_size, dropout, tf32, backward)
    ptx, _ = compiled(file, options, f"compute_{architecture}")
    entries = set(re.findall(r"\.visible \.entry (\w+)\(", ptx))
    assert entries == set(cuda_modules.declarations(file)), "kernels and declarations differ"
    assert "ld.global.v4" in ptx or "cp.async.cg" in ptx, "nothing is loaded 16 bytes at a time"
    on_tensor_cores = file in (*TILED, "batch_rows") and dtype != "float32"
    assert ("mma.sync.aligned.m16n8k16" in ptx) == on_tensor_cores
    assert ("mma.sync.aligned.m16n8k8" in ptx) == tf32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "file", "dtype", "tf32"),
    [
        case(architecture, file, dtype, tf32)
        for architecture in ARCHITECTURES
        for file, dtype, tf32 in (
            *((file, dtype, False) for file, dtype in FILES),
            *((file, "float32", True) for file in TILED),
        )
    ],
)
def test_nothing_spills_into_local_memory(
    architecture: int, file: str, dtype: str, tf32: bool
) -> None:
    """Compiled to machine code at GPT-2's head size, each kernel fits in registers."""
    size, backward = 64 if file in BY_HEAD_SIZE else 0, file == "attention_backward"
    options = cuda_modules.options(dtype, size, False, tf32, backward)
    _, log = compiled(file, options, f"sm_{architecture}")
    frames = re.findall(r"Function properties for (\w+)\nptxas\W+(\d+) bytes stack", log)
    assert {name for name, _ in frames} >= set(cuda_modules.declarations(file)), log
    assert {name for name, size in frames if size != "0"} == set()


def test_what_does_not_compile_is_reported() -> None:
    with pytest.raises(AssertionError, match="undefined"):
        nvrtc.compile_to_ptx("__global__ void f() { undefined(); }", "f.cu", [])
