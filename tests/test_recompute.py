"""Computing activations again in the backward: the same gradients, from less memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import Tensor, layers, no_grad
from micrograd_gpt.arrays.precision import compute_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, Block, GPT2Config
from micrograd_gpt.nn import Draws, Dropout, Module
from micrograd_gpt.runs.dropout import set_dropout
from micrograd_gpt.runs.recompute import recompute, recompute_blocks
from micrograd_gpt.variants import VariantConfig, VariantGPT2


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_recomputed_activations_give_the_same_gradients(norm_position: str, dtype: str) -> None:
    """Bit for bit, with dropout, over two micro-batches that accumulate."""
    config = VariantConfig(
        **{"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 11, "n_positions": 8},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.2),
        norm_position=norm_position,
    )
    ids = np.random.default_rng(0).integers(0, 11, (2, 2, 3, 8))
    grads, draws = [], []
    for again in (False, True):
        model = VariantGPT2(config)
        if again:
            recompute_blocks(model)
        for step, batch in enumerate(ids):
            model.draws.reseed(5, step)
            with compute_in(dtype):
                loss = model.loss(*batch)
                draws.append(model.draws.latest)
                loss.backward()
            draws.append(model.draws.latest)
        assert all(p.grad.any() for p in model.parameters())
        grads.append([p.grad for p in model.parameters()] + [np.asarray(loss.item())])
    for plain, recomputed in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, recomputed)
    assert draws[:4] == draws[4:] and draws[0] == draws[1] != draws[2]


def test_dropout_of_one_s_own_is_drawn_again() -> None:
    class Own(Block):
        def __init__(self, block: Block, *draws: Draws) -> None:
            vars(self).update(vars(block), extra=Dropout(0.3, *draws))

        def __call__(self, x: Tensor, past: Any = None) -> Tensor:
            return self.extra(super().__call__(x, past))

    grads, ids = [], np.array([[1, 2, 3, 4]])
    for times in range(3):  # twice is once
        model = GPT2(GPT2Config(2, 1, 4, 7, 8))
        draws = [] if times else [model.draws]
        model.transformer.h = [Own(block, *draws) for block in model.transformer.h]
        for _ in range(times):
            recompute_blocks(model)
        model.loss(ids, ids).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed, twice in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, recomputed)
        np.testing.assert_array_equal(plain, twice)


def test_a_block_of_one_s_own_may_define_forward() -> None:
    class Own(Module):
        def __init__(self, block: Block) -> None:
            self.mixing, self.mlp = block.attn, block.mlp

        def forward(self, x: Tensor, past: Any = None) -> Tensor:
            return self.mlp(x + self.mixing(x, past))

    model, ids = GPT2(GPT2Config(2, 1, 4, 7, 8)), np.array([[1, 2, 3, 4]])
    model.transformer.h = [Own(block) for block in model.transformer.h]
    expected = model.loss(ids, ids).item()
    recompute_blocks(model)
    assert model.loss(ids, ids).item() == expected


def test_names_and_parameters_stay_the_same() -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=11, n_positions=8)
    model = GPT2(config)
    before = dict(model.named_parameters())
    recompute_blocks(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(after[name] is before[name] for name in before)
    set_dropout(model, 0.3)
    assert model.transformer.h[0].attn.attn_dropout.p == 0.3
    assert not model.eval().transformer.h[0].mlp.resid_dropout.training
    ids = np.array([[1, 2, 3, 4]])
    with no_grad():
        whole, cache = model(ids).data, KVCache(model)
        parts = [model(ids[:, :3], cache).data, model(ids[:, 3:], cache).data]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-6)


def test_recomputation_keeps_only_the_inputs_of_blocks() -> None:
    config = GPT2Config(n_layer=8, n_head=2, n_embd=64, vocab_size=11, n_positions=64)
    ids = np.random.default_rng(0).integers(0, 11, (2, 2, 64))
    peaks = []
    for again in (False, True):
        model = GPT2(config)
        if again:
            recompute_blocks(model)
        model.loss(*ids).backward()
        for p in model.parameters():
            p.grad[:] = 0  # they exist already, so they are not counted
        tracemalloc.start()
        loss = model.loss(*ids)
        held, _ = tracemalloc.get_traced_memory()
        loss.backward()
        peaks.append((held, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    rows = 2 * 64 * 64 * 4  # bytes of (B, T, C)
    (held, peak), (held_again, peak_again) = peaks
    assert held > 8 * 16 * rows and held_again < (8 + 4) * rows
    assert peak_again < peak / 3


def test_frozen_inputs_do_not_hide_the_parameters() -> None:
    """No gradient flows into x, but those of the parameters must be computed all the same."""
    weight, draws = Tensor([[2.0]], requires_grad=True), Draws(0)
    y = recompute(lambda x: x @ weight, Tensor([[3.0]]), [weight], draws)
    with no_grad():
        assert not recompute(lambda x: x @ weight, Tensor([[3.0]]), [weight], draws).requires_grad
    y.backward()
    assert weight.grad.item() == 3.0


def test_a_backward_outside_the_context_computes_again_as_the_forward_did() -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=11, n_positions=8)
    ids = np.random.default_rng(0).integers(0, 11, (2, 8))
    found = []
    for again in (False, True):
        model = GPT2(config)
        if again:
            recompute_blocks(model)
        with compute_in("bfloat16"):
            loss = model.loss(ids, ids)
        loss.backward()
        found.append(np.concatenate([p.grad.ravel() for p in model.parameters()]))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("level", ["fused", "numpy", "c"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_input_gets_the_same_gradient(dtype: str, level: str) -> None:
    """Behind astype() stands a float32, whose gradient must not lose digits on the way."""
    rng = np.random.default_rng(0)
    x_data, w_data = (rng.standard_normal((8, 8), np.float32) for _ in range(2))
    grads = []
    for again in (False, True):
        x, w = Tensor(x_data, requires_grad=True), Tensor(w_data, requires_grad=True, dtype=dtype)

        def function(h: Tensor, w: Tensor = w) -> Tensor:
            return h + layers.gelu(layers.linear(h, w)) * h

        with at_most(level):
            half = x.astype(dtype)
            y = recompute(function, half, [w], Draws(0)) if again else function(half)
            y.backward(np.ones(y.shape, np.float32))
        grads.append([x.grad, w.grad])
    for plain, recomputed in zip(*grads, strict=True):
        assert plain.any()
        np.testing.assert_array_equal(plain, recomputed)


def test_an_interrupted_backward_leaves_the_random_numbers_as_they_were() -> None:
    draws, interrupt = Draws(0), False

    def function(x: Tensor) -> Tensor:
        draws.next_key()
        if interrupt:
            raise KeyboardInterrupt
        return x * 2

    y = recompute(function, Tensor([1.0], requires_grad=True), [], draws)
    draws.next_key()
    latest, interrupt = draws.latest, True
    with pytest.raises(KeyboardInterrupt):
        y.backward()
    assert draws.latest == latest
