"""Beam search against the whole tree of continuations, and against itself without a cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model, random_prompts

from micrograd_gpt import no_grad
from micrograd_gpt.generation import filters
from micrograd_gpt.generation.beam_search import beam_search
from micrograd_gpt.generation.sampling import generate
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError


def test_beams_as_wide_as_the_tree_find_the_likeliest_text(model: GPT2) -> None:
    small = make_model(vocab_size=4)
    prompt, new = [1, 2], 4
    with no_grad():
        scores = {}
        for tail in itertools.product(range(4), repeat=new):
            logits = small(np.array([[*prompt, *tail]])).numpy()[0, 1:-1].astype(np.float64)
            scores[tail] = sum(filters.log_softmax(logits)[range(new), tail])
    best = sorted(scores, key=lambda tail: -scores[tail])[:5]
    how = Settings(max_new_tokens=new, num_beams=64, num_samples=5, end_of_text=None)
    beams = beam_search(small, prompt, how)
    assert [tuple(beam.new_ids) for beam in beams] == best
    np.testing.assert_allclose([b.score for b in beams], [scores[t] / new for t in best], rtol=1e-4)
    np.testing.assert_allclose(sum(beams[0].log_probs), scores[best[0]], rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_beam_search_with_the_cache_is_beam_search(seed: int) -> None:
    """Past the context length too, where beams that share a prompt leave it behind."""
    model = make_model(seed)
    for prompt in random_prompts(3, seed=seed):
        how: dict[str, Any] = {"num_beams": 4, "num_samples": 4, "end_of_text": None}
        fast = generate(model, prompt, 24, **how)
        slow = generate(model, prompt, 24, use_cache=False, **how)
        np.testing.assert_array_equal(fast, slow)


def test_a_stop_ends_a_beam(model: GPT2) -> None:
    how = Settings(max_new_tokens=10, num_beams=3, num_samples=3, end_of_text=None)
    beams = beam_search(model, [1, 2], how, hits_stop=lambda new_ids: len(new_ids) == 4)
    assert [(beam.stopped, len(beam.new_ids)) for beam in beams] == [("stop", 4)] * 3
    endless = beam_search(model, [1, 2], how)
    assert {(beam.stopped, len(beam.new_ids)) for beam in endless} == {("length", 10)}


def test_fewer_beams_than_asked_for_is_said(model: GPT2) -> None:
    with pytest.raises(UserError, match="only 11 of 12 beams could be found: lower num_samples"):
        generate(model, np.array([1]), 1, num_beams=12, num_samples=12, end_of_text=None)


def test_beams_with_no_token_left_are_the_result() -> None:
    """As samples are, which end there too."""
    small = make_model(vocab_size=6)
    how = Settings(
        max_new_tokens=9, num_beams=3, num_samples=3, no_repeat_ngram_size=1, end_of_text=None
    )
    beams = beam_search(small, [4, 2], how)
    assert [beam.stopped for beam in beams] == ["no token left"] * 3
    assert all(sorted(beam.ids) == list(range(6)) for beam in beams)
    scores = [sum(beam.log_probs) / 4 for beam in beams]
    np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=1e-12)
    assert scores == sorted(scores, reverse=True)
    one = replace(how, num_samples=1)
    (beam,) = beam_search(small, [5, 4, 3, 2, 1, 0], one)
    assert (beam.stopped, beam.new_ids) == ("no token left", [])


def test_top_p_1_does_nothing_to_a_beam_search(model: GPT2) -> None:
    plain, with_p = (generate(model, np.array([1]), 5, num_beams=3, top_p=p) for p in (None, 1.0))
    np.testing.assert_array_equal(plain, with_p)


@pytest.mark.parametrize("early", [False, "never", True])
def test_no_length_penalty_is_too_large(model: GPT2, early: bool | str) -> None:
    """300 and -300 order texts by their lengths, which powers of these would overflow."""
    lengths = {}
    for penalty in (-1e6, -300.0, 300.0, 1e6):
        how = Settings(
            max_new_tokens=40,
            num_beams=8,
            num_samples=8,
            length_penalty=penalty,
            end_of_text=3,
            early_stopping=early,
        )
        beams = beam_search(model, [1, 2], how)
        found = [len(beam.new_ids) for beam in beams]
        assert found == sorted(found, reverse=penalty > 0)
        assert all(-np.inf < beam.score <= 0 for beam in beams)
        lengths[penalty] = sum(found)
    if early is not True:
        assert lengths[300.0] >= lengths[-300.0]
