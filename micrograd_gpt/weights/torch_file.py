"""PyTorch's files, as torch.save writes them, read without PyTorch and without running any of them.

Since PyTorch 1.6 such a file is a zip archive in which nothing is compressed:

    archive/data.pkl    what was saved, as a Python pickle; each tensor in it refers to a storage
    archive/data/0      a storage, "0": numbers of one type, little-endian, end to end; then 1, 2, …
    archive/byteorder   "little" or "big" (older versions leave it out, and mean little)

Before, it was five pickles one after the other (a magic number, the format's version, facts about
the machine, what was saved, the list of the storages' keys), then for each key 8 bytes that say how
many numbers its storage has, and the numbers. Source: torch/serialization.py.

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

import io
import os
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.reading import FLOATS, StoredTensor, open_unbuffered

# GPT-2 XL's with its optimizer takes a tenth of this. No instruction makes more than about a
# hundred bytes of objects out of each of its own, so this limits the memory that a pickle can fill.
PICKLE_BYTES = 2 << 20
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + b"."
LEGACY_VERSION = 1001
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
    **{known.name: known for known in (ORDERED_DICT, REBUILD_TENSOR)},
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


def read_torch(path: str | Path) -> Any:
    """What was saved: dicts, lists, tuples, texts and numbers, with a TorchTensor for each tensor.

    An OrderedDict comes as a dict. Numbers of tensors are not read, but every place in the file is
    checked to be inside of it. Raises UserError, naming the file, for one that torch.save did not
    write or that is damaged, and for a pickle that needs anything else: nothing of it is run.
    """
    path = Path(path)
    try:
        with open_unbuffered(path) as raw, io.BufferedReader(raw) as file:
            start = file.read(len(LEGACY_START))
            if start.startswith(ZIP_MAGIC):
                return _read_zip(path, file)
            if start == LEGACY_START:
                return _read_legacy(path, file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        what = error if isinstance(error, ValueError) else "its pickle takes what is not there"
        raise UserError(f"{path} is damaged: {what}; fetch it again") from error
    raise UserError(f"{path} is not a file that torch.save wrote")


def read_state_dict(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a file that holds a dict of them, and nothing else, as pytorch_model.bin does.

    Raises UserError as `read_torch` does, and for a file that holds anything else.
    """
    path = Path(path)
    return stored_tensors(read_torch(path), path)


def stored_tensors(saved: Any, path: Path) -> dict[str, StoredTensor]:
    """A dict of TorchTensors of the file `path` as StoredTensors; UserError if it is none."""
    if not isinstance(saved, dict) or not saved:
        raise UserError(f"{path} does not hold a dict of tensors (torch.save(model.state_dict()))")
    for name, tensor in saved.items():
        if not isinstance(name, str) or not isinstance(tensor, TorchTensor):
            raise UserError(f"{path} holds {name!r}, which is not a tensor of a model")
    return {name: tensor.stored(name, path) for name, tensor in saved.items()}


# ----------------------------------------------------------------------------------------------
# The two formats: where the pickle is, and where each storage's numbers are


def _read_zip(path: Path, file: BinaryIO) -> Any:
    members = _members(file)
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise UserError(f"{path} is a zip archive, but not one that torch.save wrote")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members:
        order = _bytes_at(file, *members[f"{folder}byteorder"])
        if order != b"little":
            raise UserError(f"{path} holds numbers in the byte order {order[:16]!r}, not little")

    def storage(key: str, dtype: np.dtype, count: int) -> Storage:
        offset, size = members.get(f"{folder}data/{key}", (0, -1))
        if size != count * dtype.itemsize:
            raise ValueError(f"it has no storage {key[:80]!r} of {count} numbers")
        return Storage(dtype, count, offset)

    return _Machine(path, _bytes_at(file, *members[pickles[0]]), storage).run()


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Each file in the archive, with the byte at which its contents begin, and how many there are.

    Python's zipfile reads the directory at the archive's end. Contents are never unpacked, so they
    cannot grow: what is not stored as it is, is refused.
    """
    total = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, struct.error) as error:
        raise ValueError(f"its zip directory cannot be read ({error})") from error
    members = {}
    for info in infos:
        name = info.filename
        encrypted = info.flag_bits & 1
        if info.compress_type != zipfile.ZIP_STORED or encrypted:
            raise ValueError(f"{name!r} is compressed or encrypted, which torch.save does not do")
        # Before the contents stands a header of 30 bytes, the name, and an extra field that may
        # have another length than in the directory: torch pads it to align the numbers.
        header = _bytes_at(file, info.header_offset, 30)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
        start = info.header_offset + 30 + name_bytes + extra_bytes
        if not header.startswith(ZIP_MAGIC) or start + info.file_size > total:
            raise ValueError(f"{name!r} does not lie inside of it")
        if info.file_size != info.compress_size or name in members:
            raise ValueError(f"its zip directory contradicts itself about {name!r}")
        members[name] = start, info.file_size
    return members


def _read_legacy(path: Path, file: BinaryIO) -> Any:
    total = os.fstat(file.fileno()).st_size
    storages: dict[str, Storage] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> Storage:
        found = storages.setdefault(key, Storage(dtype, count, -1))
        if (found.dtype, found.count) != (dtype, count):
            raise ValueError(f"it describes the storage {key!r} in two ways")
        return found

    machine = _Machine(path, _bytes_at(file, 0, min(total, PICKLE_BYTES)), storage)
    _magic, version, machine_facts, saved, keys = (machine.run() for _ in range(5))
    if version != LEGACY_VERSION or not isinstance(machine_facts, dict):
        raise UserError(f"{path} has a version of PyTorch's format that is unknown here")
    if machine_facts.get("little_endian") is not True:
        raise UserError(f"{path} holds numbers in big-endian byte order, which is not supported")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has no list of its storages")
    at = machine.at
    for key in keys:
        count = int.from_bytes(_bytes_at(file, at, 8), "little")
        if key not in storages or storages[key].count != count:
            raise ValueError(f"it describes the storage {key!r} in two ways")
        storages[key].offset = at + 8
        at += 8 + count * storages[key].dtype.itemsize
    if at > total:
        raise ValueError(f"it has {total:,} bytes where its storages take {at:,}")
    for key, found in storages.items():
        if found.offset < 0:
            raise ValueError(f"it lacks the storage {key!r}")
    return saved


def _bytes_at(file: BinaryIO, start: int, count: int) -> bytes:
    if count > PICKLE_BYTES:
        raise ValueError(f"its pickle has {count:,} bytes, which no model needs")
    file.seek(start)
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it is cut short")
    return data


# ----------------------------------------------------------------------------------------------
# The machine that a pickle is a program for


class _Machine:
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


INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
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
    b"c": _Machine.name,
    b"R": _Machine.call,
    b"b": _Machine.set_attributes,
    b"Q": _Machine.refer,
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


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
