"""Tensor: an array that remembers how it was made, so that gradients can flow back to its parts.

An operation computes its result and, if a gradient may be wanted, puts a `Node` on the tape: its
name, the nodes of its inputs, and a `backward` function that turns the gradient of the result into
those of the inputs. `Tensor.backward()` walks that tape once, from the loss down to the leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from micrograd_gpt.arrays.habits import Habits, check_leaf, checked_parts, plain_index
from micrograd_gpt.arrays.stand_ins import Switch, as_array, converted, definition

Array: TypeAlias = Any  # NumPy's or CuPy's, which answers NumPy's functions too (NEP 13, 18, 35)

LEAF = "leaf"  # the name of the nodes of tensors that no operation made
no_grad = Switch("no_grad")  # with no_grad(): operations build no tape; a decorator too


class Node:
    """One operation on the tape, or a leaf, whose `backward` adds to the leaf's `.grad`. It refers
    to nodes, never to its result's tensor: so the tape has no cycles, and frees arrays early."""

    __slots__ = ("backward", "dtype", "height", "name", "parents", "shape", "versions")

    def __init__(self, name: str, result: Tensor, inputs: Sequence[Tensor], backward: Any) -> None:
        self.name, self.backward = name, backward
        self.shape, self.dtype = result.shape, result.dtype
        self.parents: Any = tuple(map(node_of, inputs))  # each a Node, or None: no gradient goes
        # What a backward keeps is in its closure; whether that stays as it is, the versions tell.
        kept = [memory(cell.cell_contents) for cell in getattr(backward, "__closure__", None) or ()]
        used = [x.version for x in (result, *inputs) if memory(x.data) in kept]
        self.versions = [(version, *version) for version in used]
        # A parent is lower than its child, a leaf lowest: sorting by height is a topological order.
        self.height: int = 1 + max((parent.height for parent in self.parents if parent), default=0)

    def __getstate__(self) -> Any:  # for deepcopy and pickle: a copy is spent, with no way back
        spent = {"name": f"copy of {self.name}", "backward": None, "parents": (), "versions": ()}
        return None, {name: getattr(self, name) for name in self.__slots__} | spent


def is_recorded(*inputs: Tensor) -> bool:
    """True where an operation on these inputs goes on the tape."""
    return not no_grad.inside.get() and any(x.requires_grad for x in inputs)


def record(name: str, data: Array, inputs: Sequence[Tensor], backward: Any) -> Tensor:
    """The result of an operation as a tensor, on the tape if a gradient may be wanted.
    `backward(grad)` gets the gradient of the loss for `data` and returns, for each input, None, a
    `Picked`, or an array (`grad`, a view, a new one) of its shape or what that broadcast to."""
    result = Tensor(data)
    for x in inputs:  # a view has its array's memory, so it has its version too
        result.version = x.version if memory(x.data) == memory(data) else result.version
    if is_recorded(*inputs):
        result.requires_grad = True
        result._node = Node(name, result, inputs, backward)
    return result


def memory(array: Any) -> int:
    """A name for the memory of an array, which is that of its views too."""
    return id(array if getattr(array, "base", None) is None else array.base)


def node_of(x: Tensor) -> Any:
    """The operation that made `x`, or a new leaf that adds to `x.grad`; None: no gradient goes."""
    if x._node is None and x.requires_grad:
        check_leaf(x.requires_grad, x.dtype)
        return Node(LEAF, x, (), x._accumulate)
    return x._node


def comparison(name: str) -> Any:
    """The method of this name, which gives a tensor of booleans, for `where`."""
    return lambda self, other: Tensor(getattr(self.data, name)(as_tensor(other, self).data))


def reflected(name: str) -> Any:
    """The method of this name for the right operand, where the left one is no tensor."""
    return lambda self, other: getattr(as_tensor(other, self), name)(self)


class Tensor(Habits):
    """An n-dimensional array on the CPU (NumPy) or the GPU (CuPy) that can carry a gradient.

    `data` is an array, or a tensor's (off the tape), which is kept as it is; numbers and lists of
    them become float32. `dtype` ("float32", "bfloat16", …) and `device` ("cpu", "gpu") convert it.
    With `requires_grad` it is a leaf, to whose `.grad`, an array like `data`, `backward()` adds."""

    __slots__ = ("__weakref__", "_data", "_node", "grad", "requires_grad", "version")

    def __init__(
        self, data: Any, requires_grad: bool = False, dtype: Any = None, device: Any = None
    ) -> None:
        self.version: list[int] = data.version if isinstance(data, Tensor) else [0]  # changes
        data = as_array(data.data if isinstance(data, Tensor) else data, dtype)
        if requires_grad:
            check_leaf(requires_grad, data.dtype)
        self._data: Array = data if device is None else Tensor(data).to(device).data
        self.grad: Array | None = None
        self._node: Node | None = None
        self.requires_grad = bool(requires_grad)

    def _set_data(self, data: Array) -> None:
        self.version[0] += data is self._data  # the same again, as after t.data -= 1: it changed
        self._data = Tensor(data).data

    data = property(lambda self: self._data, _set_data)
    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    T = property(lambda self: self.transpose())
    device = property(lambda self: "cpu" if isinstance(self.data, np.ndarray) else "gpu")

    def detach(self) -> Tensor:
        """The same data, off the tape."""
        return Tensor(self)

    def to(self, device: str) -> Tensor:
        """The tensor on another device, "cpu" or "gpu"; gradients flow back across."""
        from micrograd_gpt.arrays.devices import to_device

        data, here = to_device(self.data, device), self.device
        return record("to", data, [self], lambda grad: (to_device(grad, here),))

    def astype(self, dtype: Any) -> Tensor:
        """This tensor in another type; a float's gradient comes back in the type of this tensor."""
        data = converted(self.data, dtype)
        result = Tensor(self if data is self.data else data)
        if is_recorded(self) and result.dtype.kind not in "iub":
            result.requires_grad, result._node = True, node_of(self)
        return result

    def backward(self, grad: Any = None) -> None:
        """Add the gradient with respect to every leaf to its `.grad`, starting from `grad`, of this
        tensor's shape (a single number's is 1). RuntimeError where there is no tape or a spent one,
        or an array it needs was changed, as by `t.data -= 1`; `t.data[0] = 1` goes unnoticed."""
        if not self.requires_grad:
            raise RuntimeError("needs no gradient: no leaf that requires one led to this tensor")
        if grad is None and self.size != 1:
            raise RuntimeError(f"backward() from shape {self.shape}: give a gradient, or .sum() it")
        start = np.ones_like(self.data) if grad is None else Tensor(grad).data.astype(self.dtype)
        if start.shape != self.shape:
            raise ValueError(f"backward(): a gradient of shape {start.shape} for {self.shape}")
        node = node_of(self)
        walk_back(node, start.astype(node.dtype, copy=False))

    def _accumulate(self, part: Array | Picked) -> tuple[()]:
        """Add to `.grad`, in place where there is one; a view of another gradient is copied."""
        if self.grad is None or (np.isscalar(self.grad) and self.grad == 0):  # as in micrograd
            new = fit(part, self.shape, self.dtype)
            self.grad = new if new.base is None else new.copy()
        elif isinstance(part, Picked):
            add_at(self.grad, *part)
        else:
            self.grad += fit(part, self.shape, self.dtype)
        return ()  # a leaf has no parents to send parts to

    def __add__(self, other: Any) -> Tensor:
        a, b = operands("add", self, other)
        return record("add", a.data + b.data, [a, b], lambda grad: (grad, grad))

    def __sub__(self, other: Any) -> Tensor:
        a, b = operands("sub", self, other)
        return record("sub", a.data - b.data, [a, b], lambda grad: (grad, -grad))

    def __mul__(self, other: Any) -> Tensor:
        a, b = operands("mul", self, other)
        x, y = a.data, b.data
        return record("mul", x * y, [a, b], lambda grad: (grad * y, grad * x))

    def __truediv__(self, other: Any) -> Tensor:
        a, b = operands("div", self, other)
        x, y = a.data, b.data
        quotient = x / y
        return record("div", quotient, [a, b], lambda grad: (grad / y, -grad * quotient / y))

    @definition
    def __pow__(self, n: Any) -> Tensor:
        """To the power n, a number or a tensor; the gradient of n is NaN where this is below 0."""
        a, b = operands("pow", self, n)
        x, power, learned = a.data, b.data, b.requires_grad
        n = n if type(n) in (int, float) else power  # NumPy has fast ways for x**2 and x**0.5

        def backward(grad: Array) -> tuple[Array, Array | None]:
            is_flat = power == 0  # x**0 is 1 for every x
            dx = np.where(is_flat, 0, grad) * n * np.where(is_flat, 1, x) ** (n - 1)
            return dx, grad * x**n * np.log(np.where(x == 0, 1, x)) if learned else None

        return record("pow", x**n, [a, b], backward)

    def __neg__(self) -> Tensor:
        return record("neg", -self.data, [self], lambda grad: (-grad,))

    def __abs__(self) -> Tensor:
        return self * np.sign(self.data)  # with slope 0 at 0

    __radd__, __rmul__ = __add__, __mul__
    __rsub__, __rtruediv__ = reflected("__sub__"), reflected("__truediv__")
    __rmatmul__, __rpow__ = reflected("__matmul__"), reflected("__pow__")

    def exp(self) -> Tensor:
        y = np.exp(self.data)
        return record("exp", y, [self], lambda grad: (grad * y,))

    def log(self) -> Tensor:
        """The natural logarithm."""
        x = self.data
        return record("log", np.log(x), [self], lambda grad: (grad / x,))

    def sqrt(self) -> Tensor:
        return self**0.5

    def tanh(self) -> Tensor:
        y = np.tanh(self.data)
        return record("tanh", y, [self], lambda grad: (grad * (1 - y * y),))

    def sigmoid(self) -> Tensor:
        """1 / (1 + exp(-x)), computed so that no x overflows and small results keep digits."""
        small = np.exp(-np.abs(self.data))  # in (0, 1]
        y = np.where(self.data >= 0, 1, small) / (1 + small)
        return record("sigmoid", y, [self], lambda grad: (grad * y * (1 - y),))

    def relu(self) -> Tensor:
        x = self.data
        return record("relu", np.maximum(x, 0), [self], lambda grad: (np.where(x <= 0, 0, grad),))

    @definition
    def __matmul__(self, other: Any) -> Tensor:
        """(…, n, k) @ (…, k, m) -> (…, n, m), batch dimensions broadcast; vectors as in NumPy."""
        a, b = operands("matmul", self, other, broadcast=False)
        if a.ndim == 1:
            return (a[None, :] @ b)[0] if b.ndim == 1 else (a[None, :] @ b)[..., 0, :]
        if b.ndim == 1:
            return (a @ b[:, None])[..., 0]
        x, y = a.data, b.data

        def backward(grad: Array) -> tuple[Array, Array]:
            return grad @ y.swapaxes(-1, -2), x.swapaxes(-1, -2) @ grad

        return record("matmul", x @ y, [a, b], backward)

    @definition
    def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        sums = total(self.data, axis, keepdims=True)
        shape, short = self.shape, sums.shape  # all that the backward keeps
        y = sums if keepdims else sums.squeeze(axis)
        return record("sum", y, [self], lambda grad: (np.broadcast_to(grad.reshape(short), shape),))

    @definition
    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        total = self.sum(axis, keepdims)
        return total / (self.size / max(1, total.size))  # by how many went into each sum

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        """The largest element along `axis`; equal ones share the gradient equally."""
        x, largest = self.data, self.data.max(axis=axis, keepdims=True)

        def backward(grad: Array) -> tuple[Array]:
            is_largest = (x == largest) | (x != x)  # as NumPy sees it, NaN is
            share = grad.reshape(largest.shape) / is_largest.sum(axis=axis, keepdims=True)
            return (np.where(is_largest, share, 0),)

        return record("max", largest if keepdims else largest.squeeze(axis), [self], backward)

    def reshape(self, *shape: Any) -> Tensor:
        y, old = self.data.reshape(*shape), self.shape
        return record("reshape", y, [self], lambda grad: (grad.reshape(old),))

    def transpose(self, *axes: Any) -> Tensor:
        """Permute the axes; without arguments, reverse them. NumPy takes 0, 1 for no change."""
        order = axes[0] if axes and np.ndim(axes[0]) else axes
        if len(order) not in (0, self.ndim) or axes in ((0, 1), (0, -1), (-2, 1), (-2, -1)):
            raise ValueError(f"transpose: {order} for shape {self.shape}: to swap two, .swapaxes()")
        inverse = np.argsort([i % self.ndim for i in order or range(self.ndim)[::-1]]).tolist()
        y = self.data.transpose(*axes)
        return record("transpose", y, [self], lambda grad: (grad.transpose(inverse),))

    def swapaxes(self, a: int, b: int) -> Tensor:
        y = self.data.swapaxes(a, b)
        return record("swapaxes", y, [self], lambda grad: (grad.swapaxes(a, b),))

    def __getitem__(self, index: Any) -> Tensor:
        """NumPy's indexing; an element picked several times gets the sum of its gradients."""
        index = plain_index(index, self.data)
        return record("getitem", self.data[index], [self], lambda grad: (Picked(index, grad),))

    __eq__, __ne__, __lt__ = map(comparison, ("__eq__", "__ne__", "__lt__"))
    __le__, __gt__, __ge__ = map(comparison, ("__le__", "__gt__", "__ge__"))
    __hash__ = Habits.__hash__  # which Python takes away where __eq__ is defined


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """`a` where `condition` (array or tensor of booleans) is true, else `b`; one is a tensor."""
    a, b = operands("where", a, b)
    mask = np.array(Tensor(condition).data, like=a.data)
    y = np.where(mask, a.data, b.data)
    return record("where", y, [a, b], lambda g: (np.where(mask, g, 0), np.where(mask, 0, g)))


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join tensors along an existing axis."""
    tensors = list(map(as_tensor, tensors))
    y = np.concatenate([t.data for t in tensors], axis=axis)
    ends = np.cumsum([t.shape[axis] for t in tensors]).tolist()
    return record("concatenate", y, tensors, lambda grad: np.split(grad, ends[:-1], axis=axis))


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join tensors of one shape along a new axis."""
    tensors = list(map(as_tensor, tensors))
    return concatenate([t.reshape(np.expand_dims(t.data, axis).shape) for t in tensors], axis)


class Picked(NamedTuple):
    """The gradient of x that came through x[index]: `grad` there, zero everywhere else."""

    index: Any
    grad: Array


def tape_below(root: Node) -> list[Node]:
    """All nodes that `root` was computed from, each after its parents, and `root` itself."""
    seen, stack = {root: None}, [root]  # a dict keeps its order, so that sums are reproducible
    while stack:
        node = stack.pop()
        if node.backward is None:
            raise RuntimeError(f"backward() has freed the tape at {node.name!r}: compute it again")
        new = [parent for parent in node.parents if parent and parent not in seen]
        seen |= dict.fromkeys(new)
        stack += new
    return sorted(seen, key=lambda node: node.height)


def walk_back(root: Node, grad: Array) -> None:
    """Send `grad` from `root` down the tape to the leaves; an operation is spent once it is done.
    Two rules: nobody changes a gradient on its way; a leaf owns its `.grad`, so it gets copies."""
    tape, grads = tape_below(root), {root: grad}
    for node in tape:
        if any(version != [before] for version, before in node.versions):
            raise RuntimeError(f"an array of {node.name!r} was changed in place: compute it again")
    while tape:
        node = tape.pop()
        if node in grads:
            grad = grads.pop(node)
            parts = checked_parts(node.name, node.backward(grad), node.parents)
            for parent, part in zip(node.parents, parts, strict=True):
                if part is not None and parent and parent.name == LEAF:  # at once: nothing to hold
                    parent.backward(part.copy() if part is grad else part)
                elif part is not None and parent:
                    part = fit(part, parent.shape, parent.dtype)  # [...]: a sum of shape () too
                    grads[parent] = (grads[parent] + part)[...] if parent in grads else part
        if node.name != LEAF:
            node.backward, node.parents = None, ()


def fit(grad: Array | Picked, shape: tuple[int, ...], dtype: Any) -> Array:
    """`grad` as an array of this shape and dtype: indexing, broadcasting and promotion undone."""
    if isinstance(grad, Picked):
        everywhere = np.zeros(shape, dtype, like=grad.grad)
        add_at(everywhere, *grad)
        return everywhere
    if grad.shape != shape:
        grad = total(grad, tuple(range(grad.ndim - len(shape))))
        grad = total(grad, tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
    if grad.shape != shape:
        raise ValueError(f"a gradient of shape {grad.shape} for a tensor that is now {shape}")
    return converted(grad, dtype)


def total(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """Sums along `axis`, in float64: adding up a million float32s one by one would lose digits."""
    wide = None if x.dtype.kind in "iub" else np.float64
    sums = x.sum(axis=axis, keepdims=keepdims, dtype=wide)
    return sums if wide is None else sums.astype(x.dtype)


@definition
def add_at(total: Array, index: Any, part: Array) -> None:
    """Add `part` to total[index], in place; an element picked several times gets every part."""
    total[None][:0] = 0  # an error where it is read-only, as np.add.at does not ask
    parts = index if isinstance(index, tuple) else (index,)
    is_basic = all(type(p) in (int, slice, type(None), type(...)) for p in parts)  # bool is not
    if is_basic and isinstance(here := total[index], type(total)):
        here += part  # a view, not a scalar; each element is picked once
    else:
        np.add.at(total, index, part)


def operands(name: str, a: Any, b: Any, broadcast: bool = True) -> tuple[Tensor, Tensor]:
    """Both operands as tensors, on one device, with shapes that broadcast; else a clear error."""
    like = a if isinstance(a, Tensor) else b
    a, b = as_tensor(a, like), as_tensor(b, like)
    if a.device != b.device:
        raise ValueError(f"{name}: one is on the {a.device}, one on the {b.device}: move it .to()")
    if broadcast and a.shape != b.shape:
        try:
            np.broadcast_shapes(a.shape, b.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return a, b


def as_tensor(value: Any, like: Any = None) -> Tensor:
    """`value` as a tensor on the device of `like`. A number gets its dtype too, but float32 where
    that is half precision, or integer and the number is not."""
    if hasattr(value, "dtype") and not isinstance(value, np.integer | np.floating):
        return value if isinstance(value, Tensor) else Tensor(value)
    if not isinstance(value, int | float | np.number) or not isinstance(like, Tensor):
        what = "is no tensor or array, nor a number beside a tensor: Tensor() makes one of a list"
        raise TypeError(f"{value!r:.50} {what}")
    kinds = "fiu" if isinstance(value, int | np.integer) else "f"
    fits = like.dtype.kind in kinds and like.dtype != np.float16
    return Tensor(np.asarray(value, like.dtype if fits else np.float32, like=like.data))
