"""The same arithmetic made fast for one device.

`functional.py` defines every fused operation in plain array code and marks the parts worth
speeding up with `@accelerated`. A function of the same name in `kernels/cpu.py` or `kernels/gpu.py`
then stands in for the definition on that device, takes the same arguments, and is tested equal to
it. Nothing is defined here alone: `definitions_only()` runs everything without this folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from micrograd_gpt.backend import device_of
from micrograd_gpt.kernels import cpu, gpu

F = TypeVar("F", bound=Callable[..., Any])

_KERNELS: ContextVar[bool] = ContextVar("kernels", default=True)


@contextmanager
def definitions_only() -> Iterator[None]:
    """Within this block every operation runs its readable definition."""
    token = _KERNELS.set(False)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def accelerated(definition: F) -> F:
    """Let the kernel of the same name stand in for `definition` where there is one.

    The device is that of the first argument, an array or a list of them. The definition itself
    stays reachable as `function.__wrapped__`.
    """
    kernel = getattr(cpu, definition.__name__, None)
    if kernel is None:
        return definition

    @functools.wraps(definition)
    def dispatch(array: Any, *args: Any, **kwargs: Any) -> Any:
        first = array[0] if isinstance(array, list) else array
        if not _KERNELS.get():
            return definition(array, *args, **kwargs)
        if device_of(first) == "cpu":
            return kernel(array, *args, **kwargs)
        return _on_gpu(definition, array, *args, **kwargs)

    return dispatch  # type: ignore[return-value]


def _on_gpu(definition: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The GPU's kernel; the definition where there is none for these arguments."""
    try:
        return getattr(gpu, definition.__name__, definition)(*args, **kwargs)
    except gpu.Unsupported:  # raised before anything is written
        return definition(*args, **kwargs)
