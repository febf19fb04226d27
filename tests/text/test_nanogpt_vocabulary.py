"""nanoGPT's shards of characters: their vocabulary is read, and nothing in it is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.corpus import load_corpus
from micrograd_gpt.text.nanogpt_vocabulary import META, nanogpt_vocabulary
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer

TEXT = "Fürst: Was?\nto be, or not to be 😀\n" * 30
CHARACTERS = sorted(set(TEXT))


def meta(characters: list[str] = CHARACTERS) -> dict[str, Any]:
    """What prepare.py writes."""
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as nanoGPT's data/shakespeare_char is after prepare.py."""
    ids = np.array([CHARACTERS.index(c) for c in TEXT], np.uint16)
    ids[:900].tofile(tmp_path / "train.bin")
    ids[900:].tofile(tmp_path / "val.bin")
    (tmp_path / META).write_bytes(pickle.dumps(meta()))
    return tmp_path


def test_shards_of_characters_are_read_with_their_vocabulary(folder: Path, tmp_path: Path) -> None:
    corpus = load_corpus(folder, "char", cache_folder=tmp_path / "cache")
    assert corpus.tokenizer.decode(corpus.train[:900].astype(int)) == TEXT[:900]
    assert corpus.tokenizer.vocab_size == len(CHARACTERS)


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("count", [1, 65, 3000])
def test_every_protocol_is_read(tmp_path: Path, protocol: int, count: int) -> None:
    characters = [chr(0x100 + i) for i in range(count)]
    (tmp_path / META).write_bytes(pickle.dumps(meta(characters), protocol))
    assert nanogpt_vocabulary(tmp_path) == characters


@pytest.mark.parametrize("name", ["gpt2", "byte", "word"])
def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """With it training would go on, on nonsense."""
    with pytest.raises(UserError, match=rf"as meta.pkl .* says, not {name}: give --tokenizer char"):
        load_corpus(folder, name, cache_folder=tmp_path / "cache")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (GPT2Tokenizer(), "not gpt2: give the text itself, or start from scratch with --tokenizer"),
        (ByteTokenizer(), "not byte: give the text itself, or start from scratch with --tokenizer"),
        (CharTokenizer(CHARACTERS[::-1]), "with a different char vocabulary, of 17 entries"),
        (CharTokenizer([*CHARACTERS, "~"]), "with a different char vocabulary, of 17 entries"),
    ],
)
def test_a_model_s_tokenizer_is_to_be_the_shards_own(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, message: str
) -> None:
    """As where training starts from a model, is resumed, or validates on shards."""
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text("to be")
    for source, validation in ((folder, 0.1), (text, folder)):
        with pytest.raises(UserError, match=message):
            load_corpus(source, tokenizer, validation, cache_folder=cache)
    same = CharTokenizer(CHARACTERS)
    assert load_corpus(text, same, folder, cache_folder=cache).tokenizer is same
    assert len(load_corpus(folder, same, cache_folder=cache).train) == 900


def test_a_meta_pkl_of_another_kind_refuses_no_given_tokenizer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / META).write_bytes(pickle.dumps({"vocab_size": 50257}))
    for given in (GPT2Tokenizer(), "gpt2"):
        assert len(load_corpus(folder, given, cache_folder=tmp_path / "cache").train) == 900
        assert f"which tokenizer made the shards in {folder} is not c" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"if the shards are not of characters, the --tokenizer"):
        load_corpus(folder, "char", cache_folder=tmp_path / "cache")


def test_without_a_vocabulary_the_advice_is_right(folder: Path, tmp_path: Path) -> None:
    (folder / META).unlink()
    with pytest.raises(UserError, match="train on the text itself, or if they were"):
        load_corpus(folder, "char", cache_folder=tmp_path / "cache")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Harm()),
        pickle.dumps(meta() | {"vocab_size": Harm()}),
        pickle.dumps({"itos": {0: "ab"}}),
        pickle.dumps({"itos": {1: "a"}}),
        pickle.dumps({"itos": {}}),
        pickle.dumps({"itos": None}),
        pickle.dumps({"itos": {0: 7}}),
        pickle.dumps([1]),
        pickle.dumps(meta())[:-1],
        pickle.dumps(meta())[:40],
        b"u.",
        b"}s.",
        b"h\x07.",
        b"(.",
        b".",
        b"",
        b"\xff\x00 no pickle",
    ],
)
def test_anything_else_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / META).write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl is not a vocabulary .*: train on the text"):
        nanogpt_vocabulary(tmp_path)
    assert not (tmp_path / "harm").exists()
