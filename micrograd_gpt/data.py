"""Text to tokens to batches.

`load_documents` finds the text, `load_corpus` turns it into two streams of token ids, one to train
on and one to validate on, and `Windows` cuts a stream into the batches of a run.

Shapes: B batch, T time (`block_size` tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from micrograd_gpt.download import cache_folder, download
from micrograd_gpt.errors import UserError
from micrograd_gpt.tokenizers import Tokenizer, make_tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".rst")
BETWEEN_DOCUMENTS = "\n\n"  # where the tokenizer has no end-of-text token

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394  # bytes
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# ----------------------------------------------------------------------------------------------
# Documents


def load_documents(source: str | Path) -> list[str]:
    """Return the documents of `source`, none of them empty.

    - "pydocs": the Python language manual inside every interpreter (`pydoc_data.topics`), one
      document per topic, in the order of their names. It differs from one Python to the next.
    - "shakespeare": one document, fetched once into the user's cache folder and verified.
    - a text file: one document. A folder: every .txt, .md and .rst file under it, sorted by path.

    Files are UTF-8 and are taken byte for byte: line ends stay what they are. To read a file that
    is called "pydocs", give its path ("./pydocs").

    Raises UserError where there is no text, or no network to fetch it from.
    """
    if source == "pydocs":
        documents = _pydocs()
    elif source == "shakespeare":
        documents = [_read_text(_shakespeare())]
    elif (path := Path(source)).is_dir():
        files = [p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()]
        if not files:
            raise UserError(f"no {', '.join('*' + s for s in TEXT_SUFFIXES)} file is under {path}")
        files.sort(key=lambda file: file.relative_to(path).as_posix())
        documents = [_read_text(file) for file in files]
    elif path.exists():
        documents = [_read_text(path)]
    else:
        raise UserError(
            f"there is no data {str(source)!r}: give pydocs, shakespeare, or the path of a text "
            "file or of a folder of text files"
        )
    documents = [document for document in documents if document]
    if not documents:
        raise UserError(f"the text of {source} is empty: give one with something to learn from")
    return documents


def _pydocs() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions package it apart from the interpreter
        raise UserError(
            "this Python came without its manual (pydoc_data): give a text file with --data"
        ) from error
    return [topics[name] for name in sorted(topics)]


def _shakespeare() -> Path:
    path = cache_folder() / "shakespeare.txt"
    try:
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SIZE, SHAKESPEARE_SHA256)
    except UserError as error:
        raise UserError(f"{error}; a local text file works with --data PATH") from error
    return path


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, line ends untouched, so that offsets into it are the file's."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}; convert it to UTF-8"
        ) from error


# ----------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class Corpus:
    """A text as two streams of token ids, each of shape (N,), and the tokenizer that made them."""

    train: np.ndarray  # uint16, or uint32 for a vocabulary of more than 65,536
    validation: np.ndarray
    tokenizer: Tokenizer
    name: str


def encode_documents(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of the documents in one stream, shape (N,).

    Where there are several documents, `<|endoftext|>` follows each; a tokenizer without that token
    gets them with an empty line between. uint16 where the vocabulary allows, else uint32.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end_of_text = tokenizer.end_of_text
    if end_of_text is None or len(documents) == 1:
        return tokenizer.encode(BETWEEN_DOCUMENTS.join(documents)).astype(dtype)
    ids = (np.append(tokenizer.encode(document), end_of_text) for document in documents)
    return np.concatenate([document.astype(dtype) for document in ids])


def load_corpus(
    source: str | Path, tokenizer: str | Tokenizer, validation_fraction: float = 0.1
) -> Corpus:
    """Return the text of `source` (see `load_documents`) as ids to train on and to validate on.

    `tokenizer` is one, or the name of one, whose vocabulary is then made from this very text. The
    last `validation_fraction` of the ids validate, those before it train. Raises UserError for
    what `load_documents`, `make_tokenizer` and `Tokenizer.encode` cannot take.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction must be between 0 and 1, not {validation_fraction}")
    documents = load_documents(source)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, BETWEEN_DOCUMENTS.join(documents))
    ids = encode_documents(documents, tokenizer)
    split = int(len(ids) * (1 - validation_fraction))
    return Corpus(ids[:split], ids[split:], tokenizer, str(source))


# ----------------------------------------------------------------------------------------------
# Batches


class Windows:
    """Sliding windows over a stream of tokens, in an order that needs no state and no memory.

    Window i is the `block_size` + 1 tokens from i * `stride` on: all but the last are the inputs,
    all but the first the targets. One epoch is every window once; `len(windows)` is their number.

    The order is a function of (seed, epoch) alone, and batches are a function of (seed, step): a
    run is resumed by asking for its next step. Each epoch also moves all its windows on by one
    offset in [0, stride), so that in time every token is seen with every length of context before
    it. (A stream too short for that gets the offsets that fit.)

    `tokens` has shape (N,) and any integer dtype; a memory-mapped file is read where it is used.
    Raises UserError where N is less than one window.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, stride: int | None = None) -> None:
        self.tokens = np.asarray(tokens)
        self.block_size = block_size
        self.stride = block_size if stride is None else stride
        if block_size < 1 or self.stride < 1:
            raise UserError(f"--block-size {block_size} and stride {self.stride} must be 1 or more")
        starts = len(self.tokens) - block_size  # how many places a window can start at
        if starts < 1:
            raise UserError(
                f"{len(self.tokens)} tokens are too few for --block-size {block_size}, which takes "
                f"{block_size + 1}: give more text or a smaller --block-size"
            )
        self._count = max(1, starts // self.stride)
        self._offsets = min(self.stride, starts - (self._count - 1) * self.stride)

    def __len__(self) -> int:
        return self._count

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of step `step`, each int64 of shape (B, T).

        Step s takes rows s * B to s * B + B - 1 of the endless sequence epoch 0, epoch 1, ...
        """
        rows = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)  # (B,)
        epoch, row = np.divmod(rows, np.uint64(self._count))
        # A key per row: output number `epoch` of the generator SplitMix64 seeded with `seed`.
        key = _mix(epoch * GOLDEN + np.uint64(seed % (1 << 64)))
        window = _permute(row, self._count, key)
        offset = _mix(key) % np.uint64(self._offsets)
        return self._gather((window * np.uint64(self.stride) + offset).astype(np.int64))

    def evenly_spaced(self, count: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield at most `count` batches of inputs and targets, each int64 of shape (B, T).

        They are `count` * `batch_size` windows, evenly spaced over the stream, the same each time;
        where there are fewer, they are all of them, and the last batch may be smaller.
        """
        chosen = min(count * batch_size, self._count)
        starts = np.arange(chosen) * self._count // max(chosen, 1) * self.stride
        for first in range(0, chosen, batch_size):
            yield self._gather(starts[first : first + batch_size])

    def _gather(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.tokens[starts[:, None] + np.arange(self.block_size + 1)]  # (B, T + 1)
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)


# A shuffled epoch without a shuffled list: a permutation of 0 .. n-1, computed index by index. The
# index is written as two digits, left and right. Each round of a Feistel network adds to one digit
# a hash of the other, which could be subtracted again: so the whole is one to one, whatever the
# hash. It permutes 0 .. a*b-1, a little more than n; an index that lands outside n goes through
# again until it lands inside ("cycle walking"), which keeps it one to one.
# Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains".

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: SplitMix64's step
ROUND_KEYS = GOLDEN * np.arange(1, 7, dtype=np.uint64)[:, None]  # (6 rounds, 1)
HALF = np.uint64(32)  # of a hash's bits: a digit and half a hash add up without overflow


def _permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where the permutation of 0 .. n-1 chosen by `key` sends `index`; all uint64, shape (B,)."""
    a = np.uint64(math.isqrt(n - 1) + 1)  # the square root of n, rounded up
    b = np.uint64(-(-n // int(a)))
    keys = key + ROUND_KEYS  # (6, B)

    def network(index: np.ndarray) -> np.ndarray:
        left, right = np.divmod(index, b)  # left < a, right < b
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + (_mix(right + even) >> HALF)) % a
            right = (right + (_mix(left + odd) >> HALF)) % b
        return left * b + right

    index = network(index)
    while (outside := index >= n).any():
        index = np.where(outside, network(index), index)
    return index


def _mix(x: np.ndarray) -> np.ndarray:
    """A one-to-one hash of 64 bits: the output function of SplitMix64. uint64, any shape.

    Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
