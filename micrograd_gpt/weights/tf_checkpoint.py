"""TensorFlow's V2 checkpoints, the format OpenAI published GPT-2 in, read without TensorFlow.

A checkpoint called `model.ckpt` is

    model.ckpt.index                 a table from each variable's name to its dtype, shape and place
    model.ckpt.data-00000-of-00001   the numbers themselves, little-endian, in one or more shards

and beside it a file `checkpoint` names the latest one. The index is a LevelDB table:

    data block | data block | … | meta-index block | index block | footer (48 bytes)

    block   entries, then the offsets of some of them (for searching), then the number of offsets;
            after it one byte, its compression, and four, the masked CRC-32C of both
    entry   how many bytes its key shares with the key before, how many follow, how long its value
            is (three varints); the rest of the key; the value
    footer  where the meta-index and the index block are (offset, length: varints); a magic number

The index block's values are the places of the data blocks. A data block's values are protocol
buffers: a BundleHeaderProto under the empty key, a BundleEntryProto under each variable's name.
Sources: LevelDB's doc/table_format.md; TensorFlow's core/util/tensor_bundle and
core/protobuf/tensor_bundle.proto; protobuf.dev's "Encoding".

Every block and every tensor carries a CRC-32C, and all of them are checked: the numbers read here
are the numbers that were written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.crc32c import crc32c, mask
from micrograd_gpt.weights.reading import FLOATS, StoredTensor, open_unbuffered

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
# TensorFlow's DataType, as far as it is read
DTYPES = {1: FLOATS["float32"], 2: FLOATS["float64"], 19: FLOATS["float16"]}


@dataclass(frozen=True)
class Variable(StoredTensor):
    """A tensor of a checkpoint, with its masked CRC-32C."""

    masked_crc: int

    def chunks(
        self, into: np.ndarray | None = None, row: int = 1
    ) -> Iterator[tuple[int, np.ndarray]]:
        """StoredTensor.chunks, with the checksum compared at the end; UserError if it differs."""
        crc = 0
        for start, chunk in super().chunks(into, row):
            crc = crc32c(chunk, crc)
            yield start, chunk
        if mask(crc) != self.masked_crc:
            raise UserError(
                f"{self.path} is damaged: the checksum of {self.name!r} is wrong; remove"
                f" {self.path.parent} and fetch it again"
            )


class TFCheckpoint:
    """The checkpoint in a folder: the one its `checkpoint` file names, or else its only one.

    The index is read and checked at once, the tensors when they are asked for. `variables` maps
    each name to its Variable, `shapes` to its shape. Raises UserError, naming the file, for one
    that is missing or damaged, or that uses what OpenAI's checkpoints do not: compressed blocks,
    partitioned variables, big-endian numbers, dtypes that are not floats.
    """

    def __init__(self, folder: str | Path) -> None:
        self.index = _find_index(Path(folder))
        with open_unbuffered(self.index) as file:
            data = file.readall()
        try:
            table = dict(_read_table(data))
            self.variables = _read_variables(self.index, table)
        except (ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.index} is damaged: {error}; fetch it again") from error
        self.shapes = {name: variable.shape for name, variable in self.variables.items()}

    def read_into(self, name: str, out: Array) -> None:
        """Fill `out`, of the variable's shape, as StoredTensor.read_into does.

        Raises UserError if the file's bytes do not have the checksum of those that were written;
        `out` is then unusable.
        """
        self.variables[name].read_into(out)

    def verify(self) -> None:
        """Read every tensor and compare its checksum; UserError names the first that differs."""
        for variable in self.variables.values():
            for _ in variable.chunks():
                pass

    def gpt2_names(self) -> dict[str, str]:
        """GPT-2's parameter names, as GPT2.named_parameters() gives them -> the variables' names.

        model/h0/attn/c_attn/w is transformer.h.0.attn.c_attn.weight. A variable outside `model/` is
        not one of GPT-2's, and gets a name that no parameter has. Raises UserError if two variables
        get the same name.
        """
        names: dict[str, str] = {}
        for name in self.variables:
            ours = _gpt2_name(name)
            if ours in names:
                raise UserError(f"{self.index} holds both {names[ours]!r} and {name!r}")
            names[ours] = name
        return names


def _gpt2_name(variable: str) -> str:
    scope, *parts = variable.split("/")
    if scope != "model" or not parts:
        return f"{variable} (outside of model/)"
    parts = [re.sub(r"^h(\d+)$", r"h.\1", part) for part in parts]
    if parts[-1] not in ("g", "w", "b"):  # the embeddings, model/wte and model/wpe
        parts.append("w")
    parts[-1] = "bias" if parts[-1] == "b" else "weight"
    return ".".join(["transformer", *parts])


def _find_index(folder: Path) -> Path:
    pointer = folder / "checkpoint"
    if pointer.exists():
        with open_unbuffered(pointer) as file:
            text = file.readall().decode("utf-8", errors="replace")
        found = re.search(r'^model_checkpoint_path:\s*"(.+)"', text, re.MULTILINE)
        if not found or not found[1].isprintable():
            raise UserError(f"{pointer} does not name a checkpoint (model_checkpoint_path)")
        # The path may be one of the machine that wrote it; the files are beside `checkpoint`.
        return folder / (re.split(r"[/\\]", found[1])[-1] + ".index")
    indexes = sorted(folder.glob("*.index"))
    if len(indexes) != 1:
        raise UserError(
            f"{folder} holds {len(indexes)} TensorFlow checkpoints (*.index) and no file"
            " `checkpoint` that names one"
        )
    return indexes[0]


# ----------------------------------------------------------------------------------------------
# The index: a LevelDB table


def _read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The table's keys and values. Raises ValueError or IndexError if it is damaged."""
    footer = data[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != TABLE_MAGIC:
        raise ValueError("it is cut short, or is not the index of a TensorFlow checkpoint")
    _, _, at = _place(footer, 0)  # of the meta-index, which is empty
    offset, length, _ = _place(footer, at)
    for _, value in _read_block(data, offset, length):
        offset, length, _ = _place(value, 0)
        yield from _read_block(data, offset, length)


def _read_block(data: bytes, offset: int, length: int) -> Iterator[tuple[bytes, bytes]]:
    end = offset + length
    if end + 5 > len(data):
        raise ValueError("a block lies outside the file")
    if mask(crc32c(data[offset : end + 1])) != int.from_bytes(data[end + 1 : end + 5], "little"):
        raise ValueError("the checksum of a block is wrong")
    if data[end] == 1:
        raise ValueError("its blocks are compressed with snappy, which is not supported")
    if data[end] != 0:
        raise ValueError(f"its blocks are compressed in an unknown way ({data[end]})")
    block = data[offset:end]
    restarts = int.from_bytes(block[-4:], "little")
    end = length - 4 * (restarts + 1)  # the entries' end
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or at + rest + size > end:
            raise ValueError("an entry runs past its block")
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + size]
        at += rest + size


def _place(data: bytes, at: int) -> tuple[int, int, int]:
    # A "block handle": offset and length of a block; then where `data` goes on.
    offset, at = _varint(data, at)
    length, at = _varint(data, at)
    return offset, length, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    # Seven bits to a byte, the low ones first; the high bit says that more follow.
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


# ----------------------------------------------------------------------------------------------
# The index's values: protocol buffers


def _read_variables(index: Path, table: dict[bytes, bytes]) -> dict[str, Variable]:
    if b"" not in table:
        raise ValueError("it has no header")
    header = _message(table.pop(b""))  # 1 num_shards, 2 endianness, 3 version
    shards, endianness = _number(header, 1), _number(header, 2)
    if endianness != 0:
        raise UserError(f"{index}: big-endian checkpoints are not supported")
    sizes = {}
    variables = {}
    for key, value in table.items():
        name = key.decode("utf-8")
        entry = _message(value)  # 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 crc32c, 7 slices
        if 7 in entry:
            raise UserError(f"{index}: {name!r} is a partitioned variable, which is not supported")
        if _number(entry, 1) not in DTYPES:
            raise UserError(
                f"{index}: {name!r} has TensorFlow's dtype {_number(entry, 1)};"
                " only floats are supported"
            )
        shape = tuple(
            _number(_message(dimension), 1)
            for message in entry.get(2, [])
            for dimension in _message(_bytes(message)).get(2, [])
        )
        shard = _number(entry, 3)
        if shard >= shards:
            raise ValueError(f"{name!r} lies in shard {shard} of {shards}")
        path = index.with_name(f"{index.stem}.data-{shard:05d}-of-{shards:05d}")
        if path not in sizes:
            if not path.is_file():
                raise UserError(f"{path} is missing; {index.name} needs it")
            sizes[path] = path.stat().st_size
        dtype = DTYPES[_number(entry, 1)]
        offset, nbytes, masked_crc = (_number(entry, field) for field in (4, 5, 6))
        if nbytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} of shape {shape} cannot have {nbytes} bytes")
        variable = Variable(name, path, dtype, shape, offset, masked_crc)
        if variable.offset + variable.nbytes > sizes[path]:
            raise UserError(
                f"{path} has {sizes[path]:,} bytes, but {name!r} ends at"
                f" {variable.offset + variable.nbytes:,}: one of the two files is damaged"
            )
        variables[name] = variable
    return variables


Message = dict[int, list[int | bytes]]  # a field's number -> its values


def _message(data: int | bytes) -> Message:
    """The fields of a protocol buffer; only its definition says what each of them means."""
    data = _bytes(data)
    fields: Message = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + size > len(data):
                raise ValueError("a field runs past its message")
            value = data[at : at + size]
            at += size
            if kind != 2:
                value = int.from_bytes(value, "little")
        else:
            raise ValueError(f"a field is of the unknown kind {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(message: Message, field: int) -> int:
    value = message.get(field, [0])[-1]  # a missing field is 0; of several, the last counts
    if not isinstance(value, int):
        raise ValueError(f"field {field} is not a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number where a message should be")
    return value
