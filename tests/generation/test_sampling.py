"""Decoding: the filters by hand, and every way to decode against the plainest one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micrograd_gpt import no_grad
from micrograd_gpt.generation import filters
from micrograd_gpt.generation.beam_search import beam_search
from micrograd_gpt.generation.context import Context, Continuation, window_start
from micrograd_gpt.generation.filters import NEVER, Settings
from micrograd_gpt.generation.sampling import (
    TextStream,
    choose,
    decode,
    generate,
    next_token_distribution,
    start_samples,
)
from micrograd_gpt.generation.speculation import PromptLookup
from micrograd_gpt.gpt2 import GPT2, GPT2Config, KVCache
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import ByteTokenizer

VOCABULARY, POSITIONS = 11, 16


def make_model(seed: int = 3, **config: Any) -> GPT2:
    """A small model with large weights: its distributions have clear favourites."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": VOCABULARY}
    model = GPT2(GPT2Config(**{**shape, "n_positions": POSITIONS, **config}), seed=seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 12
    return model


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make_model()


def random_prompts(count: int, longest: int = 30, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(1, longest + 1)) for _ in range(count)]


def plainly(model: GPT2, prompt: np.ndarray, new: int, **more: Any) -> list[int]:
    """Decoding at its plainest: one prompt, no cache, nothing guessed."""
    return generate(model, prompt, new, use_cache=False, **more).tolist()


# ------------------------------------------------------------------------------------ the window


@pytest.mark.parametrize("n_positions", [1, 2, 3, 4, 7, 16, 1024])
def test_the_window_moves_in_hops_and_no_further_than_it_must(n_positions: int) -> None:
    hop = max(1, n_positions // 4)
    for length in range(4 * n_positions + 3):
        start = window_start(length, n_positions)
        assert start % hop == 0
        assert length - start <= n_positions
        assert start == 0 or length - (start - hop) > n_positions


@pytest.mark.parametrize("position_embedding", ["learned", "sinusoidal"])
def test_cached_logits_are_the_uncached_ones(position_embedding: str) -> None:
    """At every position and past the context length, rows of different lengths in one batch, with
    guesses that turn out wrong in between. 1e-5: float32 sums of other shapes round differently."""
    model = make_model(position_embedding=position_embedding)
    rng = np.random.default_rng(0)
    texts = [prompt.tolist() for prompt in random_prompts(3, longest=6)]
    cached, uncached = (Context(model, 3, 99, use_cache) for use_cache in (True, False))
    for _ in range(3 * POSITIONS):
        room = min(min(cached.room(text) for text in texts), 4)
        guesses = rng.integers(0, room + 1)
        ahead = [text + rng.integers(0, VOCABULARY, guesses).tolist() for text in texts]
        fast, slow = (context.logits(ahead, 1 + guesses) for context in (cached, uncached))
        np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5 * np.abs(slow).max())
        for text in texts:
            text.append(int(rng.integers(VOCABULARY)))


def test_the_cache_is_one_array_of_the_stated_size_written_in_place(model: GPT2) -> None:
    context, text = Context(model, 2, longest=99), [1, 2, 3]
    assert context.cache is not None
    c, data = model.config, context.cache.data
    assert data.nbytes == 2 * c.n_layer * c.n_embd * POSITIONS * 2 * 4  # 2 rows, 4 bytes
    context.logits([text, text])
    before = data.copy()
    context.logits([[*text, 4], [*text, 5]])
    same = data.view(np.int32) == before.view(np.int32)  # what is not written yet may be NaN
    changed = ~same.all(axis=(0, 1, 3, 5))  # (rows, positions)
    assert context.cache.data is data
    assert changed.tolist() == [[False] * 3 + [True] + [False] * 12] * 2


def test_a_row_that_was_left_behind_can_be_taken_up_again(model: GPT2) -> None:
    """Its cache still holds the window of long ago, of which nothing is to be taken over."""
    text = [int(token) for token in np.random.default_rng(0).integers(0, VOCABULARY, 30)]
    context = Context(model, 2, longest=99)
    context.logits([text[:8], text[:8]])
    for end in range(9, 31):
        context.logits([text[:end]])
    context.keep([0, 0], shared=25)
    texts = [[*text, 1], [*text, 2]]
    expected = Context(model, 2, 99, use_cache=False).logits(texts)
    np.testing.assert_allclose(context.logits(texts), expected, rtol=1e-5, atol=1e-4)


def test_samples_of_one_prompt_read_it_once(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    hidden = GPT2.hidden
    monkeypatch.setattr(
        GPT2, "hidden", lambda self, ids, cache: read.append(ids.shape) or hidden(self, ids, cache)
    )
    generate(model, np.arange(8), 3, num_samples=5)
    assert read == [(1, 7), (5, 1), (5, 1), (5, 1)]


def test_cache_rows_of_different_lengths_have_no_common_length(model: GPT2) -> None:
    cache = KVCache(model, batch_size=2)
    cache.length = 3
    assert cache.length == 3
    cache.lengths[1] = 2
    with pytest.raises(ValueError, match="differ in length"):
        _ = cache.length


def test_a_batch_that_does_not_fit_the_cache_is_refused(model: GPT2) -> None:
    with no_grad(), pytest.raises(ValueError, match="2 rows for a batch of 1"):
        model(np.array([[1]]), KVCache(model, batch_size=2))
    with no_grad(), pytest.raises(ValueError, match="holds 2 positions, not 3"):
        model(np.array([[1, 2, 3]]), KVCache(model, capacity=2))


# ----------------------------------------------------------------------------------- the filters


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


def test_damaged_weights_are_named() -> None:
    model = make_model()
    model.transformer.wte.weight.data[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        generate(model, np.array([1]), 1)
    with pytest.raises(UserError, match="not finite"):
        generate(model, np.array([1]), 1, num_beams=2)


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"speculate": "prompt-lookup"}])
def test_a_sample_with_no_token_left_ends_alone(model: GPT2, how: dict[str, Any]) -> None:
    settings = Settings(max_new_tokens=5, no_repeat_ngram_size=1, end_of_text=None, **how)
    samples = start_samples([list(range(VOCABULARY - 2)), [1]], settings)
    seen = [id(sample) for sample in decode(model, samples, settings)]
    assert [(s.stopped, len(s.new_ids)) for s in samples] == [("no token left", 2), ("length", 5)]
    assert len(samples[0].log_probs) == 2
    assert seen.count(id(samples[0])) == 3  # the caller hears of the end too
    assert sorted(samples[0].ids) == list(range(VOCABULARY))


def test_rows_with_no_token_left_are_filled_up_or_refused(model: GPT2) -> None:
    full = np.stack([np.arange(VOCABULARY), np.ones(VOCABULARY, int)])
    rows = generate(model, full, 2, no_repeat_ngram_size=1, end_of_text=99)
    assert rows[0, VOCABULARY:].tolist() == [99, 99] and 99 not in rows[1]
    with pytest.raises(UserError, match="every token would repeat"):
        generate(model, full, 2, no_repeat_ngram_size=1, end_of_text=None)
    with pytest.raises(UserError, match="every token would repeat"):
        generate(model, full[0], 1, no_repeat_ngram_size=1, num_beams=2)


def test_a_cache_that_fits_no_memory_is_named_with_its_size(
    model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise MemoryError

    with pytest.raises(UserError, match=r"KV cache of [\d,]+\.\d GB: lower num_samples") as caught:
        Context(model, 10**18, 16)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("micrograd_gpt.generation.context.KVCache", full)
    with pytest.raises(UserError, match=r"KV cache of 409\.6 GB"):
        generate(model, np.array([1]), 15, num_beams=100_000_000)


# ------------------------------------------------------- every way to decode gives the same tokens

WAYS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"temperature": 1.5, "top_k": 8, "top_p": 0.9},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", [{}, {"speculate": "prompt-lookup"}])
def test_a_batch_of_any_lengths_gives_each_the_tokens_it_gets_alone(
    model: GPT2, way: dict[str, Any], how: dict[str, Any]
) -> None:
    prompts = random_prompts(6)
    together = generate(model, prompts, 40, end_of_text=5, **way, **how)
    alone = [plainly(model, prompt, 40, end_of_text=5, **way) for prompt in prompts]
    assert [ids.tolist() for ids in together] == alone
    assert len({len(ids) - len(p) for ids, p in zip(alone, prompts, strict=True)}) > 1  # ends vary


def test_samples_differ_and_do_not_depend_on_how_many_there_are(model: GPT2) -> None:
    prompt = np.array([1, 2, 3])
    eight = generate(model, prompt, 12, num_samples=8, seed=7)
    three = generate(model, prompt, 12, num_samples=3, seed=7)
    np.testing.assert_array_equal(eight[:3], three)
    assert len({tuple(row) for row in eight.tolist()}) == 8
    np.testing.assert_array_equal(generate(model, np.tile(prompt, (8, 1)), 12, seed=7), eight)
    np.testing.assert_array_equal(generate(model, prompt, 12, seed=7), eight[0])
    assert (generate(model, prompt, 12, seed=8) != eight[0]).any()


def test_the_streams_of_neighbouring_seeds_are_not_each_others(model: GPT2) -> None:
    """(seed 0, sample 1) is not (seed 1, sample 0), as adding both up would make them."""
    (_, second), (first, _) = (
        start_samples([[1]], Settings(seed=seed, num_samples=2)) for seed in (0, 1)
    )
    assert second.rng.random() != first.rng.random()
    zero, one = (generate(model, np.array([1]), 20, num_samples=2, seed=seed) for seed in (0, 1))
    assert (zero[1] != one[0]).any()


def test_the_smallest_factors_leave_a_distribution() -> None:
    logits = np.array([3e38, -3e38, 0.0])
    for how in (Settings(temperature=1e-6, repetition_penalty=factor) for factor in (1e-6, 1e6)):
        distribution = next_token_distribution(logits, [0, 1], how)
        assert np.isfinite(distribution).all() and distribution.sum() == 1


def test_speculation_does_decide_several_tokens_at_once(
    model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    logits = Context.logits
    monkeypatch.setattr(
        Context,
        "logits",
        lambda self, texts, count: passes.append(count) or logits(self, texts, count),
    )
    model = make_model(n_positions=128)
    model.transformer.wpe.weight.data *= 0  # blind to positions, it soon goes in circles
    plain = generate(model, np.array([1, 2]), 100, temperature=0)
    assert len(passes) == 100
    passes.clear()
    guessed = generate(model, np.array([1, 2]), 100, temperature=0, speculate="prompt-lookup")
    assert len(passes) < 50
    np.testing.assert_array_equal(guessed, plain)


def test_only_a_lone_sample_speculates(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    logits = Context.logits
    monkeypatch.setattr(
        Context,
        "logits",
        lambda self, texts, count: passes.append((len(texts), count)) or logits(self, texts, count),
    )
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


def test_dropout_is_off_while_decoding_and_on_again_after() -> None:
    model = make_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    first = generate(model, np.array([1, 2]), 10, temperature=0)
    np.testing.assert_array_equal(generate(model, np.array([1, 2]), 10, temperature=0), first)
    assert model.training and model.transformer.h[1].training
    model.eval()
    generate(model, np.array([1]), 1)
    assert not model.training


def test_the_caller_can_stop_a_sample(model: GPT2) -> None:
    how = Settings(max_new_tokens=9, end_of_text=None)
    samples = start_samples([[1], [2, 3], [4]], how)
    for _ in decode(model, samples, how):
        if len(samples[1].new_ids) == 4:
            samples[1].stopped = "stop"
    assert [len(sample.new_ids) for sample in samples] == [9, 4, 9]
    assert [sample.stopped for sample in samples] == ["length", "stop", "length"]
    assert samples[2].new_ids == plainly(model, np.array([4]), 9, end_of_text=None)[1:]


def test_log_probabilities_are_the_models_own(model: GPT2) -> None:
    how = Settings(max_new_tokens=5, temperature=0.3, top_k=2, end_of_text=None)
    (sample,) = start_samples([[1, 2]], how)
    for _ in decode(model, [sample], how):
        pass
    with no_grad():
        logits = model(np.array([sample.ids])).numpy()[0, 1:-1].astype(np.float64)
    expected = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    expected = expected[np.arange(5), sample.new_ids]
    np.testing.assert_allclose(sample.log_probs, expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------- beam search


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


def test_top_p_1_does_nothing_to_a_beam_search(model: GPT2) -> None:
    plain, with_p = (generate(model, np.array([1]), 5, num_beams=3, top_p=p) for p in (None, 1.0))
    np.testing.assert_array_equal(plain, with_p)


# -------------------------------------------------------------------------- what generate returns


def test_shapes(model: GPT2) -> None:
    row, batch = np.array([1, 2, 3]), np.array([[1, 2], [3, 4]])
    more: dict[str, Any] = {"end_of_text": None}
    assert generate(model, row, 4, **more).shape == (7,)
    assert generate(model, batch, 4, **more).shape == (2, 6)
    assert generate(model, row, 4, num_samples=3, **more).shape == (3, 7)
    assert generate(model, batch, 4, num_samples=3, **more).shape == (6, 6)
    assert generate(model, batch, 4, num_beams=2, num_samples=2, **more).shape == (4, 6)
    assert generate(model, [1, 2, 3], 4, **more).shape == (7,)
    assert generate(model, batch, 4).dtype == np.int64
    ragged = generate(model, [row, row[:1]], 4, num_samples=2, **more)
    assert [ids.shape for ids in ragged] == [(7,), (7,), (5,), (5,)]
    np.testing.assert_array_equal(generate(model, batch, 1, **more)[:, :2], batch)


def test_rows_that_end_early_are_filled_up_with_end_of_text(model: GPT2) -> None:
    rows = generate(model, np.tile([1, 2], (8, 1)), 12, end_of_text=5, seed=1)
    ends = [row.tolist().index(5) for row in rows if 5 in row]
    assert len(set(ends)) > 1
    for row in rows:
        tail = row[row.tolist().index(5) :] if 5 in row else np.array([5])
        assert (tail == 5).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": 2.0}, "min_p must be between"),
        ({"temperature": 1e-320}, "temperature must be 0 .greedy., or 1e-06 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 1e-06 and 1e.06"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty must be between"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be between"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1"),
        ({"num_beams": 0}, "num_beams must be 1"),
        ({"num_samples": 0}, "num_samples must be 1"),
        ({"seed": -1}, "seed must be 0"),
        ({"early_stopping": "soon"}, "early_stopping must be"),
        ({"speculate": "tea-leaves"}, "speculate must be"),
        ({"num_beams": 2, "top_k": 4}, "beam search takes no"),
        ({"num_beams": 2, "temperature": 0.5}, "beam search takes no"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples is above num_beams"),
        ({"num_beams": 2, "speculate": "prompt-lookup"}, "cannot speculate"),
        ({"length_penalty": 2.0}, "length_penalty is for"),
        ({"early_stopping": True}, "early_stopping is for"),
    ],
)
def test_wrong_settings_are_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Settings(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1, VOCABULARY]), "token id 11 is outside the model's vocabulary of 11"),
        (np.array([-1]), "token id -1 is outside"),
        (np.array([], int), "one or more token ids"),
        ([np.array([1]), np.array([], int)], "one or more token ids"),
        ([], "one or more token ids"),
        (np.zeros((0, 3), int), "there is no prompt"),
        (np.array([1.0]), "integers"),
        (np.zeros((1, 1, 1), int), "a row"),
    ],
)
def test_wrong_prompts_are_named_in_one_line(model: GPT2, ids: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(model, ids)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ text, as it comes


def shown(data: bytes, stops: list[str], how_many_at_once: int = 1) -> Iterator[str]:
    """What TextStream shows of these byte tokens after each step, and at the end."""
    continuation = Continuation(ids=[0], n_prompt=1)
    stream = TextStream(ByteTokenizer(), stops)
    for start in range(0, len(data), how_many_at_once):
        continuation.ids += data[start : start + how_many_at_once]
        if start + how_many_at_once >= len(data):
            continuation.stopped = "length"
        stream.follow(continuation)
        yield stream.text
        if continuation.stopped == "stop":
            return


def test_a_stop_text_that_spans_tokens_is_never_partly_shown() -> None:
    texts = list(shown(b"ab##c###d", ["###"]))
    assert texts == ["a", "ab", "ab", "ab", "ab##c", "ab##c", "ab##c", "ab##c"]


def test_what_might_have_become_a_stop_text_is_shown_at_the_end() -> None:
    assert list(shown(b"ab##", ["###"]))[-1] == "ab##"


def test_characters_are_shown_whole_or_not_at_all() -> None:
    assert list(shown("aé€".encode()[:-1], [])) == ["a", "a", "aé", "aé", "aé"]


def test_end_of_text_is_not_shown_but_a_passing_one_is() -> None:
    stream = TextStream(ByteTokenizer())
    continuation = Continuation(ids=[256, 97, 256, 98, 256], n_prompt=1, stopped="end-of-text")
    stream.follow(continuation)
    assert stream.text == "ab"


@settings(deadline=None)
@given(
    st.text("ab€", min_size=1, max_size=30),
    st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_a_stream_shows_the_text_up_to_the_first_stop(
    text: str, stops: list[str], how_many_at_once: int
) -> None:
    texts = list(shown(text.encode(), stops, how_many_at_once))
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert texts[-1] == text
    else:  # the stop that is complete first counts, not the one that begins first
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        candidates = {text[: text.find(stop)] for stop in stops if stop in text}
        assert texts[-1] in candidates
        assert len(texts[-1]) <= first
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)
