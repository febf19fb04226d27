"""A text larger than memory to token shards: once, by several processes, in bounded memory.

The parent reads the text and cuts it into pieces, workers encode them, the parent writes the ids in
order. Pieces and shards are a function of the text alone: a preparation that was interrupted reads
the text again and goes on at the first shard that is not there.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, sha256, write_text
from micrograd_gpt.text.documents import read_documents
from micrograd_gpt.text.shards import (
    FORMAT,
    MANIFEST,
    ShardFiles,
    find_shards,
    open_shard,
    write_shard,
)
from micrograd_gpt.text.tokenizers import (
    LEARNED,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    from_dict,
    make_tokenizer,
)

BETWEEN_DOCUMENTS = "\n\n"  # where the tokenizer has no end-of-text token
PIECE = 1 << 18  # characters that a worker encodes at a time
PIECES_IN_SHARD = 1024  # some 80 million of GPT-2's tokens
MOST_PROCESSES = 6  # some 80 MB of memory each
MOST_WORDS = 1_000_000  # counted at a time
BEGUN = "preparing.json"  # the manifest as far as it is known, until there is one
ABANDONED = 3600  # seconds after which an unfinished file is taken for that of a killed process

# A piece of text: the strings between the ends of documents. The first goes on where the last of
# the piece before stopped: "a b" and then the document "c" are ["a b", "c"], or ["a"], [" b", "c"].
Piece = list[str]
Mapping = Callable[[Callable[[Piece], Any], Iterable[Piece]], Iterator[Any]]

# Text may be cut before white space that follows something else: no token of ours has white space
# after anything else, so none spans that place; and no tokenizer looks across it, because GPT-2's
# pattern looks ahead in runs of white space only. Python takes the characters U+001C to U+001F for
# white space too, GPT-2's pattern does not. Text may be cut between a letter or digit and one of
# the marks below, too (Chinese has no spaces): no token has such a mark after a letter or digit.
SAFE_PLACE = re.compile(r"(?<=\S)[^\S\x1c-\x1f]|(?<=[^\W_])[,.;:!?、。，．；：！？]")
LONGEST = 1 << 20  # characters of a piece in which there is no such place
ANYWHERE = ("char", "byte")  # tokenizers of single characters: text may be cut at each of them


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of the texts with `<|endoftext|>` between them, int32 of shape (N,).

    A tokenizer without that token gets an empty line between them.
    """
    if tokenizer.end_of_text is None:
        return tokenizer.encode(BETWEEN_DOCUMENTS.join(texts))
    end = np.array([tokenizer.end_of_text], np.int32)
    ids = [array for text in texts for array in (end, tokenizer.encode(text))]
    return np.concatenate([np.empty(0, np.int32), *ids[1:]])


def cut(
    documents: Iterable[Iterable[str]],
    end_last: bool,
    size: int | None = None,
    anywhere: bool = False,
) -> Iterator[Piece]:
    """Yield documents, each given in blocks, as pieces of at least `size` (PIECE) characters.

    A piece ends at the first safe place there is, so that `encode_texts` of all pieces, one after
    another, gives the ids of the whole. With `anywhere`, which is for tokenizers of single
    characters, every place is safe. Empty documents are left out. With `end_last`, the last of
    several documents is ended too.

    Where a piece would grow past LONGEST characters (a million letters without white space or a
    mark), it ends there all the same, to bound the memory. Only then may the ids be others than
    those of the whole: for gpt2 and word, those of the run of letters and digits, of marks, or of
    white space that is cut, and of the runs that touch it.
    """
    size = PIECE if size is None else size
    longest = max(size, LONGEST)
    texts: Piece = []
    count = filled = 0  # documents so far; characters in `texts`
    for blocks in documents:
        begun = False
        for part in _parts(blocks, size):
            if not begun:
                texts.append("")
                count, begun = count + 1, True
            texts[-1] += part
            filled += len(part)
            while filled >= size:
                before = filled - len(texts[-1])
                place = _place(texts[-1], size - before, longest - before, anywhere)
                if place is None:
                    break
                yield [*texts[:-1], texts[-1][:place]]
                texts = [texts[-1][place:]]
                filled = len(texts[0])
        if filled >= size:
            yield texts
            texts, filled = [""], 0
    if end_last and count > 1:
        texts.append("")
    if any(texts) or len(texts) > 1:
        yield texts


def _parts(blocks: Iterable[str], size: int) -> Iterator[str]:
    """The blocks, none of them empty, the long ones in parts of `size` characters."""
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


def _place(text: str, least: int, most: int, anywhere: bool) -> int | None:
    """Where to cut `text`: at `least` or the first safe place after it, at the latest at `most`.

    None where that depends on what follows the text.
    """
    if anywhere:
        return least if len(text) > least else None
    safe = SAFE_PLACE.search(text, least, most + 1)
    if safe:
        return safe.start()
    return most if len(text) > most else None


# ----------------------------------------------------------------------------------------------
# Workers


@contextmanager
def workers(processes: int | None = None) -> Iterator[Mapping]:
    """Give a function like `map` whose results are computed by `processes` others, in order.

    It draws from what it is to map only a little ahead of the results. Raises what the mapped
    function raises, and UserError where a process is ended from outside.
    """
    count = processes or min(os.cpu_count() or 1, MOST_PROCESSES)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_worker)

    def run(function: Callable[[Piece], Any], pieces: Iterable[Piece]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        for piece in pieces:
            waiting.append(pool.submit(function, piece))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        with _ctrl_c_later():  # one that is starting would answer with a traceback
            for _ in range(count):
                pool.submit(os.getpid)
        yield run
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes was killed (out of memory?); run this again to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Hold Ctrl-C back, from the processes that are started meanwhile for good."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(settings: str, piece: Piece) -> np.ndarray:
    return encode_texts(piece, _tokenizer(settings)).astype(np.uint16)


@functools.cache
def _tokenizer(settings: str) -> Tokenizer:
    return from_dict(json.loads(settings))


def _characters(piece: Piece) -> set[str]:
    return set(BETWEEN_DOCUMENTS.join(piece))


def _words(piece: Piece) -> Counter[str]:
    return Counter(WordTokenizer.PIECE.findall(BETWEEN_DOCUMENTS.join(piece)))


# ----------------------------------------------------------------------------------------------
# A folder of shards


def prepare(
    source: str | Path,
    files: list[Path],
    tokenizer: str | Tokenizer,
    encoding: str,
    cache: Path,
    processes: int | None = None,
) -> ShardFiles:
    """Return shards of the text in `files`, those of `source`; made now, if they are not there yet.

    `tokenizer` is one, or the name of one, whose vocabulary is then made from this very text. The
    shards go to a folder of their own in `cache`, one for each `source`, `tokenizer` and
    `encoding`, and are made anew where a file has changed since. Says on stderr where that is.

    Raises UserError where the text is empty, can't be read or encoded, or changes meanwhile, and
    where the shards can't be written.
    """
    folder = _folder(source, files, tokenizer, encoding, cache)
    found = _up_to_date(folder, files)
    print(f"{'the tokens of' if found else 'tokenizing'} {source}: {folder}", file=sys.stderr)
    if found:
        return found
    sources = [_describe(file) for file in files]
    with workers(processes) as run:
        begun = _continue_or_begin(folder, sources)
        if "tokenizer" not in begun:
            if not isinstance(tokenizer, Tokenizer):
                tokenizer = _learn(tokenizer, files, encoding, run)
            if tokenizer.vocab_size > 1 << 16:
                raise UserError(
                    f"{source} has {tokenizer.vocab_size:,} different characters, and the ids of a "
                    "large text are uint16: give --tokenizer gpt2 or byte"
                )
            begun["tokenizer"] = tokenizer.to_dict()
            write_text(folder / BEGUN, json.dumps(begun))
        shards = _write_shards(folder, files, encoding, begun["tokenizer"], run)
    if not shards:
        raise UserError(f"the text of {source} is empty: give one with something to learn from")
    hashes = [sha256(file) for file in files]
    if [_describe(file) for file in files] != sources:
        raise UserError(f"{source} changed while it was read: run this again")
    manifest = {
        "format": FORMAT,
        "tokenizer": begun["tokenizer"],
        "encoding": encoding,
        "sources": [s | {"sha256": h} for s, h in zip(sources, hashes, strict=True)],
        "tokens": sum(shard["tokens"] for shard in shards),
        "shards": shards,
    }
    _write_manifest(folder, manifest)
    (folder / BEGUN).unlink(missing_ok=True)
    found = find_shards(folder)
    assert found is not None
    return found


def _folder(
    source: str | Path,
    files: list[Path],
    tokenizer: str | Tokenizer,
    encoding: str,
    cache: Path,
) -> Path:
    """Where the shards are or will be. Runs that name a tokenizer, and those resumed, which have
    it with its vocabulary, meet in one folder, as long as that holds this very vocabulary and is up
    to date: shards made with an old vocabulary are never what a name stands for.
    """

    def named(settings: dict[str, Any]) -> Path:
        key = json.dumps([settings, encoding, str(Path(source).resolve())])
        return cache / hashlib.sha256(key.encode()).hexdigest()[:16]

    if isinstance(tokenizer, str):
        return named({"tokenizer": tokenizer})
    folder = named({"tokenizer": tokenizer.name})
    manifest = read_json(folder / MANIFEST) or read_json(folder / BEGUN)
    alike = manifest is not None and manifest.get("tokenizer") == tokenizer.to_dict()
    if alike and (not tokenizer.to_dict().get("vocabulary") or _up_to_date(folder, files)):
        return folder
    return named(tokenizer.to_dict())


def _describe(file: Path) -> dict[str, Any]:
    """What tells whether a file has changed, short of reading it."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    return {
        "path": str(file.resolve()),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }


def _up_to_date(folder: Path, files: list[Path]) -> ShardFiles | None:
    """The shards in `folder`, if they are complete and of the files as they are now.

    A file of another time stamp that has the same bytes is the same; the new time is noted.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    now = [_describe(file) for file in files]
    try:
        recorded = manifest["sources"]
        if [(s["path"], s["bytes"]) for s in now] != [(s["path"], s["bytes"]) for s in recorded]:
            return None
        pairs = list(zip(recorded, now, strict=True))
        touched = [
            (before, after)
            for before, after in pairs
            if before["modified_ns"] != after["modified_ns"]
        ]
        if any(sha256(before["path"]) != before["sha256"] for before, _ in touched):
            return None
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: delete {folder}") from error
    if touched:
        for before, after in touched:
            before.update(after)
        _write_manifest(folder, manifest)
    return find_shards(folder)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _continue_or_begin(folder: Path, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """What an interrupted preparation of the same text left, or what a new one begins with."""
    begun = {"sources": sources, "pieces": [PIECE, LONGEST, PIECES_IN_SHARD]}
    left = read_json(folder / BEGUN)
    same = left is not None and begun.items() <= left.items()
    try:
        for path in [folder / MANIFEST, folder / BEGUN, *folder.glob("tokens_*.bin")]:
            if not same:
                path.unlink(missing_ok=True)
        for path in folder.glob(".*.tmp"):
            if path.stat().st_mtime < time.time() - ABANDONED:
                path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return left if same and left is not None else begun


def _pieces(
    files: list[Path], encoding: str, end_last: bool, anywhere: bool, title: str
) -> Iterator[Piece]:
    """The text of the files in pieces (see `cut`), with a progress bar."""
    from tqdm import tqdm

    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        documents = (d for file in files for d in read_documents(file, encoding, bar.update))
        yield from cut(documents, end_last, anywhere=anywhere)


def _learn(name: str, files: list[Path], encoding: str, run: Mapping) -> Tokenizer:
    """The tokenizer called `name`, with the text's vocabulary if it is one that has its own.

    The counts of words are bounded: when there are too many, the rarer half is forgotten, which
    cannot matter to the most common 10,000 (Manku & Motwani 2002, "Approximate Frequency Counts").
    """
    if name not in LEARNED:
        return make_tokenizer(name, "")
    pieces = _pieces(files, encoding, False, name in ANYWHERE, f"collecting {name}s")
    if name == "char":
        characters: set[str] = set().union(*run(_characters, pieces))
        return CharTokenizer.from_text("".join(characters))
    counts: Counter[str] = Counter()
    for found in run(_words, pieces):
        counts.update(found)
        if len(counts) > MOST_WORDS:
            counts = Counter(dict(counts.most_common(MOST_WORDS // 2)))
    return WordTokenizer.from_counts(counts)


def _write_shards(
    folder: Path, files: list[Path], encoding: str, tokenizer: dict[str, Any], run: Mapping
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the name and number of tokens of each."""
    end_last = from_dict(tokenizer).end_of_text is not None
    encode = functools.partial(_encode, json.dumps(tokenizer))
    anywhere = tokenizer["tokenizer"] in ANYWHERE
    pieces = _pieces(files, encoding, end_last, anywhere, "tokenizing")
    shards: list[dict[str, Any]] = []
    for number in itertools.count():
        rest = itertools.islice(pieces, PIECES_IN_SHARD)
        first = next(rest, None)
        if first is None:
            return shards
        path = folder / f"tokens_{number:06d}.bin"
        if path.exists():
            deque(rest, maxlen=0)
        else:
            write_shard(path, run(encode, itertools.chain([first], rest)))
        shards.append({"file": path.name, "tokens": len(open_shard(path))})
    raise AssertionError
