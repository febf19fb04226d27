"""PyTorch's files, as torch.save writes them, read without PyTorch and without running any of them.

Since PyTorch 1.6 such a file is a zip archive in which nothing is compressed:

    archive/data.pkl    what was saved, as a Python pickle; each tensor in it refers to a storage
    archive/data/0      a storage, "0": numbers of one type, little-endian, end to end; then 1, 2, …
    archive/byteorder   "little" or "big" (older versions leave it out, and mean little)

Before, it was five pickles one after the other (a magic number, the format's version, facts about
the machine, what was saved, the list of the storages' keys), then for each key 8 bytes that say how
many numbers its storage has, and the numbers. Source: torch/serialization.py.

Nothing of the pickles is run: torch_pickle.py.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.reading import StoredTensor, open_unbuffered, ways_out
from micrograd_gpt.weights.torch_pickle import Machine, Storage, TorchTensor

# GPT-2 XL's, with its optimizer, takes a tenth of this. No instruction makes more than about a
# hundred bytes of objects out of each of its own, so this limits the memory that a pickle can fill.
PICKLE_BYTES = 2 << 20
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + b"."
LEGACY_VERSION = 1001


def read_torch(path: str | Path) -> Any:
    """What was saved: dicts, lists, tuples, texts and numbers, with a TorchTensor for each tensor.

    An OrderedDict comes as a dict. Numbers of tensors are not read, but every place in the file is
    checked to be inside of it. Raises UserError, naming the file, for one that torch.save did not
    write or that is damaged, and for a pickle that needs anything else: nothing of it is run.
    """
    path = Path(path)
    try:
        with open_unbuffered(path) as raw, _File(raw) as file:
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
    raise UserError(f"{path} is not a file that torch.save wrote: {ways_out(path, 'give one')}")


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
            raise UserError(
                f"{path} holds {repr(name)[:80]}, which is not a tensor of a model: save its "
                "state_dict() alone, with its config.json beside it"
            )
    return {name: tensor.stored(name, path) for name, tensor in saved.items()}


# ----------------------------------------------------------------------------------------------
# The two formats: where the pickle is, and where each storage's numbers are


class _File(io.BufferedReader):
    """A file of which no more may be asked for at a time than a pickle may have.

    That limits a zip directory too, of which zipfile makes ten times as many bytes of objects.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > PICKLE_BYTES:
            raise ValueError(f"a part of it has {size:,} bytes, which no model needs")
        return super().read(size)


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

    return Machine(path, _bytes_at(file, *members[pickles[0]]), storage).run()


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

    machine = Machine(path, _bytes_at(file, 0, min(total, PICKLE_BYTES)), storage)
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
    file.seek(start)
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it is cut short")
    return data
