"""The pickles in PyTorch's files, read by a machine that can run nothing.

A pickle is a program for a small machine with a stack, one byte an instruction:

    }               push an empty dict
    X 3 0 0 0 wte   push the text of 3 bytes "wte"
    K 7             push the number 7
    s               take a value and a key off the stack, and store them in the dict below
    .               end: the result is what is on the stack

Two of the instructions look up any Python function by its name and call it. That is why reading a
stranger's pickle with Python's own reader means running the stranger's program. The machine here
has no such lookup. It knows the names that a file of tensors needs (NAMES), has a meaning of its
own for each, and refuses any other. Source: the opcodes at the end of Python's pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.reading import FLOATS, StoredTensor

ADVICE = (
    "convert it to model.safetensors, as huggingface.co/spaces/safetensors/convert does for a"
    " model on the Hub, and Transformers' save_pretrained for one that you trust"
)


@dataclass(frozen=True)
class Name:
    """A name that a pickle may use; `dtype` is that of the storages it stands for, if it does."""

    name: str
    dtype: np.dtype | None = None


ORDERED_DICT = Name("collections.OrderedDict")
REBUILD_TENSOR = Name("torch._utils._rebuild_tensor_v2")
REBUILD_PARAMETER = Name("torch._utils._rebuild_parameter")  # its data, requires_grad and hooks
STORAGES = {
    "Float": FLOATS["float32"],
    "Double": FLOATS["float64"],
    "Half": FLOATS["float16"],
    "BFloat16": FLOATS["bfloat16"],
    "Long": np.dtype("<i8"),
    "Int": np.dtype("<i4"),
    "Short": np.dtype("<i2"),
    "Char": np.dtype("i1"),
    "Byte": np.dtype("u1"),
    "Bool": np.dtype("?"),
}
NAMES = {
    **{known.name: known for known in (ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER)},
    **{f"torch.{kind}Storage": Name(kind, dtype) for kind, dtype in STORAGES.items()},
}


@dataclass(slots=True)
class Storage:
    """`count` numbers of `dtype`, from byte `offset` of the file on."""

    dtype: np.dtype
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """The part of a storage that begins at its number `start`; `strides` are counted in numbers."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def stored(self, name: str, path: Path) -> StoredTensor:
        """The tensor as the other formats give it; UserError if it is not in C order."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if stride != step and size > 1 and 0 not in self.shape:
                raise UserError(
                    f"{path}: {name!r} is not stored row by row (its strides are {self.strides});"
                    " save tensor.contiguous() instead"
                )
            step *= size
        storage = self.storage
        offset = storage.offset + self.start * storage.dtype.itemsize
        return StoredTensor(name, path, storage.dtype, self.shape, offset)


class Machine:
    """Runs the pickles that stand in `data` one after the other; `at` is the byte it has come to.

    `storage` gives a storage's place for its key, dtype and count. Raises UserError for what may
    not be asked for, and ValueError, IndexError or KeyError for what makes no sense.
    """

    def __init__(
        self, path: Path, data: bytes, storage: Callable[[str, np.dtype, int], Storage]
    ) -> None:
        self.path, self.data, self.storage = path, data, storage
        self.at = 0

    def run(self) -> Any:
        """Run one pickle, which begins at `at`, and return its result."""
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths that the stack had: "all since then" is one operand
        self.memo: dict[int, Any] = {}  # what is used several times, by number
        while (code := self.take(1)) != b".":
            instruction = INSTRUCTIONS.get(code)
            if instruction is None:
                raise UserError(
                    f"{self.path} is refused: its pickle uses the instruction {code!r}, which"
                    f" torch.save does not write; {ADVICE}"
                )
            instruction(self)
        return self.stack.pop()

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            raise ValueError("its pickle is cut short, or longer than any model needs")
        self.at += count
        return taken

    def number(self, format: str) -> Any:
        """The next number, in a format of the module struct."""
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def line(self) -> str:
        """The next bytes up to the end of the line, as text."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise ValueError("its pickle has a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode("ascii", errors="replace")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        """Take everything since the last mark off the stack."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(values)

    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("its pickle appends to what is not a list")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError("its pickle sets items of what is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Other keys could take forever to hash, or all have the same hash.
            if not isinstance(key, str) and not (type(key) is int and abs(key) < 2**31):
                raise ValueError("its pickle has a dict whose keys are not texts or small numbers")
            target[key] = value

    def name(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in NAMES:
            raise UserError(
                f"{self.path} is refused: its pickle asks for {name[:80]!r}, and a pickle that may"
                f" ask for that could run any code; {ADVICE}"
            )
        self.push(NAMES[name])

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is ORDERED_DICT and isinstance(arguments, tuple) and not arguments:
            self.push({})
        elif function is REBUILD_TENSOR and isinstance(arguments, tuple):
            self.push(_tensor(arguments))
        elif function is REBUILD_PARAMETER:
            self.push(_data(arguments))
        else:
            raise ValueError("its pickle calls something in an unknown way")

    def set_attributes(self) -> None:
        # torch.save stores the attribute `_metadata` of a state dict, which no reader needs.
        attributes, target = self.stack.pop(), self.stack[-1]
        if not isinstance(attributes, dict) or not isinstance(target, dict):
            raise ValueError("its pickle sets attributes of what is not a dict")

    def refer(self) -> None:
        # ("storage", its type, its key, the device it was on, how many numbers it has); before
        # PyTorch 1.6 also None, where the oldest files described a view of another storage.
        match self.stack.pop():
            case ("storage", Name(dtype=np.dtype() as dtype), str(key), str(), count, *views):
                if views in ([], [None]) and _is_size(count):
                    return self.push(self.storage(key, dtype, count))
        raise ValueError("its pickle refers to something else than a storage")


INSTRUCTIONS: dict[bytes, Callable[[Machine], None]] = {
    # Values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8")),
    # Containers
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    # What is used several times
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    # Everything else
    b"\x80": lambda m: _check_protocol(m.number("<B")),
    b"c": Machine.name,
    b"R": Machine.call,
    b"b": Machine.set_attributes,
    b"Q": Machine.refer,
}


def _check_protocol(protocol: int) -> None:
    if protocol != 2:
        raise ValueError(f"its pickle has protocol {protocol}, where torch.save writes 2")


def _tensor(arguments: tuple[Any, ...]) -> TorchTensor:
    # What torch._utils._rebuild_tensor_v2 takes; the rest are requires_grad and hooks.
    match arguments:
        case (Storage() as storage, start, tuple(shape), tuple(strides), *_):
            numbers = (start, *shape, *strides)
            if len(shape) == len(strides) <= 8 and all(map(_is_size, numbers)):
                last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
                end = start if 0 in shape else start + last + 1
                if end <= storage.count:
                    return TorchTensor(storage, start, shape, strides)
                raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    raise ValueError("its pickle describes a tensor that makes no sense")


def _data(arguments: Any) -> TorchTensor:
    match arguments:
        case (TorchTensor() as data, bool(), {}):
            return data
    raise ValueError("its pickle describes a parameter that makes no sense")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
