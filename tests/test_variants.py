"""The two variants of GPT-2, each alone and both together."""

from __future__ import annotations

import numpy as np
import pytest
from learning import assert_learns

from micrograd_gpt import Tensor, no_grad
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs.dropout import set_dropout
from micrograd_gpt.tensor import concatenate
from micrograd_gpt.variants import VariantConfig, VariantGPT2

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 23, "n_positions": 12}
EVERY = pytest.mark.parametrize(
    "choice",
    [
        {"norm_position": norm, "position_embedding": position}
        for norm in ("pre", "post")
        for position in ("learned", "sinusoidal")
    ],
    ids=lambda choice: "-".join(choice.values()),
)


def variant(choice: dict[str, str], seed: int = 0) -> VariantGPT2:
    return VariantGPT2(VariantConfig(**SMALL, **choice), seed=seed)


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 23, shape)


@EVERY
def test_every_architecture_learns(choice: dict[str, str]) -> None:
    assert_learns(variant(choice), random_ids(4, 13))


@EVERY
@pytest.mark.parametrize("cuts", [[1], [5], [3, 4, 9], list(range(1, 12))])
def test_cached_logits_equal_uncached(choice: dict[str, str], cuts: list[int]) -> None:
    model, ids = variant(choice, seed=1).eval(), random_ids(3, 12)
    for p in model.parameters():
        p.data *= 3  # attention that is far from uniform
    with no_grad():
        whole, cache = model(ids).data, KVCache(model, batch_size=3)
        parts = [model(part, cache).data for part in np.split(ids, cuts, axis=1)]
    error = np.abs(np.concatenate(parts, axis=1) - whole).max() / np.abs(whole).max()
    assert error < 1e-5


@EVERY
def test_every_level_computes_the_same(choice: dict[str, str]) -> None:
    ids, results = random_ids(2, 12), []
    for level in ("definitions", "c"):
        model = variant(choice, seed=1)
        with at_most(level):
            model.loss(ids, ids).backward()
        results.append([p.grad for p in model.parameters()])
    for composed, fast in zip(*results, strict=True):
        np.testing.assert_allclose(fast, composed, rtol=0, atol=1e-5 * np.abs(composed).max())


def test_without_a_choice_it_is_gpt2() -> None:
    model, plain, ids = variant({}, seed=3), GPT2(GPT2Config(**SMALL), seed=3), random_ids(2, 9)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    np.testing.assert_array_equal(model(ids).data, plain(ids).data)


def test_post_norm_is_the_first_transformer_s() -> None:
    """norm(x + branch(x)) after attention and after the MLP, and no norm at the end."""
    model, ids = variant({"norm_position": "post"}), random_ids(2, 5)
    assert not any("ln_f" in name for name, _ in model.named_parameters())
    body = model.transformer
    x = body.wte(ids) + body.wpe(np.arange(5))
    for block in body.h:
        x = block.ln_1(x + block.attn(x))
        x = block.ln_2(x + block.mlp(x))
    np.testing.assert_array_equal(model.hidden(ids).data, x.data)
    np.testing.assert_allclose(x.data.mean(-1), 0, atol=1e-6)


def test_sinusoidal_positions_are_the_papers() -> None:
    model = variant({"position_embedding": "sinusoidal"})
    waves = model.transformer.wpe(np.arange(12)).data
    assert waves.shape == (12, 16) and waves.dtype == np.float32
    for position, channel in ((0, 0), (3, 0), (3, 1), (7, 6), (7, 7)):
        angle = position / 10000 ** ((channel - channel % 2) / 16)
        expected = np.cos(angle) if channel % 2 else np.sin(angle)
        assert waves[position, channel] == pytest.approx(expected, abs=1e-6)
    assert not any("wpe" in name for name, _ in model.named_parameters())
    rows = model.transformer.wpe(np.array([[3, 4], [0, 1]]))  # for texts of different lengths
    assert isinstance(rows, Tensor)
    expected = concatenate([rows[1], rows[0]]).data
    np.testing.assert_array_equal(expected, waves[[0, 1, 3, 4]])


@pytest.mark.parametrize("wrong", [{"norm_position": "middle"}, {"position_embedding": "rotary"}])
def test_an_unknown_choice_is_named(wrong: dict[str, str]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        VariantConfig(**SMALL, **wrong)
    with pytest.raises(ValueError, match="must be a multiple of n_head"):
        VariantConfig(n_head=5)


def test_dropout_can_be_set() -> None:
    model, ids = variant({"norm_position": "post"}), random_ids(2, 9)
    quiet = model(ids).data
    set_dropout(model, 0.5)
    assert (model(ids).data != quiet).any()
    np.testing.assert_array_equal(model.eval()(ids).data, quiet)


def test_a_variant_s_config_is_not_for_the_plain_model() -> None:
    config = VariantConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=5, norm_position="post")
    with pytest.raises(ValueError, match="VariantConfig is for a model class of its own"):
        GPT2(config)
