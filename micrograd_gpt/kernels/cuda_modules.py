"""The CUDA sources of kernels/cuda/: what they declare, how they are compiled, how one is launched.

A source is compiled by CuPy, through NVRTC, when a kernel of it is first launched, once for each
activation type (and head size, for attention), and CuPy keeps the result in its own cache. No
compiler has to be installed. A launch is checked against the kernel's declaration, which is read
from the source: a wrong number or type of arguments is a TypeError, not garbage on the device.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micrograd_gpt.backend import Array

FOLDER = Path(__file__).parent / "cuda"
FILES = tuple(sorted(path.stem for path in FOLDER.glob("*.cu")))

ACTIVATIONS = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}
# By value: the C type and the NumPy type that goes there
SCALARS = {
    "int": np.int32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
}
TENSORS_AT_ONCE = 48  # in one launch over many tensors: all kernels' arguments must fit 4 KB
TENSOR_TABLE = np.dtype(
    [
        ("sizes", np.int64, TENSORS_AT_ONCE),
        ("arrays", np.uint64, (5, TENSORS_AT_ONCE)),
        ("decays", np.float32, TENSORS_AT_ONCE),
    ],
    align=True,
)
STRUCTURES = {"TensorTable": TENSOR_TABLE}


class Parameter(NamedTuple):
    """One argument of a kernel: `const float* x` is Parameter("float", True, "x")."""

    type: str
    is_pointer: bool
    name: str


@cache
def usable() -> bool:
    """Whether the current GPU can run the kernels: compute capability 8.0 (Ampere) or newer."""
    import cupy

    return int(cupy.cuda.Device().compute_capability) >= 80


@cache
def source(file: str) -> str:
    """The text of kernels/cuda/`file`.cu, with the files it includes in their places."""

    def included(match: re.Match[str]) -> str:
        return (FOLDER / match[1]).read_text("utf-8").replace("#pragma once\n", "")

    text, count = (FOLDER / f"{file}.cu").read_text("utf-8"), 1
    while count:
        text, count = re.subn(r'^#include "([\w.]+)"\n', included, text, flags=re.MULTILINE)
    return text


def options(dtype: str, head_size: int = 0, dropout: bool = False) -> tuple[str, ...]:
    """What the compiler is told, but for the device: CuPy adds that, and -ftz=true.

    The last two are for attention alone.
    """
    name = ACTIVATIONS[dtype]
    of_type = ("-std=c++17", f"-DACTIVATION={name}", f"-DACTIVATION_IS_{name.upper()}")
    if not head_size:
        return of_type
    rows, _ = attention_block(dtype, head_size)
    return (*of_type, f"-DHEAD_SIZE={head_size}", f"-DROWS={rows}", f"-DDROPOUT={dropout:d}")


def attention_block(dtype: str, head_size: int) -> tuple[int, int]:
    """How many rows of queries or keys a block of attention.cu works on, with how many threads.

    In float32 four tiles of so many rows lie in a block's 48 KB of shared memory.
    """
    if dtype == "float32":
        rows = 32 if head_size <= 64 else 16
        return rows, rows * 8
    return 64, 128


@cache
def declarations(file: str) -> dict[str, tuple[Parameter, ...]]:
    """The kernels of a source, each with its parameters."""
    text = re.sub(r"//.*", "", source(file))
    kernels = re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', text)
    return {name: tuple(map(_parameter, arguments.split(","))) for name, arguments in kernels}


def _parameter(text: str) -> Parameter:
    match = re.fullmatch(r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)\s*", text)
    assert match, f"a kernel's parameter this cannot read: {text!r}"
    return Parameter(match[1], bool(match[2]), match[3])


def launch(
    file: str,
    kernel: str,
    dtype: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: Any,
    head_size: int = 0,
    dropout: bool = False,
) -> None:
    """Start `kernel` of kernels/cuda/`file`.cu on the current stream; does not wait for it.

    `dtype` is the activation type, "float32", "float16" or "bfloat16". An argument is an array or
    None (a null pointer) where the kernel takes a pointer, else a number or a structured array.
    Raises TypeError where the arguments are not what the kernel declares.
    """
    parameters = declarations(file)[kernel]
    if len(arguments) != len(parameters):
        raise TypeError(f"{kernel} takes {len(parameters)} arguments, not {len(arguments)}")
    values = [
        _value(kernel, parameter, argument, dtype)
        for parameter, argument in zip(parameters, arguments, strict=True)
    ]
    run(file, kernel, options(dtype, head_size, dropout), grid, block, values)


def _value(kernel: str, parameter: Parameter, argument: Any, dtype: str) -> Any:
    """An argument as the kernel takes it: an address, a number of the declared size, a struct."""
    if parameter.is_pointer:
        if argument is None:
            return np.uint64(0)
        element = {"Activation": dtype, "float": "float32", "long long": "int64"}[parameter.type]
        if str(getattr(argument, "dtype", None)) != element:
            given = getattr(argument, "dtype", type(argument).__name__)
            raise TypeError(f"{kernel}: {parameter.name} must be {element}, not {given}")
        return np.uint64(address(argument))
    if parameter.type in STRUCTURES:
        if getattr(argument, "dtype", None) != STRUCTURES[parameter.type]:
            raise TypeError(f"{kernel}: {parameter.name} must be a {parameter.type}")
        return argument
    whole = parameter.type != "float"
    if not isinstance(argument, int | np.integer if whole else int | float | np.floating):
        raise TypeError(f"{kernel}: {parameter.name} must be {parameter.type}, not {argument!r}")
    return SCALARS[parameter.type](argument)


def address(array: Array) -> int:
    """Where an array's first element lies in its device's memory."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def run(
    file: str,
    kernel: str,
    options: tuple[str, ...],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    values: list[Any],
) -> None:
    """Launch on the GPU through CuPy: `values` are NumPy scalars and structures, by value."""
    _function(file, kernel, options)(grid, block, tuple(values))


@cache
def _function(file: str, kernel: str, options: tuple[str, ...]) -> Any:
    return _module(file, options).get_function(kernel)


@cache
def _module(file: str, options: tuple[str, ...]) -> Any:
    import cupy

    return cupy.RawModule(code=source(file), options=options)
