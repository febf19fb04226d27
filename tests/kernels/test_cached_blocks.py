"""Few tokens through all blocks at once (`gpt2.cached_blocks`, decode.c), and block by block."""

from __future__ import annotations

import copy
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import Tensor, kernels, nn, no_grad
from micrograd_gpt.gpt2 import GPT2, GPT2Config, KVCache, cached_blocks
from micrograd_gpt.kernels.in_c import arguments as c_arguments
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.kernels.in_c import kernels as compiled

needs_compiler = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)
pytestmark = needs_compiler

one_by_one = cached_blocks.__wrapped__


def make(**changes: Any) -> GPT2:
    sizes = {"n_layer": 3, "n_head": 3, "n_embd": 51, "vocab_size": 70, "n_positions": 40}
    model = GPT2(GPT2Config(**sizes | changes), seed=1).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # attention that is far from uniform
    return model


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled_cache(model: GPT2, lengths: list[int], capacity: int = 40) -> KVCache:
    """A cache with random keys and values before `lengths`, and NaN where none were written."""
    cache = KVCache(model, len(lengths), capacity)
    cache.data[:] = np.nan
    for row, length in enumerate(lengths):
        cache.data[:, :, row, :, :length] = numbers(*cache.data[:, :, row, :, :length].shape)
    cache.lengths[:] = lengths
    return cache


def runs_in_c(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C functions that are called from Python, as they are called."""
    called: list[str] = []
    call = c_arguments.call
    monkeypatch.setattr(compiled, "call", lambda name, a: (called.append(name), call(name, a)))
    return called


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [([0], 1), ([0], 5), ([7], 3), ([39], 1), ([4, 4, 4], 1), ([4, 4, 4], 5), ([0, 9, 3], 5)]
    + [([11] * 16, 1), ([0], 16)],
)
def test_equal_to_block_by_block_bit_for_bit(
    lengths: list[int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make(), numbers(len(lengths), tokens, 51)
    ours, theirs = (filled_cache(model, lengths) for _ in range(2))
    given = x.copy()
    called = runs_in_c(monkeypatch)
    with no_grad():
        y = cached_blocks(x, model.transformer.h, ours)
        assert called == ["decode"]
        expected = one_by_one(x, model.transformer.h, theirs)
    np.testing.assert_array_equal(y, expected)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(ours.data, theirs.data)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_array_equal(x, given)  # what came in is left as it was


@pytest.mark.parametrize("n_embd", [3, 48, 192])
def test_near_the_definitions(n_embd: int) -> None:
    model, x = make(n_embd=n_embd), numbers(2, 4, n_embd)
    ours, theirs = (filled_cache(model, [5, 8]) for _ in range(2))
    with no_grad():
        y = cached_blocks(x, model.transformer.h, ours)
        with kernels.definitions_only():
            expected = cached_blocks(x, model.transformer.h, theirs)
    np.testing.assert_allclose(y, expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(ours.data, theirs.data, rtol=2e-4, atol=2e-4)


def test_some_rows_of_a_larger_cache() -> None:
    model, x = make(), numbers(2, 1, 51)
    whole = filled_cache(model, [3, 6, 2, 9])
    before, apart = whole.data.copy(), copy.deepcopy(whole)
    with no_grad():
        y = cached_blocks(x, model.transformer.h, whole.rows(1, 3))
        expected = one_by_one(x, model.transformer.h, apart.rows(1, 3))
    np.testing.assert_array_equal(y, expected)
    assert list(whole.lengths) == [3, 7, 3, 9]
    np.testing.assert_array_equal(whole.data[:, :, [0, 3]], before[:, :, [0, 3]])


def test_parameters_that_are_replaced_or_changed_are_noticed() -> None:
    model, x = make(), numbers(1, 1, 51)
    results = []

    def step() -> None:
        with no_grad():
            y = cached_blocks(x, model.transformer.h, filled_cache(model, [5]))
            expected = one_by_one(x, model.transformer.h, filled_cache(model, [5]))
        np.testing.assert_array_equal(y, expected)
        results.append(y)

    step()
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data = np.asfortranarray(weight.data * 2)  # another array
    step()
    weight.data *= 2  # the same array, with other numbers in it
    step()
    assert len({y.tobytes() for y in results}) == 3


class Scaled(nn.Linear):
    """A linear layer with something of its own, as fine-tuning methods have it."""

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        return super().__call__(x, gelu) * 0.5


def refusals() -> dict[str, tuple[GPT2, int]]:
    """Models, and numbers of tokens, that decode.c does not compute."""
    dropping, dropping_in_part, c_order = (
        make(attn_pdrop=0.5).train(),
        make(resid_pdrop=0.5),
        make(),
    )
    dropping_in_part.transformer.h[1].mlp.train()
    weight = c_order.transformer.h[2].attn.c_proj.weight
    weight.data = np.ascontiguousarray(weight.data)
    with_own_layer, with_own_eps = make(), make()
    with_own_layer.transformer.h[0].mlp.c_fc.__class__ = Scaled
    with_own_eps.transformer.h[2].ln_2.eps = 0.5
    return {
        "post-norm": (make(norm_position="post"), 1),
        "dropout": (dropping, 1),
        "dropout in one place": (dropping_in_part, 1),
        "C order": (c_order, 1),
        "many tokens": (make(), 17),
        "a layer of one's own": (with_own_layer, 1),
        "a LayerNorm's own epsilon": (with_own_eps, 1),
        "float64": (GPT2(make().config, dtype="float64").eval(), 1),
        "bfloat16": (GPT2(make().config, compute="bfloat16").eval(), 1),
    }


@pytest.mark.parametrize("which", refusals())
def test_what_it_does_not_compute_is_left_to_the_blocks(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = refusals()[which]
    x = numbers(1, tokens, 51).astype(model.transformer.wte.weight.data.dtype)
    ours, theirs = (filled_cache(model, [5]) for _ in range(2))
    called = runs_in_c(monkeypatch)
    with no_grad():
        model.random.reseed(0)
        y = cached_blocks(x, model.transformer.h, ours)
        model.random.reseed(0)
        expected = one_by_one(x, model.transformer.h, theirs)
    assert "decode" not in called
    np.testing.assert_array_equal(y, expected)
    assert list(ours.lengths) == [5 + tokens]


def misfits() -> dict[str, tuple[GPT2, KVCache, int]]:
    """A model, a cache and the width of x, of which something does not fit the rest."""
    model, shortened = make(), make()
    bias = shortened.transformer.h[1].mlp.c_fc.bias
    bias.data = bias.data[:-1].copy()
    negative, read_only = (filled_cache(model, [5]) for _ in range(2))
    negative.lengths[:] = -1
    read_only.data.flags.writeable = False
    return {
        "heads": (model, filled_cache(make(n_head=17), [5]), 51),
        "head size": (model, filled_cache(make(n_embd=48), [5]), 51),
        "layers": (model, filled_cache(make(n_layer=2), [5]), 51),
        "rows": (model, filled_cache(model, [5, 5]), 51),
        "width": (model, filled_cache(make(n_embd=48), [5]), 48),
        "parameter": (shortened, filled_cache(shortened, [5]), 51),
        "lengths": (model, negative, 51),
        "read-only cache": (model, read_only, 51),
    }


@pytest.mark.parametrize("which", misfits())
def test_what_does_not_fit_is_not_for_c(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, width = misfits()[which]
    with no_grad():
        cached_blocks(numbers(1, 1, 51), make().transformer.h, filled_cache(make(), [5]))
        called = runs_in_c(monkeypatch)
        with suppress(ValueError, IndexError):  # the definition refuses most of these
            cached_blocks(numbers(1, 1, width), model.transformer.h, cache)
    assert "decode" not in called


def test_a_full_cache_is_named_and_left_as_it_was() -> None:
    model = make()
    cache = filled_cache(model, [5], capacity=6)
    before = cache.data.copy()
    with no_grad(), pytest.raises(ValueError, match="holds 6 positions"):
        cached_blocks(numbers(1, 2, 51), model.transformer.h, cache)
    np.testing.assert_array_equal(cache.data, before)
    assert list(cache.lengths) == [5]


def test_generating_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    called = runs_in_c(monkeypatch)
    tokens = model.generate(np.arange(9), max_new_tokens=20, temperature=0)
    assert called.count("decode") == 20  # the prompt of nine tokens, and nineteen more
    monkeypatch.setattr("micrograd_gpt.gpt2.cached_blocks", one_by_one)
    np.testing.assert_array_equal(
        tokens, model.generate(np.arange(9), max_new_tokens=20, temperature=0)
    )


def test_what_stands_in_a_blocks_place_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), numbers(1, 1, 51)
    block = model.transformer.h[1]
    blocks = [model.transformer.h[0], lambda x, past: block(block(x, past), past)]
    called = runs_in_c(monkeypatch)
    with no_grad():
        y = cached_blocks(x, blocks, filled_cache(model, [5]))
        expected = one_by_one(x, blocks, filled_cache(model, [5]))
    np.testing.assert_array_equal(y, expected)
    assert "decode" not in called


def test_frozen_embeddings_do_not_hide_that_a_gradient_is_wanted() -> None:
    model = make()
    for parameter in (model.transformer.wte.weight, model.transformer.wpe.weight):
        parameter.requires_grad = False
    with pytest.raises(RuntimeError, match="use it within no_grad"):
        model(np.array([[1, 2]]), KVCache(model))
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert model(np.array([[1, 2]]), KVCache(model)).shape == (1, 2, 70)


def test_arrays_that_were_replaced_are_let_go_of() -> None:
    model, x = make(), numbers(1, 1, 51)
    with no_grad():
        cached_blocks(x, model.transformer.h, filled_cache(model, [5]))
    old = [weakref.ref(parameter.data) for parameter in model.transformer.h[0].parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.copy(order="F")
    assert not any(array() is not None for array in old)


def test_an_array_replaced_by_another_thread_is_not_read_after_it_is_freed() -> None:
    """NaN takes the place of what was freed: none may appear in a result."""
    model, x = make(n_layer=6, n_embd=192), numbers(1, 1, 192)
    weight, ended, bad = model.transformer.h[3].mlp.c_fc.weight, threading.Event(), []

    def replace() -> None:
        while not ended.is_set():
            old, weight.data = weight.data, weight.data.copy(order="F")
            del old
            np.full(weight.data.size, np.nan, np.float32)  # takes the place that became free

    def decode() -> None:
        with no_grad():
            for _ in range(400):
                y = cached_blocks(x, model.transformer.h, filled_cache(model, [5]))
                bad.append(not np.isfinite(y).all())

    threads = [threading.Thread(target=decode) for _ in range(2)]
    replacing = threading.Thread(target=replace)
    for thread in (*threads, replacing):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    replacing.join()
    assert len(bad) == 800 and not any(bad)
