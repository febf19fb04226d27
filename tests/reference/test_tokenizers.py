"""The gpt2 tokenizer against Transformers' own, built from the same vocabulary, with no network."""

from __future__ import annotations

import itertools
import random

import pytest

from micrograd_gpt.text.tokenizer_files import spelled_gpt2_vocabulary
from micrograd_gpt.text.tokenizers import END_OF_TEXT, GPT2Tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs():
    """Transformers' GPT-2 tokenizer. Its merges are ours, written as pairs (see `merged_pairs`)."""
    vocabulary = spelled_gpt2_vocabulary(GPT2Tokenizer())
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=merged_pairs(vocabulary))


def merged_pairs(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """The pair each merged token is made of: what is left of it when the pairs that make tokens
    of a lower rank are merged, lowest first.
    """
    pairs = []
    for token in [t for t, rank in ranks.items() if 256 <= rank < 50256]:
        parts = list(token)
        while len(parts) > 2:
            joined = [ranks.get(a + b, 50256) for a, b in itertools.pairwise(parts)]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def test_published_ids(theirs) -> None:
    """Transformers as built here is the tokenizer it should be: what follows has a reference."""
    assert theirs.encode("Hello world") == [15496, 995]
    assert theirs.encode(END_OF_TEXT) == [50256]


@pytest.mark.parametrize("seed", range(4))
def test_random_unicode_text(seed: int, theirs) -> None:
    ours = GPT2Tokenizer()
    draw = random.Random(seed)
    alphabets = ["abcdefgh ' st re", " \n\t\r\u00a0\u3000x", "0123٣५,.;'", "äéßДж二匹🐕👩\u200d👩ก็"]
    for _ in range(500):
        text = "".join(draw.choice(draw.choice(alphabets)) for _ in range(draw.randrange(40)))
        assert ours.encode(text).tolist() == theirs.encode(text), repr(text)


def test_real_text(theirs) -> None:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ours = GPT2Tokenizer().encode(text)
    assert ours.tolist() == theirs.encode(text)
    assert GPT2Tokenizer().decode(ours) == text


def test_end_of_text_where_it_is_allowed(theirs) -> None:
    text = f"One.{END_OF_TEXT}Two. {END_OF_TEXT}{END_OF_TEXT}\n"
    assert GPT2Tokenizer().encode(text, allow_special=True).tolist() == theirs.encode(text)
