"""A text to two streams of token ids: one to train on, one to validate on.

The ids of a small text stay in memory. Those of a large one are written to disk once (prepare.py)
and read by memory map (shards.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from micrograd_gpt.support import download
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading
from micrograd_gpt.text.documents import find_files, load_documents
from micrograd_gpt.text.pieces import BETWEEN_DOCUMENTS, encode_piece
from micrograd_gpt.text.prepare import prepare
from micrograd_gpt.text.shard_files import (
    ShardFiles,
    check_shards,
    find_shards,
    matching_tokenizer,
)
from micrograd_gpt.text.shards import Shards, slices
from micrograd_gpt.text.tokenizers import Tokenizer, make_tokenizer

MOST_IN_MEMORY = 50_000_000  # bytes of text; a larger one goes to shards


@dataclass(frozen=True)
class Corpus:
    """A text as two streams of token ids, each of shape (N,), and the tokenizer that made them."""

    train: np.ndarray | Shards  # uint16, or uint32 for a vocabulary of more than 65,536
    validation: np.ndarray | Shards
    tokenizer: Tokenizer
    name: str
    unit: ClassVar[str] = "token"  # what the loss is the mean over

    def amount(self) -> str:
        """How much there is to train on, in words."""
        return f"{len(self.train):,} tokens of {self.name}"

    @cached_property
    def bytes_per_token(self) -> float | None:
        """How many bytes of UTF-8 a token of the validation text stands for, on average.

        A loss of x nats per token is x / ln 2 / `bytes_per_token` bits per byte, which can be
        compared between tokenizers. `<|endoftext|>` counts as no bytes. None if there are no
        tokens, or if some stand for text that the vocabulary does not have.
        """
        lengths = np.array([float(len(token)) for token in self.tokenizer.tokens])
        if self.tokenizer.end_of_text is not None:
            lengths[self.tokenizer.end_of_text] = 0
        if self.tokenizer.unknown is not None:
            lengths[self.tokenizer.unknown] = math.nan
        total = sum(float(lengths[ids].sum()) for ids in slices(self.validation))
        if math.isnan(total) or not len(self.validation):
            return None
        return total / len(self.validation)


def load_corpus(
    source: str | Path,
    tokenizer: str | Tokenizer,
    validation_fraction: float = 0.1,
    encoding: str = "utf-8",
    cache_folder: str | Path | None = None,
) -> Corpus:
    """Return the text of `source` as ids to train on and to validate on.

    `source` is a text (see `load_documents`) in `encoding`, or a folder of token shards (see
    shard_files.py), or one shard. `tokenizer` is a tokenizer, or the name of one; if its vocabulary
    comes from a text, it then comes from this one. The last `validation_fraction` of the ids are
    for validation and the rest for training, unless the shards are already divided.

    A text of more than 50 MB is tokenized once, into shards in `cache_folder`/tokens. The ids of
    given shards are checked once, which `cache_folder`/checked records. `cache_folder` is by
    default the folder for downloads. Raises UserError for what `load_documents`, `make_tokenizer`,
    `Tokenizer.encode`, `prepare` and `find_shards` cannot take.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction must be between 0 and 1, not {validation_fraction}")
    if source not in ("pydocs", "shakespeare"):
        cache = Path(cache_folder or download.cache_folder())
        with reading(source):
            shard_files = find_shards(source)
            text_files = [] if shard_files else find_files(source)
            size = sum(file.stat().st_size for file in text_files)
        if shard_files is not None:
            made_with = matching_tokenizer(shard_files, tokenizer)
            check_shards(shard_files, made_with, cache / "checked")
            return _corpus_of(shard_files, made_with, validation_fraction, str(source))
        if size > MOST_IN_MEMORY:
            shard_files = prepare(source, text_files, tokenizer, encoding, cache / "tokens")
            made_with = matching_tokenizer(shard_files, tokenizer)
            try:
                return _corpus_of(shard_files, made_with, validation_fraction, str(source))
            except UserError as error:
                raise UserError(
                    f"{error} (delete {cache / 'tokens'} to have texts tokenized again)"
                ) from error
    documents = load_documents(source, encoding)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, BETWEEN_DOCUMENTS.join(documents))
    ids = encode_documents(documents, tokenizer)
    split = int(len(ids) * (1 - validation_fraction))
    return Corpus(ids[:split], ids[split:], tokenizer, str(source))


def encode_documents(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of the documents in one stream, shape (N,).

    If there are several documents, `<|endoftext|>` follows each. A tokenizer without that token
    gets an empty line between them. The dtype is uint16 if the vocabulary allows it, else uint32.
    """
    ends = [""] if len(documents) > 1 and tokenizer.end_of_text is not None else []
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return encode_piece([*documents, *ends], tokenizer).astype(dtype)


def _corpus_of(
    shard_files: ShardFiles, tokenizer: Tokenizer, validation_fraction: float, name: str
) -> Corpus:
    """Return the ids of shards, split by position if the shards are not already divided."""
    train, validation = shard_files.open()
    if not shard_files.validation:
        train, validation = train.split(int(len(train) * (1 - validation_fraction)))
    return Corpus(train, validation, tokenizer, name)
