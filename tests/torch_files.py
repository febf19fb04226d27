"""PyTorch's files put together by hand, without PyTorch: right ones, and what attackers write."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

KINDS = {"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16"}
KINDS |= {"int64": "Long", "uint8": "Byte", "bool": "Bool"}


class Raw(bytes):
    """Instructions of a pickle, to stand where a value would."""


class Part(NamedTuple):
    """A tensor: the part of the storage `key`, an array, that begins at its number `start`."""

    key: str
    storage: np.ndarray
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def pickled(value: Any) -> bytes:
    """A pickle of protocol 2, as torch.save writes it."""
    return b"\x80\x02" + instructions(value) + b"."


def instructions(value: Any) -> bytes:
    """What pushes a value: plain data, an array (a storage of its own), a Part, or Raw."""
    match value:
        case Raw():
            return bytes(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case dict():
            items = b"".join(instructions(x) for item in value.items() for x in item)
            return b"}(" + items + b"u"
        case list():
            return b"](" + b"".join(map(instructions, value)) + b"e"
        case Part(key, array, start, shape, strides):
            reference = storage_reference(key, KINDS[array.dtype.name], array.size)
            arguments = (reference, start, shape, strides, False, called("collections OrderedDict"))
            return called("torch._utils _rebuild_tensor_v2", *arguments)
        case tuple():
            return b"(" + b"".join(map(instructions, value)) + b"t"
    raise TypeError(type(value))


def called(name: str, *arguments: Any) -> Raw:
    """What calls `name`, "module function"."""
    return Raw(b"c" + name.replace(" ", "\n").encode() + b"\n" + instructions(arguments) + b"R")


def storage_reference(key: Any, kind: str, count: Any, *more: Any) -> Raw:
    """What refers to a storage; `more` is what stands behind in the old format."""
    kind = Raw(f"ctorch\n{kind}Storage\n".encode())
    return Raw(instructions(("storage", kind, key, "cpu", count, *more)) + b"Q")


def whole(key: str, array: np.ndarray) -> Part:
    """An array as a tensor that has a storage of its own."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Part(key, array, 0, array.shape, strides)


def write_zip(path: Path, pickle: bytes, storages: Mapping[str, bytes], **members: bytes) -> None:
    """A file in today's format, by Python's zipfile; `members` are others in the archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        for name, content in {"byteorder": b"little", **members}.items():
            archive.writestr(f"archive/{name}", content)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)


def save(path: Path, value: Any) -> None:
    """torch.save: dicts, lists, plain data, and an array or a Part for each tensor."""
    storages: dict[str, bytes] = {}

    def parts(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = whole(str(len(storages)), value)
        if isinstance(value, Part):
            storages[value.key] = value.storage.tobytes()
        elif isinstance(value, dict):
            value = {key: parts(item) for key, item in value.items()}
        elif isinstance(value, list):
            value = [parts(item) for item in value]
        return value

    pickle = pickled(parts(value))
    write_zip(path, pickle, storages)
