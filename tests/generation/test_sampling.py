"""Decoding: every way to decode against the plainest one, and what `generate` returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_gpt2 import VOCABULARY, make_model, random_prompts

from micrograd_gpt import Tensor, layers, nn, no_grad
from micrograd_gpt.generation.sampling import decode, generate, start_samples
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.generation.ten_lines import sample
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError


def plainly(model: GPT2, prompt: np.ndarray, new: int, **more: Any) -> list[int]:
    """Decoding at its plainest: one prompt, no cache, nothing guessed."""
    return generate(model, prompt, new, use_cache=False, **more).tolist()


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


PADDED = [
    *({**way, **how} for way in WAYS for how in ({}, {"speculate": "prompt-lookup"})),
    {"num_beams": 3, "num_samples": 3},
    {"temperature": 2.0, "use_cache": False},
    {"temperature": 1.0, "num_samples": 4, "min_p": 0.01},
]


@pytest.mark.parametrize("way", PADDED)
def test_ids_from_vocab_size_on_are_never_generated(model: GPT2, way: dict[str, Any]) -> None:
    """They pad the vocabulary, and the tokenizer has no tokens for them."""
    prompts = [np.array([1, 2, 1, 2, 1, 2, 1]), np.array([4])]
    for prompt in prompts:
        free = generate(model, prompt, 40, end_of_text=None, **way)
        kept = generate(model, prompt, 40, end_of_text=None, vocab_size=5, **way)
        assert free.max() >= 5 > kept.max() and kept.shape == free.shape


def test_the_caller_can_stop_a_sample(model: GPT2) -> None:
    how = Settings(max_new_tokens=9, end_of_text=None)
    samples = start_samples([[1], [2, 3], [4]], how)
    for _ in decode(model, samples, how):
        if len(samples[1].new_ids) == 4:
            samples[1].stopped = "stop"
    assert [len(sample.new_ids) for sample in samples] == [9, 4, 9]
    assert [sample.stopped for sample in samples] == ["length", "stop", "length"]
    assert samples[2].new_ids == plainly(model, np.array([4]), 9, end_of_text=None)[1:]


@pytest.mark.parametrize("more", [{}, {"vocab_size": 6}])
def test_log_probabilities_are_the_models_own(model: GPT2, more: dict[str, Any]) -> None:
    how = Settings(max_new_tokens=5, temperature=0.3, top_k=2, end_of_text=None, **more)
    (sample,) = start_samples([[1, 2]], how)
    for _ in decode(model, [sample], how):
        pass
    with no_grad():
        logits = model(np.array([sample.ids])).numpy()[0, 1:-1].astype(np.float64)
    expected = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    expected = expected[np.arange(5), sample.new_ids]
    np.testing.assert_allclose(sample.log_probs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"speculate": "prompt-lookup"}])
def test_a_sample_with_no_token_left_ends_alone(model: GPT2, how: dict[str, Any]) -> None:
    settings = Settings(max_new_tokens=5, no_repeat_ngram_size=1, end_of_text=None, **how)
    samples = start_samples([list(range(VOCABULARY - 2)), [1]], settings)
    seen = [id(sample) for sample in decode(model, samples, settings)]
    assert [(s.stopped, len(s.new_ids)) for s in samples] == [("no token left", 2), ("length", 5)]
    assert len(samples[0].log_probs) == 2
    assert seen.count(id(samples[0])) == 3  # the caller hears of the end too
    assert sorted(samples[0].ids) == list(range(VOCABULARY))


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


def test_rows_with_no_token_left_are_filled_up_or_refused(model: GPT2) -> None:
    full = np.stack([np.arange(VOCABULARY), np.ones(VOCABULARY, int)])
    full[1] = 9
    rows = generate(model, full, 2, no_repeat_ngram_size=1, end_of_text=5, seed=1)
    assert rows[0, VOCABULARY:].tolist() == [5, 5] and 5 not in rows[1]
    how: dict[str, Any]
    for how in ({}, {"end_of_text": None}, {"end_of_text": VOCABULARY}, {"end_of_text": -1}):
        with pytest.raises(UserError, match="every token would repeat"):  # {}: GPT-2's, 50256
            generate(model, full, 2, no_repeat_ngram_size=1, **how)
        ragged = generate(model, list(full), 2, no_repeat_ngram_size=1, **how)
        assert [len(ids) for ids in ragged] == [VOCABULARY, VOCABULARY + 2]
    for beams in (1, 2):
        alone = generate(model, full[0], 1, no_repeat_ngram_size=1, num_beams=beams)
        np.testing.assert_array_equal(alone, full[0])


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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("do_sample", "'do_sample': temperature=0 takes the likeliest token"),
        ("max_length", "'max_length': max_new_tokens counts"),
        ("num_sample", "'num_sample': did you mean num_samples?"),
        ("colour", "'colour'$"),
    ],
)
def test_a_setting_that_there_is_not(name: str, hint: str, model: GPT2) -> None:
    with pytest.raises(TypeError, match=r"^generate\(\) has no setting " + hint):
        model.generate([1], **{name: False})


class Mean(nn.Module):
    """An attention of one's own: every token takes the mean of all up to its place."""

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        shares = np.tri(x.shape[1], dtype=np.float32)
        return Tensor(shares / shares.sum(1, keepdims=True)) @ x


class WideHeads(nn.Module):
    """An attention of one's own, whose heads together are twice as wide as the model."""

    def __init__(self, n_head: int, width: int) -> None:
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(width, 6 * width), nn.Linear(2 * width, width)

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        qkv = self.c_attn(x).reshape(*x.shape[:2], 3, self.n_head, -1)
        return self.c_proj(layers.self_attention(qkv, past=past).reshape(*x.shape[:2], -1))


CHANGES = {
    "another config": lambda model: setattr(model.config, "n_head", 4),
    "another width in it": lambda model: setattr(model.config, "n_embd", 16),
    "other heads": lambda model: [
        setattr(block.attn, "n_head", 4) for block in model.transformer.h
    ],
    "a block more": lambda model: model.transformer.h.append(model.transformer.h[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_is_decoded_as_it_is_now(change: str) -> None:
    model = make_model()
    CHANGES[change](model)
    prompt, greedy = [1, 2, 3, 4, 5], {"max_new_tokens": 8, "temperature": 0, "end_of_text": None}
    expected = sample(model, [prompt], 8, temperature=0)[0]
    for use_cache in (True, False):
        ids = model.generate(prompt, **greedy, use_cache=use_cache)
        np.testing.assert_array_equal(ids, expected)


class Skipped(nn.Module):
    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        return x


NO_CACHE_FITS = {
    "one's own": lambda block: setattr(block, "attn", Mean()),
    "of other heads": lambda block: setattr(block.attn, "n_head", 2 * block.attn.n_head),
    "of wide heads": lambda block: setattr(
        block, "attn", WideHeads(block.attn.n_head, len(block.ln_1.weight))
    ),
}


@pytest.mark.parametrize("change", NO_CACHE_FITS)
def test_an_attention_that_no_cache_fits_is_decoded_without_one(
    change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    NO_CACHE_FITS[change](model.transformer.h[1])
    assert_decoded_without_cache(model, capsys)


def test_a_block_without_attention_is_decoded_without_cache(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model()
    model.transformer.h[1] = Skipped()  # type: ignore[call-overload]
    assert_decoded_without_cache(model, capsys)


def assert_decoded_without_cache(model: GPT2, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, greedy = [1, 2, 3, 4, 5], {"max_new_tokens": 8, "temperature": 0, "end_of_text": None}
    expected = sample(model, [prompt], 8, temperature=0)[0]
    say_once.cache_clear()
    for more in ({}, {}, {"use_cache": False}, {"speculate": "prompt-lookup"}):
        np.testing.assert_array_equal(model.generate(prompt, **greedy, **more), expected)
    model.generate(prompt[:2], **greedy)
    said = capsys.readouterr().err
    assert said.startswith("note: no KV cache goes with") and said.count("\n") == 1
    beams = {"num_beams": 2, "max_new_tokens": 8, "end_of_text": None}
    found = [model.generate(prompt, **beams, use_cache=use) for use in (True, False)]
    np.testing.assert_array_equal(*found)
