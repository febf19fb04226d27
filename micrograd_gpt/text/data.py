"""Text to tokens to batches.

`load_corpus` turns a text into two streams of token ids, one to train on and one to validate on,
and `Windows` cuts a stream into the batches of a run. A small text stays in memory; the ids of a
large one are prepared once (prepare.py), kept on the disk and read by memory map (shards.py).

Shapes: B batch, T time (`block_size` tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from micrograd_gpt.support import download
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading
from micrograd_gpt.text.documents import find_files, load_documents
from micrograd_gpt.text.prepare import BETWEEN_DOCUMENTS, encode_texts, prepare
from micrograd_gpt.text.shards import (
    ShardFiles,
    Shards,
    blocks,
    check_ids,
    find_shards,
    tokenizer_of,
)
from micrograd_gpt.text.tokenizers import END_OF_TEXT, Tokenizer, make_tokenizer

SMALL = 50_000_000  # bytes of text below which it is tokenized anew each time, in memory

# ----------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class Corpus:
    """A text as two streams of token ids, each of shape (N,), and the tokenizer that made them."""

    train: np.ndarray | Shards  # uint16, or uint32 for a vocabulary of more than 65,536
    validation: np.ndarray | Shards
    tokenizer: Tokenizer
    name: str

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Bytes of UTF-8 that a token of the validation text stands for, on average.

        A loss of x nats per token is x / ln 2 / `bytes_per_token` bits per byte, which can be
        compared between tokenizers. `<|endoftext|>` is a token of no bytes. None where there is no
        token, and where some stand for text that the vocabulary does not know.
        """
        unknown = getattr(self.tokenizer, "UNKNOWN", "").encode()
        special = {END_OF_TEXT.encode(): 0.0, unknown: math.nan}
        lengths = np.array([special.get(token, len(token)) for token in self.tokenizer.tokens])
        total = sum(float(lengths[ids].sum()) for ids in blocks(self.validation))
        if math.isnan(total) or not len(self.validation):
            return None
        return total / len(self.validation)


def encode_documents(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of the documents in one stream, shape (N,).

    Where there are several documents, `<|endoftext|>` follows each; a tokenizer without that token
    gets them with an empty line between. uint16 where the vocabulary allows, else uint32.
    """
    ends = [""] if len(documents) > 1 and tokenizer.end_of_text is not None else []
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return encode_texts([*documents, *ends], tokenizer).astype(dtype)


def load_corpus(
    source: str | Path,
    tokenizer: str | Tokenizer,
    validation_fraction: float = 0.1,
    encoding: str = "utf-8",
    cache_folder: str | Path | None = None,
) -> Corpus:
    """Return the text of `source` as ids to train on and to validate on.

    `source` is a text (see `load_documents`) in `encoding`, or a folder of token shards (see
    shards.py) or one shard. `tokenizer` is one, or the name of one, whose vocabulary is then made
    from this very text. The last `validation_fraction` of the ids validate, those before it train,
    except for shards that are themselves divided so.

    A text of more than 50 MB is tokenized once, into shards in `cache_folder`/tokens, and the ids
    of given shards are checked once, which `cache_folder`/checked remembers; that folder is by
    default the one for downloads. Raises UserError for what `load_documents`,
    `make_tokenizer`, `Tokenizer.encode`, `prepare` and `find_shards` cannot take.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction must be between 0 and 1, not {validation_fraction}")
    if source not in ("pydocs", "shakespeare"):
        cache = Path(cache_folder or download.cache_folder())
        with reading(source):
            shards = find_shards(source)
            files = [] if shards else find_files(source)
            size = sum(file.stat().st_size for file in files)
        if shards is not None:
            made_with = tokenizer_of(shards, tokenizer)
            check_ids(shards, made_with, cache / "checked")
            return _corpus_of(shards, made_with, validation_fraction, str(source))
        if size > SMALL:
            shards = prepare(source, files, tokenizer, encoding, cache / "tokens")
            made_with = tokenizer_of(shards, tokenizer)
            try:
                return _corpus_of(shards, made_with, validation_fraction, str(source))
            except UserError as error:
                raise UserError(
                    f"{error} (delete {cache / 'tokens'} to have texts tokenized anew)"
                ) from error
    documents = load_documents(source, encoding)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, BETWEEN_DOCUMENTS.join(documents))
    ids = encode_documents(documents, tokenizer)
    split = int(len(ids) * (1 - validation_fraction))
    return Corpus(ids[:split], ids[split:], tokenizer, str(source))


def _corpus_of(
    shards: ShardFiles, tokenizer: Tokenizer, validation_fraction: float, name: str
) -> Corpus:
    train, validation = shards.open()
    if not shards.validation:
        train, validation = train.split(int(len(train) * (1 - validation_fraction)))
    return Corpus(train, validation, tokenizer, name)


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

    `tokens` has shape (N,) and any integer dtype; memory-mapped files are read where they are used.
    Raises UserError where N is less than one window.
    """

    def __init__(
        self, tokens: np.ndarray | Shards, block_size: int, stride: int | None = None
    ) -> None:
        self.tokens = tokens if isinstance(tokens, Shards) else np.asarray(tokens)
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
