"""Merges to ranks: the ids are those of merging as the files say, in whatever order they are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.byte_pairs import BytePairTokenizer
from micrograd_gpt.text.merges import SPELLING, Merges, merges_of, ranks_of, spelled, unspelled


def merged(word: str, merges: Merges) -> list[str]:
    """Byte-pair encoding word for word as it is defined: the earliest merge, leftmost first."""
    parts = list(word)
    places = {pair: place for place, pair in enumerate(merges)}
    while possible := [pair for pair in itertools.pairwise(parts) if pair in places]:
        earliest = min(possible, key=places.__getitem__)
        i = list(itertools.pairwise(parts)).index(earliest)
        parts[i : i + 2] = ["".join(earliest)]
    return parts


@st.composite
def merge_lists(draw: st.DrawFn, letters: str = "abc") -> Merges:
    """Merges of tokens made before, of tokens that nothing makes, and the same ones again."""
    tokens, merges = list(letters), []
    for _ in range(draw(st.integers(1, 12))):
        token = st.sampled_from(tokens) | st.text(letters, min_size=1, max_size=2)
        pair = (draw(token), draw(token))
        merges.append(pair)
        if len("".join(pair)) <= 8:
            tokens.append("".join(pair))
    return merges


@given(merges=merge_lists(), words=st.lists(st.text("abc", min_size=1, max_size=24), max_size=8))
def test_a_word_is_merged_as_the_merges_say(merges: Merges, words: list[str]) -> None:
    tokens = dict.fromkeys([*SPELLING, *(part for pair in merges for part in pair)])
    tokens |= dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {token: id for id, token in enumerate(reversed(tokens))}  # the bytes come last
    try:
        tokenizer = BytePairTokenizer(vocabulary, merges)
    except UserError as error:
        assert "comes before those that make its parts" in str(error)
        return
    for word in words:
        assert [spelled(tokenizer.tokens[id]) for id in tokenizer.encode(word)] == merged(
            word, merges
        )


@given(merges=merge_lists())
def test_the_merges_can_be_worked_out_from_the_ranks(merges: Merges) -> None:
    vocabulary = dict.fromkeys([*SPELLING, *("".join(pair) for pair in merges)], 0)
    try:
        tokens = list(ranks_of(vocabulary, merges))
    except UserError:
        return
    assert set(merges_of(tokens[256:])) <= set(merges)
    assert list(ranks_of(vocabulary, merges_of(tokens[256:]))) == tokens


@pytest.mark.parametrize(
    ("merges", "problem"),
    [
        ([("a", "x")], "its merge 'a x' makes no token of its vocabulary"),
        ([("ab", "c"), ("a", "b")], "its merge 'ab c' comes before those that make its parts"),
    ],
)
def test_merges_that_fit_no_vocabulary_are_refused(merges: Merges, problem: str) -> None:
    vocabulary = dict.fromkeys([*SPELLING, "ab", "abc"], 0)
    with pytest.raises(UserError, match=problem):
        ranks_of(vocabulary, merges)


def test_a_vocabulary_without_all_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"lacks 2 of the 256 bytes, such as 'Ġ', so it cannot"):
        ranks_of(dict.fromkeys(set(SPELLING) - {"Ġ", "ÿ"}, 0), [])


def test_the_spelling_is_openai_s() -> None:
    assert spelled(b" caf\xc3\xa9\n\x00") == "ĠcafÃ©ĊĀ"
    every_byte = bytes(range(256))
    assert unspelled(spelled(every_byte)) == every_byte
    assert len(set(SPELLING)) == 256 and all(c.isprintable() and c != " " for c in SPELLING)
    assert unspelled("二匹") == "二匹".encode()  # a token that was added, and is not spelled
