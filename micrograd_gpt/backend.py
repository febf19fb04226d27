"""Which array library a tensor lives in, what its device is called, where randomness comes from.

An array is a NumPy array ("cpu") or a CuPy array ("gpu"). Code that works on either asks
`array_module(array)` for the library and calls it `xp`. CuPy is imported when a GPU is first asked
for, and never before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from micrograd_gpt.errors import UserError

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; CuPy need not be installed to check types
Key: TypeAlias = tuple[int, ...]  # names one random draw: the same key gives the same numbers

DEVICES = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}
DROPOUT_ROWS = 128  # rows of attention weights that share one random draw


def resolve_device(name: str) -> str:
    """Return "cpu" or "gpu" for a name the user gave; raises UserError for any other name."""
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
    try:
        import cupy
    except ImportError:
        raise UserError(
            "--device gpu needs CuPy: pip install -e '.[cuda13]' (or '.[cuda12]')"
        ) from None
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as problem:
        raise UserError(f"CuPy finds no usable NVIDIA GPU ({problem}); use --device cpu") from None
    if not found:
        raise UserError("CuPy finds no NVIDIA GPU; use --device cpu")
    return cupy


def to_device(array: Array, device: str) -> Array:
    """`array` on `device`: itself if it is there already, else a copy."""
    device = resolve_device(device)
    if device_of(array) == device:
        return array
    return library_for("gpu").asarray(array) if device == "gpu" else array.get()


class RandomStream:
    """Numbers the random draws of a computation: draw n after `reseed(*seed)` has key (*seed, n).

    Every draw is a function of its key alone, so a run that reseeds with (seed, step) at each step
    continues exactly after a restart with no generator state to save. `position` is the key of the
    latest draw: set back, the same draws come again.
    """

    def __init__(self, *seed: int) -> None:
        self.reseed(*seed)

    def reseed(self, *seed: int) -> None:
        self.position: Key = (*seed, 0)

    def next_key(self) -> Key:
        *seed, drawn = self.position
        self.position = (*seed, drawn + 1)
        return self.position


def uniform(key: Key, shape: Iterable[int], xp: ModuleType = np) -> Array:
    """float32 numbers in [0, 1), an array of `shape`, the same for the same key and library."""
    if xp is np:
        return np.random.default_rng(key).random(tuple(shape), dtype=np.float32)
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return xp.random.default_rng(seed).random(tuple(shape), dtype=np.float32)


def dropout_factors(key: Key, shape: Iterable[int], p: float, xp: ModuleType = np) -> Array:
    """float32 factors: 0 with probability p, else 1 / (1 - p); a function of `key`."""
    return (uniform(key, shape, xp) >= p) * np.float32(1 / (1 - p))
