"""How a faster function stands in for a readable one.

Besides each other and NumPy, the six files at the top import only this module, and habits.py: what
Python and NumPy ask of a tensor. A readable function is marked `@definition`. A function that
computes the same result faster registers with `@stands_in_for(the_definition, level)`. It must take
the same arguments, and may raise `NotForMe` before it has written anything. A call tries the
stand-ins for its device, fastest first, and runs the definition where none of them takes the
arguments, or where the definition has been edited since they were tested against it (edits.py). The
levels:

    definitions   nothing stands in: `layers.py` alone, for stepping through with a debugger
    fused         the layers of `functional.py`, each forward and backward worked out by hand
    numpy         the same, with the kernels in NumPy (on a GPU, those in CUDA)
    c             the same, with the kernels in C where there is a compiler

The environment variable MICROGRAD_GPT_KERNELS (definitions, numpy or c) sets the highest level.
Without it, everything may stand in.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from contextvars import ContextVar
from numbers import Real
from types import NoneType
from typing import Any, NoReturn, TypeVar

import numpy as np

from micrograd_gpt.arrays import edits, precision
from micrograd_gpt.arrays.habits import Habits, from_list, is_plain
from micrograd_gpt.support.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])

LEVELS = ("definitions", "fused", "numpy", "c")
CUDA = "cuda"  # the kernels for a GPU's arrays; they stand in wherever "numpy" may on a CPU
IN_THE_ENVIRONMENT = ("definitions", "numpy", "c")

# Functions of these kinds return at once, and do their work when they are iterated or awaited
RUN_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)

_STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {}  # of this package's definitions
_IN_C: list[Callable[[], str]] = []
_CONVERSIONS: list[Callable[[Any, np.dtype], Any]] = []
_HIGHEST: ContextVar[str | None] = ContextVar("highest level", default=None)


class NotForMe(Exception):
    """A stand-in does not take these arguments: the next one is tried, or the definition runs."""


def definition(function: F) -> F:
    """Let faster functions stand in for `function`, which runs where none of them does.

    A call gives a TypeError where a parameter is annotated as a Tensor and gets something else. On
    the result, `.definition` is `function` itself, and `.stand_ins` maps each level to the function
    registered there.
    """

    signature = inspect.signature(function)
    tensors = [(p.name, _takes(p.annotation)) for p in signature.parameters.values()]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:  # from here on arguments are positional
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            bound.apply_defaults()
            args = bound.args
        for (name, kinds), arg in zip(tensors, args, strict=False):
            if not isinstance(arg, kinds):
                what = f"{function.__name__}: {name} must be a Tensor, not {type(arg).__name__}"
                raise TypeError(f"{what}: write Tensor({name})")
        if highest_level() == "definitions" and not precision.is_needed(args):
            return named(*args)
        return choose(*precision.rounded(function, args))

    def choose(*args: Any) -> Any:
        for stand_in in choices(highest_level(), _on_gpu(args[0])) if guard.holds() else ():
            try:
                return stand_in(*args)
            except NotForMe:
                continue
        return precision.computed_wide(named, choose, args)

    @functools.wraps(function)
    def named(*args: Any) -> Any:
        try:
            return call.definition(*args)  # type: ignore[attr-defined]  # autoreload sets a new one
        except ValueError as error:  # the array library's message, with the layer's name before it
            name = function.__name__.strip("_")
            if type(error) is not ValueError or str(error).startswith(f"{name}: "):
                raise
            raise ValueError(f"{name}: {error}") from error

    @functools.cache
    def choices(highest: str, on_gpu: bool) -> list[Callable[..., Any]]:
        below = LEVELS[1 : LEVELS.index(highest) + 1]
        if on_gpu:
            below = tuple(CUDA if level == "numpy" else level for level in below if level != "c")
        return [stand_ins[level] for level in reversed(below) if level in stand_ins]

    guard = edits.Guard(function)
    # Where the definition's module is reloaded, those of before: the guard tells whether they fit
    stand_ins = _STAND_INS.setdefault(guard.name, {}) if guard.parts else {}
    edits.MADE_OF[call] = function
    call.definition, call.stand_ins, call.choices = function, stand_ins, choices  # type: ignore[attr-defined]
    call.bypasses, call.guard = set[Any](), guard  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def stands_in_for(
    definition: Callable[..., Any], level: str, bypasses: Sequence[Callable[..., Any]] = ()
) -> Callable[[F], F]:
    """Register the decorated function as the stand-in for `definition` at this level.

    It stands in only while the definition, and what it computes with, is as it was tested
    (edits.py). `bypasses` are functions that it does the work of, but that the definition's source
    does not name.

    Raises TypeError unless both have the same parameters and defaults (for a definition that was
    edited to have others, nothing stands in), ValueError for an unknown level. At level "fused" the
    decorated name becomes the definition, whichever function computes it: `functional.linear` is
    `layers.linear`.
    """

    if level not in (*LEVELS[1:], CUDA):
        raise ValueError(f"there is no level {level!r}: use {', '.join((*LEVELS[1:], CUDA))}")

    def register(stand_in: F) -> F:
        if definition not in edits.MADE_OF:  # its file was edited: it has lost its @definition
            return definition if level == "fused" else stand_in  # type: ignore[return-value]
        theirs, ours = (_parameters(function) for function in (definition, stand_in))
        if theirs == ours:
            definition.stand_ins[level] = stand_in  # type: ignore[attr-defined]
        elif not definition.guard.was_edited():  # type: ignore[attr-defined]
            raise TypeError(
                f"{stand_in.__module__}.{stand_in.__qualname__} takes {ours}, but its definition "
                f"{definition.__module__}.{definition.__qualname__} takes {theirs}"
            )
        definition.choices.cache_clear()  # type: ignore[attr-defined]
        definition.bypasses.update(bypasses)  # type: ignore[attr-defined]
        definition.guard.need_record(stand_in)  # type: ignore[attr-defined]
        return definition if level == "fused" else stand_in  # type: ignore[return-value]

    return register


def converted(array: Any, dtype: Any) -> Any:
    """`array` in this type: itself where it has it, else a copy, which a kernel may make. One of
    NumPy's scalars, such as the sum of an array, becomes an array."""
    array = np.asarray(array) if isinstance(array, np.generic) else array
    if isinstance(array, np.ndarray) and array.dtype != dtype:
        return precision.cast(array, dtype)
    if array.dtype != dtype:
        for conversion in _CONVERSIONS:
            try:
                return conversion(array, np.dtype(dtype))
            except NotForMe:
                continue
    return array.astype(dtype, copy=False)


def converts(conversion: Callable[[Any, np.dtype], Any]) -> Callable[[Any, np.dtype], Any]:
    """Register a function that copies some arrays of a GPU's into another type, or is NotForMe."""
    _CONVERSIONS.append(conversion)
    return conversion


def as_array(data: Any, dtype: Any = None) -> Any:
    """`data` as an array: itself where it is one, a column's numbers as they are; other numbers,
    lists and arrays of objects in float32, or what `dtype` says. TypeError for None, texts, and
    all that is no real number."""
    if isinstance(data, Habits):
        raise TypeError(f"a Tensor of {type(data).__module__} is another class: use one of the two")
    if isinstance(data, np.generic) or not isinstance(getattr(data, "dtype", None), np.dtype):
        dtype = dtype or (data.dtype if isinstance(data, np.generic) else np.float32)
        data = from_list(data)
    data = data if is_plain(data) else from_list(data)
    is_odd = data.dtype.names or data.dtype.kind in "OSUMc"
    if data.dtype.kind == "m" or (is_odd and not all(isinstance(x, Real) for x in data.flat)):
        raise TypeError(f"a tensor holds numbers, not {data.tolist()!r:.60}")
    if data.dtype == object:  # each number is an object of its own, as in a table of mixed columns
        dtype = dtype or np.float32
    return data if dtype is None else data.astype(dtype, copy=False)


@contextmanager
def setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Within this block, in this thread alone, the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class Switch:
    """What holds within `with switch():`, in this thread alone, and within a function decorated
    with `@switch` or `@switch()`; `inside` tells whether it holds now, by how many of these."""

    def __init__(self, name: str) -> None:
        self.inside: ContextVar[int] = ContextVar(name, default=0)

    def __call__(self, function: F | None = None) -> Any:
        """What holds in a `with`, or as a decorator; with a function, that function decorated."""
        held = Held(self)
        return held if function is None else held(function)

    def __enter__(self) -> NoReturn:
        raise TypeError(f"write `with {self.inside.name}():`, with parentheses")

    def __exit__(self, *_: object) -> None:
        """Python looks for it before it calls __enter__."""


class Held(ContextDecorator):
    """A switch that is on within a `with`, or while a function runs that it decorates."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def __enter__(self) -> None:
        self.switch.inside.set(self.switch.inside.get() + 1)

    def __exit__(self, *_: object) -> None:
        self.switch.inside.set(max(0, self.switch.inside.get() - 1))

    def __call__(self, function: F) -> F:
        """The decorated function. TypeError for one that runs only later, in pieces: the switch
        would be off by then."""
        name = self.switch.inside.name
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"@{name} is for functions, not for {function!r:.60}")
        if any(runs_later(function) for runs_later in RUN_LATER):
            raise TypeError(
                f"@{name} cannot hold in a generator or an async function: write `with {name}():` "
                "in it, around what computes"
            )
        return super().__call__(function)


def at_most(level: str) -> AbstractContextManager[None]:
    """Within this block only stand-ins up to this level are used; ValueError for an unknown one."""
    return setting(_HIGHEST, LEVELS[LEVELS.index(level)])


def highest_level() -> str:
    """The highest level that may stand in now; UserError if the environment names none."""
    return _HIGHEST.get() or _from_environment()


@functools.cache
def _from_environment() -> str:
    level = os.environ.get("MICROGRAD_GPT_KERNELS") or LEVELS[-1]
    if level not in IN_THE_ENVIRONMENT:
        raise UserError(
            f"MICROGRAD_GPT_KERNELS is {level!r}: set it to {', '.join(IN_THE_ENVIRONMENT)}, "
            "or leave it out"
        )
    return level


def described_by(function: Callable[[], str]) -> Callable[[], str]:
    """Register the function that says whether there are kernels in C, and if not, why."""
    _IN_C.append(function)
    return function


def report() -> str:
    """Which kernels compute on the CPU, in words."""
    level = highest_level()
    if level == LEVELS[-1] and _IN_C:
        return _IN_C[-1]()
    names = {"definitions": "none, layers.py", "fused": "none, functional.py", "numpy": "NumPy"}
    return f"{names[level]} (as MICROGRAD_GPT_KERNELS asks)"


def _takes(annotation: Any) -> Any:
    """What a parameter annotated like this takes: a Tensor, a Tensor or None, or anything."""
    kinds = {"Tensor": Habits, "Tensor | None": (Habits, NoneType)}
    return kinds.get(getattr(annotation, "__name__", str(annotation)), object)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, None if p.default is p.empty else (p.default,)) for p in parameters]


def _on_gpu(first: Any) -> bool:
    """Whether a first argument (an array, a tensor, or a list of them) is on a GPU."""
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if isinstance(first, np.ndarray):
        return False
    data = getattr(first, "data", first)  # a tensor's array
    return not isinstance(data, np.ndarray) and type(data).__module__.split(".")[0] != "builtins"
