"""What the model has read: the window on a text, and the KV cache behind it."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from small_gpt2 import POSITIONS, VOCABULARY, make_model, random_prompts, work_of

from micrograd_gpt import no_grad
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation import context
from micrograd_gpt.generation.context import Context, window_start
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.generation.sampling import generate
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError


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
    tokens_read = []
    hidden = GPT2.hidden
    monkeypatch.setattr(
        GPT2,
        "hidden",
        lambda self, ids, cache: tokens_read.append(ids.size) or hidden(self, ids, cache),
    )
    generate(model, np.arange(8), 3, num_samples=5)
    assert sum(tokens_read) == 7 + 3 * 5  # the prompt but for its last token, then one each


def test_many_prompts_with_several_samples_take_work_in_proportion(model: GPT2) -> None:
    def read(n: int) -> None:
        texts = [[1 + i % 2] for i in range(n) for _ in range(2)]
        Context(model, len(texts), 8).logits([[*text, 0] for text in texts])

    read(25)  # what is made once
    one, two, four = (work_of(lambda n=n: read(n)) for n in (25, 50, 100))
    assert four - two < 2.02 * (two - one)  # 2 where it is in proportion, else more


def test_prompts_of_one_length_are_read_together(
    model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as `TOKENS_AT_ONCE` allows; a repeated one is copied, one of another length waits."""
    shapes = []
    hidden = GPT2.hidden
    monkeypatch.setattr(context, "TOKENS_AT_ONCE", 12)
    monkeypatch.setattr(
        GPT2,
        "hidden",
        lambda self, ids, cache: shapes.append(ids.shape) or hidden(self, ids, cache),
    )
    prompts = [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [3] * 5, [4] * 5, [4] * 5, [5] * 5, [6] * 7]
    together = generate(model, prompts, 1, temperature=0)
    assert shapes == [(3, 4), (1, 4), (1, 4), (1, 6), (7, 1)]
    monkeypatch.undo()
    alone = [generate(model, prompt, 1, temperature=0).tolist() for prompt in prompts]
    assert [ids.tolist() for ids in together] == alone


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
    with no_grad(), pytest.raises(ValueError, match="holds 2 positions: no 3 more"):
        model(np.array([[1, 2, 3]]), KVCache(model, capacity=2))


def test_a_cache_that_fits_no_memory_is_named_with_its_size(
    model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise MemoryError

    with pytest.raises(UserError, match=r"KV cache of [\d,]+\.\d GB: lower num_samples") as caught:
        Context(model, 10**18, 16)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("micrograd_gpt.generation.context.KVCache", full)
    with pytest.raises(UserError, match=r"KV cache of 0\.0 GB"):
        generate(model, np.array([1]), 15, num_beams=4)


@pytest.mark.parametrize(
    "how", [{"num_samples": 3_000_000}, {"num_beams": 3_000_000}, {"num_samples": 10**18}]
)
def test_more_texts_than_memory_holds_are_refused_before_they_are_made(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, how: dict[str, int]
) -> None:
    """Without a single allocation that the system could answer by killing the process."""
    monkeypatch.setattr("micrograd_gpt.arrays.memory.available_memory", lambda: 10**9)
    with pytest.raises(UserError, match=r"no memory for [\d,]+ texts .*: lower num_samples") as it:
        generate(model, np.array([1]), 15, end_of_text=None, **how)
    assert "\n" not in str(it.value)


def test_as_many_texts_as_memory_holds_are_decoded(
    model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("micrograd_gpt.arrays.memory.available_memory", lambda: 10**6)
    assert generate(model, np.array([1]), 2, num_samples=20, end_of_text=None).shape == (20, 3)


def test_damaged_weights_are_named() -> None:
    model = make_model()
    model.transformer.wte.weight.data[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        generate(model, np.array([1]), 1)
    with pytest.raises(UserError, match="not finite"):
        generate(model, np.array([1]), 1, num_beams=2)


@pytest.mark.filterwarnings("error")  # NumPy's words on what overflows would come first
def test_weights_that_float16_is_too_narrow_for_are_not_called_damaged() -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        if ".mlp.c_" in name:
            parameter.data *= 3e4
    generate(model, np.array([1]), 1)
    hold_in(model, "float16")
    with pytest.raises(UserError, match=r"not finite in float16, .*: try bfloat16 or float32"):
        generate(model, np.array([1]), 1)


def test_dropout_is_off_while_decoding_and_on_again_after() -> None:
    model = make_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    first = generate(model, np.array([1, 2]), 10, temperature=0)
    np.testing.assert_array_equal(generate(model, np.array([1, 2]), 10, temperature=0), first)
    assert model.training and model.transformer.h[1].training
    model.eval()
    generate(model, np.array([1]), 1)
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("level", ["c", "numpy"])
def test_several_threads_may_generate_with_one_model_in_training(level: str) -> None:
    """Dropout is off in each of them, and `training` stays as it is for all others."""
    model = make_model(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    prompt = np.array([1, 2, 3])
    with at_most(level):
        expected = generate(model, prompt, 4, temperature=0).tolist()
    results: list[list[int]] = []
    seen: set[bool] = set()

    def decode() -> None:
        for _ in range(100):
            with at_most(level):
                results.append(generate(model, prompt, 4, temperature=0).tolist())
            seen.update(part.training for _, part in model.modules())

    workers = [threading.Thread(target=decode) for _ in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        seen.update(part.training for _, part in model.modules())
        time.sleep(1e-4)
    assert results == [expected] * 400
    assert seen == {True}
