"""A corpus: its ids, how it is split, and what a token of it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import corpus as corpora
from micrograd_gpt.text.corpus import Corpus, encode_documents, load_corpus
from micrograd_gpt.text.decoding import Form
from micrograd_gpt.text.documents import load_documents
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer


@pytest.mark.slow
def test_end_of_text_that_is_typed_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl")]
    paths[0].write_text("one story<|endoftext|>and another " * 50)
    paths[1].write_text('{"text": "one\\u003c|endoftext|\\u003eother"}\n' * 50)
    paths[2].write_text('{"text": "one", "id": "<|endoftext|>"}\n' * 50)  # which is not read
    said = "has <|endoftext|> in it, which is read as these 13 characters; "
    for most in (corpora.MOST_IN_MEMORY, 0):  # and as a large text
        monkeypatch.setattr(corpora, "MOST_IN_MEMORY", most)
        for path, tokenizer, form, is_said in (
            (paths[0], "byte", Form(), True),
            (paths[0], "byte", Form(special_tokens=True), False),
            (paths[0], "char", Form(), False),
            (paths[1], "byte", Form(), True),
            (paths[2], "byte", Form(), False),
        ):
            load_corpus(path, tokenizer, form=form, cache_folder=tmp_path / "cache")
            assert (f"note: {path} {said}" in capsys.readouterr().err) == is_said


def test_words_that_a_given_tokenizer_does_not_know_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the cat " * 50)
    load_corpus(path, WordTokenizer.from_text("the dog " * 50))
    said = "of 200 tokens are words that the tokenizer does not know, all as one"
    assert f"{path}: 50 {said}" in capsys.readouterr().err
    load_corpus(path, "word")
    assert capsys.readouterr().err == ""


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
    corpus = load_corpus(tmp_path, name, validation=0.25)
    ids = np.concatenate([corpus.train, corpus.validation])
    np.testing.assert_array_equal(ids, encode_documents(load_documents(tmp_path), corpus.tokenizer))
    assert len(corpus.train) == int(0.75 * len(ids)) and corpus.name == str(tmp_path)
    assert corpus.tokenizer.name == name
    again = load_corpus(tmp_path, corpus.tokenizer)
    assert again.tokenizer is corpus.tokenizer and len(again.train) == int(0.9 * len(ids))


def test_a_corpus_that_cannot_be_split_or_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    ab = tmp_path / "ab.md"
    ab.write_text("ab")
    for fraction in (0, 1, -0.1, 1.1):
        with pytest.raises(UserError, match="a fraction between 0 and 1, not"):
            load_corpus(tmp_path, "char", fraction)
    with pytest.raises(UserError, match=f"^{tmp_path}: the character 'c' in '.*c"):
        load_corpus(tmp_path, CharTokenizer.from_text("ab\n"))
    with pytest.raises(UserError, match=f"^{tmp_path / 'a.txt'}: the character 'c' in '.*c"):
        load_corpus(ab, CharTokenizer.from_text("ab"), tmp_path / "a.txt")
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


@pytest.mark.parametrize("name", ["char", "word", "byte"])
def test_tokenizers_of_characters_learn_no_carriage_return(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone two\r\n".encode() * 20)
    for line_ends, expected in (("auto", "\n"), ("lf", "\n"), ("keep", "\r\n")):
        corpus = load_corpus(path, name, form=Form(line_ends=line_ends))
        text = corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.validation]))
        assert text == f"one two{expected}\ufeff" * 19 + f"one two{expected}"
    resumed = load_corpus(path, corpus.tokenizer, form=Form(line_ends="auto"))
    assert b"\r" not in resumed.tokenizer.decode_bytes(resumed.train)


def test_gpt2_keeps_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n" * 20)
    corpus = load_corpus(path, "gpt2", form=Form(line_ends="auto"))
    assert b"\r\n" in corpus.tokenizer.decode_bytes(corpus.train)


@pytest.mark.parametrize("name", ["gpt2", "byte", "word"])
def test_special_tokens_in_a_text_are_recognized_on_request(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two" * 20)
    for special in (False, True):
        corpus = load_corpus(path, name, form=Form(special_tokens=special))
        assert (corpus.train == corpus.tokenizer.end_of_text).any() == special
        if name == "word":  # no word of its vocabulary is one that the text does not have
            assert (b"endoftext" in corpus.tokenizer.tokens) != special
    with pytest.raises(UserError, match="the char tokenizer has no special tokens, as gpt2's has"):
        load_corpus(path, "char", form=Form(special_tokens=True))


def test_a_text_of_its_own_to_validate_on(tmp_path: Path) -> None:
    train, other = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text("abc" * 30)
    other.write_text("cab")
    for validation in (other, str(other)):
        corpus = load_corpus(train, "char", validation)
        assert corpus.tokenizer.decode(corpus.validation) == "cab"
        assert len(corpus.train) == 90
    for fraction in ("0.5", 0.5):
        assert len(load_corpus(train, "char", fraction).validation) == 45
    shards = tmp_path / "shards"
    shards.mkdir()
    np.arange(97, 99, dtype="<u2").tofile(shards / "train.bin")
    np.arange(98, 99, dtype="<u2").tofile(shards / "val.bin")
    cache = tmp_path / "cache"
    marked = load_corpus(train, "byte", shards, cache_folder=cache)  # of a divided set, that part
    assert marked.validation[:].tolist() == [98]
    other.write_text("é")
    with pytest.raises(UserError, match=r"b\.txt: the character 'é'"):
        load_corpus(train, "char", other)
    with pytest.raises(
        UserError, match=r"--validation 'missing' does not exist: give .* or a fraction such as 0.1"
    ):
        load_corpus(train, "char", "missing")


def test_too_short_a_text_says_what_helps(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("0123456789" * 30)
    corpus = load_corpus(path, "byte")
    message = (
        f"{path} has 300 tokens, 30 of them for validation, fewer than the 65 that "
        "--block-size 64 needs: give 651 tokens or more, another --validation fraction, a "
        "--validation FILE of its own, or a smaller --block-size (at most 29)"
    )
    with pytest.raises(UserError) as caught:
        corpus.windows(64)
    assert str(caught.value) == message
    path.write_text("0123456789" * 65 + "0")  # as many as it says
    assert [len(windows) for windows in load_corpus(path, "byte").windows(64)] == [8, 1]
    other.write_text("0")
    with pytest.raises(UserError, match=r"the validation text has 1 token, .*: give more text$"):
        load_corpus(path, "byte", other).windows(64)
    with pytest.raises(UserError, match="65 of them for training"):
        load_corpus(path, "byte", 0.9).windows(100)
    (training, validation) = load_corpus(path, "byte", path).windows(64)
    assert len(training) == len(validation) == 9


def test_what_is_left_out_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.pdf").touch()
    load_corpus(tmp_path, "char")
    assert capsys.readouterr().err.count("1 file of other kinds left out (.pdf)") == 1


def test_a_text_too_short_for_any_block_is_advised_in_whole_sentences(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello")
    for length, ways in (
        (5, ""),
        (17, ", a --validation FILE of its own"),
        (34, ", another --validation fraction, a --validation FILE of its own"),
    ):
        (tmp_path / "a.txt").write_text("0" * length)
        with pytest.raises(UserError, match=f"171 tokens or more{ways}(, or a smaller .*)?$"):
            load_corpus(tmp_path / "a.txt", "byte").windows(16)


def test_a_short_validation_file_is_called_by_its_name(tmp_path: Path) -> None:
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("to be or not to be")
    short.write_text("be")
    for source, validation, which in ((long, short, "validation"), (short, long, "training")):
        corpus = load_corpus(source, "byte", validation=validation)
        with pytest.raises(UserError, match=f"^{short}: the {which} text has 2 tokens, fewer"):
            corpus.windows(8)


def test_a_validation_text_that_is_trained_on_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = tmp_path / "data", tmp_path / "other.txt"
    data.mkdir()
    for path in (data / "a.txt", data / "b.txt", other):
        path.write_text("abc")
    load_corpus(data, "char", other)
    load_corpus("pydocs", "byte", "pydocs")  # whoever says it twice knows
    assert capsys.readouterr().err == ""
    for validation, said in ((data / "b.txt", "1 file"), (data, "2 files")):
        load_corpus(data, "char", validation)
        warning = f"warning: --validation {validation} shares {said} ({data}"
        assert capsys.readouterr().err.startswith(warning)


@pytest.mark.parametrize(
    ("tokenizer", "text", "word"),
    [
        ("char", "The end. " * 20, "The"),
        ("char", "žluť kůň " * 20, "žluť"),
        ("char", "猫" * 300, "猫" * 20),
        ("char", " " * 200, " " * 20),
        ("char", "a\0b\0 \0" * 20, "ab"),  # UTF-16 without its mark
        ("word", "The end. " * 20, "The"),
        ("word", "žluť kůň " * 20, "žluť"),
        ("gpt2", "žluť kůň " * 20, "The"),
    ],
)
def test_a_word_to_try_a_model_with(tmp_path: Path, tokenizer: str, text: str, word: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    assert load_corpus(path, tokenizer).word() == word
