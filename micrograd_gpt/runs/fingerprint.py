"""Is the data of a resumed run still the data it was started on?"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from micrograd_gpt.runs.checkpoint import load_settings
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import are_one_file
from micrograd_gpt.text.corpus import Corpus
from micrograd_gpt.text.shards import Shards, slices
from micrograd_gpt.text.tokenizers import UnknownCharacter


@contextmanager
def known_characters(settings: argparse.Namespace) -> Iterator[None]:
    """A UserError about a character in this block says so if a run would resume on other data, and
    what else helps if it would make a tokenizer of its own."""
    try:
        yield
    except UnknownCharacter as error:
        if not settings.resume:
            has_choice = getattr(settings, "tokenizer", None) == "char"
            instead = ", or, to learn from text, give --tokenizer byte, which has them all"
            raise UserError(f"{error}{instead if has_choice else ''}") from error
        raise UserError(
            f"the data is no longer that of the run in {settings.out}: {error}, or give the same "
            "data"
        ) from error


def check_same_data(settings: argparse.Namespace, corpus: Corpus) -> None:
    """UserError if a run would resume on other data; the settings note which data this is."""
    found = " and ".join(map(fingerprint, (corpus.train, corpus.validation)))
    check_fingerprint(settings, found, corpus.validation_name)


def check_fingerprint(settings: argparse.Namespace, found: str, validation: str | None) -> None:
    """check_same_data for data whose fingerprint was `found`; `validation` is the file that the
    second part of it is of, where that is not --data."""
    before = str(settings.data_fingerprint)
    if settings.resume and found != before and not settings.allow_changes:
        saved = load_settings(settings.out)
        (train, _, other), (train_before, _, other_before) = (
            text.partition(" and ") for text in (found, before)
        )
        for name in ("validation", "test"):  # of which another one changes what is left of --data
            had, has = saved.get(name), getattr(settings, name, None)
            is_same = has == had or are_one_file(has or "", had or "")
            if not is_same and (name == "test" or other != other_before):
                raise UserError(
                    f"the run in {settings.out} has {had or 'a part of --data'} as --{name}, not "
                    f"{has}: leave the flag out to resume, or add --allow-changes"
                )
        changed = validation if validation and train == train_before else settings.data
        raise UserError(
            f"{changed} is no longer the data of the run in {settings.out} ({before}; now {found}):"
            " give the same data, or add --allow-changes"
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
