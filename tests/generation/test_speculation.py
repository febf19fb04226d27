"""Guessing ahead: what is guessed, when, and that it changes no token."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt.generation.context import Context
from micrograd_gpt.generation.sampling import decode, generate, start_samples
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.generation.speculation import PromptLookup


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many texts, and how many tokens of each, are read at once in greedy decoding."""
    passes = []
    likeliest = Context.likeliest

    def counted(self: Context, texts: list[list[int]], count: int, *more: Any) -> Any:
        passes.append((len(texts), count))
        return likeliest(self, texts, count, *more)

    monkeypatch.setattr(Context, "likeliest", counted)
    return passes


def test_speculation_does_decide_several_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = passes_of(monkeypatch)
    model = make_model(n_positions=128)
    model.transformer.wpe.weight.data *= 0  # blind to positions, it soon goes in circles
    plain = generate(model, np.array([1, 2]), 100, temperature=0)
    assert len(passes) == 100
    passes.clear()
    guessed = generate(model, np.array([1, 2]), 100, temperature=0, speculate="prompt-lookup")
    assert len(passes) < 50
    np.testing.assert_array_equal(guessed, plain)


def test_only_a_lone_sample_speculates(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = passes_of(monkeypatch)
    how = Settings(max_new_tokens=30, temperature=0, end_of_text=None, speculate="prompt-lookup")
    samples = start_samples([[1, 2, 3, 4] * 3, [1, 2, 3, 4] * 3], how)
    for _ in decode(make_model(n_positions=128), samples, how):
        if len(samples[1].new_ids) == 10:
            samples[1].stopped = "stop"
    assert {count for rows, count in passes if rows == 2} == {1}
    assert max(count for rows, count in passes if rows == 1) > 1


def test_guesses_continue_the_latest_place_that_looks_alike() -> None:
    run = [1, 2, 3, 4]
    assert PromptLookup().guess([*run, 5, 6, 7, 8, *run]) == [5, 6, 7, 8, 1, 2, 3]
    assert PromptLookup().guess([9, *run, 5, *run, 6, 7, 8, *run])[:3] == [6, 7, 8]
    longer = [0, 9, 9, 9, *run]  # eight tokens that agree say more than four
    assert PromptLookup().guess([*longer, 5, 5, *run, 6, 6, *longer])[:2] == [5, 5]
    assert PromptLookup().guess([1, 2, 1, 2, 1, 2]) == [1, 2, 1, 2, 1, 2, 1]  # round and round
    assert PromptLookup().guess([1, 2, 1, 2, 1, 2], most=2) == [1, 2]
    assert PromptLookup().guess([1, 2, 3, 4, 5]) == []


def test_guesses_grow_when_right_and_get_rare_when_wrong() -> None:
    lookup, text = PromptLookup(), [1, 2, 3] * 3
    sizes = []
    for _ in range(4):
        guess = lookup.guess(text)
        sizes.append(len(guess))
        text = text + guess
    assert sizes == [7, 15, 31, 31]
    lookup, text = PromptLookup(), [1, 2, 3] * 3
    for _ in range(4):  # that there was no room for more is not held against a guess
        text = text + lookup.guess(text, most=1)
    assert len(lookup.guess(text)) == 31
    fresh, run = itertools.count(100), [1, 2, 3, 4]
    lookup, text, attempts = PromptLookup(), [*run], []
    for i in range(40):  # what follows a run of four is new each time
        text += [next(fresh), *run]
        attempts += [i] if lookup.guess(text) else []
    assert attempts == [0]  # a run of eight never comes again
    lookup, text, attempts = PromptLookup(), [*run] * 8, []
    for i in range(100):  # what follows any run is new each time
        text += [next(fresh), *run * 8]
        attempts += [i] if lookup.guess(text) else []
    assert attempts[:3] == [0, 1, 2] and (np.diff(attempts[2:]) == 3).all()  # in 99 tokens
