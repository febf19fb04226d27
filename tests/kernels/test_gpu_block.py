"""Training through whole blocks on "gpu", with emulated kernels: the same as by the tape."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import cuda_emulator
import numpy as np
import pytest

from micrograd_gpt import Tensor, gpt2, layers, no_grad, optim
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.kernels.in_cuda import cublas_lt
from micrograd_gpt.runs.recompute import recompute_blocks
from micrograd_gpt.tensor import node_of, tape_below
from micrograd_gpt.variants import VariantConfig, VariantGPT2

fake_cupy = pytest.importorskip("fake_cupy")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("emulated_gpu"),
    pytest.mark.skipif(cuda_emulator.COMPILER is None, reason=cuda_emulator.MISSING),
]

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=53, n_positions=40)
BY_THE_TAPE = gpt2.through_blocks.definition  # type: ignore[attr-defined]
DROPOUT = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.2)
# The products are rounded alike; sums of float32 in another order may round a few the other way
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}


def make(config: GPT2Config = CONFIG) -> GPT2:
    """A model whose biases and LayerNorms are not what they are at first, on the GPU."""
    model = (VariantGPT2 if type(config) is VariantConfig else GPT2)(config, seed=1)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        noise = rng.standard_normal(parameter.shape, np.float32)
        parameter.data = parameter.data * 3 if parameter.ndim > 1 else parameter.data + 0.2 * noise
    move(model, "gpu")
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 20))
    return ids[:, :-1], ids[:, 1:]


def operations(result: Tensor) -> list[str]:
    return [node.name for node in tape_below(node_of(result))]


def gradients(model: GPT2, result: Tensor) -> dict[str, np.ndarray]:
    for parameter in model.parameters():
        parameter.grad = None
    result.backward()
    return {name: p.grad.get().astype(np.float32) for name, p in model.named_parameters()}


def assert_alike(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, atol=tolerance * size, err_msg=name)


def by_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no kernel computes whole blocks."""
    monkeypatch.setattr(gpt2, "through_blocks", BY_THE_TAPE)


@pytest.mark.parametrize(
    ("dtype", "held", "changes"),
    [
        ("bfloat16", False, {}),
        ("float16", False, {"n_embd": 96, **DROPOUT}),
        ("bfloat16", True, DROPOUT),
    ],
)
def test_the_gradients_are_the_tapes(
    dtype: str, held: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights float32 that are rounded on their way in, or held in half precision."""
    model = make(dataclasses.replace(CONFIG, **changes))
    if held:
        hold_in(model, dtype)
    found = []
    for name in ("block", "self_attention"):
        model.draws.reseed(3)
        with compute_in(dtype):
            loss = model.loss(*batch())
        assert operations(loss).count(name) == CONFIG.n_layer
        found.append((loss.item(), model.draws.latest, gradients(model, loss)))
        by_the_tape(monkeypatch)
    (loss, draws, ours), (reference, expected_draws, theirs) = found
    assert loss == pytest.approx(reference, rel=1e-3) and draws == expected_draws
    assert_alike(ours, theirs, TOLERANCE[dtype])


def test_without_cublaslt_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not found, biases and GELU are launches of their own."""
    model, found = make(), []
    for _ in range(2):
        with compute_in("bfloat16"):
            loss = model.loss(*batch())
        assert "block" in operations(loss)
        found.append((loss.item(), gradients(model, loss)))
        monkeypatch.setattr(cublas_lt, "product", lambda *_: False)
    (loss, ours), (reference, theirs) = found
    assert loss == pytest.approx(reference, rel=1e-3)
    assert_alike(ours, theirs, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("part", [".attn.c_", ".mlp.c_"])
def test_the_loss_falls_along_the_gradient_as_it_says(part: str) -> None:
    """By central differences, with dropout, over a way so long that rounding vanishes in it."""
    model = make(dataclasses.replace(CONFIG, **DROPOUT))

    def loss() -> Tensor:
        model.draws.reseed(7)
        with compute_in("float16"):
            return model.loss(*batch())

    found = {name: g for name, g in gradients(model, loss()).items() if part in name}
    norm, size = np.sqrt(sum((g.astype(float) ** 2).sum() for g in found.values())), 0.05
    ends = []
    for way in (size, -2 * size):  # up, and from there down
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.data += fake_cupy.asarray((way * found[name] / norm).astype(np.float32))
        ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(norm, rel=3e-2)


def test_any_gradient_of_the_stream_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is the same everywhere, and has no memory of its own; and one that is a sum."""
    model, found = make(), []
    ends = [lambda y: y.sum(), lambda y: (y * y).sum() + (y * 0.5).sum()]
    for _ in range(2):
        for end in ends:
            x = Tensor(fake_cupy.asarray(np.ones((2, 5, 32), np.float32)), requires_grad=True)
            with compute_in("float16"):
                end(gpt2.through_blocks(x, model.transformer.h)).backward()
            found.append(x.grad.get())
        by_the_tape(monkeypatch)
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())


def test_two_forwards_may_come_before_their_backwards() -> None:
    """Each backward has the weights of its forward, though the parameters changed in between."""
    model, found = make(), []
    with compute_in("bfloat16"):
        for together in (True, False):
            change = fake_cupy.asarray(np.float32(0.5))
            first = model.loss(*batch())
            if not together:
                found.append(gradients(model, first))
            matrix = model.transformer.h[1].mlp.c_fc.weight
            matrix.data *= change
            second = model.loss(*batch())
            if together:
                found += [gradients(model, first)]
            found.append(gradients(model, second))
            matrix.data /= change
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        for name, gradient in theirs.items():
            np.testing.assert_array_equal(ours[name], gradient, err_msg=name)


@pytest.mark.parametrize("held", [False, True])
def test_what_the_backward_reads_must_not_change_before(held: bool) -> None:
    """A LayerNorm's weight is used as it is; a matrix where it is held in half precision."""
    model = make()
    if held:
        hold_in(model, "bfloat16")
    block = model.transformer.h[1]
    for weight in (block.ln_2.weight, block.attn.c_proj.weight):
        with compute_in("bfloat16"):
            loss = model.loss(*batch())
        weight.data += weight.data
        if weight is block.ln_2.weight or held:
            with pytest.raises(RuntimeError, match="'block' was changed in place"):
                loss.backward()
        else:
            loss.backward()


def test_without_a_tape_the_result_is_the_same() -> None:
    model = make(dataclasses.replace(CONFIG, **DROPOUT))
    ids, targets = batch()
    with compute_in("bfloat16"):
        model.draws.reseed(1)
        loss = model.loss(ids, targets).item()
        model.draws.reseed(1)
        with no_grad():
            assert model.loss(ids, targets).item() == loss
        model.eval()
        assert model.loss(ids, targets).item() != loss


def frozen(model: GPT2) -> None:
    model.transformer.h[0].attn.c_attn.bias.requires_grad = False


def with_another_part(model: GPT2) -> None:
    class Doubled(gpt2.Linear):
        def __call__(self, x: Any) -> Tensor:
            return super().__call__(x) * 2.0

    model.transformer.h[1].mlp.c_fc.__class__ = Doubled


def with_a_new_array(model: GPT2) -> None:
    weight = model.transformer.h[0].ln_1.weight
    weight.data = weight.data.astype(np.float16)


@pytest.mark.parametrize("change", [frozen, with_another_part, with_a_new_array, recompute_blocks])
def test_other_blocks_are_left_to_the_tape(change: Any) -> None:
    """Also those that become others after they have been taken."""
    model = make()
    with compute_in("bfloat16"):
        assert "block" in operations(model.loss(*batch()))
        change(model)
        loss = model.loss(*batch())
    assert "block" not in operations(loss)
    loss.backward()


def test_other_work_is_left_to_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, relatives of GPT-2, and layers that somebody has edited."""
    model = make()
    assert "block" not in operations(model.loss(*batch()))
    relative = make(VariantConfig(**vars(CONFIG), activation_function="relu"))
    with compute_in("bfloat16"):
        assert "block" not in operations(relative.loss(*batch()))
        monkeypatch.setattr(layers, "gelu", lambda x: x.tanh())
        loss = model.loss(*batch())
        assert "tanh" in operations(loss) and "block" not in operations(loss)


def test_a_model_that_nobody_uses_is_freed() -> None:
    model = make()
    with compute_in("bfloat16"):
        model.loss(*batch()).backward()
    gone = weakref.ref(model.transformer.h[0])
    del model
    gc.collect()
    assert gone() is None


def test_many_steps_learn_as_the_tape_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        model = make()
        optimizer, losses = optim.AdamW(model.parameters(), lr=1e-2), []
        for _ in range(3):
            with compute_in("bfloat16"):
                for _ in range(2):  # micro-batches, whose gradients add up
                    loss = model.loss(*batch())
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
        by_the_tape(monkeypatch)
    assert found[0][-1] < found[0][0] - 0.1
    np.testing.assert_allclose(*found, rtol=1e-2)
