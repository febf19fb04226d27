"""A text larger than memory to token shards: once, by several processes, in bounded memory.

The parent process reads the text and cuts it into pieces, workers encode them, and the parent
writes the ids in order. Pieces and shards are a function of the text alone, so a preparation that
was interrupted reads the text again and continues with the first shard that is missing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, reading, sha256, write_text
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT
from micrograd_gpt.text.decoding import Form, Notes
from micrograd_gpt.text.documents import no_text, read_documents
from micrograd_gpt.text.pieces import (
    CUT_ANYWHERE,
    LONGEST_PIECE,
    PIECE_SIZE,
    Piece,
    cut,
    encode_piece,
    joined,
    refuse_where_cut,
)
from micrograd_gpt.text.shard_files import FORMAT, MANIFEST, ShardFiles, find_shards
from micrograd_gpt.text.shards import open_shard, write_shard
from micrograd_gpt.text.tokenizers import (
    LEARNED,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    make_tokenizer,
    tokenizer_from_dict,
)
from micrograd_gpt.text.workers import ParallelMap, worker_pool

PIECES_PER_SHARD = 1024  # some 80 million of GPT-2's tokens
MOST_WORDS = 1_000_000  # different ones, counted at a time
PROGRESS = "preparing.json"  # what is known of the manifest, while shards are still missing
ABANDONED = 3600  # seconds after which a temporary file is taken to be a killed process's


def prepare(
    source: str | Path,
    files: list[Path],
    tokenizer: str | Tokenizer,
    form: Form,
    cache: Path,
    processes: int | None = None,
) -> ShardFiles:
    """Return shards of the text in `files`, the files of `source`, making them if necessary.

    `tokenizer` is a tokenizer, or the name of one; if its vocabulary comes from a text, it then
    comes from this one. Each `source`, `tokenizer` and `form` has a folder of its own in
    `cache`, which is made anew if a file has changed since. Says on stderr which folder that is.

    Raises UserError if the text is empty, can't be read or encoded, or changes meanwhile, and if
    the shards can't be written.
    """
    folder = _folder(source, files, tokenizer, form, cache)
    _remove_abandoned(folder)
    if up_to_date := _up_to_date(folder, files):
        print(f"using the tokens of {source} in {folder}", file=sys.stderr)
        return up_to_date
    print(f"tokenizing {source} into {folder}", file=sys.stderr)
    states, notes = [_state(file) for file in files], Notes()
    with worker_pool(processes) as parallel_map:
        progress = _continue_or_begin(folder, states)
        if "tokenizer" not in progress:
            if isinstance(tokenizer, str):
                tokenizer = _learn(tokenizer, files, form, parallel_map)
            if tokenizer.vocab_size > 1 << 16:
                raise UserError(
                    f"the {tokenizer.name} tokenizer of {source} has {tokenizer.vocab_size:,} ids, "
                    "more than the 65,536 that a large text can use: give less than 50 MB of it, "
                    "or, to start from scratch, --tokenizer gpt2 or byte"
                )
            tokenizer.check_special(form.special_tokens)
            refuse_where_cut(tokenizer, form.special_tokens)
            progress["tokenizer"] = tokenizer.to_dict()
            write_text(folder / PROGRESS, json.dumps(progress))
        how = form, notes, progress["tokenizer"]
        entries = _write_shards(folder, files, *how, parallel_map)
    notes.tell(source)
    if notes.typed and not form.special_tokens:
        tokenizer_from_dict(progress["tokenizer"]).tell_typed(source)
    if not entries:
        raise no_text(source)
    hashes = [sha256(file) for file in files]
    if [_state(file) for file in files] != states:
        raise UserError(f"{source} changed while it was read: run this again")
    manifest = {
        "format": FORMAT,
        "tokenizer": progress["tokenizer"],
        "form": asdict(form),
        "sources": [s | {"sha256": h} for s, h in zip(states, hashes, strict=True)],
        "tokens": sum(entry["tokens"] for entry in entries),
        "shards": entries,
    }
    _write_manifest(folder, manifest)
    (folder / PROGRESS).unlink(missing_ok=True)
    complete = find_shards(folder)
    assert complete is not None
    return complete


# ----------------------------------------------------------------------------------------------
# The folder: which it is, whether it is up to date, what an interrupted preparation left in it


def _folder(
    source: str | Path,
    files: list[Path],
    tokenizer: str | Tokenizer,
    form: Form,
    cache: Path,
) -> Path:
    """Return where the shards are or will be.

    A run that names a tokenizer and a resumed run, which brings its vocabulary, share one folder
    as long as that folder is up to date and has this very vocabulary. Otherwise a vocabulary gets
    a folder of its own: shards made with an old one must never be found under the mere name.
    """

    def folder_for(settings: dict[str, Any]) -> Path:
        key = json.dumps([settings, asdict(form), str(Path(source).resolve())])
        return cache / hashlib.sha256(key.encode()).hexdigest()[:16]

    if isinstance(tokenizer, str):
        return folder_for({"tokenizer": tokenizer})
    settings = tokenizer.to_dict()
    shared = folder_for({"tokenizer": tokenizer.name})
    with _kept(shared):
        manifest = read_json(shared / MANIFEST) or read_json(shared / PROGRESS)
    same_tokenizer = manifest is not None and manifest.get("tokenizer") == settings
    if same_tokenizer and (not settings.get("vocabulary") or _up_to_date(shared, files)):
        return shared
    return folder_for(settings)


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Around what reads what was kept in `folder`: a UserError says how to have it made again."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}: remove {folder}, and the text is tokenized again") from error


def _state(file: Path) -> dict[str, Any]:
    """Return what tells whether a file has changed, short of reading it."""
    with reading(file):
        status = file.stat()
    return {
        "path": str(file.resolve()),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }


def _up_to_date(folder: Path, files: list[Path]) -> ShardFiles | None:
    """Return the shards in `folder` if they are complete and made from the files as they are now.

    A file with another time stamp but the same bytes has not changed; its new time is recorded.
    """
    with _kept(folder):
        manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    now = [_state(file) for file in files]
    try:
        recorded = manifest["sources"]
        if [(s["path"], s["bytes"]) for s in now] != [(s["path"], s["bytes"]) for s in recorded]:
            return None
        touched = [
            (before, after)
            for before, after in zip(recorded, now, strict=True)
            if before["modified_ns"] != after["modified_ns"]
        ]
        if any(sha256(before["path"]) != before["sha256"] for before, _ in touched):
            return None
    except (KeyError, TypeError) as error:
        with _kept(folder):
            raise UserError(f"{folder / MANIFEST} is damaged") from error
    if touched:
        for before, after in touched:
            before.update(after)
        _write_manifest(folder, manifest)
    with _kept(folder):
        return find_shards(folder)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _continue_or_begin(folder: Path, states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the progress that an interrupted preparation of the same text left, or new progress.

    Removes what was made from another text.
    """
    new = {"sources": states, "pieces": [PIECE_SIZE, LONGEST_PIECE, PIECES_PER_SHARD]}
    with _kept(folder):
        left = read_json(folder / PROGRESS)
    progress = left if left is not None and new.items() <= left.items() else new
    try:
        if progress is new:
            for path in [folder / MANIFEST, folder / PROGRESS, *folder.glob("tokens_*.bin")]:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return progress


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of killed processes."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process removes it too, or it belongs to another user
            if path.stat().st_mtime < time.time() - ABANDONED:
                path.unlink()


# ----------------------------------------------------------------------------------------------
# The text: once for the vocabulary, if that comes from it, and once for the ids


def _pieces(
    files: list[Path], form: Form, notes: Notes, end_last: bool, anywhere: bool, title: str
) -> Iterator[Piece]:
    """Yield the text of the files in pieces (see `cut`), with a progress bar."""
    from tqdm import tqdm

    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        documents = (d for file in files for d in read_documents(file, form, bar.update, notes))
        for piece in cut(documents, end_last, PIECE_SIZE, LONGEST_PIECE, anywhere):
            notes.typed = notes.typed or any(END_OF_TEXT in text for text in piece)
            yield piece


def _learn(name: str, files: list[Path], form: Form, parallel_map: ParallelMap) -> Tokenizer:
    """Return the tokenizer called `name`, with the text's vocabulary if it has one of its own.

    The counts of words are bounded: when there are too many, the rarer half is forgotten, which
    cannot matter to the most common 10,000 (Manku & Motwani 2002, "Approximate Frequency Counts").
    """
    if name not in LEARNED:
        return make_tokenizer(name, "")
    pieces = _pieces(files, form, Notes(), False, name in CUT_ANYWHERE, f"collecting {name}s")
    if name == "char":
        characters: set[str] = set().union(*parallel_map(_characters, pieces))
        return CharTokenizer.from_text("".join(characters))
    counts: Counter[str] = Counter()
    for found in parallel_map(functools.partial(_words, form.special_tokens), pieces):
        counts.update(found)
        if len(counts) > MOST_WORDS:
            counts = Counter(dict(counts.most_common(MOST_WORDS // 2)))
    return WordTokenizer.from_counts(counts)


def _write_shards(
    folder: Path,
    files: list[Path],
    form: Form,
    notes: Notes,
    settings: dict[str, Any],
    parallel_map: ParallelMap,
) -> list[dict[str, Any]]:
    """Write the shards that are missing; return the manifest's entries, one for each shard.

    `settings` is the tokenizer's `to_dict()`.
    """
    end_last = tokenizer_from_dict(settings).end_of_text is not None
    anywhere = settings["tokenizer"] in CUT_ANYWHERE and not form.special_tokens
    encode = functools.partial(_ids, json.dumps(settings), form.special_tokens)
    pieces = _pieces(files, form, notes, end_last, anywhere, "tokenizing")
    entries: list[dict[str, Any]] = []
    for first in pieces:
        rest = itertools.islice(pieces, PIECES_PER_SHARD - 1)
        path = folder / f"tokens_{len(entries):06d}.bin"
        if path.exists():
            deque(rest, maxlen=0)  # read past its text
        else:
            write_shard(path, parallel_map(encode, itertools.chain([first], rest)))
        with _kept(folder):
            entries.append({"file": path.name, "tokens": len(open_shard(path))})
    return entries


# ----------------------------------------------------------------------------------------------
# What workers find in a piece


def _ids(settings: str, allow_special: bool, piece: Piece) -> np.ndarray:
    return encode_piece(piece, _cached_tokenizer(settings), allow_special).astype(np.uint16)


@functools.cache
def _cached_tokenizer(settings: str) -> Tokenizer:
    return tokenizer_from_dict(json.loads(settings))


def _characters(piece: Piece) -> set[str]:
    return set(joined(piece))


def _words(allow_special: bool, piece: Piece) -> Counter[str]:
    return Counter(WordTokenizer.PATTERN.findall(joined(piece, allow_special)))
