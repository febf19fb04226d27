"""Named tensors in safetensors files: read straight into the arrays that will hold them.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (for every tensor its
dtype, shape and place), then the tensors' bytes end to end: https://github.com/huggingface/safetensors

The safetensors library judges whether a file is well formed. The bytes are read here, at the
offsets its header gives, because the library's NumPy interface maps the whole file and copies each
tensor out of the map: while a model is filled, twice its size is resident. Reading into the
parameter itself keeps one copy, and converts float16 and bfloat16 a chunk at a time on the way.

The format holds no checksum: a flipped bit in a weight cannot be seen.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays import bfloat16
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import written_whole

CHUNK = 1 << 20  # bytes converted at a time: small enough to stay in the processor's cache

# The format's dtypes, in its own order: files begin with the tensors of the last dtype here.
# NumPy has no bfloat16: its 16 bits are held in a uint16.
STORED_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
FORMAT_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items() if name != "BF16"}
FLOAT_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `count` numbers of the format's dtype from byte `offset` of `path`."""

    path: Path
    dtype: str  # the format's name, a key of STORED_DTYPES
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * STORED_DTYPES[self.dtype].itemsize


class TensorFile:
    """A safetensors file, or a sharded set of them read as one.

    `path` is `*.safetensors`, or the `*.safetensors.index.json` of a sharded set. The headers are
    read and checked at once, the tensors when they are asked for; no file stays open or mapped.
    Raises UserError, naming the file, for one that is missing, damaged or not safetensors.

    `entries` maps each tensor's name to its Entry, in the order they are stored; `shapes` maps it
    to its shape; `metadata` is the header's own dictionary of texts (empty for a sharded set).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        if self.path.name.endswith(".json"):
            self.entries = _read_shards(self.path)
        else:
            self.entries, self.metadata = _read_header(self.path)
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fill `out` (of the tensor's shape) with the tensor, in `out`'s dtype.

        Numbers of `out`'s own dtype go from the file into `out` with nothing in between; others are
        converted CHUNK by CHUNK. float64 or float32 beyond the range of a smaller float becomes
        infinity. Raises UserError where the file can't be read or holds no floats for a float.
        """
        entry = self.entries[name]
        if out.shape != entry.shape:
            raise ValueError(f"{name}: need an array of shape {entry.shape}, not {out.shape}")
        if not out.flags.c_contiguous:  # laid out otherwise than the file: by way of a copy
            self.read_into(name, copy := np.empty(out.shape, out.dtype))
            out[...] = copy
            return
        stored = STORED_DTYPES[entry.dtype]
        with open_unbuffered(entry.path) as file:
            file.seek(entry.offset)
            if entry.dtype != "BF16" and out.dtype == stored:
                fill(file, out)
                return
            if entry.dtype not in FLOAT_NAMES.values() or out.dtype.kind != "f":
                raise UserError(
                    f"{entry.path}: {name!r} holds {entry.dtype}, where {out.dtype} is needed"
                )
            flat = out.reshape(-1)
            for start, chunk in chunks(file, stored, entry.count):
                if entry.dtype == "BF16":
                    chunk = bfloat16.from_bits(chunk)
                with np.errstate(over="ignore"):
                    flat[start : start + chunk.size] = chunk

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype; bfloat16, which NumPy lacks, as the same float32 numbers."""
        entry = self.entries[name]
        is_bfloat16 = entry.dtype == "BF16"
        out = np.empty(entry.shape, "float32" if is_bfloat16 else STORED_DTYPES[entry.dtype])
        self.read_into(name, out)
        return out

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit for bit (dtype and shape too)."""
        a, b = self.entries[first], self.entries[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with open_unbuffered(a.path) as file_a, open_unbuffered(b.path) as file_b:
            file_a.seek(a.offset)
            file_b.seek(b.offset)
            pairs = zip(
                chunks(file_a, np.dtype("u1"), a.nbytes),
                chunks(file_b, np.dtype("u1"), b.nbytes),
                strict=True,
            )
            return all(np.array_equal(x, y) for (_, x), (_, y) in pairs)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> None:
    """Write named arrays to `path`, whole or not at all, byte for byte as the library would.

    `dtype` ("float16", "bfloat16", "float32" or "float64") stores the floating-point arrays in it,
    rounded to nearest, ties to even; None keeps each array's own. One chunk at a time is converted,
    so no second copy of the model is made. Raises UserError for a finite number that the smaller
    dtype would turn into infinity, a dtype the format lacks, or a file that can't be written.
    """
    path = Path(path)
    if dtype is not None and dtype not in FLOAT_NAMES:
        raise UserError(f"cannot store tensors as {dtype!r}; choose from {', '.join(FLOAT_NAMES)}")

    def format_name(name: str) -> str:
        array = tensors[name]
        if dtype is not None and array.dtype.kind == "f":
            return FLOAT_NAMES[dtype]
        if array.dtype.newbyteorder("<") not in FORMAT_NAMES:
            raise UserError(f"{path}: safetensors cannot store {name}, of dtype {array.dtype}")
        return FORMAT_NAMES[array.dtype.newbyteorder("<")]

    # The library's order: widest numbers first, so that every tensor is aligned; then by name.
    stored = {name: format_name(name) for name in tensors}
    rank = {dtype: -position for position, dtype in enumerate(STORED_DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[stored[name]], name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in order:
        end = offset + tensors[name].size * STORED_DTYPES[stored[name]].itemsize
        header[name] = {
            "dtype": stored[name],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = np.ascontiguousarray(tensors[name]).reshape(-1)
            step = CHUNK // flat.itemsize
            for start in range(0, flat.size, step):
                file.write(_encode(flat[start : start + step], stored[name], name))


def _encode(chunk: np.ndarray, dtype: str, name: str) -> memoryview:
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            encoded = bfloat16.to_bits(chunk.astype(np.float32, copy=False))
            rounded = bfloat16.from_bits(encoded)
        else:
            encoded = rounded = chunk.astype(STORED_DTYPES[dtype], copy=False)
    if encoded is not chunk and np.isinf(rounded).sum() != np.isinf(chunk).sum():
        raise UserError(
            f"{name} holds numbers too large for {dtype}; store it as float32 or bfloat16"
        )
    return encoded.data.cast("B")


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    # Imported here: most programs that import the package read no safetensors file.
    from safetensors import SafetensorError, safe_open

    with open_unbuffered(path) as file:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            size = os.fstat(file.fileno()).st_size
            raise UserError(
                f"{path}: {size:,} bytes that are not a whole safetensors file"
                f" ({_one_line(error)}); fetch it again"
            ) from error
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise UserError(f"{path}: its header is damaged ({_one_line(error)})") from error
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if facts["dtype"] not in STORED_DTYPES:
            raise UserError(f"{path}: {name!r} has dtype {facts['dtype']}, which is not supported")
        start, _ = facts["data_offsets"]
        entries[name] = Entry(path, facts["dtype"], tuple(facts["shape"]), 8 + length + start)
    return entries, metadata


def _read_shards(index: Path) -> dict[str, Entry]:
    # {"weight_map": {tensor's name: file beside the index}, ...}, as Hugging Face writes it.
    with open_unbuffered(index) as file:
        text = file.readall()
    try:
        weight_map = json.loads(text)["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not the index of a sharded safetensors set") from error
    entries: dict[str, Entry] = {}
    for shard in sorted(set(files.values())):
        if Path(shard).name != shard or shard in ("", "..") or not shard.isprintable():
            raise UserError(f"{index}: the shard {shard!r} is not a file beside the index")
        found, _ = _read_header(index.with_name(shard))
        listed = {name for name, file in files.items() if file == shard}
        if listed != found.keys():
            name = min(listed ^ found.keys())
            where = "does not hold" if name in listed else "holds, against the index,"
            raise UserError(f"{index}: the shard {shard} {where} {name!r}")
        entries.update(found)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def open_unbuffered(path: Path) -> FileIO:
    """Open for reading with no buffer between the file and the array; UserError if it can't be."""
    try:
        return open(path, "rb", buffering=0)
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {why}") from error


def fill(file: FileIO, out: np.ndarray) -> None:
    """Read exactly `out`'s bytes into it; UserError where the file has fewer or can't be read."""
    if out.size == 0:
        return
    remaining = out.reshape(-1).data.cast("B")
    while len(remaining):  # one read may give less than asked for (Linux: at most 2 GiB)
        try:
            got = file.readinto(remaining)
        except OSError as error:
            raise UserError(f"cannot read {file.name}: {error.strerror or error}") from error
        if not got:
            raise UserError(f"{file.name} ended early; it was changed while it was read")
        remaining = remaining[got:]


def chunks(
    file: FileIO, dtype: np.dtype, count: int, into: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Read `count` numbers, CHUNK bytes at a time, and yield each chunk with its start.

    The chunks are pieces of `into` (flat, of this dtype) where given, else one buffer used again.
    """
    step = CHUNK // dtype.itemsize
    buffer = np.empty(min(count, step), dtype) if into is None else into
    for start in range(0, count, step):
        first = 0 if into is None else start
        chunk = buffer[first : first + min(step, count - start)]
        fill(file, chunk)
        yield start, chunk


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
