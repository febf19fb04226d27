"""A corpus: its ids, how it is split, and what a token of it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.corpus import Corpus, encode_documents, load_corpus
from micrograd_gpt.text.documents import load_documents
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer


def test_documents_are_told_apart() -> None:
    byte, word = ByteTokenizer(), WordTokenizer.from_text("a b")
    assert encode_documents(["ab", "c"], byte).tolist() == [97, 98, 256, 99, 256]
    assert encode_documents(["ab"], byte).tolist() == [97, 98]
    a, b = word.encode("a")[0], word.encode("b")[0]
    assert encode_documents(["a", "b"], word).tolist() == [a, 0, b, 0]
    char = CharTokenizer.from_text("ab\n")
    assert char.decode(encode_documents(["ab", "b"], char)) == "ab\n\nb"
    assert encode_documents(["<|endoftext|>"], GPT2Tokenizer()).max() < 50256  # text, not a token


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_take_two_bytes_where_they_fit(size: int, dtype: type) -> None:
    characters = [chr(c) for c in range(0x10000, 0x10000 + size)]
    ids = encode_documents([characters[-1]], CharTokenizer(characters))
    assert ids.dtype == dtype and ids.tolist() == [size - 1]


@pytest.mark.parametrize("name", ["char", "byte", "word", "gpt2"])
def test_a_corpus_is_split_by_position(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The cat sat. " * 20)
    (tmp_path / "b.txt").write_text("It ran off!" * 20)  # neither holds a line end: it is added
    corpus = load_corpus(tmp_path, name, validation_fraction=0.25)
    ids = np.concatenate([corpus.train, corpus.validation])
    np.testing.assert_array_equal(ids, encode_documents(load_documents(tmp_path), corpus.tokenizer))
    assert len(corpus.train) == int(0.75 * len(ids)) and corpus.name == str(tmp_path)
    assert corpus.tokenizer.name == name
    again = load_corpus(tmp_path, corpus.tokenizer)
    assert again.tokenizer is corpus.tokenizer and len(again.train) == int(0.9 * len(ids))


def test_a_corpus_that_cannot_be_split_or_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    for fraction in (0, 1, -0.1, 1.1):
        with pytest.raises(UserError, match="validation_fraction must be between 0 and 1"):
            load_corpus(tmp_path, "char", fraction)
    with pytest.raises(UserError, match="'c' at position 2"):
        load_corpus(tmp_path, CharTokenizer.from_text("ab"))
    with pytest.raises(UserError, match="choose one of char"):
        load_corpus(tmp_path, "bpe")


def test_bytes_per_token_are_those_of_the_validation_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 60 + "to be or not to be " * 20)
    gpt2 = load_corpus(tmp_path, "gpt2")
    text = gpt2.tokenizer.decode_bytes(gpt2.validation)
    assert gpt2.bytes_per_token == len(text) / len(gpt2.validation)
    assert load_corpus(tmp_path, "byte").bytes_per_token == 1
    assert load_corpus(tmp_path, "char", 0.999).bytes_per_token == pytest.approx(500 / 440, 0.01)
    (tmp_path / "b.txt").write_text("b")
    corpus = load_corpus(tmp_path, "byte", 0.9999)  # <|endoftext|>, twice, is no bytes
    assert corpus.bytes_per_token == (len(corpus.validation) - 2) / len(corpus.validation)
    assert load_corpus(tmp_path, WordTokenizer.from_text("to be")).bytes_per_token is None
    (tmp_path / "b.txt").unlink()
    (tmp_path / "a.txt").write_text("unknown " * 9 + "to be")
    known_at_the_end = load_corpus(tmp_path, WordTokenizer.from_text("to be"))
    assert known_at_the_end.bytes_per_token == pytest.approx(5 / 3)
    assert Corpus(np.arange(3), np.arange(0), ByteTokenizer(), "").bytes_per_token is None
