"""Folders of token shards: which files they are, which tokenizer made them, whether they match it.

Three kinds of folders are read as they are:

    ours     tokens_*.bin and manifest.json, which says which tokenizer made them
    llm.c    *_train_*.bin and *_val_*.bin, or of a small set *_train.bin and *_val.bin
    nanoGPT  train.bin and val.bin, without a header; meta.pkl if they are of characters
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, reading
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.decoding import is_text
from micrograd_gpt.text.shards import HEADER_SIZE, Shards, open_shard, read_shard
from micrograd_gpt.text.tokenizers import FIXED, LEARNED, NAMES, CharTokenizer, tokenizer_from_dict

MANIFEST = "manifest.json"
FORMAT = "micrograd-gpt token shards"


@dataclass(frozen=True)
class ShardFiles:
    """The shards of a folder. `validation` is empty where the folder does not mark any for it."""

    train: list[Path]
    validation: list[Path]
    manifest: dict[str, Any] | None = None  # only ours have one
    headerless: bool = False

    def open(self) -> tuple[Shards, Shards]:
        """Return the ids to train on and those to validate on.

        Raises UserError for a damaged shard.
        """
        train, validation = (
            Shards([open_shard(path, self.headerless) for path in paths])
            for paths in (self.train, self.validation)
        )
        return train, validation


def find_shards(source: str | Path) -> ShardFiles | None:
    """Return the shards in a folder, or `source` itself if it is one; None if there are none.

    A file called .bin may be a text, which is said on stderr. Raises UserError for shards of ours
    that have no manifest, or one that does not match them.
    """
    path = Path(source)
    if path.suffix == ".bin" and path.is_file():
        with reading(path), open(path, "rb") as file:
            if not is_text(file.read(HEADER_SIZE)):
                return ShardFiles([path], [], headerless=True)
        say(f"note: {path} is read as the text that it begins as, not as token ids")
        return None
    if any(path.glob("tokens_[0-9]*.bin")):
        return _our_shards(path)
    if train := _named(path, "train"):
        if os.path.lexists(path / "train.bin"):
            say(f"note: {path}: train.bin is left out, beside the shards {train[0].name} …")
        return ShardFiles(train, _named(path, "val"))
    if os.path.lexists(path / "train.bin"):
        validation = [p for p in [path / "val.bin"] if os.path.lexists(p)]
        return ShardFiles([path / "train.bin"], validation, headerless=True)
    return None


def _named(folder: Path, part: str) -> list[Path]:
    """llm.c's shards for `part`, "train" or "val"; UserError for those of several data sets."""
    found = [p for end in ("_*", "") for p in folder.glob(f"*_{part}{end}.bin")]
    shown = sorted(path for path in found if not path.name.startswith("."))
    names = sorted({path.name.rpartition(f"_{part}")[0] for path in shown})
    if len(names) > 1:
        raise UserError(
            f"{folder} holds the shards of several data sets ({', '.join(names)}): give each a "
            "folder of its own"
        )
    return shown


def _our_shards(folder: Path) -> ShardFiles:
    """Return the shards that the manifest of `folder` lists."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        raise UserError(
            f"{folder} has shards but no {MANIFEST}: preparing them was interrupted; give the text "
            "instead"
        )
    try:
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{folder / MANIFEST} is not the manifest of token shards: give the text instead"
            )
        counts = {folder / shard["file"]: shard["tokens"] for shard in manifest["shards"]}
        if not counts:
            raise KeyError("shards")
        tokenizer_from_dict(manifest["tokenizer"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({error!r}): prepare the shards again"
        ) from error
    for path, count in counts.items():
        if (found := len(open_shard(path))) != count:
            raise UserError(
                f"{path} has {found:,} tokens where {MANIFEST} says {count:,}: prepare the shards "
                "again"
            )
    return ShardFiles(list(counts), [], manifest)


def matching_tokenizer(files: ShardFiles, requested: str | Tokenizer) -> Tokenizer:
    """Return the tokenizer of shards, after checking that it is the requested one.

    `requested` is a tokenizer, or the name of one. Raises UserError if the shards were made with
    another, and for a name whose vocabulary comes from a text that the shards do not have.
    """
    folder = files.train[0].parent
    name = requested if isinstance(requested, str) else requested.name
    made_with, says_it = _made_with(files, requested)
    if made_with is None:
        if isinstance(requested, Tokenizer):
            return requested
        if name in FIXED:
            return FIXED[name]()
        raise UserError(
            f"the shards in {folder} come without the vocabulary that --tokenizer {name} needs: "
            f"train on the text itself, or if they were made with another tokenizer, give that: "
            f"--tokenizer {' or '.join(FIXED)}, or the folder with its files"
        )
    if made_with.name != name:
        it = made_with.name if made_with.name in NAMES else "and the folder with its files"
        instead = f"give --tokenizer {it}"
        if isinstance(requested, Tokenizer):  # as with --init-from, which takes no --tokenizer
            instead = f"give the text itself, or start from scratch with --tokenizer {it}"
        raise UserError(
            f"the shards in {folder} were made with the {made_with.name} tokenizer, as {says_it} "
            f"beside them says, not {name}: {instead}"
        )
    if isinstance(requested, Tokenizer) and requested.to_dict() != made_with.to_dict():
        raise UserError(
            f"the shards in {folder} were made with a different {name} vocabulary, of "
            f"{made_with.vocab_size} entries, as {says_it} beside them says: give the text instead"
        )
    return made_with


def _made_with(files: ShardFiles, requested: str | Tokenizer) -> tuple[Tokenizer | None, str]:
    """The tokenizer that shards were made with, and the file beside them that says so; None where
    none does.
    """
    from micrograd_gpt.text.nanogpt_vocabulary import META, nanogpt_vocabulary

    if files.manifest is not None:
        return tokenizer_from_dict(files.manifest["tokenizer"]), MANIFEST
    try:
        folder = files.train[0].parent
        vocabulary = nanogpt_vocabulary(folder) if files.headerless else None
    except UserError as error:  # a meta.pkl of another kind says nothing against a given tokenizer
        if requested in LEARNED:
            made = f"the --tokenizer that made them ({' or '.join(FIXED)}, or a folder)"
            raise UserError(f"{error}; or, if the shards are not of characters, {made}") from error
        say(f"note: which tokenizer made the shards in {folder} is not checked: {error}")
        vocabulary = None
    return CharTokenizer(vocabulary) if vocabulary else None, META


def check_shards(files: ShardFiles, tokenizer: Tokenizer, cache: Path | None) -> None:
    """Raise UserError, naming the file, if a shard holds an id that the tokenizer does not have.

    All ids are read, but only once: an empty file in `cache`, named after the shards' paths, sizes
    and time stamps, records that they passed. Without `cache`, or where it cannot be written, they
    are read again next time.
    """
    paths = [*files.train, *files.validation]
    if cache is None:
        return _check_ids_in(paths, files.headerless, tokenizer)
    passed = cache / _record_name(paths, tokenizer.vocab_size)
    if not os.path.exists(passed):
        _check_ids_in(paths, files.headerless, tokenizer)
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            passed.touch()


def _record_name(paths: list[Path], vocab_size: int) -> str:
    """Return a name that changes whenever a shard does, or the size of the vocabulary."""
    described: list[Any] = [vocab_size]
    for path in paths:
        with reading(path):
            status = path.stat()
        described.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _check_ids_in(paths: list[Path], headerless: bool, tokenizer: Tokenizer) -> None:
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=total, desc="checking", unit="B", unit_scale=True, delay=1, disable=None
    ) as bar:
        for path in paths:
            for ids in read_shard(path, headerless):
                if ids.max() >= tokenizer.vocab_size:
                    raise UserError(
                        f"{path} holds the token id {ids.max()}, but the {tokenizer.name} "
                        f"tokenizer has only {tokenizer.vocab_size} ids: give the text itself, "
                        "or, to start from scratch, the --tokenizer it was made with"
                    )
                bar.update(ids.nbytes)
