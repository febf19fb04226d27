"""What Python and NumPy ask of a tensor besides arithmetic: nothing here is about gradients.

`Tensor` adds to this base all that is. What would lose a gradient is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import numpy as np

NO_GRADIENT = (np.shape, np.ndim, np.size, np.isnan, np.isinf, np.isfinite)  # is asked of these
OPERATORS = {  # what an array on the left calls, and what the tensor on its right does
    np.add: "__radd__",
    np.subtract: "__rsub__",
    np.multiply: "__rmul__",
    np.true_divide: "__rtruediv__",
    np.power: "__rpow__",
    np.matmul: "__rmatmul__",
    np.equal: "__eq__",
    np.not_equal: "__ne__",
    np.less: "__gt__",
    np.less_equal: "__ge__",
    np.greater: "__lt__",
    np.greater_equal: "__le__",
}


def check_leaf(requires_grad: Any, dtype: Any) -> None:
    """TypeError where `requires_grad` is a dtype, which stands second in NumPy, or a size or row;
    ValueError where a leaf of integers requires a gradient, which would be rounded to 0."""
    if not isinstance(requires_grad, Integral | np.bool_) or requires_grad not in (0, 1):
        raise TypeError(
            f"requires_grad must be True or False, not {requires_grad!r}: if that is a dtype or a "
            "device, write dtype=… or device=…; more numbers stand in one list, Tensor([…])"
        )
    if requires_grad and dtype.kind in "iub":
        raise ValueError(f"a tensor of {dtype} cannot require a gradient: use a float")


def checked_parts(name: str, parts: Any, parents: tuple[Any, ...]) -> list[Any]:
    """What the backward of the operation `name` returned, a tuple or anything that can be gone
    through; TypeError unless that is something for each of its inputs."""
    found = list(parts) if np.iterable(parts) else None
    if found is None or len(found) != len(parents):
        given = f"of {len(found)}" if found is not None else f"{parts!r:.40}"
        raise TypeError(
            f"the backward of {name!r} must return a tuple that has for each input, of which there "
            f"are {len(parents)}, a gradient, an array, or None; not {given}"
        )
    return found


def is_plain(data: Any) -> bool:
    """Whether this is an array that computes as arrays do, of NumPy, CuPy or this package. For a
    matrix, * is a product of matrices; masked numbers and a table's columns are added otherwise."""
    is_array = hasattr(data, "__array_function__")
    return is_array and not isinstance(data, (np.matrix, np.ma.MaskedArray))


def from_list(values: Any) -> np.ndarray:
    """Numbers, lists of them, or an array that is not plain, as one that is, of integers where a
    list is empty. ValueError where rows differ in length, TypeError where numbers are masked."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise TypeError("a tensor has no masked numbers: the array's .filled(0) puts 0 there")
    try:
        array = np.array(values)
    except ValueError as error:
        if "inhomogeneous" not in str(error):
            raise
        raise ValueError("the rows of a list differ in length, and must be equally long") from error
    return array if array.size or hasattr(values, "dtype") else array.astype(int)


def plain_index(index: Any, like: Any) -> Any:
    """The index, with its tensors and lists as arrays, and every array on the device of `like`."""
    if isinstance(index, tuple):
        return tuple(plain_index(part, like) for part in index)
    index = index.data if isinstance(index, Habits) else index
    index = from_list(index) if isinstance(index, list) else index
    return np.array(index, like=like) if getattr(index, "ndim", 0) else index  # a copy of one's own


class Habits:
    """The base of Tensor, which has `data`, an array, and `requires_grad`."""

    __slots__ = ()

    data: Any
    requires_grad: bool
    _node: Any
    to: Callable[[str], Any]

    __hash__ = object.__hash__  # as a key a tensor is itself, whatever it holds

    def __repr__(self) -> str:
        leaf = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({self.data!r}{f', made by {self.made_by()}' if self._node else leaf})"

    def made_by(self) -> str:
        """The operation that made this result. A cast has the node of what was cast."""
        return self._node.name.replace("leaf", "astype")

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i, _ in enumerate(self.data))  # type: ignore[index]  # TypeError if 0-d

    def numpy(self) -> np.ndarray:
        """The data as a NumPy array: itself on the CPU, a copy from the GPU."""
        data = self.to("cpu").data
        return data if type(data) is np.ndarray else data[...]  # the numbers of an int8 matrix

    def item(self) -> float:
        """The number in a tensor of one element; ValueError where there are more, or none."""
        if self.data.size != 1:
            raise ValueError(
                f"a tensor of shape {self.data.shape} is not a single number: take an element or "
                "its .sum(), and in an `if` its .numpy().any() or .all()"
            )
        return self.data.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.data.ndim == 0 else super().__format__(spec)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.requires_grad:
            raise TypeError("NumPy would lose the gradient: for the data alone call .numpy()")
        return np.array(self.numpy(), dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **options: Any) -> Any:
        """array * tensor, which is a tensor, and np.exp(tensor): that of its numbers (NEP 13)."""
        if ufunc in OPERATORS and args[-1] is self and method == "__call__" and not options:
            return getattr(self, OPERATORS[ufunc])(args[0])
        function = ufunc if method == "__call__" else getattr(ufunc, method)
        return self.__array_function__(function, (), args, options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        """A function of NumPy's on tensors, as np.mean(tensor): that on their numbers (NEP 18)."""

        def numbers(value: Any) -> Any:
            if isinstance(value, Habits):
                return value.data if function in NO_GRADIENT else np.asarray(value)
            return type(value)(map(numbers, value)) if type(value) in (list, tuple) else value

        return function(*numbers(args), **{name: numbers(value) for name, value in options.items()})

    def __iadd__(self, other: Any) -> Any:
        return self._changed(self + other)

    def __isub__(self, other: Any) -> Any:
        return self._changed(self - other)

    def __imul__(self, other: Any) -> Any:
        return self._changed(self * other)

    def __itruediv__(self, other: Any) -> Any:
        return self._changed(self / other)

    def __ipow__(self, other: Any) -> Any:
        return self._changed(self**other)

    def __imatmul__(self, other: Any) -> Any:
        return self._changed(self @ other)

    def _changed(self, result: Any) -> Any:
        """What `t -= x` makes of t, where `t - x` is the result.

        A parameter, and any other leaf that learns, changes in place, within no_grad. Any other
        name gets the new tensor, so that what was computed with the old one keeps its gradient, and
        an array that the old one was made of its numbers.
        """
        is_plain = type(self) is type(result)  # and no Parameter
        if self._node is not None or (is_plain and not self.requires_grad):
            return result
        if result.requires_grad:
            raise RuntimeError("a leaf that requires a gradient changes in place within no_grad()")
        self.data[...] = result.data
        self.data = self.data  # tells the tape that it changes
        return self
