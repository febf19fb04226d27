"""Pieces of text: they tokenize as the whole, and none grows too long."""

from __future__ import annotations

import itertools
import re
import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import MERGES, vocabulary

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.byte_pairs import AddedToken, BytePairTokenizer, GPT2Tokenizer
from micrograd_gpt.text.corpus import encode_documents
from micrograd_gpt.text.pieces import (
    LONGEST_PIECE,
    PIECE_SIZE,
    SAFE_PLACE,
    cut,
    encode_piece,
    refuse_where_cut,
)
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer

# Every character that Python or Unicode calls white space, and what GPT-2's pattern tells apart.
WHITE_SPACE = [chr(c) for c in range(0x110000) if chr(c).isspace()]
OTHERS = [
    "'",
    "s",
    "'s",
    "'re",
    "a",
    "Z",
    "é",
    "中",
    "1",
    "½",
    ".",
    "!",
    "\u0301",
    "_",
    "\u200b",
    "😀",
]
MIXED = st.lists(st.sampled_from([*WHITE_SPACE, *"  \n\n  \t", *OTHERS]), max_size=40).map("".join)


@pytest.mark.slow
@given(
    texts=st.lists(MIXED | st.text(max_size=30), max_size=5),
    size=st.integers(1, 12),
    data=st.data(),
)
def test_pieces_tokenize_as_the_whole(texts: list[str], size: int, data: st.DataObject) -> None:
    def in_chunks(text: str) -> list[str]:
        at = data.draw(st.lists(st.integers(0, len(text)), max_size=4))
        return [text[a:b] for a, b in itertools.pairwise([0, *sorted(at), len(text)])]

    documents = [text for text in texts if text]
    whole = "\n\n".join(documents)
    for tokenizer in (
        GPT2Tokenizer(),
        ByteTokenizer(),
        CharTokenizer.from_text(whole + "\n"),
        WordTokenizer.from_text(whole),
        BytePairTokenizer(vocabulary(), MERGES),
    ):
        end_last = tokenizer.end_of_text is not None
        pieces = list(cut([in_chunks(text) for text in texts], end_last, size))
        ids = [encode_piece(piece, tokenizer) for piece in pieces]
        expected = encode_documents(documents, tokenizer)
        np.testing.assert_array_equal(np.concatenate([*ids, np.empty(0, int)]), expected)


def with_added(*contents: str) -> BytePairTokenizer:
    tokens = vocabulary()
    added = [AddedToken(text, len(tokens) + i, False, True) for i, text in enumerate(contents)]
    return BytePairTokenizer(tokens, MERGES, added)


@given(text=MIXED, size=st.integers(1, 12))
def test_added_tokens_are_not_cut(text: str, size: int) -> None:
    tokenizer = with_added("  ", "\n\n", "\na", "'!s", ".a", "a中", "1Z")
    refuse_where_cut(tokenizer)
    ids = [encode_piece(piece, tokenizer) for piece in cut([[text]], False, size)]
    found = np.concatenate([*ids, np.empty(0, int)])
    np.testing.assert_array_equal(found, tokenizer.encode(text))


@pytest.mark.parametrize("content", ["U.S.", "the dog", "a\n", "中。"])
def test_added_tokens_that_might_be_cut_are_refused(content: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"has an added token {content!r}, within which")):
        refuse_where_cut(with_added("ok", content))


RUNS = st.lists(
    st.text("abcdrstz", min_size=1, max_size=40)
    | st.text("0123456789", min_size=1, max_size=40)
    | st.text("-+=*/'", min_size=1, max_size=40)
    | st.sampled_from([" ", "\n", ", ", ".", "'s"]),
    max_size=20,
).map("".join)


@given(text=RUNS, size=st.integers(1, 12), chunk=st.integers(1, 50))
def test_a_run_that_is_too_long_is_cut_and_nothing_else_changes(
    text: str, size: int, chunk: int
) -> None:
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    pieces = [piece for (piece,) in cut([chunks], True, size, longest=16)]
    assert pieces == [piece for (piece,) in cut([[text]], True, size, longest=16)]
    assert "".join(pieces) == text and max(map(len, pieces), default=0) <= 16
    places = [0, *itertools.accumulate(map(len, pieces))]
    runs = [run.span() for run in re.finditer(r"[a-z]+|[0-9]+|[^a-z0-9\s]+|\s+", text)]
    may_differ: set[int] = set()
    for place in places[1:-1]:
        if not SAFE_PLACE.match(text, place):
            touched = [i for i, (start, end) in enumerate(runs) if start <= place <= end]
            for start, end in runs[max(0, touched[0] - 1) : touched[-1] + 2]:
                may_differ |= set(range(start, end + 1))
    gpt2 = GPT2Tokenizer()
    for tokens in (
        lambda part: [gpt2.decode([i]) for i in gpt2.encode(part)],
        WordTokenizer.PATTERN.findall,
    ):
        whole = set(itertools.accumulate(map(len, tokens(text))))
        cut_up = {
            place + end
            for place, piece in zip(places, pieces, strict=False)
            for end in itertools.accumulate(map(len, tokens(piece)))
        }
        assert cut_up - may_differ == whole - may_differ


@given(text=st.text(max_size=60), size=st.integers(1, 12), chunk=st.integers(1, 50))
def test_characters_and_bytes_are_cut_anywhere(text: str, size: int, chunk: int) -> None:
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    pieces = list(cut([chunks], True, size, anywhere=True))
    assert all(len(piece) == size for (piece,) in pieces[:-1])
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_text(text)):
        ids = [encode_piece(piece, tokenizer) for piece in pieces]
        found = np.concatenate([*ids, np.empty(0, int)])
        np.testing.assert_array_equal(found, tokenizer.encode(text))


def test_only_letters_and_digits_come_before_a_mark_at_which_text_is_cut() -> None:
    """GPT-2's pattern goes by Unicode's categories, and Python's \\w is to mean the same here."""
    for code in range(0x110000):
        cut_after = SAFE_PLACE.match(chr(code) + ".", 1)
        assert not cut_after or unicodedata.category(chr(code))[0] in "LN", hex(code)


@pytest.mark.slow
def test_text_without_white_space_takes_bounded_memory() -> None:
    """64 MB in chunks, as a file is read, and in one, as from a .jsonl file."""
    chunk = "abcdefghijklmnop" * (1 << 14)
    for anywhere, longest in ((False, LONGEST_PIECE), (True, PIECE_SIZE)):
        tracemalloc.start()
        pieces = cut([(chunk for _ in range(256))], True, anywhere=anywhere)
        lengths = [len(text) for (text,) in pieces]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(lengths) == 256 * len(chunk) and max(lengths) == longest
        assert peak < 6 * longest
    whole = chunk * 64
    assert "".join(text for (text,) in cut([[whole]], True)) == whole
    chinese = "天地玄黄宇宙洪荒。" * 100_000
    pieces = [text for (text,) in cut([[chinese]], True)]
    assert max(map(len, pieces)) < PIECE_SIZE + 10 and "".join(pieces) == chinese
    assert all(piece[0] == "。" for piece in pieces[1:])


@pytest.mark.parametrize("space", WHITE_SPACE, ids=ascii)
def test_white_space_is_cut_where_it_is_safe(space: str) -> None:
    text = f"it's{space}{space}ab{space}\n{space}12 !{space}"
    pieces = [piece[0] for piece in cut([[text]], True, 1)]
    assert "".join(pieces) == text
    # The four of Python's white space that are none in GPT-2's pattern are left alone.
    assert pieces[1][0] == (" " if space in "\x1c\x1d\x1e\x1f" else space)


def test_pieces_are_about_as_long_as_asked_for() -> None:
    words = ["word " * 50, "one-long-word" * 20, "", "a b " * 3, "c"]
    pieces = list(cut([[text] for text in words], True, 40))
    assert [sum(map(len, piece)) for piece in pieces] == [44, *[40] * 5, 266, 13]
    assert pieces[-1] == ["", "a b a b a b ", "c", ""]
    assert list(cut([["a"], [""], []], True, 40)) == [["a"]]
    assert list(cut([[""], []], True, 40)) == []


def test_the_pieces_of_a_text_do_not_depend_on_its_chunks() -> None:
    text = "some words, and more of them\n" * 30
    for size in (1, 7, 100):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(cut([chunks], True, 64)) == list(cut([[text]], True, 64))
