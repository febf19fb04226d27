"""A stream of tokens is told apart from one that differs anywhere it is looked at."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt.runs.fingerprint import (
    check_fingerprint,
    check_same_data,
    fingerprint,
    known_characters,
)
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.corpus import load_corpus
from micrograd_gpt.text.shards import Shards
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.tuning.classification import encode
from micrograd_gpt.tuning.labelled import Example


def test_token_streams_are_told_apart() -> None:
    tokens = np.arange(5_000_000) % 50_000
    same = fingerprint(tokens.astype(np.uint16))
    assert same == fingerprint(tokens) and same.startswith("5000000 tokens, CRC-32 ")
    shifted = np.concatenate([tokens[:3_000_000], tokens[3_000_001:], [7]])
    assert fingerprint(shifted) != same
    short = fingerprint(tokens[:10])
    assert short != fingerprint(tokens[:11]) != fingerprint(tokens[1:12])


def test_every_token_of_a_stream_is_told_apart_but_of_a_very_long_one() -> None:
    tokens = (np.arange(5_000_000) % 50_000).astype(np.uint16)
    shards = Shards([tokens[:10], tokens[10:10], tokens[10:]])
    assert fingerprint(shards) == fingerprint(tokens)
    assert fingerprint(shards, 0) == fingerprint(tokens, 0)
    before, before_of_pieces = fingerprint(tokens), fingerprint(tokens, 10)
    tokens[10_000] = 7  # in no piece of those 256, which are 19,600 apart
    assert fingerprint(tokens) != before
    assert fingerprint(tokens, 10) == before_of_pieces


def test_the_file_that_is_no_longer_the_same_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("data.txt", "validation.txt")]
    for file in files:
        file.write_text("to be or not to be")
    settings = Namespace(data=str(files[0]), validation=str(files[1]), out="out", resume=False)
    settings.data_fingerprint = None
    check_same_data(settings, load_corpus(files[0], "byte", validation=files[1]))
    saved = {"validation": str(files[1])}
    monkeypatch.setattr("micrograd_gpt.runs.fingerprint.load_settings", lambda out: saved)
    settings.resume, settings.allow_changes = True, False
    for file in reversed(files):
        file.write_text("to be or not")
        with pytest.raises(UserError, match=f"^{file} is no longer the data of the run in out"):
            check_same_data(settings, load_corpus(files[0], "byte", validation=files[1]))


@pytest.mark.parametrize(
    ("flag", "had", "has"),
    [
        ("validation", "0.1", "0.2"),
        ("validation", "0.1", "other.txt"),
        ("validation", None, "other.txt"),
        ("test", None, "other.txt"),
    ],
)
def test_a_flag_by_which_the_data_differ_is_named_and_no_file(
    flag: str, had: str | None, has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"validation": "0.1", flag: had}
    monkeypatch.setattr("micrograd_gpt.runs.fingerprint.load_settings", lambda out: saved)
    settings = Namespace(**saved | {flag: has}, resume=True, allow_changes=False)
    settings.data, settings.out, settings.data_fingerprint = "a.txt", "out", "9 and 1"
    of_own = None if has == "0.2" else "0.1" if flag == "test" else has
    match = f"^the run in out has {had or 'a part of --data'} as --{flag}, not {has}: leave the"
    with pytest.raises(UserError, match=match):
        check_fingerprint(settings, "10 and 2", of_own)
    with pytest.raises(UserError, match="^a.txt is no longer" if flag != "test" else match):
        check_fingerprint(settings, "10 and 1", of_own)  # the same text to validate on, moved


def test_texts_with_a_new_character_are_other_data() -> None:
    """Also those of labels, whose lines are named."""
    examples = [Example("abé", "odd", "labels.tsv, line 3")]
    for resume, start in ((False, ""), (True, "the data is no longer that of the run in out: ")):
        match = f"^{start}labels.tsv, line 3: the character 'é'"
        with (
            pytest.raises(UserError, match=match),
            known_characters(Namespace(resume=resume, out="out")),
        ):
            encode(examples, CharTokenizer("ab"), 8, "training")


def test_a_new_run_may_take_another_tokenizer() -> None:
    for tokenizer, end in (
        ("char", "remove it, or, to learn from text, give --tokenizer byte, which"),
        (None, "it$"),
    ):
        with (
            pytest.raises(UserError, match=f"the character 'c' .*: .*{end}"),
            known_characters(Namespace(resume=False, tokenizer=tokenizer)),
        ):
            CharTokenizer("ab").encode("abc")
