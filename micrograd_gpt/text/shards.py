"""Token ids on disk: files ("shards") of uint16 numbers, read by memory map.

Three kinds of folders are read as they are:

    ours     tokens_*.bin and manifest.json, which names the tokenizer
    llm.c    *_train_*.bin and *_val_*.bin
    nanoGPT  train.bin and val.bin: the ids and nothing else

Ours and llm.c's begin with 256 int32: the magic number, the version, how many ids follow, zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, reading, written_whole
from micrograd_gpt.text.tokenizers import FIXED, Tokenizer, from_dict

MAGIC, VERSION = 20240520, 1  # as llm.c's dev/data/data_common.py writes them
HEADER_SIZE = 1024  # bytes
TOKEN = np.dtype("<u2")
BLOCK = 1 << 22  # ids looked at in one go

MANIFEST = "manifest.json"
FORMAT = "micrograd-gpt token shards"


class Shards:
    """The ids of several arrays (memory maps) used as one of shape (N,), which is never made.

    An index is a slice or an array of positions, of any shape: the ids there come as an array.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)])  # of each part, and of what follows

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"a position is outside the {len(self)} tokens")
        found = np.empty(index.shape, TOKEN)
        which = np.searchsorted(self._starts, index, side="right") - 1
        for part in np.unique(which):
            here = which == part
            found[here] = self.parts[part][index[here] - self._starts[part]]
        return found

    def split(self, position: int) -> tuple[Shards, Shards]:
        """The ids before `position`, and those from it on."""
        cuts = np.clip(position - self._starts[:-1], 0, [len(part) for part in self.parts])
        pairs = list(zip(self.parts, cuts.tolist(), strict=True))
        return Shards([part[:cut] for part, cut in pairs]), Shards(
            [part[cut:] for part, cut in pairs]
        )


# ----------------------------------------------------------------------------------------------
# One shard


def write_shard(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Write ids, arrays of shape (N,) one after another, as one shard: whole or not at all."""
    count = 0
    with written_whole(path) as file:
        file.seek(HEADER_SIZE)
        for ids in arrays:
            file.write(ids.astype(TOKEN).tobytes())
            count += len(ids)
        file.seek(0)
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, VERSION, count
        file.write(header.tobytes())


def open_shard(path: Path, headerless: bool = False) -> np.ndarray:
    """Return the ids of a shard as a read-only memory map, uint16 of shape (N,).

    With `headerless`, a file that does not begin with the magic number is ids from its first byte
    on. Raises UserError, naming the file, where it is damaged or something else.
    """
    with reading(path):
        with open(path, "rb") as file:
            size, start = _check_shard(path, file, headerless)
        if start == size:
            return np.empty(0, TOKEN)  # there is no empty memory map
        return np.asarray(np.memmap(path, TOKEN, mode="r", offset=start))


def _check_shard(path: Path, file: BinaryIO, headerless: bool) -> tuple[int, int]:
    """The size of a shard and where its ids start, both in bytes."""
    header = file.read(HEADER_SIZE)
    size = file.seek(0, os.SEEK_END)
    numbers = np.frombuffer(header[: len(header) // 4 * 4], "<i4").tolist()
    if numbers[:1] != [MAGIC]:
        if not headerless:
            raise UserError(
                f"{path} is no shard of tokens: it does not begin with the magic number {MAGIC}"
            )
        if size % TOKEN.itemsize:
            raise UserError(f"{path} is damaged: {size:,} bytes cannot be uint16 ids, it is odd")
        return size, 0
    if numbers[1:2] != [VERSION]:
        raise UserError(f"{path} is a shard of another version than {VERSION}, which holds uint16")
    expected = HEADER_SIZE + numbers[2] * TOKEN.itemsize if len(header) == HEADER_SIZE else None
    if size != expected:
        raise UserError(
            f"{path} is damaged: {size:,} bytes are not the length that its header says"
        )
    return size, HEADER_SIZE


# ----------------------------------------------------------------------------------------------
# A folder of shards


@dataclass(frozen=True)
class ShardFiles:
    """The shards of a folder. `validation` is empty where they are not told apart."""

    train: list[Path]
    validation: list[Path]
    manifest: dict[str, Any] | None = None  # of ours only
    headerless: bool = False

    def open(self) -> tuple[Shards, Shards]:
        """The ids to train on and those to validate on. Raises UserError for a damaged shard."""
        train, validation = (
            Shards([open_shard(path, self.headerless) for path in paths])
            for paths in (self.train, self.validation)
        )
        return train, validation


def find_shards(source: str | Path) -> ShardFiles | None:
    """The shards of a folder, or the one that `source` is; None where it is something else.

    Raises UserError for shards of ours that have no manifest, or one that does not fit them.
    """
    path = Path(source)
    if path.suffix == ".bin" and path.is_file():
        return ShardFiles([path], [], headerless=True)
    if any(path.glob("tokens_[0-9]*.bin")):
        return _our_shards(path)
    train = sorted(path.glob("*_train_*.bin"))
    if train:
        return ShardFiles(train, sorted(path.glob("*_val_*.bin")))
    if os.path.lexists(path / "train.bin"):
        validation = [p for p in [path / "val.bin"] if os.path.lexists(p)]
        return ShardFiles([path / "train.bin"], validation, headerless=True)
    return None


def _our_shards(folder: Path) -> ShardFiles:
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        raise UserError(f"{folder} has shards but no {MANIFEST}: preparing them was interrupted")
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder / MANIFEST} is no manifest of token shards")
        counts = {folder / shard["file"]: shard["tokens"] for shard in manifest["shards"]}
        if not counts:
            raise KeyError("shards")
        from_dict(manifest["tokenizer"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error!r}; prepare it again") from error
    for path, count in counts.items():
        if (found := len(open_shard(path))) != count:
            raise UserError(
                f"{path} has {found:,} tokens where {MANIFEST} says {count:,}: prepare it again"
            )
    return ShardFiles(list(counts), [], manifest)


def tokenizer_of(files: ShardFiles, asked: str | Tokenizer) -> Tokenizer:
    """The tokenizer of shards, which must be the one `asked` for, by name or with its vocabulary.

    Raises UserError for another, and for a name whose vocabulary only a text could tell.
    """
    folder = files.train[0].parent
    name = asked if isinstance(asked, str) else asked.name
    if files.manifest is None:
        if isinstance(asked, Tokenizer):
            return asked
        if name in FIXED:
            return FIXED[name]()
        raise UserError(
            f"the shards in {folder} do not say which ids stand for what, as --tokenizer {name} "
            f"needs: give --tokenizer {' or '.join(FIXED)}"
        )
    made_with = from_dict(files.manifest["tokenizer"])
    if made_with.name != name:
        raise UserError(
            f"the shards in {folder} were made with the {made_with.name} tokenizer: give "
            f"--tokenizer {made_with.name}"
        )
    if isinstance(asked, Tokenizer) and asked.to_dict() != made_with.to_dict():
        raise UserError(
            f"the shards in {folder} were made with another {name} vocabulary of "
            f"{made_with.vocab_size} entries: give the text instead"
        )
    return made_with


def check_ids(files: ShardFiles, tokenizer: Tokenizer, cache: Path) -> None:
    """Raise UserError, naming the file, where a shard has an id that the tokenizer does not.

    All ids are read once: an empty file in `cache`, named after the paths, sizes and time stamps,
    says that shards were found good. A cache that can't be written only costs time.
    """
    paths = [*files.train, *files.validation]
    good = cache / _identity(paths, tokenizer.vocab_size)
    if not os.path.exists(good):
        _read_ids(paths, tokenizer, files.headerless)
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            good.touch()


def _identity(paths: list[Path], vocab_size: int) -> str:
    """Another string for shards that were changed since, or are for another vocabulary."""
    described: list[Any] = [vocab_size]
    for path in paths:
        with reading(path):
            status = path.stat()
        described.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _read_ids(paths: list[Path], tokenizer: Tokenizer, headerless: bool) -> None:
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=total, desc="checking", unit="B", unit_scale=True, delay=1, disable=None
    ) as bar:
        for path in paths:
            # A memory map would count as memory of this process.
            with reading(path), open(path, "rb") as file:
                _, start = _check_shard(path, file, headerless)
                file.seek(start)
                while len(ids := np.fromfile(file, TOKEN, BLOCK)):
                    if ids.max() >= tokenizer.vocab_size:
                        raise UserError(
                            f"{path} holds the token id {ids.max()}, and the {tokenizer.name} "
                            f"tokenizer has {tokenizer.vocab_size} ids only: give the --tokenizer "
                            "that it was made with"
                        )
                    bar.update(ids.nbytes)


def blocks(tokens: np.ndarray | Shards) -> Iterator[np.ndarray]:
    """The ids, part by part, in order: arrays that each fit memory."""
    for part in tokens.parts if isinstance(tokens, Shards) else [tokens]:
        for start in range(0, len(part), BLOCK):
            yield part[start : start + BLOCK]
