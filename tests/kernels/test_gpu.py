"""The whole model on a GPU, compared with the CPU: losses, gradients and generated tokens.

test_gpu_kernels.py, which runs on a GPU too, tests the kernels one by one.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import gpt2, no_grad, optim
from micrograd_gpt.arrays.devices import move, set_tf32, to_device
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation.context import next_logits
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.kernels.in_cuda import token_step
from micrograd_gpt.tensor import node_of, tape_below

pytestmark = pytest.mark.gpu

BY_THE_TAPE = gpt2.through_blocks.definition  # type: ignore[attr-defined]
CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=128, vocab_size=211, n_positions=80)
# For the losses: float32 sums in another order, or products of two-byte numbers
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    set_tf32(False, "gpu")


def batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 78))
    return ids[:, :-1], ids[:, 1:]


def make(device: str, config: GPT2Config = CONFIG) -> GPT2:
    model = GPT2(config, seed=1)
    move(model, device)
    return model


def train(device: str, dtype: str, config: GPT2Config = CONFIG, steps: int = 20) -> list[float]:
    model = make(device, config)
    optimizer, losses = optim.AdamW(model.parameters(), lr=1e-3), []
    with compute_in(dtype):
        for _ in range(steps):
            loss = model.loss(*batch())
            loss.backward()
            optim.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_training_gives_the_cpus_losses(dtype: str) -> None:
    ours, reference = train("gpu", dtype), train("cpu", "float32")
    assert ours[-1] < ours[0] - 0.5
    np.testing.assert_allclose(ours, reference, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_same_seed_gives_the_same_bits(dtype: str) -> None:
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
    config = dataclasses.replace(CONFIG, **dropout)
    assert train("gpu", dtype, config, 5) == train("gpu", dtype, config, 5)


@pytest.mark.parametrize("level", ["fused", "definitions"])
def test_gradients_are_those_of_the_definitions(level: str) -> None:
    """Those of functional.py on the GPU too, those of layers.py on the CPU."""

    def gradients(device: str) -> dict[str, Any]:
        model = make(device)
        model.loss(*batch()).backward()
        return {name: to_device(p.grad, "cpu") for name, p in model.named_parameters()}

    ours = gradients("gpu")
    with at_most(level):
        reference = gradients("gpu" if level == "fused" else "cpu")
    for name, gradient in reference.items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-4 * size, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("width", "n_head"), [(768, 12), (208, 13)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_whole_blocks_give_the_gradients_of_the_tape(
    p: float, width: int, n_head: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, of 77 tokens a row; the loss too."""
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), p)
    config = dataclasses.replace(CONFIG, n_embd=width, n_head=n_head, **dropout)
    losses, found = [], []
    for operation in ("block", "self_attention"):
        model = make("gpu", config)
        with compute_in(dtype):
            loss = model.loss(*batch())
        names = [node.name for node in tape_below(node_of(loss))]
        assert names.count(operation) == config.n_layer
        loss.backward()
        losses.append(loss.item())
        found.append({name: to_device(p.grad, "cpu") for name, p in model.named_parameters()})
        monkeypatch.setattr(gpt2, "through_blocks", BY_THE_TAPE)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, gradient in found[1].items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(found[0][name], gradient, atol=2e-2 * size, err_msg=name)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_greedy_tokens_are_the_cpus(rows: int) -> None:
    """The model is trained for a moment, since at random two logits may be almost equal."""
    found = []
    prompt = np.tile(batch()[0], (7, 1))[:rows, :9]
    for device in ("cpu", "gpu"):
        model = make(device)
        optimizer = optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(30):
            model.loss(*batch()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.eval().generate(prompt, max_new_tokens=40, temperature=0))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [*range(1, 38)]])
def test_the_token_step_is_captured_and_gives_the_same_logits(
    lengths: list[int], dtype: str
) -> None:
    """A capture that fails gives a warning, which is an error here."""
    model, found = make("gpu").eval(), []
    hold_in(model, dtype)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (20, len(lengths), 1))
    for function in (next_logits, next_logits.definition):
        cache = KVCache(model, len(lengths))
        with no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            for row, length in enumerate(lengths):
                model.hidden(batch()[0][:1, :length], cache.rows(row, row + 1))
            logits = [function(cache, model, step).get().astype(np.float32) for step in ids]
            found.append(np.stack(logits))
    (step,) = token_step._STEPS[model].steps.values()
    assert step.graph is not None
    size = np.abs(found[1]).max()
    np.testing.assert_allclose(*found, rtol=0, atol=TOLERANCE[dtype] * size)
