"""The CUDA sources in sources/: what they declare, how they are compiled, how one is launched.

CuPy compiles a source through NVRTC when one of its kernels is first launched, once for each
activation type (and head size, for attention), and keeps the result in its own cache. No compiler
has to be installed. Each launch is checked against the kernel's declaration, which is read from the
source: arguments of a wrong number or type are a TypeError, not garbage on the device.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micrograd_gpt.arrays.devices import Array

FOLDER = Path(__file__).parent / "sources"
FILES = tuple(sorted(path.stem for path in FOLDER.glob("*.cu")))

ACTIVATIONS = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}
# Types passed by value: each name in C, and NumPy's type of the same size
SCALARS = {
    "int": np.int32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}
TENSORS_AT_ONCE = 48  # in one launch over many tensors: a launch takes at most 4 KB of arguments
TENSOR_TABLE = np.dtype(
    [
        ("sizes", np.int64, TENSORS_AT_ONCE),
        ("arrays", np.uint64, (4, TENSORS_AT_ONCE)),
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


def tf32_wanted() -> bool:
    """Whether products may round float32 to TF32: the setting of `set_tf32` (arrays/devices.py)."""
    return os.environ.get("CUPY_TF32") == "1"


@cache
def source(file: str) -> str:
    """The text of sources/`file`.cu, with the files that it includes in place."""

    def included(match: re.Match[str]) -> str:
        return (FOLDER / match[1]).read_text("utf-8").replace("#pragma once\n", "")

    text, count = (FOLDER / f"{file}.cu").read_text("utf-8"), 1
    while count:
        text, count = re.subn(r'^#include "([\w.]+)"\n', included, text, flags=re.MULTILINE)
    return text


@cache
def options(
    dtype: str,
    head_size: int = 0,
    dropout: bool = False,
    tf32: bool = False,
    backward: bool = False,
) -> tuple[str, ...]:
    """The compiler's options, to which CuPy adds the device's architecture and -ftz=true.

    All but the first are only for attention, and `tf32` only for float32.
    """
    name = ACTIVATIONS[dtype]
    of_type = ("-std=c++17", f"-DACTIVATION={name}", f"-DACTIVATION_IS_{name.upper()}")
    if not head_size:
        return of_type
    rows, _ = attention_block(dtype, head_size, tf32, backward)
    shape = (f"-DHEAD_SIZE={head_size}", f"-DROWS={rows}", f"-DDROPOUT={dropout:d}")
    return (*of_type, *shape, *(["-DTF32"] if tf32 else []))


def attention_block(
    dtype: str, head_size: int, tf32: bool = False, backward: bool = False
) -> tuple[int, int]:
    """How many rows of queries or keys a block of attention works on, and its number of threads.

    In float32 without TF32, four tiles of that many rows fit a block's 48 KB of shared memory. Else
    a warp works on 16 rows, or on 32 where registers hold their products.
    """
    if dtype == "float32" and not tf32:
        rows = 32 if head_size <= 64 else 16
        return rows, rows * 8
    wide = dtype != "float32" and head_size <= 64 and not backward
    return (128 if wide else 64), 128


@cache
def declarations(file: str) -> dict[str, tuple[Parameter, ...]]:
    """The kernels in a source, each with its parameters."""
    text = re.sub(r"//.*", "", source(file))
    bounds = r"(?:__launch_bounds__\([^)]*\) )?"
    kernels = re.findall(rf'extern "C" __global__ void {bounds}(\w+)\(([^)]*)\)', text)
    return {name: tuple(map(_parameter, arguments.split(","))) for name, arguments in kernels}


def _parameter(text: str) -> Parameter:
    match = re.fullmatch(r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)\s*", text)
    assert match, f"cannot read this parameter of a kernel: {text!r}"
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
    tf32: bool = False,
) -> None:
    """Start `kernel` of sources/`file`.cu on the current stream, without waiting for it.

    `dtype` is the activation type: "float32", "float16" or "bfloat16". For a pointer the argument
    is an array or None (a null pointer); for anything else, a number or a structured array. Raises
    TypeError where the arguments do not fit the kernel's declaration.
    """
    parameters, types = declarations(file)[kernel], _argument_types(file, kernel, dtype)
    if len(arguments) != len(parameters):
        raise TypeError(f"{kernel} takes {len(parameters)} arguments, not {len(arguments)}")
    values = []
    for parameter, expected, argument in zip(parameters, types, arguments, strict=True):
        given = getattr(argument, "dtype", None)
        alike = given is not None and given == expected  # to NumPy, None is float64
        if parameter.is_pointer and (argument is None or alike):
            values.append(np.uint64(0 if argument is None else address(argument)))
        elif parameter.type in STRUCTURES and alike:
            values.append(argument)
        elif (
            parameter.type in SCALARS
            and not parameter.is_pointer
            and _is_number(argument, expected)
        ):
            values.append(expected.type(argument))
        else:
            raise TypeError(
                f"{kernel}: {parameter.name} must be {expected}, not {given or argument!r}"
            )
    backward = file == "attention_backward"
    run(file, kernel, options(dtype, head_size, dropout, tf32, backward), grid, block, values)


@cache
def _argument_types(file: str, kernel: str, dtype: str) -> tuple[np.dtype, ...]:
    """NumPy's type for each argument: what a pointer points to, a number, or a structure."""
    types: dict[str, Any] = {"Activation": dtype, **SCALARS, **STRUCTURES}
    return tuple(np.dtype(types[parameter.type]) for parameter in declarations(file)[kernel])


def _is_number(argument: Any, expected: np.dtype) -> bool:
    """Whether an argument can be passed as a number of this type; a float is not an integer."""
    if expected.kind == "f":
        return isinstance(argument, int | float | np.integer | np.floating)
    return isinstance(argument, int | np.integer)


def address(array: Array) -> int:
    """The address of an array's first element in its device's memory."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def run(
    file: str,
    kernel: str,
    options: tuple[str, ...],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    values: list[Any],
) -> None:
    """Launch on the GPU through CuPy, with NumPy scalars and structures as `values`."""
    _function(file, kernel, options)(grid, block, tuple(values))


@cache
def _function(file: str, kernel: str, options: tuple[str, ...]) -> Any:
    return _module(file, options).get_function(kernel)


@cache
def _module(file: str, options: tuple[str, ...]) -> Any:
    import cupy

    return cupy.RawModule(code=source(file), options=options)
