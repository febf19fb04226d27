"""Memory: what to say when it runs out, how freed memory is kept, and arrays in huge pages."""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.machine import available_memory

# The most logits that a loss holds at a time: in float32 256 MB, and 1 GB of a GPU's larger memory
LOGITS_AT_ONCE = {"cpu": 2**26, "gpu": 2**28}

ROWS_AT_ONCE = 512  # of logits, in the kernels in C: of GPT-2's vocabulary 103 MB

HUGE_PAGE = 2**21  # bytes, of x86-64 and of most of arm64
CHUNK = 2**26  # bytes that are asked of the system together, for arrays that share them
LARGEST_TO_SHARE = CHUNK // 4  # bytes: less is left over at the end of a chunk
CACHE_LINE = 64  # bytes

# What the runtime, the driver and cuBLAS say when they get no memory for their own needs
NO_GPU_MEMORY = (
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Within this block, running out of memory is a UserError that ends in `advice`."""
    try:
        yield
    except MemoryError as error:
        place = "the GPU" if type(error).__module__ == "cupy.cuda.memory" else "this machine"
        raise UserError(f"{place} is out of memory ({error}): {advice}") from error
    except RuntimeError as error:  # CuPy raises the errors of CUDA's libraries as these
        if not str(error).startswith(NO_GPU_MEMORY):
            raise
        raise UserError(f"the GPU is out of memory ({error}): {advice}") from error


def check_room(size: float, what: str, advice: str) -> None:
    """UserError, ending in `advice`, if `what` takes more bytes than this process can still get.

    Linux gives out more memory than there is, and kills a process later that writes to all of it:
    so what grows with a setting is counted before it is allocated.
    """
    room = available_memory()
    if room is not None and size > room:
        raise UserError(
            f"no memory for {what}: about {size / 1e9:,.1f} GB, where {room / 1e9:,.1f} GB are "
            f"free: {advice}"
        )


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next array instead of giving it back to the system.

    A training step allocates and frees the same large arrays again and again, and fetching their
    pages anew each time took a quarter of its time. With any other C library this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h: M_TRIM_THRESHOLD, …
    libc.mallopt(trim_threshold, -1)  # never shrink the heap
    libc.mallopt(top_pad, 64 * 2**20)  # grow it in steps of 64 MB
    libc.mallopt(mmap_max, 0)  # large arrays come from the heap too, not from the system
    libc.mallopt(arena_max, 1)  # one heap for all threads


class HugePages:
    """Arrays of zeros in huge pages, where Linux has them: small ones lie one behind another.

    Whoever reads all weights for every token waits for the addresses of pages too, of which there
    are 512 times fewer in pages of 2 MB. NumPy asks for these from 4 MB on, but its arrays begin
    and end anywhere in them. A chunk is freed with the last of the arrays that share it.
    """

    def __init__(self) -> None:
        self.room = memoryview(b"")

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype, order: str = "C") -> np.ndarray:
        """A new array; MemoryError where there is no memory for it."""
        size = math.prod(shape) * dtype.itemsize
        if size > sys.maxsize:
            raise MemoryError(f"an array of {size:,} bytes")
        if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
            return np.zeros(shape, dtype, order=order)  # type: ignore[call-overload]
        mine = _in_huge_pages(size) if size > LARGEST_TO_SHARE else self._shared(size)
        return np.frombuffer(mine, dtype).reshape(shape, order=order)  # type: ignore[call-overload]

    def _shared(self, size: int) -> memoryview:
        """The next bytes of the chunk, or of a new one where these are too few."""
        if size > len(self.room):
            self.room = _in_huge_pages(CHUNK)
        mine, self.room = self.room[:size], self.room[-(-size // CACHE_LINE) * CACHE_LINE :]
        return mine


def _in_huge_pages(size: int) -> memoryview:
    """So many bytes of zeros, which begin at a huge page and take no room until they are used."""
    try:
        memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(str(error)) from error
    with suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
    return memoryview(memory)[start : start + size]
