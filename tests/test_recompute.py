"""Gradients from activations computed again: the same gradients, from less memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from micrograd_gpt import no_grad
from micrograd_gpt.arrays.backend import RandomStream
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.tensor import Tensor, recompute


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_recomputed_activations_give_the_same_gradients(norm_position: str) -> None:
    """Bit for bit, with dropout, over two micro-batches that accumulate."""
    config = GPT2Config(
        **{"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 11, "n_positions": 8},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.2),
        norm_position=norm_position,
    )
    ids = np.random.default_rng(0).integers(0, 11, (2, 2, 3, 8))
    grads, positions = [], []
    for again in (False, True):
        model = GPT2(config)
        model.transformer.recompute = again
        for step, batch in enumerate(ids):
            model.random.reseed(5, step)
            loss = model.loss(*batch)
            positions.append(model.random.position)
            loss.backward()
            positions.append(model.random.position)
        grads.append([p.grad for p in model.parameters()] + [np.asarray(loss.item())])
    for plain, recomputed in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, recomputed)
    assert positions[:4] == positions[4:] and positions[0] == positions[1] != positions[2]


def test_recomputation_keeps_only_the_inputs_of_blocks() -> None:
    config = GPT2Config(n_layer=8, n_head=2, n_embd=64, vocab_size=11, n_positions=64)
    ids = np.random.default_rng(0).integers(0, 11, (2, 2, 64))
    peaks = []
    for again in (False, True):
        model = GPT2(config)
        model.transformer.recompute = again
        model.loss(*ids).backward()
        for p in model.parameters():
            p.grad[:] = 0  # there already, so not counted
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
    """No gradient flows into x, and yet those of the parameters must be computed."""
    weight, random = Tensor([[2.0]], requires_grad=True), RandomStream(0)
    y = recompute(lambda x: x @ weight, Tensor([[3.0]]), [weight], random)
    with no_grad():
        assert not recompute(lambda x: x @ weight, Tensor([[3.0]]), [weight], random).requires_grad
    y.backward()
    assert weight.grad.item() == 3.0
