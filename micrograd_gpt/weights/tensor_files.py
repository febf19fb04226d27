"""Named tensors in safetensors files: read straight into the arrays that will hold them.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (each tensor's dtype,
shape and place), then the tensors' bytes end to end: https://github.com/huggingface/safetensors

The safetensors library judges whether a file is well formed. The bytes are read here (`reading`),
at the offsets that the header gives, because the library's NumPy interface maps the whole file and
copies each tensor out of the map: while a model is being filled, twice its size is resident.

The format holds no checksum: a flipped bit in a weight cannot be noticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array, to_device
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import other_checkpoint, written_whole
from micrograd_gpt.weights.reading import (
    CHUNK,
    FLOATS,
    StoredTensor,
    is_float,
    open_unbuffered,
    ways_out,
)
from micrograd_gpt.weights.torch_file import read_state_dict

FETCH = "copy or fetch it again"  # a file that was not whole
# The format's dtypes in its own order: a file begins with the tensors of the last dtype here.
STORED_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": FLOATS["float16"],
    "BF16": FLOATS["bfloat16"],
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": FLOATS["float32"],
    "F64": FLOATS["float64"],
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
FORMAT_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class TensorFile:
    """A safetensors file, or a sharded set of them (or of PyTorch's *.bin files) read as one.

    `path` is `*.safetensors`, or the `*.index.json` of a sharded set. The headers are
    read and checked at once, the tensors when they are asked for; no file stays open or mapped.
    Raises UserError, naming the file, for one that is missing, damaged or not safetensors.

    `entries` maps each tensor's name to its StoredTensor, in the order they are stored; `shapes`
    maps it to its shape; `metadata` is the header's own dictionary of texts (empty for a sharded
    set).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        if self.path.name.endswith(".json"):
            self.entries = _read_shards(self.path)
        else:
            self.entries, self.metadata = _read_header(self.path)
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def read_into(self, name: str, out: Array) -> None:
        """Fill `out`, of the tensor's shape, as StoredTensor.read_into does."""
        self.entries[name].read_into(out)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a new array in its own dtype (BF16: ml_dtypes.bfloat16)."""
        out = np.empty(self.entries[name].shape, self.entries[name].dtype)
        self.read_into(name, out)
        return out


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> None:
    """Write named arrays to `path`, whole or not at all, byte for byte as the library would.

    Arrays on a GPU come to the host one at a time.

    `dtype` (a name in FLOATS) stores the floating-point arrays in that type, rounded to nearest,
    ties to even; None keeps each array's own. One chunk at a time is converted, so no second copy
    of the model is made. Raises UserError for a finite number that would become infinity in
    `dtype`, for a dtype that the format lacks, and for a file that can't be written.
    """
    path = Path(path)
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"cannot store tensors as {dtype!r}: choose one of {', '.join(FLOATS)}")

    def dtype_in_file(name: str) -> np.dtype:
        own = tensors[name].dtype
        stored = FLOATS[dtype] if dtype is not None and is_float(own) else own.newbyteorder("<")
        if stored not in FORMAT_NAMES:
            raise UserError(f"{path}: {name} is {own}, which safetensors cannot store")
        return stored

    # The library's order: widest numbers first, so that every tensor is aligned; then by name.
    stored = {name: dtype_in_file(name) for name in tensors}
    rank = {dtype: -position for position, dtype in enumerate(FORMAT_NAMES)}
    order = sorted(tensors, key=lambda name: (rank[stored[name]], name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in order:
        end = offset + tensors[name].size * stored[name].itemsize
        header[name] = {
            "dtype": FORMAT_NAMES[stored[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = np.ascontiguousarray(to_device(tensors[name], "cpu")).reshape(-1)
            step = CHUNK // flat.itemsize
            for start in range(0, flat.size, step):
                chunk = converted(flat[start : start + step], stored[name], name)
                file.write(chunk.view(np.uint8).data)


def converted(chunk: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Floats of another type, rounded to nearest; UserError where a finite one becomes infinity."""
    with np.errstate(over="ignore"):
        numbers = chunk.astype(dtype, copy=False)
    if numbers is not chunk and np.isinf(numbers).sum() != np.isinf(chunk).sum():
        raise UserError(f"{name} holds numbers too large for {dtype}: store it in a wider type")
    return numbers


def fetch_again(path: Path) -> str:
    """What to do about a file that is damaged and no checkpoint's."""
    kept = path.resolve()  # huggingface_hub's cache would only give the same again
    return f"remove {kept} and fetch it again" if kept.parent.name == "blobs" else FETCH


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    # Imported here: most programs that import the package read no safetensors file.
    from safetensors import SafetensorError, safe_open

    with open_unbuffered(path) as file:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            size = os.fstat(file.fileno()).st_size
            advice = ways_out(path, other_checkpoint(path) or fetch_again(path))
            raise UserError(
                f"{path} has {size:,} bytes that are not a whole safetensors file"
                f" ({_one_line(error)}): {advice}"
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
        dtype = STORED_DTYPES.get(facts["dtype"])
        if dtype is None:
            raise UserError(f"{path}: {name!r} has dtype {facts['dtype']}, which is not supported")
        start, _ = facts["data_offsets"]
        entries[name] = StoredTensor(name, path, dtype, tuple(facts["shape"]), 8 + length + start)
    return entries, metadata


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    # {"weight_map": {tensor's name: file beside the index}, ...}, as Hugging Face writes it.
    with open_unbuffered(index) as file:
        text = file.readall()
    try:
        weight_map = json.loads(text)["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not the index of a sharded set of weights") from error
    entries: dict[str, StoredTensor] = {}
    for shard in sorted(set(files.values())):
        if Path(shard).name != shard or shard in ("", "..") or not shard.isprintable():
            raise UserError(f"{index}: the shard {shard!r} is not a file beside the index")
        path = index.with_name(shard)
        found = read_state_dict(path) if path.suffix == ".bin" else _read_header(path)[0]
        listed = {name for name, file in files.items() if file == shard}
        if listed != found.keys():
            name = min(listed ^ found.keys())
            problem = f"does not hold {name!r}"
            if name not in listed:
                problem = f"holds {name!r}, which the index does not list there"
            raise UserError(f"{index}: the shard {shard} {problem}")
        entries.update(found)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
