"""A replacement for the parts of CuPy that the GPU path uses, on a machine without a GPU.

Its arrays hold NumPy arrays but are not NumPy arrays. Like CuPy's, they refuse to be converted to
NumPy arrays implicitly and do not combine with them. Only `.get()`, `.item()`, `float()` and the
like read their elements; `counts.reads` counts each read, since each would wait for a GPU.

NumPy's functions work on them as they do on CuPy's arrays, by the protocols of NEP 13, 18 and 35. A
function that CuPy does not have is refused, and so are arguments that CuPy's own does not take
(test_real_cupy.py compares the two where CuPy is installed). So is what CuPy 14 cannot do: indexing
by lists and NumPy arrays, and products of batches of bfloat16.

    with fake_cupy.installed() as cupy: ...        # `import cupy` gives this module
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

# Taken over from NumPy, with the arguments of CuPy 14 (test_real_cupy.py compares them).
UFUNCS = {
    **dict.fromkeys(
        ("absolute", "exp", "isfinite", "log", "negative", "sign", "sqrt", "tanh"),
        "x out casting dtype",
    ),
    **dict.fromkeys(
        ("add", "divide", "maximum", "minimum", "multiply", "power", "subtract"),
        "x1 x2 out casting dtype",
    ),
    **dict.fromkeys(
        ("equal", "greater", "greater_equal", "less", "less_equal", "not_equal"),
        "x1 x2 out casting dtype",
    ),
}
FUNCTIONS = {
    "arange": "start stop step dtype",
    "argsort": "a axis kind",
    "array": "obj dtype copy order subok ndmin",
    "asarray": "a dtype order",
    "ascontiguousarray": "a dtype",
    "broadcast_to": "array shape",
    "clip": "a a_min a_max out",
    "concatenate": "tup axis out",
    "empty": "shape dtype order",
    "empty_like": "prototype dtype order subok shape",
    "expand_dims": "a axis",
    "flatnonzero": "a",
    "full": "shape fill_value dtype order",
    "full_like": "a fill_value dtype order subok shape",
    "ones": "shape dtype order",
    "ones_like": "a dtype order subok shape",
    "split": "ary indices_or_sections axis",
    "stack": "tup axis out",
    "tri": "N M k dtype",
    "where": "condition x y",
    "zeros": "shape dtype order",
    "zeros_like": "a dtype order subok shape",
}
KEEPING = ("asarray", "ascontiguousarray")  # which return an array itself if it is as it should be
WAITING = ("flatnonzero",)  # functions whose result has a shape that only the device knows
METHODS = {
    "all": "axis out keepdims",
    "any": "axis out keepdims",
    "argmax": "axis out",
    "astype": "dtype order casting subok copy",
    "copy": "order",
    "fill": "value",
    "max": "axis out keepdims",
    "mean": "axis dtype out keepdims",
    "min": "axis out keepdims",
    "ravel": "order",
    "squeeze": "axis",
    "sum": "axis dtype out keepdims",
    "swapaxes": "axis1 axis2",
}
ANY_NUMBER = ("reshape", "transpose")  # methods that take a shape or axes as several arguments
READS = ("__bool__", "__float__", "__int__", "item", "tolist")  # each waits
ATTRIBUTES = ("dtype", "itemsize", "nbytes", "ndim", "shape", "size", "strides")
OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "neg", "abs", "invert"),
)


class SyncCount:
    """How often numbers were read from the device, and how often arrays were copied to it."""

    def __init__(self) -> None:
        self.reads = self.uploads = 0


counts = SyncCount()


class CUDARuntimeError(RuntimeError):
    pass


class Capture:
    """The launches that a stream records instead of running; None while nothing is captured."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] | None = None
        self.broken = False

    def forbids(self, what: str) -> None:
        """Raise CUDARuntimeError during a capture, which `what` makes invalid."""
        if self.launches is not None:
            self.broken = True
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what}")


capture = Capture()


def launch(kernel: Any, *arguments: Any) -> None:
    """Run kernel(*arguments), or record it; a test wraps the emulator's `run` in this."""
    if capture.launches is None:
        kernel(*arguments)
    else:
        capture.launches.append((kernel, *arguments))


class Graph:
    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self.launches = launches

    def launch(self, stream: None = None) -> None:
        for kernel, *arguments in self.launches:
            kernel(*arguments)


class Stream:
    """A stream that is not the default one, so that it can be captured."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.is_current = False

    def __enter__(self) -> Stream:
        self.is_current = True
        return self

    def __exit__(self, *_: Any) -> None:
        self.is_current = False

    def begin_capture(self, mode: int | None = None) -> None:
        assert self.is_current and capture.launches is None
        capture.launches, capture.broken = [], False

    def end_capture(self) -> Graph:
        launches, capture.launches = capture.launches, None
        if launches is None or capture.broken:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        return Graph(launches)


def nobody_watches(array: ndarray) -> None:
    """Called with each array whose numbers are read or written; fake_nccl.py puts its own here."""


touched = nobody_watches


def unwrap(value: Any, operation: str) -> Any:
    """A device array's numbers; other values pass as they are, but NumPy arrays are refused."""
    if isinstance(value, ndarray):
        touched(value)
        return value._numbers
    if isinstance(value, np.ndarray):
        raise TypeError(f"{operation}: Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(unwrap(part, operation) for part in value)
    return value


def wrap(value: Any, *sources: Any) -> Any:
    """NumPy's result as a device array: one of the sources, a view of one, or a new array."""
    if isinstance(value, list | tuple):
        return type(value)(wrap(part, *sources) for part in value)
    if not isinstance(value, np.ndarray | np.generic):
        return value
    array = ndarray(np.asarray(value))
    for source in (source for source in sources if isinstance(source, ndarray)):
        if value is source._numbers:
            return source
        if np.may_share_memory(array._numbers, source._numbers):
            array.base = source if source.base is None else source.base
    return array


def numbers_of(value: Any, operation: str) -> Any:
    """An operand of a ufunc: a device array's numbers, or a Python or NumPy number."""
    if isinstance(value, ndarray | np.ndarray):
        return unwrap(value, operation)
    if not isinstance(value, bool | int | float | np.generic):
        raise TypeError(f"{operation}: Unsupported type {type(value)}")
    return value


def index_of(index: Any) -> Any:
    """An index as CuPy takes it: integers, slices, None, Ellipsis, and arrays on the device."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if isinstance(part, list | np.ndarray):
            raise IndexError(f"CuPy cannot be indexed by {type(part)}")
    return unwrap(index, "index")


class ndarray:
    """An array on the fake device. Reductions give 0-dimensional arrays, never scalars."""

    __array_priority__ = 100

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self.base: ndarray | None = None  # the array that this one is a view of
        if numbers.base is None:
            capture.forbids("an allocation")
            touched(self)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use .get()")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """NEP 13: call CuPy's ufunc of the same name; of the `at` methods there is only add's."""
        function = globals().get(ufunc.__name__) if ufunc.__name__ in UFUNCS else None
        if function is None or method not in ("__call__", "at"):
            return NotImplemented
        if any(isinstance(value, tuple) for value in inputs):  # several indices of add.at
            return NotImplemented
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
        return (function if method == "__call__" else function.at)(*inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """NEP 18 and 35: call CuPy's function of the same name, which may refuse the arguments."""
        here = function.__module__ == "numpy" and function.__name__ in FUNCTIONS
        if not here or not all(issubclass(t, ndarray | np.ndarray) for t in types):
            return NotImplemented
        return globals()[function.__name__](*args, **kwargs)

    def get(self, stream: None = None, order: Any = "C") -> np.ndarray:
        capture.forbids("get()")
        touched(self)
        counts.reads += 1
        return self._numbers.copy(order)

    def set(self, numbers: np.ndarray) -> None:
        capture.forbids("set()")
        assert isinstance(numbers, np.ndarray)
        if (numbers.shape, numbers.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"set(): {numbers.shape} {numbers.dtype} for {self.shape} {self.dtype}"
            )
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        touched(self)
        counts.uploads += 1
        self._numbers[...] = numbers

    def __getitem__(self, index: Any) -> ndarray:
        return wrap(self._numbers[index_of(index)], self)

    def __setitem__(self, index: Any, value: Any) -> None:
        capture.forbids("an assignment, which is not recorded here")
        touched(self)
        self._numbers[index_of(index)] = unwrap(value, "setitem")

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"fake_cupy.{self._numbers!r}"

    @property
    def flags(self) -> SimpleNamespace:
        """CuPy's, which do not say whether an array is writable: all are."""
        names = ("c_contiguous", "f_contiguous", "owndata")
        return SimpleNamespace(**{name: getattr(self._numbers.flags, name) for name in names})

    @property
    def T(self) -> ndarray:
        return wrap(self._numbers.T, self)

    def __matmul__(self, other: Any) -> ndarray:
        return matmul(self, other)

    __hash__ = None


def check_arguments(name: str, accepted: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """TypeError for arguments that CuPy's function of this name would not take."""
    names = accepted.split()
    if len(args) > len(names) or kwargs.keys() - set(names):
        raise TypeError(f"CuPy's {name} takes {names}, not {len(args)} and {sorted(kwargs)}")


def is_of(result: Any, array: ndarray) -> bool:
    """Whether it is the array, or a view of it, for which no number had to be looked at."""
    return isinstance(result, ndarray) and whole(result) is whole(array)


def whole(array: ndarray) -> ndarray:
    """The array that holds the memory of this one."""
    return array if array.base is None else array.base


def _method(name: str, accepted: str | None = None) -> Any:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        if accepted is not None:
            check_arguments(name, accepted, args, kwargs)
        kwargs = {key: unwrap(value, name) for key, value in kwargs.items()}
        result = wrap(getattr(self._numbers, name)(*unwrap(args, name), **kwargs), self)
        if not is_of(result, self):
            touched(self)
        return result

    return method


def _read(name: str) -> Any:
    def method(self: ndarray) -> Any:
        capture.forbids(name)
        counts.reads += 1
        return getattr(unwrap(self, name), name)()

    return method


def _in_place(name: str) -> Any:
    def method(self: ndarray, other: Any) -> ndarray:
        capture.forbids(f"{name}, which is not recorded here")
        ours = unwrap(self, name)
        getattr(np, name)(ours, unwrap(other, name), out=ours, casting="same_kind")
        return self

    return method


for _name in METHODS:
    setattr(ndarray, _name, _method(_name, METHODS[_name]))
for _name in ANY_NUMBER:
    setattr(ndarray, _name, _method(_name))
for _name in READS:
    setattr(ndarray, _name, _read(_name))
for _name in ATTRIBUTES:
    setattr(ndarray, _name, property(lambda self, name=_name: getattr(self._numbers, name)))
for _name in OPERATORS:
    setattr(ndarray, f"__{_name}__", _method(f"__{_name}__"))
    if hasattr(np.ndarray, f"__r{_name}__"):
        setattr(ndarray, f"__r{_name}__", _method(f"__r{_name}__"))
for _name, _function in (("add", "add"), ("sub", "subtract"), ("mul", "multiply")):
    setattr(ndarray, f"__i{_name}__", _in_place(_function))
ndarray.__itruediv__ = _in_place("divide")


def _function(name: str, accepted: str) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        check_arguments(name, accepted, args, kwargs)
        if name == "where" and not isinstance(args[0], ndarray):
            raise AttributeError("CuPy's where calls condition.astype, which a number lacks")
        capture.forbids(f"{name}, which is not recorded here")
        counts.reads += name in WAITING
        uploads = name in ("array", "asarray") and isinstance(args[0], np.ndarray | list | tuple)
        counts.uploads += uploads
        if name in KEEPING and isinstance(args[0], ndarray):
            same = wrap(getattr(np, name)(args[0]._numbers, *args[1:], **kwargs), args[0])
            if same is args[0]:
                return same
        sources = [*args, *kwargs.values()]
        args = args if uploads else unwrap(args, f"cupy.{name}")
        kwargs = {key: unwrap(value, f"cupy.{name}") for key, value in kwargs.items()}
        if kwargs.get("shape") == ():  # CuPy's *_like() ignore an empty shape
            del kwargs["shape"]
        return wrap(getattr(np, name)(*args, **kwargs), *sources)

    function.__name__ = name
    return function


def _ufunc(name: str, accepted: str) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        check_arguments(name, accepted, args, kwargs)
        capture.forbids(f"{name}, which is not recorded here")
        out = kwargs.get("out")
        numbers = [numbers_of(value, f"cupy.{name}") for value in args]
        if out is not None:
            kwargs["out"] = numbers_of(out, f"cupy.{name}")
        return wrap(getattr(np, name)(*numbers, **kwargs), out)

    function.__name__ = name
    return function


for _name, _accepted in FUNCTIONS.items():
    globals()[_name] = _function(_name, _accepted)
for _name, _accepted in UFUNCS.items():
    globals()[_name] = _ufunc(_name, _accepted)


def matmul(a: Any, b: Any, out: Any = None) -> ndarray:
    """CuPy's: sums half precision in float32, then rounds it; refuses batches of bfloat16."""
    capture.forbids("a library's product")
    x, y = unwrap(a, "cupy.matmul"), unwrap(b, "cupy.matmul")
    dtype = np.result_type(x, y)
    if dtype.name == "bfloat16" and max(x.ndim, y.ndim) > 2:
        raise TypeError("CuPy 14.2 cannot multiply batches of bfloat16")
    half = dtype.name in ("float16", "bfloat16")
    if half:
        x, y = x.astype(np.float32), y.astype(np.float32)
    product = (x @ y).astype(dtype)
    if out is None:
        return ndarray(np.asarray(product))
    unwrap(out, "cupy.matmul")[...] = product
    return out


def scatter_add(target: ndarray, index: Any, values: Any) -> None:
    np.add.at(unwrap(target, "cupy.add.at"), index_of(index), unwrap(values, "cupy.add.at"))


globals()["add"].at = scatter_add


class OutOfMemoryError(MemoryError):
    pass


OutOfMemoryError.__module__ = "cupy.cuda.memory"
cuda = SimpleNamespace(
    memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    Stream=Stream,
    runtime=SimpleNamespace(
        streamCaptureModeThreadLocal=1,
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        memGetInfo=lambda: (70_000_000_000, 80_000_000_000),  # free, all
    ),
    # A card too old for our kernels, so that the fused layers or the definitions do all the work.
    Device=lambda: SimpleNamespace(compute_capability="70"),
)


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Within this block `import cupy` gives this module, and the counts begin at 0."""
    from micrograd_gpt.arrays import devices
    from micrograd_gpt.kernels.in_cuda import modules as cuda_modules

    this, before = sys.modules[__name__], sys.modules.get("cupy")
    sys.modules["cupy"] = this
    devices._usable_cupy.cache_clear()
    cuda_modules.usable.cache_clear()
    counts.__init__()
    capture.__init__()
    try:
        yield this
    finally:
        devices._usable_cupy.cache_clear()
        cuda_modules.usable.cache_clear()
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before
