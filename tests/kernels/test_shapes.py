"""Arrays that do not fit, or are not what they seem to be: kernels do what the definitions do.

Every kernel for the CPU is called with each of its arrays in turn of another size, type or layout,
or in memory that it shares with another. It must then return what the definition returns, or raise
what the definition raises, and leave the same in the arrays that it writes to. A kernel that looks
at an address too early ends its process, so the calls are made in a process of their own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import Tensor, functional, optim, tensor
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_forward,
)
from micrograd_gpt.layers import IGNORE

Arguments = list[Any]
N, C, M, V = 6, 5, 7, 9  # rows, channels, and two other sizes


def numbers(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(shape)
    return np.asarray(rng.standard_normal(shape), np.float32)


def labels() -> np.ndarray:
    return np.array([3, IGNORE, 0, 8, 3, 5])


def heads(t: int) -> np.ndarray:
    return numbers(2, 3, t, 4)


def saved_by_attention() -> Arguments:
    q, k, v = heads(5), heads(5)[::-1], heads(5) * 2
    out, log_total = functional.attention_forward.definition(q, k, v, 0.0, ())
    return [heads(5) + 1, q, k, v, out, log_total, 0.0, ()]


# Arguments that fit
FITTING: dict[Callable[..., Any], Callable[[], Arguments]] = {
    functional.linear_forward: lambda: [numbers(N, C), numbers(C, M), numbers(M)],
    functional.linear_backward: lambda: [numbers(N, M), numbers(N, C), numbers(C, M)],
    functional.layer_norm_forward: lambda: [numbers(N, C), numbers(C), numbers(C), 1e-5],
    functional.layer_norm_backward: lambda: [
        *(numbers(N, C) ** 2, numbers(N, C), numbers(C)),
        *functional.layer_norm_forward.definition(numbers(N, C), numbers(C), numbers(C), 1e-5)[1:],
    ],
    functional.gelu_forward: lambda: [numbers(N, C)],
    functional.gelu_backward: lambda: [numbers(N, C), numbers(N, C) + 1],
    functional.attention_forward: lambda: [heads(5), heads(7), heads(7) + 1, 0.0, ()],
    functional.attention_backward: saved_by_attention,
    functional.cross_entropy_forward: lambda: [numbers(N, V), labels()],
    linear_cross_entropy_forward: lambda: [numbers(N, C), numbers(V, C), labels(), True],
    tensor.add_at: lambda: [numbers(V, C), np.array([3, 0, 8, 3, -9, -1]), numbers(N, C)],
}

SHAPES: dict[str, Callable[[np.ndarray], Any]] = {
    "an axis more": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "one axis less": lambda x: x[0],
    "no element": lambda x: x[:0],
    "no number of its own": lambda x: x[(0,) * x.ndim],
}
for axis in range(4):
    SHAPES[f"longer along {axis}"] = lambda x, axis=axis: longer(x, axis)
    SHAPES[f"shorter along {axis}"] = lambda x, axis=axis: shorter(x, axis)
    SHAPES[f"one along {axis}"] = lambda x, axis=axis: x[(slice(None),) * axis + (slice(1),)]

LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "other way round in memory": lambda x: np.asfortranarray(x),
    "backwards in memory": lambda x: x[::-1].copy()[::-1],
    "with gaps": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "one row many times": lambda x: np.broadcast_to(x[:1], x.shape),
    "at an odd address": lambda x: misaligned(x),
    "masked": lambda x: np.ma.masked_array(x, x > 1),
    "a matrix": lambda x: x.view(np.matrix) if x.ndim == 2 else x,
    "a list": lambda x: x.tolist(),
    "in a file": lambda x: in_a_file(x, "r+"),
    "in a file, read-only": lambda x: in_a_file(x, "r"),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}
TYPES = ("float64", "float16", ">f4", "int32", "complex64", "object", "bool")
INTEGERS = ("int8", "uint8", "int32", "uint64", ">i8", "float32", "bool", "object")


def longer(x: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate([x, x.take([0], axis)], axis)


def shorter(x: np.ndarray, axis: int) -> np.ndarray:
    return x.take(range(x.shape[axis] - 1), axis)


def misaligned(x: np.ndarray) -> np.ndarray:
    memory = bytearray(x.nbytes + 1)
    moved = np.frombuffer(memory, x.dtype, x.size, 1).reshape(x.shape)
    moved[...] = x
    return moved


def in_a_file(x: np.ndarray, mode: Any) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        file.write(x.tobytes())
        file.flush()
        return np.memmap(file, x.dtype, mode, shape=x.shape)


def changed(make: Callable[[], Arguments], i: int, change: Callable[[np.ndarray], Any]) -> Any:
    def arguments() -> Arguments:
        args = make()
        args[i] = change(args[i])
        return args

    return arguments


def calls() -> Iterator[tuple[str, Callable[..., Any], Callable[[], Arguments]]]:
    """What is odd about a call, the definition, and what makes the arguments, each time anew."""
    for definition, make in FITTING.items():
        yield "nothing", definition, make
        arrays = [i for i, x in enumerate(make()) if isinstance(x, np.ndarray)]
        for i in arrays:
            x = make()[i]
            changes = dict(LAYOUTS)
            for what, change in SHAPES.items():
                if "along" not in what or int(what[-1]) < x.ndim:
                    changes[what] = change
            for dtype in TYPES if x.dtype.kind == "f" else INTEGERS:
                changes[dtype] = lambda x, dtype=dtype: x.astype(dtype)
            if x.dtype.kind == "i":
                for value in (V, V - 1, -1, -V, -V - 1, IGNORE - 1, 2**40, -(2**40)):
                    changes[f"with {value}"] = lambda x, v=value: np.where(x == 3, v, x)
            for what, change in changes.items():
                yield f"argument {i} {what}", definition, changed(make, i, change)
        for i in arrays:
            for j in arrays:
                yield f"arguments {i} and {j} one", definition, one_array(make, i, j)
    for p in (1.0, -0.1, 2.0, float("nan")):
        for definition in (functional.attention_forward, functional.attention_backward):
            make = FITTING[definition]
            yield f"p = {p}", definition, lambda p=p, make=make: [*make()[:-2], p, (1,)]
    yield from calls_of_add_at()
    yield from calls_of_adamw()
    yield from calls_of_clip()


def one_array(make: Callable[[], Arguments], i: int, j: int) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        args = make()
        args[i] = args[j]
        return args

    return arguments


def calls_of_add_at() -> Iterator[tuple[str, Callable[..., Any], Callable[[], Arguments]]]:
    def part_of_total() -> Arguments:
        total = numbers(V, C)
        return [total, np.array([1, 2, 0, 1]), total[1:5]]

    def several_axes() -> Arguments:
        return [numbers(V, C), np.array([[1, 2], [1, 0]]), numbers(2, 2, C)]

    def no_axis() -> Arguments:
        return [numbers(V, C), np.array(-2), numbers(C)]

    yield "part in total", tensor.add_at, part_of_total
    yield "index without an axis", tensor.add_at, no_axis
    yield "index of two axes", tensor.add_at, several_axes
    yield "no index", tensor.add_at, lambda: [numbers(V, C), np.array([], int), numbers(0, C)]
    yield "no row", tensor.add_at, lambda: [numbers(0, C), np.array([0]), numbers(1, C)]


def row(*shape: int) -> Arguments:
    p, grad, m = (numbers(*shape) * n for n in (1, 2, 3))
    return [p, grad, m, abs(numbers(*shape)), 0.1]


def calls_of_adamw() -> Iterator[tuple[str, Callable[..., Any], Callable[[], Arguments]]]:
    settings = [1e-2, 0.9, 0.95, 1e-8, 3]
    odd = SHAPES | LAYOUTS
    odd |= {dtype: lambda x, dtype=dtype: x.astype(dtype) for dtype in TYPES}

    def with_one(i: int, change: Callable[[np.ndarray], Any]) -> Arguments:
        rows = [row(3, 4), row(5, 2), row(3)]
        rows[1][i] = change(rows[1][i])
        return [rows, *settings]

    for i, name in enumerate(("p", "grad", "m", "v")):
        for what, change in odd.items():
            if "along" not in what or int(what[-1]) < 2:
                make = lambda i=i, change=change: with_one(i, change)  # noqa: E731
                yield f"{name} {what}", optim.adamw_update, make

    def shared(i: int, j: int, a: int, b: int) -> Arguments:
        rows = [row(4, 5), row(4, 5)]
        rows[a][i] = rows[b][j]
        return [rows, *settings]

    for i in range(4):
        for j in range(4):
            for a, b in ((0, 0), (0, 1)):
                make = lambda i=i, j=j, a=a, b=b: shared(i, j, a, b)  # noqa: E731
                yield f"array {i} of row {a} also {j} of row {b}", optim.adamw_update, make

    def overlapping(n: int) -> Arguments:
        memory = abs(numbers(200_000))
        p, grad, m, v = (memory[n * i : n * i + 100_000] for i in range(4))
        return [[[p, grad, m, v, 0.1]], *settings]

    for n in (0, 1, 50_000):
        make = lambda n=n: overlapping(n)  # noqa: E731
        yield f"{n} numbers apart", optim.adamw_update, make
    yield "no rows", optim.adamw_update, lambda: [[], *settings]
    yield "rows of a generator", optim.adamw_update, lambda: [iter([row(3)]), *settings]
    yield (
        "a decay for each number",
        optim.adamw_update,
        lambda: [
            [[*row(3)[:4], np.array([0.1, 0.2, 0.3])]],
            *settings,
        ],
    )
    yield "a row too short", optim.adamw_update, lambda: [[row(3)[:4]], *settings]


def calls_of_clip() -> Iterator[tuple[str, Callable[..., Any], Callable[[], Arguments]]]:
    odd = SHAPES | LAYOUTS
    odd |= {dtype: lambda x, dtype=dtype: x.astype(dtype) for dtype in ("float64", "float16")}
    del odd["a list"], odd["masked"]  # no gradient is one

    def with_grad(change: Callable[[np.ndarray], Any]) -> Arguments:
        tensors = [Tensor(numbers(3, 4)) for _ in range(2)]
        tensors[0].grad, tensors[1].grad = numbers(3, 4), change(numbers(3, 4))
        return [tensors, 0.5, 2.0]

    for what, change in odd.items():
        if "along" not in what or int(what[-1]) < 2:
            yield f"gradient {what}", optim.clip_grad_norm, lambda c=change: with_grad(c)


def outcome(level: str, definition: Callable[..., Any], args: Arguments) -> str | list[Any]:
    """What a call returns and leaves in its arguments, or the kind of its error."""
    with at_most(level), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = definition(*args)
        except Exception as error:
            return f"raises {type(error).__name__}"
    return [*flat(result), *flat(args)]


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)
    elif isinstance(value, Tensor):
        yield value.grad
    elif isinstance(value, np.ndarray | np.generic | float):
        yield np.asarray(value)


def agree(ours: str | list[Any], theirs: str | list[Any]) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return ours == theirs
    return len(ours) == len(theirs) and all(map(same, ours, theirs))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    error = 1e-3 if a.dtype == np.float16 else 1e-5
    a, b = a.astype(complex), b.astype(complex)  # also of objects
    # Where a sum cancels, only the rounding of its numbers is left, which are of about 1.
    size = np.abs(b).max(initial=0.1, where=np.isfinite(b))
    return np.allclose(a, b, rtol=0, atol=error * size, equal_nan=True)


def run_all(level: str) -> None:
    """Make all calls; each is printed before it is made, so that the last one printed is it."""
    faulthandler.enable()
    for what, definition, make in calls():
        print(f"{definition.__name__}: {what}", flush=True)
        ours, theirs = (outcome(at, definition, make()) for at in (level, "definitions"))
        if not agree(ours, theirs):
            told = [x if isinstance(x, str) else "returns" for x in (ours, theirs)]
            print(f"WRONG: it {told[0]}, but its definition {told[1]}", flush=True)


def change_labels_meanwhile(level: str) -> None:
    """Whatever another thread writes to the labels, a row's gradient adds up to 0."""
    faulthandler.enable()
    logits, theirs = numbers(20_000, V), np.zeros(20_000, int)
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for value in (2**40, 3, -(2**40), IGNORE):
                theirs[:] = value

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with at_most(level):
            for _ in range(100):
                with contextlib.suppress(IndexError):  # the definition's, for such labels
                    dlogits, _ = functional.cross_entropy_forward(logits, theirs)
                    assert abs(dlogits.sum(axis=-1)).max() < 1e-5
    finally:
        ended.set()
        changing.join()


def apart(function: Callable[[str], None], level: str) -> list[str]:
    """What function(level) prints in a process of its own, which must end well."""
    if level == "c" and compiler.library() is None:
        pytest.skip(f"no compiled kernels: {compiler.report()}")
    child = subprocess.run(
        [sys.executable, __file__, function.__name__, level],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = child.stdout.splitlines()
    assert child.returncode == 0, f"it ended at {lines[-1:]}: {child.stderr}"
    return lines


@pytest.mark.parametrize("level", ["numpy", "c"])
def test_kernels_do_what_the_definitions_do(level: str) -> None:
    lines = apart(run_all, level)
    wrong = [f"{a}: {b}" for a, b in itertools.pairwise(lines) if b.startswith("WRONG")]
    assert wrong == [] and len(lines) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("level", ["numpy", "c"])
def test_labels_may_change_while_a_loss_is_computed(level: str) -> None:
    apart(change_labels_meanwhile, level)


@pytest.mark.parametrize(
    ("x", "weight"), [((2, 3, 4), (9, 5)), ((2, 4), (4,)), ((2, 4), (9, 4, 1)), ((2, 4), ())]
)
def test_a_loss_of_widths_that_differ_is_named(x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    tensors = Tensor(np.ones(x, np.float32)), Tensor(np.ones(weight, np.float32))
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: shapes .* do not fit"):
        linear_cross_entropy(*tensors, np.zeros(x[:-1], int))


def test_a_loss_of_rows_without_channels_is_that_of_chance() -> None:
    x, weight = Tensor(np.ones((6, 0), np.float32)), Tensor(np.ones((9, 0), np.float32))
    assert linear_cross_entropy(x, weight, labels()).item() == pytest.approx(np.log(9))


if __name__ == "__main__":
    {f.__name__: f for f in (run_all, change_labels_meanwhile)}[sys.argv[1]](sys.argv[2])
