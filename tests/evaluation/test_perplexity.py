"""Perplexity: windows that score each token once, and what is worked out from the scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from small_gpt2 import POSITIONS, TEXT, make_model

from micrograd_gpt.evaluation.detokenize import wikitext
from micrograd_gpt.evaluation.perplexity import PerplexityTask, sliding_windows, window_size
from micrograd_gpt.evaluation.records import Records, Row
from micrograd_gpt.evaluation.running import run
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer


def evaluate(tokenizer: CharTokenizer | ByteTokenizer, text: str, stride: int = 5) -> Row:
    model = make_model(factor=8, vocab_size=tokenizer.vocab_size).eval()
    task = PerplexityTask([text], [text], tokenizer, POSITIONS, stride)
    return run(model, task, Records(None, {}))


@pytest.mark.parametrize("length", [2, 15, 16, 17, 40, 41])
@pytest.mark.parametrize("stride", [1, 5, 15])
def test_each_token_but_the_first_is_scored_once_with_as_much_context_as_there_is(
    length: int, stride: int
) -> None:
    windows = sliding_windows(length, POSITIONS, stride)
    scored = [token for _, start, end in windows for token in range(start, end)]
    assert scored == list(range(1, length))
    for begin, start, end in windows:
        assert end - begin <= POSITIONS
        assert begin == 0 or start - begin == POSITIONS - stride


@pytest.mark.parametrize("stride", [0, 16, 17])
def test_a_stride_that_leaves_no_context_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match="give a --stride from 1 to 15"):
        sliding_windows(40, POSITIONS, stride)


def test_figures_follow_from_the_loss() -> None:
    text = TEXT * 2
    tokenizer = CharTokenizer.from_text(TEXT)
    report = evaluate(tokenizer, text)
    model = make_model(factor=8, vocab_size=tokenizer.vocab_size).eval()
    ids, losses = tokenizer.encode(text), []
    for begin, start, end in sliding_windows(len(ids), POSITIONS, 5):
        targets = ids[None, begin + 1 : end].astype(int)
        targets[:, : start - begin - 1] = -100
        losses += [model.loss(ids[None, begin : end - 1], targets).item()] * (end - start)
    nats, count = np.mean(losses), len(text)
    assert report["tokens"] == count - 1
    assert report["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)
    per_word = math.exp(nats * count / 18)  # the text has 18 words
    assert report["word_perplexity"] == pytest.approx(per_word, rel=1e-3)
    assert 0 <= report["next_token_accuracy"] < 0.5
    assert 0 < report["nats_per_token_stderr"] < 2


def test_bits_per_byte_count_bytes_and_not_characters() -> None:
    report = evaluate(ByteTokenizer(), "é" * 20)
    assert report["tokens"] == 39
    assert report["bits_per_byte"] == pytest.approx(report["nats_per_token"] / math.log(2))


def test_bytes_and_words_are_those_of_the_text_as_it_was() -> None:
    tokenizer = ByteTokenizer()
    model = make_model(vocab_size=tokenizer.vocab_size).eval()
    task = PerplexityTask(["a, b"] * 2, ["a , b"] * 2, tokenizer, POSITIONS, 8)
    report = run(model, task, Records(None, {}))
    nats, tokens = report["nats_per_token"], len(task.ids)
    assert report["bits_per_byte"] == pytest.approx(nats * tokens / math.log(2) / 10)
    assert math.log(report["word_perplexity"]) == pytest.approx(nats * tokens / 6)


def test_what_a_tokenizer_does_not_know_has_no_bits() -> None:
    tokenizer = WordTokenizer.from_text("a b " * 9)
    model = make_model(vocab_size=tokenizer.vocab_size).eval()
    report = run(
        model, PerplexityTask(["a b c"], ["a b c"], tokenizer, POSITIONS, 8), Records(None, {})
    )
    assert report["bits_per_byte"] is None and report["word_perplexity"] is None
    assert report["perplexity"] > 1


def test_a_limit_scores_the_first_windows() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    model = make_model(vocab_size=tokenizer.vocab_size).eval()
    task = PerplexityTask([TEXT], [TEXT], tokenizer, POSITIONS, 5, limit=1)
    report = run(model, task, Records(None, {}))
    assert (report["windows"], report["tokens"]) == (1, POSITIONS - 1)
    assert report["nats_per_token_stderr"] is None  # one window says nothing of others


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(UserError, match="a single token"):
        PerplexityTask(["a"], ["a"], CharTokenizer.from_text("ab"), POSITIONS, 8)


def test_the_size_of_a_window() -> None:
    model = make_model()
    assert (window_size(model, None), window_size(model, 7)) == (POSITIONS, 7)
    with pytest.raises(UserError, match="at most 16 tokens"):
        window_size(model, 17)


def test_wikitext_without_its_spaces() -> None:
    text = (
        " = A = \n \n The ( well @-@ known ) cat 's 1 @,@ 000 lives , "
        '" the cats \' own " . \n = = B = = '
    )
    expected = " = A =\n\nThe (well-known) cat's 1,000 lives, \"the cats' own\".\n== B == "
    assert wikitext(text) == expected
    assert wikitext("the cats ' own") == "the cats' own"


def test_a_window_of_one_token_has_no_context() -> None:
    with pytest.raises(UserError, match="a window has 2 tokens or more"):
        sliding_windows(10, 1, 1)
