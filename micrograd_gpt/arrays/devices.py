"""Which array library an array belongs to, and what its device is called.

An array is a NumPy array ("cpu") or a CuPy array ("gpu"). Code that works on either asks
`array_module(array)` for the library and calls it `xp`. CuPy is not imported until a GPU is asked
for.
"""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from micrograd_gpt.support.errors import UserError

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; CuPy need not be installed to check types

DEVICES = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}
INSTALL_CUPY = 'pip install -e ".[cuda13]" (or ".[cuda12]")'


def resolve_device(name: str) -> str:
    """Return "cpu" or "gpu" for "cpu", "gpu" or "cuda"; raises UserError for any other name."""
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


def array_module(array: Array) -> ModuleType:
    """The library, numpy or cupy, whose functions work on `array`."""
    return np if isinstance(array, np.ndarray | np.generic) else sys.modules["cupy"]


def device_of(array: Array) -> str:
    """The device an array lives on, "cpu" or "gpu"."""
    return "cpu" if isinstance(array, np.ndarray | np.generic) else "gpu"


def library_for(device: str) -> ModuleType:
    """The array library of a device; raises UserError when there is no GPU to compute on."""
    if resolve_device(device) == "cpu":
        return np
    return _usable_cupy()


@functools.cache
def _usable_cupy() -> ModuleType:
    # CuPy if it is installed and finds a GPU, else UserError. The cache does not hold failures.
    try:
        import cupy
    except ModuleNotFoundError as problem:
        if problem.name != "cupy":
            raise UserError(f"CuPy cannot be imported ({problem}): {INSTALL_CUPY}") from None
        raise UserError(f"--device gpu needs CuPy: {INSTALL_CUPY}") from None
    except ImportError as problem:  # such as a missing CUDA library
        reason = " ".join(str(problem).split())
        raise UserError(f"CuPy cannot be imported ({reason}): {INSTALL_CUPY}") from None
    runtime = cupy.cuda.runtime
    try:
        found = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as problem:
        driver = runtime.driverGetVersion()  # 12040 is CUDA 12.4, 0 is no driver
        if driver == 0:
            raise UserError("there is no NVIDIA driver here; use --device cpu") from None
        if driver < runtime.runtimeGetVersion():
            raise UserError(
                f"the NVIDIA driver is too old for this CuPy: it knows CUDA {_cuda(driver)}, CuPy "
                f"was built for {_cuda(runtime.runtimeGetVersion())}; update the driver, or "
                'pip install -e ".[cuda12]"'
            ) from None
        raise UserError(f"CuPy finds no usable NVIDIA GPU ({problem}); use --device cpu") from None
    if not found:
        raise UserError("CuPy finds no NVIDIA GPU; use --device cpu")
    return cupy


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def set_tf32(on: bool, device: str) -> None:
    """Let float32 matrix products on the GPU round their operands to TF32, or forbid it.

    TF32 has float32's exponent and float16's precision of 11 bits, and runs on tensor cores. CuPy
    reads CUPY_TF32 at its first float32 product, so call this before it. Raises UserError when TF32
    is asked for on the CPU, which does not have it.
    """
    if resolve_device(device) == "gpu":
        os.environ["CUPY_TF32"] = "1" if on else "0"
    elif on:
        raise UserError("--tf32 is for --device gpu: leave it out, or add --device gpu")


def gpu_addresses() -> list[str]:
    """Where the GPUs that this process sees are on the PCI bus, in the order of their numbers."""
    runtime = library_for("gpu").cuda.runtime
    return [runtime.deviceGetPCIBusId(number) for number in range(runtime.getDeviceCount())]


def use_gpu(number: int) -> None:
    """Compute on GPU `number`, of those that this process sees, from now on."""
    library_for("gpu").cuda.Device(number).use()


def to_device(array: Array, device: str) -> Array:
    """`array` on `device` ("cpu", "gpu"): the array itself if it is there already, else a copy.

    Raises UserError where there is no such device.
    """
    device = resolve_device(device)
    if device_of(array) == device:
        return array
    return library_for("gpu").asarray(array) if device == "gpu" else array.get(order="A")


def move(model: Any, device: str) -> None:
    """Move all tensors of a model (an nn.Module), and their gradients, to "cpu" or "gpu".

    Make the optimizer after this: its moments are made where the parameters are.
    """
    values = [value for _, part in model.modules() for value in vars(part).values()]
    others = [value for value in values if hasattr(value, "requires_grad")]  # such as constants
    for tensor in (*model.parameters(), *others):
        tensor.data = to_device(tensor.data, device)
        if tensor.grad is not None:
            tensor.grad = to_device(tensor.grad, device)
