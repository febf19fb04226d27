"""A few tokens through all blocks in one call of C (decode.c), compared with block by block."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import Tensor, nn, no_grad
from micrograd_gpt.arrays import int8
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import NotForMe, at_most
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config, through_blocks
from micrograd_gpt.kernels.in_c import compiler, token_step
from micrograd_gpt.variants import VariantConfig, VariantGPT2

needs_compiler = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)
pytestmark = needs_compiler

one_by_one = through_blocks.definition  # type: ignore[attr-defined]


def make(dtype: str = "float32", **changes: Any) -> GPT2:
    sizes = {"n_layer": 3, "n_head": 3, "n_embd": 51, "vocab_size": 70, "n_positions": 40}
    model = GPT2(GPT2Config(**sizes | changes), seed=1).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # attention that is far from uniform
    hold_in_any(model, dtype)
    return model


def hold_in_any(model: GPT2, dtype: str) -> None:
    if dtype == "int8":
        for name, parameter in model.named_parameters():
            int8.hold_in_int8(name, parameter)
    else:
        hold_in(model, dtype)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled_cache(model: GPT2, lengths: list[int], capacity: int = 40) -> KVCache:
    """A cache whose rows hold random keys and values up to `lengths`, and NaN beyond."""
    cache = KVCache(model, len(lengths), capacity)
    cache.data[:] = np.nan
    for row, length in enumerate(lengths):
        cache.data[:, :, row, :, :length] = numbers(*cache.data[:, :, row, :, :length].shape)
    cache.lengths[:] = lengths
    return cache


def in_c(x: np.ndarray, model: GPT2, cache: KVCache) -> np.ndarray:
    """Call the step in C itself; NotForMe where it does not take the arguments."""
    with no_grad():
        return token_step.through_blocks(Tensor(x), model.transformer.h, cache).data


def block_by_block(x: np.ndarray, model: GPT2, cache: KVCache) -> np.ndarray:
    with no_grad():
        return one_by_one(Tensor(x), model.transformer.h, cache).data


def whatever_stands_in(x: np.ndarray, model: GPT2, cache: KVCache) -> np.ndarray:
    with no_grad():
        return through_blocks(Tensor(x), model.transformer.h, cache).data


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [([0], 1), ([0], 5), ([7], 3), ([39], 1), ([4, 4, 4], 1), ([4, 4, 4], 5), ([0, 9, 3], 5)]
    + [([11] * 16, 1), ([0], 16)],
)
def test_equal_to_block_by_block_bit_for_bit(lengths: list[int], tokens: int, dtype: str) -> None:
    model, x = make(dtype), numbers(len(lengths), tokens, 51)
    ours, theirs, by_choice = (filled_cache(model, lengths) for _ in range(3))
    given = x.copy()
    y = in_c(x, model, ours)
    expected = block_by_block(x, model, theirs)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(y, whatever_stands_in(x, model, by_choice))
    assert np.isfinite(y).all()
    for cache in (ours, by_choice):
        assert cache.data.tobytes() == theirs.data.tobytes()
        np.testing.assert_array_equal(cache.lengths, theirs.lengths)
    np.testing.assert_array_equal(x, given)  # the input is left as it was


@pytest.mark.parametrize(
    ("lengths", "tokens"), [([0], 17), ([3], 37), ([0, 9, 3], 6), ([2, 2], 38), ([0] * 17, 1)]
)
def test_a_prompt_in_bfloat16_equals_block_by_block_bit_for_bit(
    lengths: list[int], tokens: int
) -> None:
    model, x = make("bfloat16"), numbers(len(lengths), tokens, 51)
    ours, theirs = (filled_cache(model, lengths) for _ in range(2))
    y = in_c(x, model, ours)
    np.testing.assert_array_equal(y, block_by_block(x, model, theirs))
    assert np.isfinite(y).all() and ours.data.tobytes() == theirs.data.tobytes()
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("n_embd", [3, 48, 192])
def test_near_the_definitions(n_embd: int, dtype: str) -> None:
    model, x = make(dtype, n_embd=n_embd), numbers(2, 4, n_embd)
    ours, theirs = (filled_cache(model, [5, 8]) for _ in range(2))
    y = in_c(x, model, ours)
    with at_most("definitions"):
        expected = whatever_stands_in(x, model, theirs)
    # One rounding to bfloat16 that falls the other way is off by 2^-8, and moves those after it.
    tolerance = 2**-5 if dtype == "bfloat16" else 2e-4
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    wide = (cache.data.astype("float32") for cache in (ours, theirs))
    np.testing.assert_allclose(*wide, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)


def test_some_rows_of_a_larger_cache() -> None:
    model, x = make(), numbers(2, 1, 51)
    whole = filled_cache(model, [3, 6, 2, 9])
    before, apart = whole.data.copy(), copy.deepcopy(whole)
    y = in_c(x, model, whole.rows(1, 3))
    expected = block_by_block(x, model, apart.rows(1, 3))
    np.testing.assert_array_equal(y, expected)
    assert list(whole.lengths) == [3, 7, 3, 9]
    np.testing.assert_array_equal(whole.data[:, :, [0, 3]], before[:, :, [0, 3]])


def test_parameters_that_are_replaced_or_changed_are_noticed() -> None:
    model, x = make(), numbers(1, 1, 51)
    results = []

    def step() -> None:
        y = in_c(x, model, filled_cache(model, [5]))
        np.testing.assert_array_equal(y, block_by_block(x, model, filled_cache(model, [5])))
        results.append(y)

    step()
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data = np.asfortranarray(weight.data * 2)  # another array
    step()
    weight.data *= 2  # the same array, with other numbers in it
    step()
    assert len({y.tobytes() for y in results}) == 3


@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize(("before", "after"), [("float32", "int8"), ("bfloat16", "float32")])
def test_a_block_that_changes_its_type_after_a_token_is_noticed(
    part: int, before: str, after: str
) -> None:
    model, x = make(before), numbers(1, 1, 51)
    in_c(x, model, filled_cache(model, [5]))
    hold_in_any(model.transformer.h[part], after)
    ours, theirs = (filled_cache(model, [5]) for _ in range(2))
    with pytest.raises(NotForMe):
        in_c(x, model, ours)
    y = whatever_stands_in(x, model, ours)
    np.testing.assert_array_equal(y, block_by_block(x, model, theirs))


class Scaled(nn.Linear):
    """A linear layer that computes something else, as in fine-tuning methods."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 0.5


def post_norm() -> GPT2:
    config = VariantConfig(**vars(make().config), norm_position="post")
    return VariantGPT2(config, seed=1).eval()


def refusals() -> dict[str, tuple[GPT2, int]]:
    """Models and numbers of tokens that decode.c does not compute."""
    dropping = make(attn_pdrop=0.5).train()
    dropping_in_part, c_order = make(resid_pdrop=0.5), make()
    dropping_in_part.transformer.h[1].mlp.train()
    weight = c_order.transformer.h[2].attn.c_proj.weight
    weight.data = np.ascontiguousarray(weight.data)
    with_own_layer, with_own_eps, in_float64, in_float16, in_part = (make() for _ in range(5))
    with_own_layer.transformer.h[0].mlp.c_fc.__class__ = Scaled
    with_own_eps.transformer.h[2].ln_2.eps = 0.5
    hold_in(in_float64, "float64")
    hold_in(in_float16, "float16")
    hold_in(in_part.transformer.h[1].mlp, "bfloat16")
    return {
        "post-norm": (post_norm(), 1),
        "dropout": (dropping, 1),
        "dropout in one place": (dropping_in_part, 1),
        "C order": (c_order, 1),
        "many tokens": (make(), 17),
        "another layer": (with_own_layer, 1),
        "another epsilon": (with_own_eps, 1),
        "float64": (in_float64, 1),
        "float16": (in_float16, 1),
        "bfloat16 in part": (in_part, 1),
    }


@pytest.mark.parametrize("which", refusals())
def test_what_it_does_not_compute_is_left_to_the_blocks(which: str) -> None:
    model, tokens = refusals()[which]
    x = numbers(1, tokens, 51).astype("float64" if which == "float64" else "float32")
    ours, theirs = (filled_cache(model, [5]) for _ in range(2))
    before = ours.data.tobytes()
    with pytest.raises(NotForMe):
        in_c(x, model, ours)
    assert ours.data.tobytes() == before and list(ours.lengths) == [5]
    model.draws.reseed(0)
    y = whatever_stands_in(x, model, ours)
    model.draws.reseed(0)
    np.testing.assert_array_equal(y, block_by_block(x, model, theirs))
    assert list(ours.lengths) == [5 + tokens]


def test_half_precision_in_this_block_is_not_for_c() -> None:
    model, x = make(), numbers(1, 1, 51)
    with compute_in("bfloat16"):
        ours, theirs = (filled_cache(model, [5]) for _ in range(2))
        with pytest.raises(NotForMe):
            in_c(x, model, ours)
        y = whatever_stands_in(x, model, ours)
        np.testing.assert_array_equal(y, block_by_block(x, model, theirs))
    wide = in_c(x, model, filled_cache(model, [5]))
    assert y.dtype == np.float32 and (y != wide).any()  # the residual stream, of rounded branches


def misfits() -> dict[str, tuple[GPT2, KVCache, tuple[int, ...]]]:
    """A model, a cache and the shape of x, one of which does not fit the others."""
    one = (1, 1, 51)
    found = {
        "heads": (make(), filled_cache(make(n_head=17), [5]), one),
        "head size": (make(), filled_cache(make(n_embd=48), [5]), one),
        "layers": (make(), filled_cache(make(n_layer=2), [5]), one),
        "rows": (make(), filled_cache(make(), [5, 5]), one),
        "width": (make(), filled_cache(make(n_embd=48), [5]), (1, 1, 48)),
        "axes of x": (make(), filled_cache(make(), [5]), (1, 51)),
        "no token": (make(), filled_cache(make(), [5]), (1, 0, 51)),
        "more tokens than room": (make(), filled_cache(make(), [39]), (1, 2, 51)),
    }
    for name, _ in make().transformer.h[1].named_parameters():
        model = make()
        parameter = dict(model.transformer.h[1].named_parameters())[name]
        parameter.data = np.asfortranarray(parameter.data[..., :-1])
        found[name] = model, filled_cache(model, [5]), one
    for what, spoil in SPOILED.items():
        cache = filled_cache(make(), [5])
        spoil(cache)
        found[what] = make(), cache, one
    return found


def set_data(cache: KVCache, data: np.ndarray) -> None:
    cache.data = data


def set_lengths(cache: KVCache, lengths: Any) -> None:
    cache.lengths = lengths


def at_an_odd_address(array: np.ndarray) -> np.ndarray:
    moved = np.frombuffer(bytearray(array.nbytes + 1), array.dtype, array.size, 1)
    return moved.reshape(array.shape)


SPOILED: dict[str, Callable[[KVCache], None]] = {
    "read-only cache": lambda cache: cache.data.setflags(write=False),
    "a cache of other numbers": lambda cache: set_data(cache, cache.data.astype("float64")),
    "a cache in another order": lambda cache: set_data(cache, np.asfortranarray(cache.data)),
    "a cache backwards": lambda cache: set_data(cache, cache.data[::-1]),
    "a cache with gaps": lambda cache: set_data(cache, np.repeat(cache.data, 2, -1)[..., ::2]),
    "a cache at an odd address": lambda cache: set_data(cache, at_an_odd_address(cache.data)),
    "a cache of five axes": lambda cache: set_data(cache, cache.data[:, :, 0]),
    "a cache that is one layer": lambda cache: set_data(cache, as_strided(cache.data)),
    "an empty cache": lambda cache: set_data(cache, cache.data[..., :0, :]),
    "negative lengths": lambda cache: set_lengths(cache, np.array([-1])),
    "lengths beyond the cache": lambda cache: set_lengths(cache, np.array([40])),
    "lengths far beyond it": lambda cache: set_lengths(cache, np.array([2**62])),
    "more lengths than rows": lambda cache: set_lengths(cache, np.array([5, 5])),
    "lengths of two axes": lambda cache: set_lengths(cache, np.array([[5]])),
    "lengths that are no integers": lambda cache: set_lengths(cache, np.array([5.0])),
    "lengths of 64 bits without a sign": lambda cache: set_lengths(cache, np.array([5], "u8")),
    "read-only lengths": lambda cache: cache.lengths.setflags(write=False),
    "a list of lengths": lambda cache: set_lengths(cache, [5]),
}


def as_strided(data: np.ndarray) -> np.ndarray:
    """The first layer's memory in place of all layers'."""
    return np.lib.stride_tricks.as_strided(data, strides=(0, *data.strides[1:]))


@pytest.mark.parametrize("which", misfits())
def test_what_does_not_fit_is_not_for_c(which: str) -> None:
    model, cache, shape = misfits()[which]
    before, lengths = cache.data.copy(), copy.copy(cache.lengths)
    in_c(numbers(1, 1, 51), make(), filled_cache(make(), [5]))  # after a step that fits
    with pytest.raises(NotForMe):
        in_c(numbers(*shape), model, cache)
    np.testing.assert_array_equal(cache.data, before)
    np.testing.assert_array_equal(cache.lengths, lengths)


def test_a_parameter_that_got_another_shape_in_place_is_noticed() -> None:
    model = make()
    in_c(numbers(1, 1, 51), model, filled_cache(model, [5]))
    weight = model.transformer.h[1].mlp.c_fc.weight.data
    with pytest.raises(ValueError, match="resize"):  # its memory stays where it is
        weight.resize(1, refcheck=False)
    bias = model.transformer.h[1].mlp.c_fc.bias.data
    bias.shape = (4, 51)
    with pytest.raises(NotForMe):
        in_c(numbers(1, 1, 51), model, filled_cache(model, [5]))


def test_a_full_cache_is_named_and_left_as_it_was() -> None:
    model = make()
    cache = filled_cache(model, [5], capacity=6)
    before = cache.data.copy()
    with pytest.raises(ValueError, match="holds 6 positions"):
        whatever_stands_in(numbers(1, 2, 51), model, cache)
    np.testing.assert_array_equal(cache.data, before)
    assert list(cache.lengths) == [5]


def test_a_model_with_a_cache_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(), np.arange(12).reshape(1, 12)
    step, steps = token_step.through_blocks, []

    def counted(x: Tensor, blocks: list[Any], cache: Any = None) -> Tensor:
        y = step(x, blocks, cache)
        steps.append(x.shape[1])
        return y

    monkeypatch.setitem(through_blocks.stand_ins, "c", counted)  # type: ignore[attr-defined]
    through_blocks.choices.cache_clear()  # type: ignore[attr-defined]
    try:
        with no_grad():
            cache, parts = KVCache(model), (ids[:, :9], ids[:, 9:10], ids[:, 10:])
            logits = [model(part, cache).data for part in parts]
            assert steps == [9, 1, 2]
            whole = model(ids).data  # without a cache, this is a forward as in training
            assert steps == [9, 1, 2]
    finally:
        monkeypatch.undo()
        through_blocks.choices.cache_clear()  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole, rtol=0, atol=1e-4)


def test_what_stands_in_a_blocks_place_is_called() -> None:
    model, x = make(), Tensor(numbers(1, 1, 51))
    block = model.transformer.h[1]
    blocks = [model.transformer.h[0], lambda x, past: block(block(x, past), past)]
    with no_grad():
        y = through_blocks(x, blocks, filled_cache(model, [5]))
        expected = one_by_one(x, blocks, filled_cache(model, [5]))
        with pytest.raises(NotForMe):
            token_step.through_blocks(x, blocks, filled_cache(model, [5]))
    np.testing.assert_array_equal(y.data, expected.data)


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
    in_c(x, model, filled_cache(model, [5]))
    old = [weakref.ref(parameter.data) for parameter in model.transformer.h[0].parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.copy(order="F")
    assert not any(array() is not None for array in old)


@pytest.mark.slow
def test_an_array_replaced_by_another_thread_is_not_read_after_it_is_freed() -> None:
    """NaN overwrites the memory that was freed: none may appear in a result."""
    model, x = make(n_layer=6, n_embd=192), numbers(1, 1, 192)
    weight, ended, bad = model.transformer.h[3].mlp.c_fc.weight, threading.Event(), []

    def replace() -> None:
        while not ended.is_set():
            old, weight.data = weight.data, weight.data.copy(order="F")
            del old
            np.full(weight.data.size, np.nan, np.float32)  # reuses the memory that was freed

    def decode() -> None:
        for _ in range(400):
            bad.append(not np.isfinite(in_c(x, model, filled_cache(model, [5]))).all())

    threads = [threading.Thread(target=decode) for _ in range(2)]
    replacing = threading.Thread(target=replace)
    for thread in (*threads, replacing):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    replacing.join()
    assert len(bad) == 800 and not any(bad)


def test_a_layer_without_a_bias_is_left_to_the_definition() -> None:
    model = make()
    model.transformer.h[0].mlp.c_fc.bias = None  # type: ignore[assignment]
    with pytest.raises(NotForMe):
        in_c(numbers(1, 1, 51), model, filled_cache(model, [5]))
