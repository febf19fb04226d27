"""Random expressions of every public operation, here and in PyTorch: results and all gradients.

A graph is a function of its number. It has a few leaves and some ten operations on them, chosen at
random with their shapes and arguments, in float32 or float64, at one of the levels of kernels. Its
backward is called one to three times on different expressions, which add up in the leaves. In some
graphs the leaves and the first gradient hold zeros, infinities or NaN: where PyTorch has NaN,
an infinity or a number, there must be the same here.

    RANDOM_GRAPHS=50000 pytest tests/reference/test_random_graphs.py    # so many graphs; 3,000 else
    RANDOM_GRAPHS_FROM=1234 …                                           # the first one's number

A failure prints the graph's number and program; RANDOM_GRAPHS=1 with that number repeats it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import Tensor, layers
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.tensor import concatenate, stack, where

torch = pytest.importorskip("torch")

COUNT = int(os.environ.get("RANDOM_GRAPHS", "3000"))
FIRST = int(os.environ.get("RANDOM_GRAPHS_FROM", "0"))
PARTS = 4  # tests, so that a failure leaves the others to run

LEVELS = ("definitions", "fused", "numpy", "c")
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}  # of a tensor's size: ten roundings and their sums
TIMES_THEIRS = 100  # above it, this many times PyTorch's own distance from its float64 result
LEAST_SIZE = 0.1  # what is smaller may be what is left where equal parts cancel
SMALLEST, LARGEST = 1e-4, 1e6  # beyond, rounding would decide what overflows or is left at all

NUMBERS, WITH_ZEROS, WITH_INFINITIES, WITH_NAN = range(4)  # what leaves hold


class Value:
    """A tensor of the graph, here and in PyTorch."""

    def __init__(self, name: str, ours: Tensor, theirs: Any) -> None:
        self.name, self.ours, self.theirs = name, ours, theirs

    shape = property(lambda self: self.ours.shape)
    ndim = property(lambda self: self.ours.ndim)

    @property
    def is_exact(self) -> bool:
        """Whether both have the very same numbers, so that both take the same side of a step."""
        a, b = self.ours.data, self.theirs.detach().numpy()
        signs_agree = np.array_equal(np.signbit(a)[a == 0], np.signbit(b)[b == 0])
        return np.array_equal(a, b, equal_nan=True) and signs_agree

    @property
    def may_divide(self) -> bool:
        """Whether 1 / it is the same here and there: the sign of a 0 that sums left may not be."""
        return self.is_exact or bool(self.ours.data.all())

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.ours.data).all())


class Graph:
    """A random program, run here and in PyTorch while it is made up."""

    def __init__(self, number: int) -> None:
        self.rng = np.random.default_rng(number)
        self.dtype = str(self.rng.choice(list(TOLERANCE)))
        self.level = str(self.rng.choice(LEVELS))
        self.holds = int(self.rng.choice(4, p=[0.7, 0.15, 0.1, 0.05]))
        self.program = [f"graph {number}, {self.dtype}, level {self.level}"]
        self.leaves: list[Value] = []
        self.steps: list[tuple[Value, Callable[..., Any], tuple[Value, ...]]] = []
        self.roots: list[tuple[Value, np.ndarray | None]] = []
        self.pool: list[Value] = []  # what the next operation may take

    # ------------------------------------------------------------------------------- its parts

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def among(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def size(self, least: int = 0) -> int:
        """The length of an axis: 0 and 1 are rare enough that most graphs compute something."""
        size = self.rng.choice([0, 1, 2, 3, 4, 7], p=[0.03, 0.17, 0.2, 0.3, 0.2, 0.1])
        return max(least, int(size))

    def shape(self) -> tuple[int, ...]:
        ndim = int(self.rng.choice(4, p=[0.3, 0.4, 0.2, 0.1]))
        return tuple(self.size() for _ in range(ndim))

    def numbers(self, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers away from 0, or few different ones, which tie; and what else this graph holds."""
        size = self.rng.uniform(0.3, 2, shape) * self.rng.choice([-1, 1], shape)
        if self.chance(0.3):
            size = self.rng.choice([-2.0, -1.0, 1.0, 2.0], shape)
        for value, from_here in ((0, 1), (math.inf, 2), (-math.inf, 2), (math.nan, 3)):
            if self.holds >= from_here:
                size = np.where(self.rng.random(shape) < 0.08, value, size)
        return np.asarray(size, self.dtype)

    def constant(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array without a gradient, such as a cotangent."""
        array = self.numbers(shape)
        self.say(f"c = {array.tolist()}")
        return array

    def say(self, line: str) -> None:
        self.program.append(line)

    def leaf(self, shape: tuple[int, ...]) -> Value:
        data = self.numbers(shape)
        if self.chance(0.2):  # not contiguous
            data = data.T.copy().T
        name = f"x{len(self.leaves)}"
        self.say(f"{name} = Tensor({data.tolist()}, shape {shape})")
        theirs = torch.tensor(data, requires_grad=True)
        value = Value(name, Tensor(data, requires_grad=True), theirs)
        self.leaves.append(value)
        self.pool.append(value)
        return value

    def some(self, fits: Callable[[Value], bool], shape: Callable[[], tuple[int, ...]]) -> Value:
        """A value of the graph that fits, preferably a late one, or a new leaf."""
        found = [value for value in self.pool if fits(value)]
        if found and not self.chance(0.15):
            return found[-1] if self.chance(0.4) else self.among(found)
        return self.leaf(shape())

    def any(self, least_ndim: int = 0, least_size: int = 0) -> Value:
        """A value of any shape, with at least so many axes, the last one of at least that size."""

        def fits(v: Value) -> bool:
            return v.ndim >= least_ndim and (v.ndim == 0 or v.shape[-1] >= least_size)

        def shape() -> tuple[int, ...]:
            if least_ndim == 0 and self.chance(0.2):
                return ()
            return (*self.shape(), self.size(least_size))

        return self.some(fits, shape)

    def of(self, shape: tuple[int, ...]) -> Value:
        return self.some(lambda v: v.shape == shape, lambda: shape)

    def broadcast_to(self, shape: tuple[int, ...]) -> Value:
        """A value that broadcasts with this shape: axes left out, or 1, or made longer from 1."""
        if self.chance(0.4):
            return self.of(shape)
        new = [1 if self.chance(0.3) else n for n in shape]
        new = [self.size(1) if n == old == 1 else n for n, old in zip(new, shape, strict=True)]
        if self.chance(0.4):
            new = new[int(self.rng.integers(len(new) + 1)) :]
        elif self.chance(0.15):
            new = [self.size(1), *new]
        return self.of(tuple(new))

    def axes(self, value: Value) -> Any:
        """None, an axis or a tuple of them, from the front or the back."""
        if value.ndim == 0 or self.chance(0.2):
            return None
        picked = self.rng.permutation(value.ndim)[: int(self.rng.integers(1, value.ndim + 1))]
        axes = tuple(int(i) - (value.ndim if self.chance(0.5) else 0) for i in picked)
        return axes[0] if len(axes) == 1 and self.chance(0.8) else axes

    def step(
        self, text: str, ours: Callable[..., Tensor], theirs: Callable[..., Any], *inputs: Value
    ) -> Value:
        """One operation on both sides. Its result goes on in the graph if its size is moderate."""
        name = f"y{len(self.steps)}"
        self.say(f"{name} = {text.format(*(value.name for value in inputs))}")
        y = Value(name, ours(*(v.ours for v in inputs)), theirs(*(v.theirs for v in inputs)))
        assert y.shape == tuple(y.theirs.shape), f"{name}: shape {y.shape}"
        assert str(y.ours.dtype) == self.dtype, f"{name}: {y.ours.dtype}"
        assert y.ours.requires_grad == y.theirs.requires_grad, f"{name}: requires_grad"
        self.steps.append((y, theirs, inputs))
        data = y.ours.data
        sizes = np.abs(data[np.isfinite(data) & (data != 0)])
        is_moderate = not sizes.size or (sizes.min() > SMALLEST and sizes.max() < LARGEST)
        if is_moderate and (self.holds != NUMBERS or y.is_finite):
            self.pool.append(y)
        return y

    # ---------------------------------------------------------------------------- run and check

    def run(self) -> None:
        """A few expressions, each with its backward, which must add up in the leaves."""
        for _ in range(int(self.rng.integers(1, 4))):
            self.pool = list(self.leaves)
            for _ in range(int(self.rng.integers(2, 9))):
                self.among(OPERATIONS)(self)
            ends = [y for y in self.pool if y.name[0] == "y" and y.theirs.requires_grad]
            if ends:
                self.backward(ends[-1] if self.chance(0.5) else self.total(ends[-3:]))

    def total(self, ends: list[Value]) -> Value:
        """Several results as one number."""
        total = None
        for end in ends:
            c = self.constant(end.shape)
            part = self.step(
                "({} * c).sum()",
                lambda x, c=c: (x * c).sum(),
                lambda x, c=c: (x * constant_like(x, c)).sum(),
                end,
            )
            total = part if total is None else self.step("{} + {}", add, add, total, part)
        assert total is not None
        return total

    def backward(self, root: Value) -> None:
        c = None if root.shape == () and self.chance(0.5) else self.constant(root.shape)
        self.say(f"{root.name}.backward({'' if c is None else 'c'})")
        self.roots.append((root, c))
        root.ours.backward(c)
        root.theirs.backward(None if c is None else torch.tensor(c))

    def check(self) -> None:
        """Every result, and the gradient of every leaf."""
        pairs = [(y.name, y.ours.data, y.theirs.detach().numpy()) for y, _, _ in self.steps]
        for x in self.leaves:
            ours, theirs = x.ours.grad, x.theirs.grad
            assert (ours is None) == (theirs is None), f"{x.name}.grad: one is None"
            is_number = ours is not None and (self.holds != NUMBERS or theirs.isfinite().all())
            if is_number:
                assert ours.shape == x.shape and ours.dtype == x.ours.dtype, f"{x.name}.grad"
                pairs.append((f"{x.name}.grad", ours, theirs.numpy()))
        off = [pair for pair in pairs if distance(*pair[1:]) > TOLERANCE[self.dtype]]
        exact = self.in_float64() if off and self.dtype == "float32" else {}
        for name, ours, theirs in off:  # theirs may be as far off, where the graph loses digits
            allowed = TIMES_THEIRS * distance(theirs, exact[name]) if exact else 0.0
            if not (math.isfinite(allowed) and allowed and distance(ours, exact[name]) <= allowed):
                raise AssertionError(f"{name}: here\n{ours!r}\nin PyTorch\n{theirs!r}")

    def in_float64(self) -> dict[str, np.ndarray]:
        """What PyTorch computes in float64 for the same leaves."""
        values = {id(x): torch.tensor(x.ours.data).double() for x in self.leaves}
        for x in values.values():
            x.requires_grad = True
        for y, theirs, inputs in self.steps:
            values[id(y)] = theirs(*(values[id(v)] for v in inputs))
        for root, c in self.roots:
            y = values[id(root)]
            y.backward(None if c is None else torch.tensor(c).double(), retain_graph=True)
        found = {y.name: values[id(y)].detach().numpy() for y, _, _ in self.steps}
        grads = {f"{x.name}.grad": values[id(x)].grad for x in self.leaves}
        return found | {name: g.numpy() for name, g in grads.items() if g is not None}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of finite elements, relative to the size of b; infinite if others
    are not the same."""
    finite = np.isfinite(b)
    is_alike = np.array_equal(a[~finite], b[~finite], equal_nan=True)
    if not is_alike or not np.isfinite(a[finite]).all():
        return math.inf
    size = np.abs(b[finite]).max(initial=0)
    difference = np.abs(a[finite].astype(float) - b[finite]).max(initial=0)
    return float(difference / max(size, LEAST_SIZE))


def constant_like(x: Any, c: np.ndarray) -> Any:
    return torch.tensor(c).to(x.dtype)


# ------------------------------------------------------------------------------------ operations

Operation = Callable[[Graph], Any]
OPERATIONS: list[Operation] = []


def operation(function: Operation) -> Operation:
    OPERATIONS.append(function)
    return function


def for_numbers(function: Operation) -> Operation:
    """A layer whose formula decides what infinities cancel to NaN: it gets none of them."""
    OPERATIONS.append(lambda g: function(g) if g.holds == NUMBERS else arithmetic(g))
    return function


def add(a: Any, b: Any) -> Any:
    return a + b


ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": add,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
SCALARS = (0, 1, 2, -3, 0.5, -1.25, np.float32(0.75), np.float64(1.5), np.int64(2))
EXPONENTS = (-2, -1, 0, 1, 2, 3, 2.0, 0.5, -0.5, 1.5, np.float32(3))


@operation
def arithmetic(g: Graph) -> None:
    sign, x = g.among(list(ARITHMETIC)), g.any()
    y = x if g.chance(0.1) else g.broadcast_to(x.shape)
    pair = (x, y) if g.chance(0.5) else (y, x)
    sign = sign if sign != "/" or pair[1].may_divide else "-"
    g.step(f"{{}} {sign} {{}}", ARITHMETIC[sign], ARITHMETIC[sign], *pair)


OPERATIONS.append(arithmetic)  # twice as likely as others


@operation
def arithmetic_with_a_number(g: Graph) -> None:
    sign, number, x = g.among(list(ARITHMETIC)), g.among(SCALARS), g.any()
    f, plain = ARITHMETIC[sign], number.item() if isinstance(number, np.generic) else number
    if g.chance(0.5):
        g.step(f"{{}} {sign} {number!r}", lambda x: f(x, number), lambda x: f(x, plain), x)
    elif sign != "/" or x.may_divide:
        g.step(f"{number!r} {sign} {{}}", lambda x: f(number, x), lambda x: f(plain, x), x)


@operation
def arithmetic_with_an_array(g: Graph) -> None:
    sign, x = g.among(list(ARITHMETIC)), g.any()
    f, c = ARITHMETIC[sign], g.constant(x.shape)
    if g.chance(0.5):
        g.step(f"{{}} {sign} c", lambda x: f(x, c), lambda x: f(x, constant_like(x, c)), x)
    elif sign != "/" or x.may_divide:
        g.step(f"c {sign} {{}}", lambda x: f(c, x), lambda x: f(constant_like(x, c), x), x)


@operation
def power(g: Graph) -> None:
    n, x = g.among(EXPONENTS), g.any()
    if n != int(n):
        x = not_negative(g, x)
    n = n if n >= 0 or x.may_divide else 2
    plain = n.item() if isinstance(n, np.generic) else n
    g.step(f"{{}} ** {n!r}", lambda x: x**n, lambda x: x**plain, x)


@operation
def power_of_two_tensors(g: Graph) -> None:
    x = not_negative(g, g.any())
    n = g.broadcast_to(x.shape)
    if not (x.ours.data > 0).all():
        return arithmetic(g)
    g.step("{} ** {}", lambda x, n: x**n, lambda x, n: x**n, x, n)


@operation
def power_of_a_number(g: Graph) -> None:
    number = g.among((2, 0.5, np.float32(3)))
    g.step(f"{number!r} ** {{}}", lambda n: number**n, lambda n: float(number) ** n, g.any())


def not_negative(g: Graph, x: Value) -> Value:
    """x², mostly: half of all numbers are negative, and NaN would soon be everywhere. What roots
    of -0 and -inf are, C's pow() and PyTorch's special cases do not agree on."""
    data = x.ours.data
    if (data > 0).all() or (g.chance(0.05) and x.is_finite and data.all()):
        return x
    return g.step("{0} * {0}", lambda x: x * x, lambda x: x * x, x)


@operation
def unary(g: Graph) -> None:
    name = g.among(
        ["exp", "log", "sqrt", "tanh", "relu", "sigmoid", "__neg__", "__abs__", "detach"]
    )
    x = g.any()
    if name in ("log", "sqrt"):
        x = not_negative(g, x)
    if name in ("relu", "__abs__") and not x.is_exact:
        return arithmetic(g)
    if name == "__abs__" and np.isnan(x.ours.data).any():  # whose slope is 0 in PyTorch
        return arithmetic(g)
    if name == "detach" and g.chance(0.7):
        name = "exp"
    g.step(f"{{}}.{name}()", lambda x: getattr(x, name)(), lambda x: getattr(x, name)(), x)


@operation
def there_and_back(g: Graph) -> None:
    """To float64 and back; a float32 between would round PyTorch's gradients, and not ours."""
    g.step(
        f"{{}}.astype(float64).astype({g.dtype})",
        lambda x: x.astype("float64").astype(g.dtype),
        lambda x: x.double().to(x.dtype),
        g.any(),
    )


@operation
def reduction(g: Graph) -> None:
    name, x = g.among(["sum", "mean", "max"]), g.any()
    axis, keep = g.axes(x), g.chance(0.5)
    dims = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    # amax multiplies by its mask, so that infinite gradients become NaN: ours selects
    is_finite = g.holds < WITH_INFINITIES and x.is_finite
    if name == "max" and not (is_finite and x.is_exact and all(x.shape[i] for i in dims)):
        return arithmetic(g)
    if name == "mean" and g.holds < WITH_NAN and not all(x.shape[i] for i in dims):
        name = "sum"  # the mean of nothing is NaN

    def theirs(x: Any) -> Any:
        if name == "max":
            return torch.amax(x, dims, keepdim=keep)
        return getattr(x, name)(dims, keepdim=keep) if dims else getattr(x, name)()

    g.step(
        f"{{}}.{name}(axis={axis}, keepdims={keep})",
        lambda x: getattr(x, name)(axis=axis, keepdims=keep),
        theirs,
        x,
    )


@operation
def reshape(g: Graph) -> None:
    x = g.any()
    shape = [int(n) for n in g.rng.permutation(x.shape)]
    while len(shape) > 1 and g.chance(0.4):
        shape[:2] = [shape[0] * shape[1]]
    if g.chance(0.4):
        shape.insert(int(g.rng.integers(len(shape) + 1)), 1)
    new = tuple(shape)
    if shape and math.prod(shape) and g.chance(0.4):
        shape[int(g.rng.integers(len(shape)))] = -1
    if g.chance(0.5) and shape:
        g.step(f"{{}}.reshape(*{shape})", lambda x: x.reshape(*shape), lambda x: x.reshape(new), x)
    else:
        g.step(f"{{}}.reshape({new})", lambda x: x.reshape(new), lambda x: x.reshape(new), x)


@operation
def permute(g: Graph) -> None:
    x = g.any()
    order = tuple(int(i) for i in g.rng.permutation(x.ndim))
    signed = tuple(i - x.ndim if g.chance(0.3) else i for i in order)
    kind = g.among(["T", "axes", "tuple", "swap"])
    if kind == "T" or x.ndim == 0:
        order = tuple(range(x.ndim))[::-1]
        g.step("{}.T", lambda x: x.T, lambda x: x.permute(order), x)
    elif kind == "axes" and order != (0, 1):  # which is refused, as PyTorch swaps the two
        g.step(f"{{}}.transpose(*{signed})", lambda x: x.transpose(*signed), to_order(order), x)
    elif kind in ("axes", "tuple"):
        g.step(f"{{}}.transpose({signed})", lambda x: x.transpose(signed), to_order(order), x)
    else:
        a, b = signed[0], signed[-1]
        g.step(
            f"{{}}.swapaxes({a}, {b})", lambda x: x.swapaxes(a, b), lambda x: x.swapaxes(a, b), x
        )


def to_order(order: tuple[int, ...]) -> Callable[[Any], Any]:
    return lambda x: x.permute(order)


@operation
def indexing(g: Graph) -> None:
    """PyTorch gets the numbers of the picked elements, so that it can follow any index."""
    x = g.any()
    index = random_index(g, x.shape)
    places = np.arange(x.ours.size).reshape(x.shape)[as_numpy(index)]
    ids = torch.tensor(places.reshape(-1).copy() if isinstance(places, np.ndarray) else [places])
    g.step(
        f"{{}}[{index!r}]",
        lambda x: x[index],
        lambda x: x.reshape(-1)[ids].reshape(np.shape(places)),
        x,
    )


def as_numpy(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(as_numpy(part) for part in index)
    return index.data if isinstance(index, Tensor) else index


def random_index(g: Graph, shape: tuple[int, ...]) -> Any:
    """Integers, slices, None, ..., lists, arrays of integers or booleans, and tuples of them."""
    if g.chance(0.1):
        return g.rng.random(shape) < 0.5
    parts: list[Any] = []
    picked = g.size(), g.size()  # arrays in one index broadcast
    for n in shape:
        kind = g.among(["integer", "slice", "slice", "array", "list", "booleans", "all", "tensor"])
        if n == 0 or (kind == "booleans" and g.chance(0.7)):
            kind = "slice"
        if kind == "integer":
            i = int(g.rng.integers(-n, n))
            parts.append(g.among([i, np.int64(i)]))
        elif kind == "slice":
            start, stop = (g.among([None, int(g.rng.integers(-n - 1, n + 2))]) for _ in range(2))
            parts.append(slice(start, stop, g.among([None, 1, 2, -1, -2])))
        elif kind == "array":
            parts.append(g.rng.integers(-n, n, g.among([picked, picked[1:], (1,), ()])))
        elif kind == "tensor":
            parts.append(Tensor(g.rng.integers(-n, n, picked[1:])))
        elif kind == "list":
            parts.append(g.rng.integers(-n, n, picked[1]).tolist())
        elif kind == "booleans":
            mask = np.zeros(n, bool)
            mask[g.rng.permutation(n)[: picked[1]]] = True
            parts.append(mask if mask.sum() in (1, picked[1]) else slice(None))
        else:
            parts.append(slice(None))
    if parts and g.chance(0.3):
        parts = parts[: int(g.rng.integers(1, len(parts) + 1))]
        if g.chance(0.5) and len(parts) < len(shape):
            parts.append(...)
    if g.chance(0.2):
        parts.insert(int(g.rng.integers(len(parts) + 1)), None)
    if len(parts) == 1 and g.chance(0.7):
        return parts[0]
    return tuple(parts)


@operation
def joined(g: Graph) -> None:
    x = g.any(least_ndim=1)
    axis = int(g.rng.integers(-x.ndim, x.ndim))
    shapes = [list(x.shape) for _ in range(int(g.rng.integers(3)))]
    for shape in shapes:
        shape[axis] = g.size()
    parts = [x, *(g.of(tuple(shape)) for shape in shapes)]
    g.step(
        f"concatenate([{', '.join(['{}'] * len(parts))}], {axis})",
        lambda *parts: concatenate(parts, axis),
        lambda *parts: torch.cat(parts, axis),
        *parts,
    )


@operation
def stacked(g: Graph) -> None:
    x = g.any()
    axis = int(g.rng.integers(-x.ndim - 1, x.ndim + 1))
    parts = [x, *(g.of(x.shape) for _ in range(int(g.rng.integers(3))))]
    g.step(
        f"stack([{', '.join(['{}'] * len(parts))}], {axis})",
        lambda *parts: stack(parts, axis),
        lambda *parts: torch.stack(parts, axis),
        *parts,
    )


@operation
def chosen(g: Graph) -> None:
    x = g.any()
    y = g.broadcast_to(x.shape)
    shape = np.broadcast_shapes(x.shape, y.shape)
    mask = g.rng.random(shape if g.chance(0.7) else shape[1:]) < 0.5
    if x.is_exact and y.is_exact and g.chance(0.3):  # by a comparison of tensors
        mask = (x.ours < y.ours).data
    g.say(f"mask = {mask.tolist()}")
    number = g.among([0, -1.5, -np.inf, None, None])
    if number is None:
        g.step(
            "where(mask, {}, {})",
            lambda x, y: where(Tensor(mask), x, y),
            lambda x, y: torch.where(torch.tensor(mask), x, y),
            x,
            y,
        )
    else:
        g.step(
            f"where(mask, {{}}, {number})",
            lambda x: where(mask, x, number),
            lambda x: torch.where(torch.tensor(mask), x, number),
            x,
        )


@operation
def product(g: Graph) -> None:
    x = g.any(least_ndim=1)
    n = x.shape[-1]
    kind = g.among(["vector", "matrix", "batch", "stretched", "array"])
    batch = x.shape[:-2]
    if kind == "vector":
        y = g.of((n,))
    elif kind == "stretched":
        y = g.of((*(1 if g.chance(0.5) else k for k in batch), n, g.size()))
    elif kind == "batch":
        y = g.of((g.size(1), *batch, n, g.size()))
    elif kind == "matrix":
        y = g.of((n, g.size()))
    else:
        c = g.constant((g.size(), x.shape[-2] if x.ndim > 1 else n))
        g.step("c @ {}", lambda x: c @ x, lambda x: constant_like(x, c) @ x, x)
        return
    g.step("{} @ {}", lambda x, y: x @ y, lambda x, y: x @ y, x, y)


# ----------------------------------------------------------------------------------------- layers

functional = torch.nn.functional


@operation
def linear(g: Graph) -> None:
    x = g.any(least_ndim=1, least_size=1)
    weight = g.of((x.shape[-1], g.size(1)))
    inputs = [x, weight] + ([g.of(weight.shape[1:])] if g.chance(0.7) else [])
    g.step(
        "linear(" + ", ".join(["{}"] * len(inputs)) + ")",
        layers.linear,
        lambda x, w, *b: functional.linear(x, w.T, *b),
        *inputs,
    )


@for_numbers
def layer_norm(g: Graph) -> None:
    x = g.any(least_ndim=1, least_size=2)
    if x.ours.data.std(axis=-1).min(initial=1) < 0.1:  # of equal numbers only rounding is left
        return arithmetic(g)
    weight, bias = g.of(x.shape[-1:]), g.of(x.shape[-1:])
    g.step(
        "layer_norm({}, {}, {})",
        layers.layer_norm,
        lambda x, w, b: functional.layer_norm(x, x.shape[-1:], w, b),
        x,
        weight,
        bias,
    )


@for_numbers
def gelu(g: Graph) -> None:
    g.step("gelu({})", layers.gelu, lambda x: functional.gelu(x, approximate="tanh"), g.any())


@operation
def softmax(g: Graph) -> None:
    name, x = g.among(["softmax", "log_softmax"]), g.any(least_ndim=1, least_size=1)
    g.step(f"{name}({{}})", getattr(layers, name), lambda x: getattr(x, name)(-1), x)


@operation
def embedding(g: Graph) -> None:
    table = g.some(lambda v: v.ndim == 2 and v.shape[0] > 0, lambda: (g.size(1), g.size()))
    ids = g.rng.integers(0, table.shape[0], g.shape())
    g.step(
        f"embedding({ids.tolist()}, {{}})",
        lambda table: layers.embedding(ids, table),
        lambda table: functional.embedding(torch.tensor(ids), table),
        table,
    )


@for_numbers
def attention(g: Graph) -> None:
    # Of a lone token's gradients, which cancel, only rounding would be left
    b, h, t, d = g.size(), g.size(1), g.size(2), g.size(1)
    if g.chance(0.5):
        g.step(
            "self_attention({})",
            layers.self_attention,
            lambda x: their_attention(*x.permute(2, 0, 3, 1, 4)).transpose(1, 2),
            g.of((b, t, 3, h, d)),
        )
    else:
        seen = (b, h, t + g.size(), d)
        inputs = (g.of(shape) for shape in ((b, h, t, d), seen, seen))
        g.step("attention({}, {}, {})", layers.attention, their_attention, *inputs)


def their_attention(q: Any, k: Any, v: Any) -> Any:
    t, s = q.shape[-2], k.shape[-2]
    may_look = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    return functional.scaled_dot_product_attention(q, k, v, may_look)


@for_numbers
def cross_entropy(g: Graph) -> None:
    x = g.any(least_ndim=1, least_size=1)
    if x.ours.size == 0:
        return arithmetic(g)
    in_one = g.chance(0.4)
    weight = g.of((g.size(1), x.shape[-1])) if in_one else x
    targets = g.rng.integers(0, weight.shape[0] if in_one else x.shape[-1], x.shape[:-1])
    ignored = g.rng.random(targets.shape) < 0.3
    if not ignored.all():
        targets = np.where(ignored, layers.IGNORE, targets)

    def theirs(x: Any, *weight: Any) -> Any:
        logits = x @ weight[0].T if weight else x
        return functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.tensor(targets).reshape(-1)
        )

    if in_one:
        g.step(
            f"linear_cross_entropy({{}}, {{}}, {targets.tolist()})",
            lambda x, weight: layers.linear_cross_entropy(x, weight, targets),
            theirs,
            x,
            weight,
        )
    else:
        g.step(
            f"cross_entropy({{}}, {targets.tolist()})",
            lambda x: layers.cross_entropy(x, targets),
            theirs,
            x,
        )


# ------------------------------------------------------------------------------------------ tests


def check(number: int) -> None:
    """Make up a graph, run it, and compare. The error, whichever it is, shows the program."""
    graph = Graph(number)
    try:
        with at_most(graph.level), np.errstate(all="ignore"):
            graph.run()
            graph.check()
    except Exception as error:
        raise AssertionError(
            f"{type(error).__name__}: {error}\n" + "\n".join(graph.program)
        ) from error


@pytest.mark.parametrize("part", range(PARTS))
def test_random_graphs_as_in_pytorch(part: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(FIRST + part, FIRST + COUNT, PARTS):
                check(number)
    finally:
        torch.set_num_threads(threads)
