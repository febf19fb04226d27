"""Tensor: an array that remembers how it was made, so that gradients can flow back to its parts.

Every operation computes its result and, if a gradient may be wanted, puts a `Node` on the tape: the
operation's name, its parents, and a `backward` function that turns the gradient of the result into
the gradients of the inputs. `Tensor.backward()` walks that tape once, from the loss to the leaves,
and takes it apart as it goes. Operations read top to bottom below: compute the result, define its
backward right there, record both.

    x = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = ((x @ x.T).tanh() * 0.5).sum()
    loss.backward()
    x.grad                              # an array of x's shape
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np

from micrograd_gpt.arrays.backend import (
    Array,
    RandomStream,
    array_module,
    device_of,
    to_device,
)
from micrograd_gpt.arrays.precision import half_name, is_float, kept, wide, widened
from micrograd_gpt.kernels import accelerated

Number: TypeAlias = int | float
AddInto: TypeAlias = Callable[[Array], None]  # adds a gradient into an array, in place
Backward: TypeAlias = Callable[[Array], tuple[Array | AddInto | None, ...]]
Axes: TypeAlias = int | tuple[int, ...] | None

AS_INPUTS = "as inputs"  # the precision of a result that was not given one

_RECORDING: ContextVar[bool] = ContextVar("recording", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Within this block operations build no tape: results do not require gradients."""
    with _recording(False):
        yield


@contextmanager
def _recording(on: bool) -> Iterator[None]:
    token = _RECORDING.set(on)
    try:
        yield
    finally:
        _RECORDING.reset(token)


# ------------------------------------------------------------------------------------- the tape


class Node:
    """One operation on the tape.

    It refers to the nodes (or leaf tensors) its inputs came from, never to its result, so the tape
    has no reference cycles and an intermediate array lives only as long as a backward needs it.
    """

    __slots__ = ("backward", "depth", "dtype", "half", "name", "parents", "result", "shape")

    def __init__(
        self,
        name: str,
        result: Tensor,
        parents: tuple[Node | Tensor | None, ...],
        backward: Backward,
    ) -> None:
        self.name, self.shape, self.dtype = name, result.shape, result.dtype
        self.half = result.half
        self.parents = parents
        self.backward: Backward | None = backward
        self.result: Callable[[], Tensor | None] | None = None  # set by Tensor.retain_grad()
        # Every parent is less deep than its child: sorting by depth is a topological order.
        self.depth: int = 1 + max(p.depth if isinstance(p, Node) else 0 for p in parents)

    def release(self) -> None:
        """Let go of everything the backward saved; the node is spent."""
        self.backward, self.parents = None, ()


def tape_is_on() -> bool:
    """False within no_grad()."""
    return _RECORDING.get()


def recording(*inputs: Tensor) -> bool:
    """True when an operation on these inputs goes on the tape."""
    return _RECORDING.get() and any(x.requires_grad for x in inputs)


def record(
    name: str,
    data: Array,
    inputs: Sequence[Tensor],
    backward: Backward,
    half: str | None = AS_INPUTS,
) -> Tensor:
    """Wrap the result of an operation, and put the operation on the tape if it is wanted there.

    `backward(grad)` gets the gradient of the loss with respect to `data` and returns one gradient
    (or None) for each input, in order. Each must be an array made for that input alone or a view
    of `grad`; it may still have the broadcast shape: the walk sums it down to the input's shape.
    A gradient that is zero almost everywhere may instead be a function that adds it into an array.

    The result is rounded to `half`, a half-precision type, or to none; left out, to that of the
    inputs where they all have the same. Its gradient will be rounded likewise.
    """
    if half is AS_INPUTS:
        half = inputs[0].half
        if half and any(x.half != half for x in inputs):
            half = None
    if half and not _is_view_of(data, inputs[0], half):
        data = kept(data, half)
    result = Tensor._wrap(data, half)
    if recording(*inputs):
        parents = tuple((x._node or x) if x.requires_grad else None for x in inputs)
        result.requires_grad = True
        result._node = Node(name, result, parents, backward)
    return result


def _is_view_of(data: Array, x: Tensor, half: str) -> bool:
    """True where `data` are x's own numbers in another shape, which are kept in `half` already."""
    return x.half == half and _may_share_memory(data, x.data)


def _tape_below(root: Node) -> list[Node]:
    """All nodes that `root` was computed from, and root itself, each after its parents.

    Raises RuntimeError where a part of the tape was walked, and so freed, before.
    """
    seen, stack = {root: None}, [root]  # a dict keeps its order, so that sums are reproducible
    while stack:
        node = stack.pop()
        if node.backward is None:
            raise RuntimeError(
                f"the tape at {node.name!r} of shape {node.shape} was freed by a backward() "
                "through it: compute the result again before a second one, or before drawing it"
            )
        for parent in node.parents:
            if isinstance(parent, Node) and parent not in seen:
                seen[parent] = None
                stack.append(parent)
    return sorted(seen, key=lambda node: node.depth)


def _walk_back(root: Node, grad: Array) -> None:
    """Send `grad` from `root` down the tape to the leaves, freeing each node once it is done."""
    tape = _tape_below(root)
    pending: dict[Node, tuple[Array, bool]] = {root: (grad, False)}  # see _plus
    while tape:
        node = tape.pop()
        grad, _ = pending.pop(node, (None, False))
        if grad is not None:
            assert node.backward is not None
            for parent, part in zip(node.parents, node.backward(grad), strict=True):
                if isinstance(parent, Tensor):
                    parent._accumulate(part, grad)
                elif parent is not None and part is not None:
                    pending[parent] = _plus(*pending.get(parent, (None, False)), part, grad, parent)
            tensor = node.result() if node.result else None
            if tensor is not None:
                tensor._accumulate(grad, grad)
        node.release()


def _plus(
    total: Array | None, owned: bool, part: Array | AddInto, grad: Array, target: Node | Tensor
) -> tuple[Array, bool]:
    """The gradient of `target` so far, plus the part that a backward made from `grad`.

    This is the one place that decides who owns a gradient. With each comes whether it is `owned`,
    so that it may be added into: an array that a backward made is; a view of the gradient it was
    given may be someone else's too, and is not.
    """
    if callable(part):
        if total is None:
            total = array_module(grad).zeros(target.shape, target.dtype)
        elif not owned:
            total = total.copy()
        part(total)
        return total, True
    part = _fit(part, target.shape, target.dtype)
    ours = part.size > 0 and not _may_share_memory(part, grad)
    if target.half:
        rounded = kept(part, target.half)
        part, ours = rounded, ours or rounded is not part
    if total is None:
        return part, ours
    out = total if owned else part if ours else None
    total = add(total, part, out=out)
    if target.half:
        total = kept(total, target.half)
    return (np.asarray(total) if isinstance(total, np.generic) else total), True


@accelerated
def add(a: Array, b: Array, out: Array | None = None) -> Array:
    """a + b with NumPy's broadcasting, into `out` if given; residuals and gradients meet here."""
    return array_module(a).add(a, b, out=out)


def _may_share_memory(a: Array, b: Array) -> bool:
    if device_of(a) != device_of(b):
        return False
    if isinstance(a, np.ndarray) and a is not b and a.base is None and b.base is not a:
        return False  # a has memory of its own: most often so, and quickly seen
    return array_module(a).may_share_memory(a, b)


def _fit(grad: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Undo broadcasting and type promotion: sum `grad` down to `shape`, and give it `dtype`."""
    if grad.shape != shape:
        extra = tuple(range(grad.ndim - len(shape)))
        grad = grad.sum(axis=extra) if extra else grad
        stretched = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
        grad = grad.sum(axis=stretched, keepdims=True) if stretched else grad
    grad = grad if grad.dtype == dtype else grad.astype(dtype)
    return np.asarray(grad) if isinstance(grad, np.generic) else grad  # NumPy scalar -> 0-d array


# --------------------------------------------------------------------------------- the tensor


class Tensor:
    """An n-dimensional array on the CPU (NumPy) or the GPU (CuPy) that can carry a gradient.

    Args:
        data: a number, nested lists, or an array. Arrays keep their dtype and are not copied;
            numbers and lists become float32.
        requires_grad: make it a leaf whose `.grad` `backward()` fills. Floating-point types only.
        dtype: convert to this type ("float32", "float64", "bfloat16", "float16", …).
        device: "cpu" or "gpu"; left out, an array stays where it is.

    Attributes: `data` the array, `grad` the accumulated gradient (an array of the same shape and
    dtype, or None), `requires_grad`, and `half`: the half-precision type the numbers are kept in,
    "bfloat16" or "float16", None for any other type. On the CPU such data are float32 arrays of
    rounded numbers (see precision.py).
    """

    __slots__ = ("__weakref__", "_node", "data", "grad", "half", "requires_grad")
    __array_ufunc__ = None  # np.float32(2) * tensor: NumPy leaves it to Tensor.__rmul__

    def __init__(
        self,
        data: Any,
        requires_grad: bool = False,
        dtype: Any = None,
        device: str | None = None,
    ) -> None:
        if isinstance(data, Tensor):
            data = data.data
        self.half = None if dtype is None else half_name(dtype)
        if not hasattr(data, "dtype"):
            data = np.asarray(data, dtype=wide(dtype or np.float32))
        elif dtype is not None and not self.half:
            data = data.astype(dtype, copy=False)
        if isinstance(data, np.generic):
            data = np.asarray(data)
        data = to_device(data, device) if device else data
        if dtype is None and device_of(data) == "gpu":
            self.half = half_name(data.dtype)
        self.data: Array = kept(data, self.half) if self.half else data
        if requires_grad and not is_float(self.data.dtype):
            raise ValueError(
                f"a tensor of {self.data.dtype} cannot require a gradient; use a float dtype"
            )
        self.requires_grad = requires_grad
        self.grad: Array | None = None
        self._node: Node | None = None

    @classmethod
    def _wrap(cls, data: Array, half: str | None = None) -> Tensor:
        """A tensor around the result of an operation, skipping the constructor's conversions."""
        tensor = Tensor.__new__(Tensor)
        tensor.data = np.asarray(data) if isinstance(data, np.generic) else data
        tensor.requires_grad, tensor.grad, tensor._node, tensor.half = False, None, None, half
        return tensor

    # What it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def device(self) -> str:
        """ "cpu" or "gpu"."""
        return device_of(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        made_by = f", made by {self._node.name}" if self._node else ""
        leaf = ", requires_grad=True" if self.requires_grad and not self._node else ""
        half = f", {self.half}" if self.half else ""
        return f"Tensor({self.data!r}{half}{leaf}{made_by})"

    def numpy(self) -> np.ndarray:
        """The data as a NumPy array: itself on the CPU, a copy from the GPU.

        Half precision comes as the same numbers in float32.
        """
        array = to_device(self.data, "cpu")
        return widened(array) if self.half else array

    def item(self) -> float:
        """The one number of a tensor of size 1; raises ValueError for any other size."""
        if self.size != 1:
            raise ValueError(
                f"item() needs a tensor of one element; this one has shape {self.shape}"
            )
        return self.data.item()

    def detach(self) -> Tensor:
        """The same data, off the tape."""
        return Tensor._wrap(self.data, self.half)

    # Gradients

    def backward(self, grad: Any = None) -> None:
        """Add the gradient of this tensor with respect to every leaf to the leaf's `.grad`.

        Args:
            grad: the cotangent, of this tensor's shape; may be left out for a single number.

        The tape is freed as it is walked, so this works once per computed result. Raises
        RuntimeError when there is nothing to differentiate, when the cotangent is missing, or on a
        spent tape; ValueError when the cotangent has another shape.
        """
        if not self.requires_grad:
            raise RuntimeError(
                "backward() on a tensor that needs no gradient: no leaf below it has "
                "requires_grad=True, or it was computed under no_grad()"
            )
        xp = array_module(self.data)
        if grad is None:
            if self.size != 1:
                raise RuntimeError(
                    f"backward() on a tensor of shape {self.shape} needs a cotangent of that "
                    "shape: backward(grad), or reduce it to one number first, e.g. with .sum()"
                )
            grad = xp.ones_like(self.data)
        else:
            # A copy, since it may be a leaf's own .grad, which is about to change.
            grad = xp.array(grad.data if isinstance(grad, Tensor) else grad, dtype=self.dtype)
            if grad.shape != self.shape:
                raise ValueError(f"backward(): cotangent of shape {grad.shape} for {self.shape}")
        if self._node is None:
            self._accumulate(grad, grad)
        else:
            _walk_back(self._node, grad)

    def retain_grad(self) -> Tensor:
        """Keep the gradient of an intermediate result too: backward() fills its `.grad`."""
        if self._node is not None:
            self._node.result = weakref.ref(self)
        return self

    def _accumulate(self, part: Array | AddInto | None, grad: Array) -> None:
        """Add a part of the gradient, made from `grad`, to this tensor's `.grad`, which it owns."""
        if part is not None:
            total, owned = _plus(self.grad, True, part, grad, self)
            self.grad = total if owned else total.copy()

    # Where it lives

    def to(self, device: str) -> Tensor:
        """The tensor on another device, "cpu" or "gpu"; gradients flow back across."""
        here = self.device
        data = to_device(self.data, device)
        return record("to", data, [self], lambda grad: (to_device(grad, here),))

    def astype(self, dtype: Any) -> Tensor:
        """The tensor in another type; from float to float, gradients come back in the old one."""
        half = half_name(dtype)
        if half and half == self.half:
            return self
        data = widened(self.data) if half else self.data.astype(dtype)
        if not is_float(data.dtype):
            return Tensor._wrap(data)
        return record("astype", data, [self], lambda grad: (grad,), half)

    # Arithmetic, element by element, with NumPy's broadcasting

    def __add__(self, other: Operand) -> Tensor:
        a, b = _operands("add", self, other)
        return record("add", add(a.data, b.data), [a, b], lambda grad: (grad, grad))

    def __sub__(self, other: Operand) -> Tensor:
        a, b = _operands("sub", self, other)
        return record("sub", a.data - b.data, [a, b], lambda grad: (grad, -grad))

    def __mul__(self, other: Operand) -> Tensor:
        a, b = _operands("mul", self, other)
        x, y = a.data, b.data
        return record("mul", x * y, [a, b], lambda grad: (grad * y, grad * x))

    def __truediv__(self, other: Operand) -> Tensor:
        a, b = _operands("div", self, other)
        x, y = a.data, b.data
        quotient = x / y
        return record("div", quotient, [a, b], lambda grad: (grad / y, -grad * quotient / y))

    def __pow__(self, exponent: Number) -> Tensor:
        if isinstance(exponent, np.number):
            exponent = exponent.item()
        if not isinstance(exponent, int | float):
            raise TypeError(
                "only a number can be an exponent; for x ** y write (y * x.log()).exp()"
            )
        x = self.data

        def backward(grad: Array) -> tuple[Array]:
            return (grad * exponent * x ** (exponent - 1),) if exponent != 0 else (0 * grad,)

        return record("pow", x**exponent, [self], backward)

    def __neg__(self) -> Tensor:
        return record("neg", -self.data, [self], lambda grad: (-grad,))

    def __radd__(self, other: Operand) -> Tensor:
        return self + other

    def __rmul__(self, other: Operand) -> Tensor:
        return self * other

    def __rsub__(self, other: Operand) -> Tensor:
        a, b = _operands("sub", self, other)
        return b - a

    def __rtruediv__(self, other: Operand) -> Tensor:
        a, b = _operands("div", self, other)
        return b / a

    def exp(self) -> Tensor:
        y = array_module(self.data).exp(self.data)
        return record("exp", y, [self], lambda grad: (grad * y,))

    def log(self) -> Tensor:
        """The natural logarithm."""
        x = self.data
        return record("log", array_module(x).log(x), [self], lambda grad: (grad / x,))

    def sqrt(self) -> Tensor:
        return self**0.5

    def tanh(self) -> Tensor:
        y = array_module(self.data).tanh(self.data)
        return record("tanh", y, [self], lambda grad: (grad * (1 - y * y),))

    def sigmoid(self) -> Tensor:
        """1 / (1 + exp(-x)), so that no x overflows and small results keep their digits."""
        x = self.data
        xp = array_module(x)
        small = xp.exp(-xp.abs(x))  # in (0, 1]
        y = xp.where(x >= 0, xp.ones_like(small), small) / (1 + small)
        return record("sigmoid", y, [self], lambda grad: (grad * y * (1 - y),))

    def relu(self) -> Tensor:
        x = self.data
        y = array_module(x).maximum(x, 0)
        return record("relu", y, [self], lambda grad: (grad * (x > 0),))

    # Comparisons give tensors of booleans, for `where`

    def __bool__(self) -> bool:
        """The truth of a single element; ValueError for more, which have no one truth."""
        return bool(self.data)

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        a, b = _operands("eq", self, other)
        return Tensor._wrap(a.data == b.data)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        a, b = _operands("ne", self, other)
        return Tensor._wrap(a.data != b.data)

    __hash__ = object.__hash__  # as a key a tensor is itself, whatever it holds

    def __gt__(self, other: Operand) -> Tensor:
        a, b = _operands("gt", self, other)
        return Tensor._wrap(a.data > b.data)

    def __lt__(self, other: Operand) -> Tensor:
        a, b = _operands("lt", self, other)
        return Tensor._wrap(a.data < b.data)

    def __ge__(self, other: Operand) -> Tensor:
        a, b = _operands("ge", self, other)
        return Tensor._wrap(a.data >= b.data)

    def __le__(self, other: Operand) -> Tensor:
        a, b = _operands("le", self, other)
        return Tensor._wrap(a.data <= b.data)

    # Matrix product

    def __matmul__(self, other: Operand) -> Tensor:
        """(…, n, k) @ (…, k, m) -> (…, n, m), batch dimensions broadcast; vectors as in NumPy."""
        a, b = _operands("matmul", self, other, broadcast=False)
        x, y = a.data, b.data
        try:
            product = x @ y
        except ValueError:
            raise ValueError(f"matmul: shapes {x.shape} and {y.shape} do not fit") from None

        def backward(grad: Array) -> tuple[Array, Array]:
            # A vector is a matrix with one row (left) or one column (right); add it, then drop it.
            x2 = x[None, :] if x.ndim == 1 else x  # (…, n, k)
            y2 = y[:, None] if y.ndim == 1 else y  # (…, k, m)
            grad = grad[..., None] if y.ndim == 1 else grad
            grad = grad[..., None, :] if x.ndim == 1 else grad  # (…, n, m)
            dx = grad @ y2.swapaxes(-1, -2)  # (…, n, k)
            dy = x2.swapaxes(-1, -2) @ grad  # (…, k, m)
            return (
                _fit(dx, x2.shape, dx.dtype).reshape(x.shape),
                _fit(dy, y2.shape, dy.dtype).reshape(y.shape),
            )

        return record("matmul", product, [a, b], backward)

    def __rmatmul__(self, other: Operand) -> Tensor:
        a, b = _operands("matmul", self, other, broadcast=False)
        return b @ a

    # Reductions

    def sum(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        x = self.data
        xp, shape, kept = array_module(x), x.shape, _kept_shape(x.shape, axis)

        def backward(grad: Array) -> tuple[Array]:
            return (xp.broadcast_to(grad.reshape(kept), shape),)

        return record("sum", x.sum(axis=axis, keepdims=keepdims), [self], backward)

    def mean(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        total = self.sum(axis, keepdims)
        return total / (self.size / max(1, total.size))

    def max(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The largest element along `axis`; equal maxima share the gradient equally."""
        x = self.data
        kept = _kept_shape(x.shape, axis)
        y = x.max(axis=axis, keepdims=keepdims)

        def backward(grad: Array) -> tuple[Array]:
            is_max = x == y.reshape(kept)
            return (is_max * (grad.reshape(kept) / is_max.sum(axis=axis, keepdims=True)),)

        return record("max", y, [self], backward)

    # Shape

    def reshape(self, *shape: Any) -> Tensor:
        x = self.data
        new = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return record("reshape", x.reshape(new), [self], lambda grad: (grad.reshape(x.shape),))

    def transpose(self, *axes: Any) -> Tensor:
        """Permute the axes; without arguments, reverse them."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        order = tuple(order) or tuple(reversed(range(self.ndim)))
        if sorted(i + self.ndim if i < 0 else i for i in order) != list(range(self.ndim)):
            raise ValueError(f"transpose: axes {order} do not permute those of shape {self.shape}")
        order = tuple(i % self.ndim for i in order)
        inverse = tuple(order.index(i) for i in range(self.ndim))
        return record(
            "transpose", self.data.transpose(order), [self], lambda grad: (grad.transpose(inverse),)
        )

    def swapaxes(self, a: int, b: int) -> Tensor:
        axes = list(range(self.ndim))
        axes[a], axes[b] = axes[b], axes[a]
        return self.transpose(axes)

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def __getitem__(self, index: Any) -> Tensor:
        """NumPy's indexing; an element picked several times gets the sum of its gradients."""
        x = self.data
        index = _plain_index(index, array_module(x))

        def backward(grad: Array) -> tuple[Array]:
            xp = array_module(grad)
            dx = xp.zeros(x.shape, grad.dtype)
            if _is_basic(index):
                dx[index] = grad
            else:
                xp.add.at(dx, index, grad)
            return (dx,)

        return record("getitem", x[index], [self], backward)

    def masked_fill(self, mask: Any, value: Number) -> Tensor:
        """This tensor with `value` where `mask` is true; no gradient flows there."""
        return where(mask, value, self)


Operand: TypeAlias = Tensor | Number | Array


# ---------------------------------------------------------------- operations on several tensors


def where(condition: Any, a: Operand, b: Operand) -> Tensor:
    """`a` where `condition` (an array or tensor of booleans) is true, else `b`; broadcasts."""
    mask = condition.data if isinstance(condition, Tensor) else condition
    like = a if isinstance(a, Tensor) else b
    if not isinstance(like, Tensor):
        raise TypeError("where() needs a Tensor among its two choices")
    a, b = (_as_tensor(x, like) for x in (a, b))
    _check_device("where", a, b)
    xp = array_module(a.data)
    mask = xp.asarray(mask)
    try:
        chosen = xp.where(mask, a.data, b.data)
    except ValueError:
        raise ValueError(
            f"where: shapes {mask.shape}, {a.shape} and {b.shape} do not broadcast"
        ) from None
    return record(
        "where", chosen, [a, b], lambda grad: (xp.where(mask, grad, 0), xp.where(mask, 0, grad))
    )


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join tensors along an existing axis."""
    xp = array_module(tensors[0].data)
    _check_device("concatenate", *tensors)
    try:
        joined = xp.concatenate([t.data for t in tensors], axis=axis)
    except ValueError:
        shapes = ", ".join(str(t.shape) for t in tensors)
        raise ValueError(f"concatenate: shapes {shapes} do not line up on axis {axis}") from None
    ends = [int(n) for n in np.cumsum([t.shape[axis] for t in tensors])]
    return record(
        "concatenate", joined, tensors, lambda grad: tuple(xp.split(grad, ends[:-1], axis=axis))
    )


def recompute(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    random: RandomStream,
) -> Tensor:
    """function(x), with nothing kept but x: the backward computes it again, this time with a tape.

    `parameters` are the leaves the function reads besides x, `random` the stream it draws from; it
    must give the same result for the same x and draws. Gradients are those of function(x), bit for
    bit. Memory for time: Chen et al. 2016 (arXiv:1604.06174).
    """
    data, before = x.data, random.position
    with no_grad():
        y = function(x)

    def backward(grad: Array) -> tuple[Array | None, ...]:
        again = Tensor(data, requires_grad=True)
        after, random.position = random.position, before
        with _recording(True):
            result = function(again)
        random.position = after
        result.backward(grad)  # fills the parameters' gradients itself
        return (again.grad, *(None for _ in parameters))

    return record("recompute", y.data, [x, *parameters], backward, y.half)


# ------------------------------------------------------------------------------ a graph to look at


def draw_graph(result: Tensor) -> str:
    """The tape below `result` as Graphviz DOT text: operation names, shapes and dtypes.

    Draw it before backward(), which frees the tape; `dot -Tsvg` turns the text into a picture.
    """
    root = result._node or result
    nodes: list[Node | Tensor] = [*_leaves_below(root)]
    nodes += _tape_below(root) if isinstance(root, Node) else []
    names: dict[Node | Tensor, str] = {}
    lines = ["digraph tape {", "  rankdir=LR;"]
    for node in nodes:
        names[node] = name = f"n{len(names)}"
        kept_in = node.half or node.dtype
        title, shape = (node.name, "box") if isinstance(node, Node) else ("leaf", "ellipse")
        lines.append(f'  {name} [shape={shape}, label="{title}\\n{node.shape} {kept_in}"];')
        if isinstance(node, Node):
            parents = (parent for parent in node.parents if parent is not None)
            lines += [f"  {names[parent]} -> {name};" for parent in parents]
    return "\n".join([*lines, "}"])


def _leaves_below(root: Node | Tensor) -> list[Tensor]:
    """The leaf tensors that `root` was computed from, each once."""
    if isinstance(root, Tensor):
        return [root]
    leaves = (p for node in _tape_below(root) for p in node.parents if isinstance(p, Tensor))
    return list(dict.fromkeys(leaves))


# ---------------------------------------------------------------------------------------- helpers


def _as_tensor(value: Any, like: Tensor) -> Tensor:
    """`value` as a tensor; a Python number takes the dtype and device of `like`."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.number):
        value = value.item()
    if hasattr(value, "dtype"):
        return Tensor(value)
    if not isinstance(value, int | float):
        raise TypeError(f"a tensor combines with tensors, arrays and numbers, not with {value!r}")
    same_kind = is_float(like.dtype) or (like.dtype.kind in "iu" and isinstance(value, int))
    dtype = like.dtype if same_kind else np.dtype(np.float32)
    number = array_module(like.data).full((), value, dtype)  # made there: nothing is copied over
    return Tensor._wrap(kept(number, like.half) if like.half else number, like.half)


def _operands(name: str, a: Operand, b: Operand, broadcast: bool = True) -> tuple[Tensor, Tensor]:
    """Both operands as tensors on one device, with shapes that broadcast; else a clear error."""
    like: Any = a if isinstance(a, Tensor) else b
    a, b = _as_tensor(a, like), _as_tensor(b, like)
    _check_device(name, a, b)
    if broadcast and a.shape != b.shape:
        try:
            np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise ValueError(f"{name}: shapes {a.shape} and {b.shape} do not broadcast") from None
    return a, b


def _check_device(name: str, *tensors: Tensor) -> None:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        places = ", ".join(f"{t.shape} on {t.device}" for t in tensors)
        raise ValueError(f"{name}: tensors on different devices ({places}); move one with .to()")


def _kept_shape(shape: tuple[int, ...], axis: Axes) -> tuple[int, ...]:
    """`shape` with the reduced axes kept as 1, whatever `keepdims` was."""
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    reduced = {i % len(shape) for i in axes} if shape else set()
    return tuple(1 if i in reduced else n for i, n in enumerate(shape))


def _plain_index(index: Any, xp: Any) -> Any:
    """An index with arrays of `xp` in place of tensors; CuPy takes neither NumPy's nor lists."""
    if isinstance(index, tuple):
        return tuple(_plain_index(part, xp) for part in index)
    index = index.data if isinstance(index, Tensor) else index
    if xp is not np and isinstance(index, list | np.ndarray):
        return xp.asarray(np.asarray(index, None if len(index) else int))
    return index


def _is_basic(index: Any) -> bool:
    """True for an index of integers and slices, which picks every element at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, int | slice | type(None) | type(...)) for p in parts)
