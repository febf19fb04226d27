"""The whole model on "gpu", without one: the host's code, with emulated kernels.

test_gpu_kernels.py tests each kernel alone, and this file tests them together: in a training step
and in decoding each gets arrays that it takes, and none is left out.
"""

from __future__ import annotations

import dataclasses

import cuda_emulator
import numpy as np
import pytest

from micrograd_gpt import Tensor, layers, optim
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.runs.plan import Plan
from micrograd_gpt.runs.recompute import recompute_blocks

fake_cupy = pytest.importorskip("fake_cupy")
pytestmark = [
    pytest.mark.usefixtures("emulated_gpu"),
    pytest.mark.skipif(cuda_emulator.COMPILER is None, reason=cuda_emulator.MISSING),
]

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=53, n_positions=40)
# For the losses: float32 sums in another order, or products of two-byte numbers
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}

# Launches that a training step makes in one kind alone; in half, cuBLASLt adds biases
ONLY_IN_FLOAT32 = ("gelu_forward", "add_bias")
ONLY_IN_HALF = ("narrow", "narrow_all", "add_and_normalise", "add_and_normalise_backward")


def batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 38))
    return ids[:, :-1], ids[:, 1:]


def train(model: GPT2, steps: int = 3) -> list[float]:
    optimizer, losses = optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = model.loss(*batch())
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_training(dtype: str, emulator: cuda_emulator.Emulator) -> None:
    model = GPT2(CONFIG, seed=1)
    move(model, "gpu")
    with compute_in(dtype):
        ours = train(model)
    with at_most("fused"):
        reference = train(GPT2(CONFIG, seed=1))
    assert ours[-1] < ours[0] - 0.1
    np.testing.assert_allclose(ours, reference, rtol=TOLERANCE[dtype])
    launched = {(kernel, options[1]) for _, kernel, options in emulator.launched}
    activation = f"-DACTIVATION={cuda_modules.ACTIVATIONS[dtype]}"
    assert {name for name, kept_in in launched if kept_in == activation} >= {
        *("gelu_backward", "cross_entropy_forward", "column_sums"),
        *("attention_forward", "attention_backward_queries", "attention_backward_keys"),
        *(ONLY_IN_FLOAT32 if dtype == "float32" else ONLY_IN_HALF),
    }
    assert {name for name, kept_in in launched if kept_in == "-DACTIVATION=Float"} >= {
        *("layer_norm_forward", "layer_norm_backward", "layer_norm_backward_weight"),
        *("embedding_backward", "sum_of_squares", "adamw_update", "clip_scale", "total"),
        *("sum_partials", "scale"),
    }


@pytest.mark.slow
def test_training_with_dropout(emulator: cuda_emulator.Emulator) -> None:
    """The backward drops what the forward dropped: the loss changes along the gradient as it says.

    The same holds for blocks that are computed again in the backward. In float32 and with this
    step, the error of the central difference is a few thousandths.
    """
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.2)
    gradients = []
    for recompute in (False, True):
        model = GPT2(dataclasses.replace(CONFIG, **dropout), seed=1)
        move(model, "gpu")
        if recompute:
            recompute_blocks(model)

        def loss(model: GPT2 = model) -> Tensor:
            model.draws.reseed(7)
            return model.loss(*batch())

        loss().backward()
        gradients.append([p.grad.get() for p in model.parameters()])
    names = {kernel for _, kernel, _ in emulator.launched}
    assert "dropout" in names
    for once, again in zip(*gradients, strict=True):
        np.testing.assert_array_equal(once, again)
    size, parameters = 1e-3, model.parameters()
    norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients[0]))
    found = []
    for sign in (size, -2 * size):  # up, and from there down
        for p, g in zip(parameters, gradients[0], strict=True):
            p.data += fake_cupy.asarray((sign * g / norm).astype(np.float32))
        found.append(loss().item())
    assert (found[0] - found[1]) / (2 * size) == pytest.approx(norm, rel=1e-2)


@pytest.mark.slow
def test_a_plan_is_timed_on_the_gpu(emulator: cuda_emulator.Emulator) -> None:
    config = dataclasses.replace(CONFIG, n_positions=8)
    assert "measured here" in Plan(config, 1, 8, device="gpu").report(max_steps=10)
    assert "adamw_update" in {kernel for _, kernel, _ in emulator.launched}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoding(dtype: str, emulator: cuda_emulator.Emulator) -> None:
    """Greedy; the model is trained for a moment, since at random two logits may be almost equal."""
    model = GPT2(CONFIG, seed=1)
    train(model, steps=30)
    prompt = batch()[0][:1, :5]
    reference = model.eval().generate(prompt, max_new_tokens=6, temperature=0)
    move(model, "gpu")
    hold_in(model, dtype)
    np.testing.assert_array_equal(
        model.generate(prompt, max_new_tokens=6, temperature=0), reference
    )
    names = {kernel for _, kernel, _ in emulator.launched}
    assert names >= {"matvec_row", "attention_token", "attention_forward", "likeliest"}


@pytest.mark.parametrize("kind", ["int64", "uint8"])
def test_ids_on_the_host_are_sorted_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the backward of an embedding need not wait for the GPU."""
    monkeypatch.setattr(fake_cupy, "argsort", None)
    table = np.random.default_rng(0).standard_normal((300, 12), np.float32)
    ids, found = np.array([[5, 0, 5, 69], [5, 1, 69, 5]], kind), []
    for device in ("cpu", "gpu"):
        weight = Tensor(Tensor(table).to(device).data, requires_grad=True)
        y = layers.embedding(ids, weight)
        (y * y).sum().backward()
        found.append((y, weight.grad))
    (y, grad), (ours, our_grad) = found
    np.testing.assert_array_equal(ours.data.get(), y.data)
    np.testing.assert_allclose(our_grad.get(), grad, rtol=1e-6)
