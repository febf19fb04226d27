"""TensorFlow's V2 checkpoints, the format OpenAI published GPT-2 in, read without TensorFlow.

A checkpoint called `model.ckpt` is

    model.ckpt.index                 a table from each variable's name to its dtype, shape and place
    model.ckpt.data-00000-of-00001   the numbers themselves, little-endian, in one or more shards

and beside it a file `checkpoint` says which name is the latest. The index is a LevelDB table:

    data block | data block | … | meta-index block | index block | footer (48 bytes)

    block   entries, then the offsets of some of them (for searching), then how many these are;
            behind it one byte, its compression, and four, the masked CRC-32C of both
    entry   how many bytes its key shares with the key before, how many follow, how long its value
            is (three varints); the rest of the key; the value
    footer  where the meta-index and the index block are (offset, length: varints); a magic number

The index block's values are the places of the data blocks. A data block's values are protocol
buffers: a BundleHeaderProto under the empty key, a BundleEntryProto under each variable's name.
Sources: LevelDB's doc/table_format.md; TensorFlow's core/util/tensor_bundle and
core/protobuf/tensor_bundle.proto; protobuf.dev's "Encoding".

Every block and every tensor carries a CRC-32C, and all of them are checked: what is read here is
what was written.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.tensor_files import chunks, open_unbuffered

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
# TensorFlow's DataType, as far as it is read: float32, float64, float16
DTYPES: dict[int, np.dtype] = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 19: np.dtype("<f2")}


@dataclass(frozen=True)
class Variable:
    """One tensor of a checkpoint: `offset` and `nbytes` in a shard, and its masked CRC-32C."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    masked_crc: int


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

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fill `out` (floats, of the variable's shape) with it, in `out`'s dtype.

        Raises UserError where the checksum says that the file's bytes are not those written; `out`
        is then unusable.
        """
        variable = self.variables[name]
        if out.shape != variable.shape or out.dtype.kind != "f":
            raise ValueError(f"{name}: need an array of floats of shape {variable.shape}")
        if not out.flags.c_contiguous:  # laid out otherwise than the file: by way of a copy
            self.read_into(name, copy := np.empty(out.shape, out.dtype))
            out[...] = copy
            return
        flat = out.reshape(-1)
        same = out.dtype == variable.dtype
        for start, chunk in self._checked_chunks(name, flat if same else None):
            if not same:
                with np.errstate(over="ignore"):
                    flat[start : start + chunk.size] = chunk

    def verify(self) -> None:
        """Read every tensor and compare its checksum; UserError names the first that differs."""
        for name in self.variables:
            for _ in self._checked_chunks(name):
                pass

    def _checked_chunks(
        self, name: str, into: np.ndarray | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        variable = self.variables[name]
        crc = 0
        with open_unbuffered(variable.path) as file:
            file.seek(variable.offset)
            for start, chunk in chunks(file, variable.dtype, math.prod(variable.shape), into):
                crc = crc32c(chunk, crc)
                yield start, chunk
        if mask(crc) != variable.masked_crc:
            raise UserError(
                f"{variable.path} is damaged: the checksum of {name!r} is wrong; remove"
                f" {variable.path.parent} and fetch it again"
            )

    def gpt2_names(self) -> dict[str, str]:
        """GPT-2's parameter names, as GPT2.named_parameters() gives them -> the variables' names.

        model/h0/attn/c_attn/w is transformer.h.0.attn.c_attn.weight. A variable outside `model/` is
        none of GPT-2's and gets a name that no parameter has. Raises UserError where two variables
        have the same one.
        """
        names: dict[str, str] = {}
        for name in self.variables:
            ours = _gpt2_name(name)
            if ours in names:
                raise UserError(f"{self.index}: holds both {names[ours]!r} and {name!r}")
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
            raise UserError(f"{pointer} names no checkpoint (model_checkpoint_path)")
        # The path may be of the machine it was written on; the files are beside it.
        return folder / (re.split(r"[/\\]", found[1])[-1] + ".index")
    indexes = sorted(folder.glob("*.index"))
    if len(indexes) != 1:
        raise UserError(
            f"{folder} holds {len(indexes)} TensorFlow checkpoints (*.index) and no file"
            " `checkpoint` that says which one"
        )
    return indexes[0]


# ----------------------------------------------------------------------------------------------
# The index: a LevelDB table


def _read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The table's keys and values. Raises ValueError or IndexError where it is damaged."""
    footer = data[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != TABLE_MAGIC:
        raise ValueError("it is cut short, or no index of a TensorFlow checkpoint")
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
        raise ValueError("its blocks are compressed with snappy, which is not read here")
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
    # A "block handle": offset, length, and where the next thing in `data` is.
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
        raise UserError(f"{index}: big-endian checkpoints are not read here")
    sizes = {}
    variables = {}
    for key, value in table.items():
        name = key.decode("utf-8")
        entry = _message(value)  # 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 crc32c, 7 slices
        if 7 in entry:
            raise UserError(f"{index}: {name!r} is a partitioned variable, which is not read here")
        if _number(entry, 1) not in DTYPES:
            raise UserError(
                f"{index}: {name!r} has TensorFlow's dtype {_number(entry, 1)};"
                " only floats are read"
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
        variable = Variable(
            path, dtype, shape, _number(entry, 4), _number(entry, 5), _number(entry, 6)
        )
        if variable.nbytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} of shape {shape} cannot have {variable.nbytes} bytes")
        if variable.offset + variable.nbytes > sizes[path]:
            raise UserError(
                f"{path} has {sizes[path]:,} bytes, but {name!r} ends at"
                f" {variable.offset + variable.nbytes:,}: one of the two files is damaged"
            )
        variables[name] = variable
    return variables


Message = dict[int, list[int | bytes]]  # a field's number -> its values


def _message(data: int | bytes) -> Message:
    """The fields of a protocol buffer; which field is what, only its definition says."""
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
    value = message.get(field, [0])[-1]  # a field left out is 0; of several the last counts
    if not isinstance(value, int):
        raise ValueError(f"field {field} is not a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number where a message should be")
    return value


# ----------------------------------------------------------------------------------------------
# CRC-32C, vectorised
#
# A CRC is the remainder of a polynomial division: the message's bits are the coefficients (0 or 1)
# of a polynomial, addition is exclusive or, and the divisor P is fixed. Bit by bit that is
#
#     for each bit of the message, the lowest of each byte first:
#         state ^= bit;  state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)
#
# where the shift is a multiplication by x modulo P (the state's lowest bit is its highest power).
# In Python that takes a second for a megabyte. But the remainder is linear, so a message A followed
# by a message B of n bits has the remainder of A · xⁿ + B, and A may be many words at once:
#
#  1. Cut the message into rows of LANES words. Horner's rule, row by row: multiply every word of
#     the rows so far by x^(32 · LANES) modulo P, and add the next row. One row is left.
#  2. Fold it in half until one word is left: left half · x^(bits of the right half) + right half.
#
# Multiplying by a constant modulo P is linear as well: a word's product is that of its lower
# 16 bits plus that of its upper 16, two look-ups. This checks more than 1 GB a second.
#
# The zeros that fill up the first row change nothing: leading zeros don't, in a polynomial.

POLYNOMIAL = 0x82F63B78  # Castagnoli's, lowest bit = highest power
LANES = 1 << 14  # a row is 64 KiB: it and the tables stay in the cache


def crc32c(data: bytes | np.ndarray, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of `data`'s bytes, going on from the `crc` of those before."""
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    state = crc ^ 0xFFFFFFFF
    odd = octets.size % 4  # bytes that fill no word: bit by bit, as above
    for byte in octets[:odd].tolist():
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)
    words = octets[odd:].view("<u4")
    if words.size:
        lanes = min(LANES, 1 << (words.size - 1).bit_length())  # a power of 2
        first = (words.size - 1) % lanes + 1
        row = np.zeros(lanes, np.uint32)
        row[lanes - first :] = words[:first]
        row[lanes - first] ^= np.uint32(state)
        for start in range(first, words.size, lanes):
            row = _times_x32(row, lanes)
            row ^= words[start : start + lanes]
        while (half := row.size // 2) > 0:
            row = _times_x32(row[:half], half) ^ row[half:]
        state = int(_times_x32(row, 1)[0])
    return state ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    """The form in which LevelDB and TensorFlow store a CRC: rotated, and a constant added."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _times_x32(words: np.ndarray, n: int) -> np.ndarray:
    # Each word times x^(32 n) modulo P.
    lower, upper = _products(n)
    return lower.take(words & 0xFFFF, mode="clip") ^ upper.take(words >> 16, mode="clip")


@functools.cache
def _products(n: int) -> tuple[np.ndarray, np.ndarray]:
    # x^(32 n) modulo P times each lower half of a word, and times each upper half; n a power of 2.
    single_bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if n == 1:
        products = single_bits
        for _ in range(32):
            products = products >> 1 ^ np.where(products & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    else:
        products = _times_x32(_times_x32(single_bits, n // 2), n // 2)

    def sums(of_bits: np.ndarray) -> np.ndarray:
        table = np.zeros(1, np.uint32)
        for product in of_bits:
            table = np.concatenate([table, table ^ product])
        return table

    return sums(products[:16]), sums(products[16:])
