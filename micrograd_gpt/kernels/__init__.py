"""The same arithmetic made fast for one device.

`functional.py` defines every fused operation in plain array code and marks the parts worth
speeding up with `@accelerated`. Functions of the same name then stand in for the definition, take
the same arguments, and are tested equal to it: on the CPU those in C (`kernels/compiled.py`) where
the machine has a compiler, or those in NumPy (`kernels/cpu.py`); on a GPU those in CUDA
(`kernels/gpu.py`). What none of them takes is done by the definition. Nothing is defined here
alone: `definitions_only()` runs everything without this folder, `numpy_only()` without C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from micrograd_gpt.arrays.backend import device_of
from micrograd_gpt.kernels.in_c import kernels as compiled
from micrograd_gpt.kernels.in_c.arguments import NotForC
from micrograd_gpt.kernels.in_cuda import kernels as gpu
from micrograd_gpt.kernels.in_numpy import kernels as cpu

F = TypeVar("F", bound=Callable[..., Any])

_KERNELS: ContextVar[str] = ContextVar("kernels", default="compiled")


@contextmanager
def definitions_only() -> Iterator[None]:
    """Within this block every operation runs its readable definition."""
    with _use("definitions"):
        yield


@contextmanager
def numpy_only() -> Iterator[None]:
    """Within this block the CPU runs the NumPy kernels, as where there is no C compiler."""
    with _use("numpy"):
        yield


@contextmanager
def _use(kernels: str) -> Iterator[None]:
    token = _KERNELS.set(kernels)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def accelerated(definition: F) -> F:
    """Let the kernel of the same name stand in for `definition` where there is one.

    The device is that of the first argument, an array or a list of them. The definition itself
    stays reachable as `function.__wrapped__`.
    """
    name = definition.__name__
    in_numpy = getattr(cpu, name, definition)
    in_c = getattr(compiled, name, in_numpy)
    on_cpu = {"compiled": in_c, "numpy": in_numpy, "definitions": definition}
    if in_c is definition and not hasattr(gpu, name):
        return definition

    @functools.wraps(definition)
    def dispatch(array: Any, *args: Any, **kwargs: Any) -> Any:
        first = array[0] if isinstance(array, list) else array
        if device_of(first) == "cpu":
            with suppress(NotForC):  # raised before anything is written
                return on_cpu[_KERNELS.get()](array, *args, **kwargs)
            return definition(array, *args, **kwargs)
        in_cuda = getattr(gpu, name, None)
        if in_cuda is not None and _KERNELS.get() != "definitions":
            with suppress(gpu.Unsupported):  # raised before anything is written
                return in_cuda(array, *args, **kwargs)
        return definition(array, *args, **kwargs)

    return dispatch  # type: ignore[return-value]
