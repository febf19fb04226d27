"""The tokenizers: round trips, GPT-2's published ids, what is saved and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import byte_pairs
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    UnknownCharacter,
    WordTokenizer,
    make_tokenizer,
    tokenizer_from_dict,
)

TEXT = "The dog's tail wagged; it didn't stop.\r\n\n\tДва пса — 二匹の犬 🐕‍🦺!\n"
NAMES = ["char", "byte", "word", "gpt2"]

texts = st.text(max_size=60)  # hypothesis leaves out lone surrogates, which are no text


@pytest.mark.parametrize("name", NAMES)
@given(text=texts)
def test_decoding_gives_the_text_back(name: str, text: str) -> None:
    tokenizer = make_tokenizer(name, text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_line_ends_are_read_as_the_vocabulary_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    """As a training text's were: a file of Windows' is no other text."""
    say_once.cache_clear()
    without, text = make_tokenizer("char", "a\nb"), "a\r\nb\ra"
    for _ in range(2):
        assert without.decode(without.encode(text)) == "a\nb\na"
    said = capsys.readouterr().err
    assert said.count(r"note: \r\n and \r are read as \n: the char tokenizer has no \r") == 1
    having = make_tokenizer("char", text)
    assert having.decode(having.encode(text)) == text
    with pytest.raises(UnknownCharacter):
        without.encode(text, keep_line_ends=True)
    words = make_tokenizer("word", "a\nb")  # has a token for what it does not know
    assert words.count_unknown(words.encode(text)) == 2


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(text=texts)
def test_a_tokenizer_is_restored_from_what_it_saved(
    name: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(name, text)
    tokenizer.save(folder)
    restored = load_tokenizer(folder)
    assert type(restored) is type(tokenizer)
    assert (restored.tokens, restored.end_of_text) == (tokenizer.tokens, tokenizer.end_of_text)
    assert restored.unknown == tokenizer.unknown
    np.testing.assert_array_equal(restored.encode(text), tokenizer.encode(text))
    assert restored.to_dict() == tokenizer_from_dict(tokenizer.to_dict()).to_dict()


@pytest.mark.parametrize("name", ["byte", "word", "gpt2"])
def test_end_of_text_is_special_only_when_allowed(name: str) -> None:
    tokenizer = make_tokenizer(name, f"a b{END_OF_TEXT}")
    text = f"a{END_OF_TEXT}{END_OF_TEXT}b"
    ordinary, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    end = tokenizer.end_of_text
    assert end is not None
    assert end not in ordinary
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert special.tolist() == [*a, end, end, *b] and special.dtype == np.int32
    assert tokenizer.decode(ordinary) == tokenizer.decode(special) == text
    assert tokenizer.encode("", allow_special=True).tolist() == []


@pytest.mark.parametrize("name", NAMES)
def test_ids_outside_the_vocabulary_are_named(name: str) -> None:
    tokenizer = make_tokenizer(name, TEXT)
    size = tokenizer.vocab_size
    for bad in (-1, size, 10**6):
        with pytest.raises(UserError, match=rf"token id {bad} .*{size} ids"):
            tokenizer.decode([0, bad])
        with pytest.raises(UserError, match=f"token id {bad} "):
            StreamDecoder(tokenizer).feed(bad)
    assert tokenizer.decode([]) == ""
    for wrong in ([0.5], [[0, 1]]):
        with pytest.raises(TypeError, match="shape"):
            tokenizer.decode(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_surrogate_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"'\\udcff', at position 1"):
        make_tokenizer(name, TEXT).encode("T\udcff")


# ----------------------------------------------------------------------------------------------
# gpt2


def test_gpt2_gives_the_published_ids() -> None:
    gpt2 = GPT2Tokenizer()
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("The dog").tolist() == [464, 3290]
    assert gpt2.encode(END_OF_TEXT, allow_special=True).tolist() == [50256]
    # What OpenAI's 124M model says of the dog, decoding greedily.
    ids = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262]
    ids += [13, 198, 198, 464, 3290]
    text = gpt2.decode(ids)
    assert text.startswith("The dog was found in a field near the intersection of")
    assert text.endswith(".\n\nThe dog")
    assert gpt2.encode(text).tolist() == ids


def test_the_vocabulary_is_the_one_openai_published() -> None:
    """Spelt as OpenAI's encoder.json and vocab.bpe, it has those files' checksums."""
    assert sha256(json.dumps(byte_pairs.gpt2_vocabulary())) == (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in byte_pairs.gpt2_merges())]
    assert sha256("\n".join(lines) + "\n") == (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    )


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_vocabulary_file_is_named(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = byte_pairs.GPT2_FILE.read_bytes()
    path = tmp_path / "gpt2.tiktoken"
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "truncated" else data.replace(b"IQ== 0", b"Ig== 0"))
    monkeypatch.setattr(byte_pairs, "GPT2_FILE", path)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*install micrograd-gpt again"):
        byte_pairs.gpt2_encoding.__wrapped__()


def test_a_run_of_white_space_that_would_overflow_the_stack_is_refused() -> None:
    limit = byte_pairs.LONGEST_WHITE_SPACE
    gpt2 = GPT2Tokenizer()
    assert len(gpt2.encode(" " * (limit - 1) + "x")) == limit - 1
    with pytest.raises(UserError, match="500,000 or more white-space characters"):
        gpt2.encode("x" + " " * limit + "x")


# ----------------------------------------------------------------------------------------------
# char, byte, word


def test_char_ids_follow_the_code_points() -> None:
    tokenizer = CharTokenizer.from_text("banana🐕")
    assert tokenizer.to_dict() == {"tokenizer": "char", "vocabulary": ["a", "b", "n", "🐕"]}
    assert tokenizer.encode("nab🐕").tolist() == [2, 0, 1, 3]
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("char", 4, None)


@pytest.mark.parametrize("unseen", ["c", "é", "🐕", "\U0010ffff", "\0"])
def test_a_character_never_seen_is_named_or_unknown(unseen: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{unseen!r} in ")):
        CharTokenizer.from_text("ab").encode(f"ab{unseen}a")
    with pytest.raises(UserError, match=r"'c' in '.*: remove it, and 2 more$"):
        CharTokenizer.from_text("ab").encode("accade")
    tokenizer = CharTokenizer.from_text("ab", unk=True)
    assert tokenizer.encode(f"ab{unseen}a").tolist() == [0, 1, 2, 0]
    assert tokenizer.decode([0, 2]) == "a<unk>"
    assert tokenizer_from_dict(tokenizer.to_dict()).encode(f"{unseen}b").tolist() == [2, 1]


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("Aé").tolist() == [0x41, 0xC3, 0xA9]
    assert tokenizer.decode([0x41, 0xC3, 256]) == "A\ufffd<|endoftext|>"


def test_word_pieces() -> None:
    tokenizer = WordTokenizer.from_text("No, no: don't  stop\n")
    pieces = [token.decode() for token in tokenizer.tokens]
    assert pieces[:3] == [END_OF_TEXT, "<|unk|>", " "]  # the most common piece comes first
    assert sorted(pieces[3:]) == ["\n", ",", ":", "No", "don't", "no", "stop"]
    assert tokenizer.decode(tokenizer.encode("no\n\n  don't, No")) == "no\n\n  don't, No"


def test_words_not_in_the_vocabulary_become_unk() -> None:
    tokenizer = WordTokenizer.from_text("c b b a a a", max_vocab_size=5)
    assert tokenizer.to_dict()["vocabulary"] == [END_OF_TEXT, "<|unk|>", " ", "a", "b"]
    assert tokenizer.decode(tokenizer.encode("a c b")) == "a <|unk|> b"
    assert WordTokenizer.from_text("b a").to_dict()["vocabulary"][3:] == ["a", "b"]  # a tie
    with pytest.raises(UserError, match="max_vocab_size must be 3 or more, not 2"):
        WordTokenizer.from_text("a", max_vocab_size=2)


def test_special_tokens_typed_out_are_ordinary_text() -> None:
    tokenizer = WordTokenizer.from_text("<|unk|> <|endoftext|>")
    ids = tokenizer.encode("<|unk|>")
    assert 1 not in ids and tokenizer.decode(ids) == "<|unk|>"


# ----------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("name", NAMES)
@given(text=texts)
def test_streaming_gives_whole_characters_and_all_of_them(name: str, text: str) -> None:
    assert_streams(make_tokenizer(name, text), text + "🐕‍🦺二匹" * (name in ("byte", "gpt2")))


def assert_streams(tokenizer: Tokenizer, text: str) -> None:
    decoder, shown = StreamDecoder(tokenizer), ""
    for token_id in tokenizer.encode(text):
        shown += decoder.feed(int(token_id))
        assert text.startswith(shown)  # half a character would be a U+FFFD here
    assert decoder.finish() == "" and shown == text


@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_streaming_bytes_that_are_no_utf8_equals_decode(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    decoder = StreamDecoder(tokenizer)
    assert "".join([*map(decoder.feed, ids), decoder.finish()]) == tokenizer.decode(ids)


def test_a_character_cut_off_at_the_end_is_shown_as_replaced() -> None:
    gpt2 = GPT2Tokenizer()
    *most, _ = gpt2.encode("🐕").tolist()
    decoder = StreamDecoder(gpt2)
    assert [decoder.feed(i) for i in most] == [""] * len(most)
    assert decoder.finish() == "\ufffd"


# ----------------------------------------------------------------------------------------------
# Names


def test_an_unknown_name_lists_the_four() -> None:
    with pytest.raises(UserError, match="is not a tokenizer: choose one of char, word, byte, gpt2"):
        make_tokenizer("bpe", TEXT)


@pytest.mark.parametrize("make", [CharTokenizer, WordTokenizer])
def test_a_vocabulary_has_an_order(make: Any) -> None:
    """A set's is another in each process; a dict's ids may be others than its order."""
    entries = ["<|endoftext|>", "<|unk|>"] if make is WordTokenizer else ["a", "b"]
    for unordered in (set(entries), frozenset(entries)):
        with pytest.raises(UserError, match="a set has none: give sorted"):
            make(unordered)
    with pytest.raises(UserError, match="a dict whose ids are not 0, 1, 2, …: give a list"):
        make({entries[0]: 1, entries[1]: 0})
    ids, array = dict(zip(entries, (0, 1), strict=True)), np.array(entries)
    for ordered in (tuple(entries), iter(entries), dict.fromkeys(entries), ids, ids.keys(), array):
        assert make(ordered).to_dict()["vocabulary"] == entries


@pytest.mark.parametrize("text", [b"ab", ["a", "b"], None, 3])
def test_what_is_no_text_is_not_encoded(text: Any) -> None:
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer(), GPT2Tokenizer()):
        with pytest.raises(TypeError, match=f"takes a text, .* not a {type(text).__name__}"):
            tokenizer.encode(text)
