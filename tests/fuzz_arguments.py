"""Random arguments for the fuzz test: right ones, and ones with something wrong.

Every array lies within a larger piece of memory that is filled with a pattern before and after it.
So a byte that is written beside the array, in its gaps, or in an array that is only read, is found.
The same seed and number make the same arguments each time, with the same overlaps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from micrograd_gpt import Tensor
from micrograd_gpt.layers import IGNORE

GUARD = 64  # bytes before and after an array
CANARY = 0xA5

SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33)
LARGE = (130, 260)  # sizes that are cut into blocks, and shared among threads
HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
DTYPES = ("float32",) * 6 + ("float64",) * 2 + ("float16", ml_dtypes.bfloat16)
OTHER_DTYPES = (
    *("float32", "float64", "float16", ml_dtypes.bfloat16, ">f4", ">f8", "longdouble"),
    *("int8", "int32", "int64", ">i4", "uint8", "uint64", "bool", "complex64", "object", "S1"),
)
ID_DTYPES = ("int64", "int32", "int16", "uint8", "uint32", "uint64", ">i8", "float32", "bool")
LAYOUTS = (
    *("Fortran", "gaps", "backwards", "broadcast", "misaligned", "read-only", "bytes"),
    *("memory map", "read-only memory map", "subclass"),
)
ODD_NUMBERS = (0, -1, 1.5, float("nan"), float("inf"), 2**70, 1e300, None, "1", np.float64(0.5))
ODD_IDS = (-1, -99, IGNORE, IGNORE - 1, 2**31, 2**62, -(2**63))
FINITE_VALUES = (1e-40, 0.0, -0.0, 100.0)
ODD_VALUES = (np.inf, -np.inf, np.nan, 1e4, *FINITE_VALUES)


class Subclass(np.ndarray):
    """An array of another class, with nothing changed."""


class Memory:
    """A piece of memory, which bytes of it may be written, and what it held at first."""

    def __init__(self, held: np.ndarray) -> None:
        self.held, self.before = held, held.copy()
        self.may_change = np.zeros(held.size, bool)

    def allow(self, view: np.ndarray) -> None:
        """The elements of `view`, and no other bytes, may be written."""
        if view.flags.writeable:
            offset = view.ctypes.data - self.held.ctypes.data
            itemsize = view.dtype.itemsize
            elements = np.ndarray(
                (*view.shape, itemsize), bool, self.may_change, offset, (*view.strides, 1)
            )
            elements[...] = True

    def contains(self, array: np.ndarray) -> bool:
        return bool(np.may_share_memory(self.held, array))

    def check(self) -> None:
        """AssertionError where a byte was written that may not be."""
        wrong = (self.held != self.before) & ~self.may_change
        assert not wrong.any(), (
            f"{wrong.sum()} bytes were written that are no part of an array that may be written, "
            f"the first at byte {wrong.argmax() - GUARD} from the array's start"
        )


def guarded(nbytes: int, shift: int = 0) -> tuple[np.ndarray, int]:
    """Memory with room for `nbytes` between two guards, and where the room begins."""
    memory = np.full(nbytes + 3 * GUARD, CANARY, np.uint8)
    return memory, -memory.ctypes.data % GUARD + GUARD + shift


class Arguments:
    """Makes the arguments of one case, and remembers what it made.

    With each call of `array`, `ids`, `number` something may be spoiled: a shape, a type, a layout,
    a value. `rate` says how often; at 0 layouts alone are unusual.
    """

    def __init__(self, seed: int, case: int) -> None:
        self.rng = np.random.default_rng((seed, case))
        self.rate = float(self.rng.choice((0, 0, 0.1, 0.3, 0.5)))
        self.dtype = np.dtype(self.pick(DTYPES))
        self.disturbs = True  # whether `disturb` does anything
        self.disturbed = False
        self.float_bytes = self.dtype.itemsize  # of the narrowest floats that are computed with
        self.mixes_types = False
        self.masks = False  # whether attention masks: 0 × inf in the definition, skipped by kernels
        self.memories: list[Memory] = []
        self.arrays: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        self.leaves: list[Tensor] = []
        self.notes: list[str] = []

    # --------------------------------------------------------------------------- what is asked for

    def pick(self, choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def size(self, most: int = 1000) -> int:
        sizes = LARGE if most > 200 and self.chance(0.03) else SIZES
        return int(min(most, self.pick(sizes)))

    def sizes(self, count: int, most: int = 1000) -> list[int]:
        return [self.size(most) for _ in range(count)]

    def lead(self) -> list[int]:
        """Leading dimensions: none, one or two."""
        return self.sizes(int(self.rng.integers(3)), 17)

    def number(self, *right: Any) -> Any:
        """One of these numbers, or seldom an odd one."""
        if self.chance(self.rate / 4):
            return self.note(self.pick(ODD_NUMBERS), "a number")
        return self.pick(right)

    def key(self) -> Any:
        return (1, int(self.rng.integers(99)))

    def array(
        self, *shape: int, written: bool = False, positive: bool = False, finite: bool = False
    ) -> Any:
        """Random floats of this shape; `written`: the call may change them; `finite`: none is
        infinite or not a number, for which a fused backward gives other results."""
        shape = self._shape(shape)
        dtype = self.dtype
        if self.chance(self.rate / 3):
            dtype = np.dtype(self.pick(OTHER_DTYPES))
            self.rounded_to(2 if dtype in HALF else 4)
        values = self.rng.standard_normal(shape) * 2
        values = np.abs(values) if positive or dtype.kind in "u" else values
        if values.size and self.chance(self.rate / 6):
            odd = self.note(self.pick(ODD_VALUES if not finite else FINITE_VALUES), "with a")
            values.flat[self.rng.integers(values.size)] = odd
        with np.errstate(all="ignore"):
            return self.spoil(self.place(values.astype(dtype), written=written), written)

    def ids(self, *shape: int, below: int, ignore: bool = False, written: bool = False) -> Any:
        """Random integers in 0 … below-1, some of them -100 where that may be."""
        shape = self._shape(shape)
        values = self.rng.integers(0, max(1, below), shape)
        if ignore and self.chance(0.7):
            values[self.rng.random(shape) < 0.3] = IGNORE
        if values.size and self.chance(self.rate / 2):
            odd = self.pick((*ODD_IDS, below))
            values.flat[self.rng.integers(values.size)] = self.note(odd, "an id")
        dtype = np.dtype(self.pick(ID_DTYPES) if self.chance(self.rate / 2) else "int64")
        with np.errstate(all="ignore"):
            return self.spoil(self.place(values.astype(dtype), written=written), written)

    def index(self, *shape: int) -> Any:
        """Something to index an array of this shape with."""
        n = shape[0] if shape else 1
        rows = int(self.rng.integers(0, 6))
        kind = int(self.rng.integers(7))
        if kind == 0 or not shape:
            return self.pick(
                (0, -1, n, slice(None), slice(-3, None, 2), None, ..., True, (), 2**40)
            )
        if kind == 1:
            return self.ids(rows, below=n)
        if kind == 2:
            return self.ids(2, rows, below=n) - self.pick((0, n, 1))
        if kind == 3:
            return self.place(self.rng.random(n + self.chance(self.rate)) < 0.5)
        if kind == 4:
            return tuple(self.ids(rows, below=length) for length in shape)
        if kind == 5:
            return (slice(None), *(self.ids(rows, below=length) for length in shape[1:2]))
        return self.rng.integers(-n, n, rows).tolist() if n else []

    def tensor(self, *shape: int, leaf: bool = True, **how: Any) -> Tensor:
        """A tensor of such an array; where `leaf`, mostly one that gets a gradient."""
        if self.leaves and self.chance(self.rate / 10):
            return self.note(self.pick(self.leaves), "a tensor that was there before")
        data = self.array(*shape, finite=True, **how)
        wanted = leaf and self.chance(0.85) and getattr(data, "dtype", self.dtype).kind in "fV"
        made = Tensor(data, requires_grad=wanted)
        self.leaves += [made] if wanted else []
        return made

    def rounded_to(self, float_bytes: int) -> None:
        """Somewhere on the way the numbers are floats of so many bytes, beside other types."""
        self.mixes_types = True
        self.float_bytes = min(self.float_bytes, float_bytes)

    def disturb(self, change: Callable[[], Any]) -> None:
        """What somebody does to the arguments while they are in use, which is to have no effect.

        The run that says what is right leaves it out.
        """
        self.disturbed = True
        if self.disturbs:
            change()

    # ---------------------------------------------------------------------------- how it is made

    def note(self, what: Any, kind: str = "") -> Any:
        self.notes.append(f"{kind} {what!r}"[:120].strip())
        return what

    def _shape(self, shape: Any) -> tuple[int, ...]:
        """The shape, or one with something wrong."""
        if not self.chance(self.rate / 2):
            return tuple(shape)
        wrong, axis = list(shape), int(self.rng.integers(len(shape) or 1))
        how = self.pick(("longer", "shorter", "one", "none", "dropped", "more", "turned"))
        if how == "more" or not wrong:
            wrong.insert(axis, self.pick((1, 2)))
        elif how == "dropped":
            del wrong[axis]
        elif how == "turned":
            wrong.reverse()
        else:
            length = wrong[axis]
            new = {"longer": length + self.pick((1, 2, 64)), "shorter": length - 1, "one": 1}
            wrong[axis] = max(0, new.get(how, 0))
        return self.note(tuple(wrong), f"for the shape {tuple(shape)}")

    def place(self, values: np.ndarray, layout: str = "", written: bool = False) -> np.ndarray:
        """These values within guarded memory, laid out in one of many ways."""
        if values.dtype.hasobject:
            return values  # Python's objects lie elsewhere
        if not layout:
            layout = self.pick(LAYOUTS) if self.chance(max(0.2, self.rate)) else "in order"
        array, held = self._laid_out(values, layout)
        memory = Memory(held)
        self.memories.append(memory)
        self.arrays.append(array)
        if written:
            memory.allow(array)
            self.written.append(array)
        self.note(f"{array.dtype} {array.shape} {layout}", "an array:")
        return array

    def _laid_out(self, values: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
        """The array, and the memory around it."""
        if layout == "bytes":
            held = np.frombuffer(values.tobytes() or b" ", np.uint8)
            return held[: values.nbytes].view(values.dtype).reshape(values.shape), held
        if "memory map" in layout and values.size:
            with tempfile.TemporaryFile() as file:
                file.write(values.tobytes())
                file.flush()
                mode: Any = "r" if "read-only" in layout else "r+"
                mapped = np.memmap(file, values.dtype, mode, shape=values.shape)
            return mapped, mapped.reshape(-1).view(np.uint8, np.ndarray)
        shape, itemsize = list(values.shape), values.dtype.itemsize
        if layout == "gaps" and shape:
            shape[-1] *= 2
        turned = shape[::-1] if layout == "Fortran" else shape
        nbytes = int(np.prod(shape)) * itemsize
        held, start = guarded(nbytes, shift=1 if layout == "misaligned" else 0)
        array: np.ndarray = np.ndarray(turned, values.dtype, held, start)
        if layout == "Fortran":
            array = array.T
        elif layout == "gaps" and shape:
            array = array[..., ::2]
        elif layout == "backwards":
            array = array[tuple(slice(None, None, -1) for _ in shape)]
        array[...] = values
        if layout == "broadcast" and shape and shape[0]:
            array = np.broadcast_to(array[:1], shape)
        elif layout == "subclass":
            array = array.view(Subclass)
        elif layout == "read-only":
            array.flags.writeable = False
        return array, held

    def spoil(self, array: np.ndarray, written: bool = False) -> Any:
        """The array; or another one that was there before, or part of it, or no array at all."""
        if not self.chance(self.rate / 4):
            return array
        how = self.pick(("alias", "alias", "alias", "overlap", "overlap", "none", "list", "number"))
        if how == "none":
            return self.note(None, "in place of an array:")
        if how in ("list", "number"):
            self.rounded_to(4)
            return self.note(array.tolist() if how == "list" else 1.5, "in place of an array:")
        others = [a for a in self.arrays if a is not array and a.dtype == array.dtype]
        if how == "alias":
            others = [a for a in others if a.shape == array.shape]
        else:
            others = [a for a in others if a.flags.c_contiguous and a.size > array.size]
        if not others:
            return array
        other = self.pick(others)
        if how == "overlap":
            first = int(self.rng.integers(0, other.size - array.size + 1))
            other = other.reshape(-1)[first : first + array.size].reshape(array.shape)
        if written:
            for memory in self.memories:
                if memory.contains(other):
                    memory.allow(other)
            self.written.append(other)
        return self.note(other, f"{how}:")

    # -------------------------------------------------------------------------------- afterwards

    def check(self) -> None:
        """AssertionError where anything was written that may not be."""
        for memory in self.memories:
            memory.check()


class GuardedNumPy:
    """NumPy, but new arrays hold NaN (or the canary), and lie within guarded memory.

    It stands in for NumPy in the modules of kernels, so that what they write beside their results,
    or leave out of them, is seen.
    """

    def __init__(self) -> None:
        self.made: list[Memory] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = float, order: str = "C", **others: Any) -> Any:
        shape = tuple(shape) if isinstance(shape, tuple | list) else (int(shape),)
        dtype = np.dtype(dtype)
        if others or dtype.hasobject or min(shape, default=1) < 0:
            return np.empty(shape, dtype, order, **others)
        held, start = guarded(int(np.prod(shape, dtype=object)) * dtype.itemsize)
        array: Any = np.ndarray(shape, dtype, held, start, order=order)  # type: ignore[call-overload]
        memory = Memory(held)
        memory.allow(array)
        self.made.append(memory)
        if dtype.kind in "fc":
            array[...] = np.nan
        return array

    def empty_like(self, like: Any, **others: Any) -> Any:
        """As NumPy's, which keeps the order of the axes in memory."""
        if others or not isinstance(like, np.ndarray):
            return np.empty_like(like, **others)
        axes = [int(i) for i in np.argsort([-abs(s) for s in like.strides], kind="stable")]
        array = self.empty(tuple(like.shape[i] for i in axes), like.dtype)
        return array.transpose(np.argsort(axes)) if axes else array

    def check(self) -> None:
        """AssertionError where a byte beside one of the new arrays was written."""
        made, self.made = self.made, []
        for memory in made:
            memory.check()
