"""The filters by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.generation import filters
from micrograd_gpt.generation.filters import NEVER
from micrograd_gpt.generation.sampling import choose, next_token_distribution
from micrograd_gpt.generation.settings import Settings


def test_the_likeliest_tokens_are_found_with_their_log_probabilities() -> None:
    """Of several that are equally likely the first; its probability is that among all ids."""
    scores = np.array([[[0.5, 2.0, 2.0, 3.0], [1.0, -1.0, 0.0, -2.0]]], np.float32)
    tokens, log_probs, finite = filters.likeliest(scores, 3)
    np.testing.assert_array_equal(tokens, [[1, 0]])
    exact = scores.astype(float) - np.log(np.exp(scores.astype(float)).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_probs, [[exact[0, 0, 1], exact[0, 1, 0]]], rtol=1e-6)
    assert finite.all()
    assert filters.likeliest(scores)[0].tolist() == [[3, 0]]
    assert filters.log_probability(scores[0, 0], 1) == pytest.approx(exact[0, 0, 1], rel=1e-6)
    for damage in (np.nan, np.inf, -np.inf):
        scores[0, 1, 3] = damage
        assert filters.likeliest(scores, 3)[2].tolist() == [[1, 0]]


def test_repetition_penalty() -> None:
    scores = np.array([2.0, -2.0, 3.0, 0.0])
    penalised = filters.repetition_penalty(scores, [0, 1, 1, 3], 2.0)
    np.testing.assert_array_equal(penalised, [1.0, -4.0, 3.0, 0.0])  # once, however often used
    np.testing.assert_array_equal(scores, [2.0, -2.0, 3.0, 0.0])  # not in place


@pytest.mark.parametrize(
    ("text", "n", "ruled_out"),
    [
        ([0, 1, 2, 0, 1], 3, [2]),
        ([0, 1, 2, 0, 1, 3, 0, 1], 3, [2, 3]),
        ([0, 1], 3, []),
        ([0, 0], 2, [0]),
        ([0, 1, 3], 1, [0, 1, 3]),
        ([2, 2, 2], 3, [2]),
    ],
)
def test_no_repeat_ngram(text: list[int], n: int, ruled_out: list[int]) -> None:
    filtered = filters.no_repeat_ngram(np.zeros(5), text, n)
    assert np.flatnonzero(filtered == NEVER).tolist() == ruled_out


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 2, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4]), (9, range(5))]
)
def test_top_k_keeps_ties_and_all_of_a_smaller_vocabulary(k: int, kept: list[int]) -> None:
    filtered = filters.top_k(np.array([0.5, 3.0, 2.0, -1.0, 2.0]), k)
    assert np.flatnonzero(filtered > NEVER).tolist() == list(kept)


@pytest.mark.parametrize(
    ("p", "kept"),
    [(1e-18, [1]), (0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.85, [0, 1, 3])],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, kept: list[int]) -> None:
    filtered = filters.top_p(np.log([0.15, 0.5, 0.05, 0.3]), p)
    assert np.flatnonzero(filtered > NEVER).tolist() == kept


def test_top_p_of_1_keeps_even_what_rounds_to_nothing() -> None:
    scores = np.array([0.0, -800.0, NEVER])
    np.testing.assert_array_equal(filters.top_p(scores, 1.0), scores)


def test_top_p_after_another_filter_counts_what_is_left() -> None:
    left = filters.top_k(np.log([0.4, 0.3, 0.2, 0.1]), 2)  # 4/7 and 3/7
    assert np.flatnonzero(filters.top_p(left, 0.5) > NEVER).tolist() == [0]


@pytest.mark.parametrize(("p", "kept"), [(0.0, [0, 1, 2]), (0.3, [0, 1]), (0.6, [0]), (1.0, [0])])
def test_min_p_is_relative_to_the_likeliest(p: float, kept: list[int]) -> None:
    filtered = filters.min_p(np.log([0.6, 0.3, 0.1]), p)
    assert np.flatnonzero(filtered > NEVER).tolist() == kept


def test_temperature_is_the_root_of_the_probabilities() -> None:
    ours = next_token_distribution(np.log([0.81, 0.09, 0.09, 0.01]), [], Settings(temperature=2.0))
    np.testing.assert_allclose(ours, np.array([0.9, 0.3, 0.3, 0.1]) / 1.6)


def test_temperature_comes_before_top_p_and_penalties_before_both() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    hot = next_token_distribution(logits, [], Settings(temperature=9.0, top_p=0.6))
    cold = next_token_distribution(logits, [], Settings(temperature=0.1, top_p=0.6))
    assert ((hot > 0).sum(), (cold > 0).sum()) == (2, 1)
    no_first = next_token_distribution(logits, [0], Settings(no_repeat_ngram_size=1, top_k=1))
    np.testing.assert_array_equal(no_first, [0, 1, 0])


@pytest.mark.slow
def test_draws_follow_the_filtered_distribution() -> None:
    """Pearson's chi-square over 50,000 draws; 4 standard deviations above its mean is p < 1e-4."""
    rng = np.random.default_rng(0)
    logits, text = rng.normal(0, 2, 30), [3, 4, 5]
    how = Settings(temperature=1.5, top_k=20, top_p=0.95, repetition_penalty=1.2)
    expected = 50_000 * next_token_distribution(logits, text, how)
    drawn = np.bincount([choose(logits, text, how, rng) for _ in range(50_000)], minlength=30)
    possible = expected > 0
    assert 10 < possible.sum() < 20 and drawn[~possible].sum() == 0
    chi_square = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@given(st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.3, 1.0]), min_size=1), st.floats(0, 1))
def test_a_token_of_probability_0_is_never_drawn(weights: list[float], uniform: float) -> None:
    probabilities = np.array([*weights, 1e-5])
    token = filters.draw(probabilities, min(uniform, np.nextafter(1, 0)))
    assert probabilities[token] > 0


def test_the_smallest_factors_leave_a_distribution() -> None:
    logits = np.array([3e38, -3e38, 0.0])
    for how in (Settings(temperature=1e-6, repetition_penalty=factor) for factor in (1e-6, 1e6)):
        distribution = next_token_distribution(logits, [0, 1], how)
        assert np.isfinite(distribution).all() and distribution.sum() == 1
