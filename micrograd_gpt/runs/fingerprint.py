"""Is the data of a resumed run still the data it was started on?"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.corpus import Corpus
from micrograd_gpt.text.shards import Shards, slices
from micrograd_gpt.text.tokenizers import UnknownCharacter


@contextmanager
def known_characters(settings: argparse.Namespace) -> Iterator[None]:
    """A UserError about a character in this block says so if a run would resume on other data."""
    try:
        yield
    except UnknownCharacter as error:
        if not settings.resume:
            raise
        raise UserError(
            f"the data is no longer that of the run in {settings.out}: {error}, or give the same "
            "data"
        ) from error


def check_same_data(settings: argparse.Namespace, corpus: Corpus) -> None:
    """UserError if a run would resume on other data; the settings note which data this is."""
    train, validation = map(fingerprint, (corpus.train, corpus.validation))
    is_same = str(settings.data_fingerprint).startswith(f"{train} and ")
    changed = corpus.validation_name if is_same else None
    check_fingerprint(settings, f"{train} and {validation}", changed)


def check_fingerprint(settings: argparse.Namespace, found: str, changed: str | None = None) -> None:
    """check_same_data for data whose fingerprint was `found`; `changed` is the file that differs,
    where it is not --data."""
    before = settings.data_fingerprint
    if settings.resume and found != before and not settings.allow_changes:
        raise UserError(
            f"{changed or settings.data} is no longer the data of the run in {settings.out} "
            f"({before}; now {found}): give the same data, or add --allow-changes"
        )
    settings.data_fingerprint = found


def fingerprint(tokens: np.ndarray | Shards, whole_up_to: int = 50_000_000) -> str:
    """What tells two token streams (N,) apart: their length, and a checksum.

    The checksum covers all of at most `whole_up_to` tokens. Of more, it covers 256 pieces of 4,096
    tokens, evenly spaced: a change between the pieces is seen only if it moves what follows.
    """
    if len(tokens) <= whole_up_to:
        parts: Iterable[np.ndarray] = slices(tokens)
    else:
        starts = np.linspace(0, max(0, len(tokens) - 4096), 256).astype(np.int64)
        places = np.minimum(starts[:, None] + np.arange(4096), len(tokens) - 1)  # (256, 4096)
        parts = [tokens[places]]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part.astype("<u4").tobytes(), checksum)
    return f"{len(tokens)} tokens, CRC-32 {checksum:08x}"
