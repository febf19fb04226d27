"""A text to two streams of token ids: one to train on, one to validate on.

The ids of a small text stay in memory. Those of a large one are written to disk once (prepare.py)
and read by memory map (shards.py).
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from micrograd_gpt.support import download
from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.errors import UserError, about
from micrograd_gpt.support.files import reading
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT
from micrograd_gpt.text.decoding import Form
from micrograd_gpt.text.documents import (
    AS_IT_IS,
    BY_NAME,
    find_files,
    load_documents,
    text_files,
)
from micrograd_gpt.text.pieces import encode_piece, joined
from micrograd_gpt.text.prepare import prepare
from micrograd_gpt.text.shard_files import check_shards, find_shards, matching_tokenizer
from micrograd_gpt.text.shards import Shards, slices
from micrograd_gpt.text.tokenizers import Tokenizer, make_tokenizer
from micrograd_gpt.text.windows import Windows

MOST_IN_MEMORY = 50_000_000  # bytes of text; a larger one goes to shards
VALIDATION = 0.1  # the fraction of a text to validate on


@dataclass(frozen=True)
class Corpus:
    """A text as two streams of token ids, each of shape (N,), and the tokenizer that made them.

    `fraction` is how much of the text is the second stream; None where that is another text.
    """

    train: np.ndarray | Shards  # uint16, or uint32 for a vocabulary of more than 65,536
    validation: np.ndarray | Shards
    tokenizer: Tokenizer
    name: str
    fraction: float | None = None
    validation_name: str | None = None  # of the other text; None: it has the same name
    unit: ClassVar[str] = "token"  # what the loss is the mean over

    def amount(self) -> str:
        """How much there is to train on, in words."""
        return f"{len(self.train):,} tokens of {self.name}"

    def word(self) -> str:
        """A word to try the model with: "The", unless the text lacks that or its characters."""
        with suppress(UserError):
            if not self.tokenizer.count_unknown(self.tokenizer.encode("The")):
                return "The"
        ids = self.validation[:100].astype(int)
        text = self.tokenizer.decode([i for i in ids if not self.tokenizer.count_unknown([i])])
        text = text.replace("\0", "")  # which no shell passes on
        return (text.split() or [text])[0][:20]

    @property
    def in_memory(self) -> bool:
        """Whether all its ids are in memory, and none in files that are read when needed."""
        return not any(isinstance(ids, Shards) for ids in (self.train, self.validation))

    def windows(self, block_size: int) -> tuple[Windows, Windows]:
        """The windows to train on, and those to validate on.

        Raises UserError, which says what helps, where a stream is shorter than a window.
        """
        need = block_size + 1
        lengths = len(self.train), len(self.validation)
        if min(lengths) >= need:
            return Windows(self.train, block_size), Windows(self.validation, block_size)
        which = "validation" if lengths[1] <= lengths[0] else "training"
        shorter = min(lengths)
        few = f"fewer than the {need:,} that --block-size {block_size} needs"
        smaller = f", or a smaller --block-size (at most {shorter - 1})" if shorter > 1 else ""
        if self.fraction is None:
            name = self.validation_name if which == "validation" else None
            raise UserError(
                f"{name or self.name}: the {which} text has {counted(shorter, 'token')}, {few}: "
                f"give more text{smaller}"
            )
        enough = math.ceil(need / min(self.fraction, 1 - self.fraction)) + 1
        fraction = ", another --validation fraction" if sum(lengths) >= 2 * need else ""
        own = ", a --validation FILE of its own" if sum(lengths) >= need else ""
        raise UserError(
            f"{self.name} has {counted(sum(lengths), 'token')}, {shorter:,} of them for "
            f"{which}, {few}: give {enough:,} tokens or more{fraction}{own}{smaller}"
        )

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
    validation: float | str | Path = VALIDATION,
    form: Form = AS_IT_IS,
    cache_folder: str | Path | None = None,
) -> Corpus:
    """Return the text of `source` as ids to train on and to validate on.

    `source` is a text (see `load_documents`), or a folder of token shards (see shard_files.py), or
    one shard. `tokenizer` is a tokenizer, or the name of one; if its vocabulary comes from a text,
    it then comes from this one. `validation` is another source, or a fraction: the last part of the
    ids is for validation then and the rest for training, unless the shards are already divided.

    A text of more than 50 MB is tokenized once, into shards in `cache_folder`/tokens. The ids of
    given shards are checked once, which `cache_folder`/checked records. `cache_folder` is by
    default the folder for downloads. Raises UserError for what `load_documents`, `make_tokenizer`,
    `Tokenizer.encode`, `prepare` and `find_shards` cannot take, and for special tokens of a
    tokenizer that has none.
    """
    fraction = _fraction(validation)
    form = form.for_tokenizer(tokenizer if isinstance(tokenizer, str) else tokenizer.name)
    ids, marked, tokenizer = _read(source, tokenizer, form, cache_folder)
    if fraction is None:
        _warn_if_shared(source, validation)
        other = _read_validation(validation, tokenizer, form, cache_folder)
        return Corpus(ids, other, tokenizer, str(source), validation_name=str(validation))
    if marked is not None:
        if fraction != VALIDATION:
            raise UserError(
                f"{source} has validation shards of its own: leave --validation {validation} out, "
                "or give a file"
            )
        return Corpus(ids, marked, tokenizer, str(source))
    train, rest = _split(ids, int(len(ids) * (1 - fraction)))
    return Corpus(train, rest, tokenizer, str(source), fraction)


def _fraction(validation: float | str | Path) -> float | None:
    """The fraction that `validation` is; None if it is a source. UserError for what is neither."""
    try:
        fraction = float(validation)  # type: ignore[arg-type]  # a Path is no number, as it says
    except (TypeError, ValueError):
        name = str(validation)
        with reading(name):
            if name in BY_NAME or Path(name).exists():
                return None
        raise UserError(
            f"--validation {name!r} does not exist: give a path as for --data, or a "
            "fraction such as 0.1"
        ) from None
    if not 0 < fraction < 1:
        raise UserError(
            f"--validation is a file, a folder or a fraction between 0 and 1, not {validation}"
        )
    return fraction


Ids = np.ndarray | Shards


def _read(
    source: str | Path, tokenizer: str | Tokenizer, form: Form, cache_folder: str | Path | None
) -> tuple[Ids, Ids | None, Tokenizer]:
    """The ids of a source, those that it marks for validation (None: it marks none), and what
    made them.
    """
    text_files = None
    if source not in BY_NAME:
        with reading(source):
            shard_files = find_shards(source)
            text_files = [] if shard_files else find_files(source)
            size = sum(file.stat().st_size for file in text_files)
        if shard_files is not None:
            if form.special_tokens or form.encoding != AS_IT_IS.encoding:
                say(f"note: {source} holds tokens: --encoding and --special-tokens are for text")
            made_with = matching_tokenizer(shard_files, tokenizer)
            check_shards(shard_files, made_with, _cache(cache_folder, "checked"))
            train, validation = shard_files.open()
            return train, validation if shard_files.validation else None, made_with
        if size > MOST_IN_MEMORY:
            tokens = Path(cache_folder or download.cache_folder()) / "tokens"
            with about(source):
                shard_files = prepare(source, text_files, tokenizer, form, tokens)
            made_with = matching_tokenizer(shard_files, tokenizer)
            return shard_files.open()[0], None, made_with
    documents = load_documents(source, form, text_files)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, joined(documents, form.special_tokens))
    with about(source):
        ids = encode_documents(documents, tokenizer, form.special_tokens)
    tokenizer.tell_unknown(ids, str(source))
    if not form.special_tokens and any(END_OF_TEXT in document for document in documents):
        tokenizer.tell_typed(source)
    return ids, None, tokenizer


def _read_validation(
    source: Any, tokenizer: Tokenizer, form: Form, cache_folder: str | Path | None
) -> Ids:
    """The ids of a source that is for validation only; of a divided one, that part of it."""
    with about(source):
        ids, marked, _ = _read(source, tokenizer, form, cache_folder)
    return ids if marked is None else marked


def _warn_if_shared(source: Any, validation: Any) -> None:
    """Say so where a model would be validated on what it was trained on."""
    trained, other = ({file.resolve() for file in text_files(s)} for s in (source, validation))
    if shared := other & trained:
        say(
            f"warning: --validation {validation} shares {counted(len(shared), 'file')} "
            f"({min(shared)}) with --data {source}: the validation loss says nothing about a new "
            "text"
        )


def _cache(folder: str | Path | None, name: str) -> Path | None:
    """A folder for what can be made again; None for a user without a home, as in a container."""
    try:
        return Path(folder or download.cache_folder()) / name
    except UserError:
        return None


def _split(ids: Ids, position: int) -> tuple[Ids, Ids]:
    if isinstance(ids, Shards):
        return ids.split(position)
    return ids[:position], ids[position:]


def encode_documents(
    documents: list[str], tokenizer: Tokenizer, allow_special: bool = False
) -> np.ndarray:
    """Return the ids of the documents in one stream, shape (N,).

    If there are several documents, `<|endoftext|>` follows each. A tokenizer without that token
    gets an empty line between them. With `allow_special`, special tokens that are written in the
    documents are recognized; UserError if the tokenizer has none. The dtype is uint16 if the
    vocabulary allows it, else uint32.
    """
    tokenizer.check_special(allow_special)
    ends = [""] if len(documents) > 1 and tokenizer.end_of_text is not None else []
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return encode_piece([*documents, *ends], tokenizer, allow_special).astype(dtype)
