"""Half precision as the CPU emulates it: how numbers round, and where; and how it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt import Tensor, draw_graph, no_grad, optim
from micrograd_gpt import functional as F
from micrograd_gpt.arrays.precision import HALF, kept, product_in_float32, widened
from micrograd_gpt.gpt2 import GPT2, GPT2Config, KVCache
from micrograd_gpt.kernels import definitions_only
from micrograd_gpt.text.corpus import load_corpus
from micrograd_gpt.text.windows import Windows

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61, "n_positions": 16}
UNIT = {"bfloat16": 2**-8, "float16": 2**-11}  # the largest relative error of one rounding


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def is_kept(array: np.ndarray, half: str) -> bool:
    """True where every number is one of the half-precision type."""
    assert array.dtype == np.float32
    return np.array_equal(kept(array, half), array, equal_nan=True)


# ------------------------------------------------------------------------------- how numbers round


def test_float16_rounds_as_numpy_does_and_overflows_to_infinity() -> None:
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)  # all there are
    stays = kept(bits.astype(np.float32), "float16")
    np.testing.assert_array_equal(stays, bits.astype(np.float32))
    x = np.array([65519.9, 65520, -1e9, 2**-25, 2**-24 * 0.51, np.nan], np.float32)
    np.testing.assert_array_equal(
        kept(x, "float16"), np.array([65504, np.inf, -np.inf, 0, 2**-24, np.nan], np.float32)
    )


def test_bfloat16_keeps_what_it_holds() -> None:
    bits = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)  # all there are
    np.testing.assert_array_equal(kept(bits, "bfloat16"), bits)
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(
        kept(x, "bfloat16"), np.array([1, 1 + 2**-6, np.inf, -np.inf, np.nan], np.float32)
    )


@pytest.mark.parametrize("half", HALF)
def test_rounding_leaves_its_argument_and_takes_any_layout(half: str) -> None:
    x = numbers(6, 4)
    before = x.copy()
    for view in (x, x.T, x[::2, 1:], x[0, 0], np.asfortranarray(x)):
        rounded = kept(view, half)
        assert rounded.shape == view.shape and not np.shares_memory(rounded, x)
        np.testing.assert_array_equal(
            rounded, kept(np.array(view).ravel(), half).reshape(view.shape)
        )
        np.testing.assert_allclose(rounded, view, rtol=UNIT[half])
    np.testing.assert_array_equal(x, before)


def test_widened_is_the_array_itself_unless_it_is_half_precision() -> None:
    x = numbers(3)
    assert widened(x) is x and widened(x.astype("f8")).dtype == np.float64
    assert widened(x.astype("f2")).dtype == np.float32
    product = product_in_float32(np.full((1, 3), 0.1, "f2"), np.full((3, 1), 0.1, "f2"))
    assert product.dtype == np.float32 and not is_kept(product, "float16")


def test_numpy_s_own_float16_arrays_stay_what_they_are() -> None:
    x = Tensor(np.ones(3, np.float16))
    assert x.half is None and x.dtype == np.float16 and x.numpy() is x.data


def test_a_tensor_and_its_graph_tell_the_precision() -> None:
    x = Tensor([1.0], requires_grad=True, dtype="bfloat16")
    assert "bfloat16" in repr(x) and draw_graph(x * 2).count("bfloat16") == 2


# --------------------------------------------------------------------------- what is rounded, where

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, Tensor(numbers(12, 8)), Tensor(numbers(8))),
    "gelu": F.gelu,
    "causal_attention": lambda x: F.causal_attention(x, 2),
    "attention with dropout": lambda x: F.causal_attention(x, 2, 0.3, (1,)),
    "dropout": lambda x: F.dropout(x, 0.3, (1,)),
    "softmax": F.softmax,
    "mul": lambda x: x * 0.3 + x,
    "matmul": lambda x: x @ x.swapaxes(-1, -2),
    "sum": lambda x: x.sum(-1),
}


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_its_result_and_gradient_in_its_input_s_type(
    name: str, half: str
) -> None:
    exact, rounded = (Tensor(numbers(2, 5, 12), requires_grad=True, dtype=half) for _ in range(2))
    exact.half = None  # the same numbers, but nothing is rounded from here on
    results = [OPERATIONS[name](x) for x in (exact, rounded)]
    assert results[0].half is None and results[1].half == half
    assert is_kept(results[1].data, half) and not is_kept(results[0].data, half)
    cotangent = kept(numbers(*results[0].shape, seed=1), half)
    for result in results:
        result.backward(cotangent)
    assert is_kept(rounded.grad, half)
    for wide, narrow in ((results[0].data, results[1].data), (exact.grad, rounded.grad)):
        error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
        assert error < 2 * UNIT[half]  # rounded once or twice, and no more


@pytest.mark.parametrize("half", HALF)
def test_views_are_not_rounded_again(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = Tensor(numbers(4, 6), dtype=half)
    monkeypatch.setattr("micrograd_gpt.tensor.kept", None)
    for view in (x.T, x.reshape(6, 4), x[1:], x.swapaxes(0, 1), x.astype(half)):
        assert view.half == half


@pytest.mark.parametrize("half", HALF)
def test_with_a_float32_tensor_the_result_is_float32(half: str) -> None:
    x, y = Tensor(numbers(3), dtype=half, requires_grad=True), Tensor(numbers(3, seed=1))
    total = x + y
    assert total.half is None
    np.testing.assert_array_equal(total.data, x.data + y.data)
    assert x.astype("float32").half is None
    (total * y).sum().backward()
    assert is_kept(x.grad, half)  # a gradient has the type of what it is the gradient of


def test_two_precisions_do_not_mix_silently() -> None:
    x, weight = Tensor(numbers(2, 4)), Tensor(numbers(4, 3), dtype="bfloat16")
    with pytest.raises(ValueError, match="needs one float dtype, not float32, bfloat16"):
        F.linear(x, weight)
    with pytest.raises(ValueError, match="needs one float dtype, not bfloat16, float32, float32"):
        F.layer_norm(x.astype("bfloat16"), *(Tensor(np.zeros(4, "f4")) for _ in range(2)))


@pytest.mark.parametrize("half", HALF)
def test_gradients_of_parameters_are_not_rounded(half: str) -> None:
    weight, bias = (Tensor(numbers(*s), requires_grad=True) for s in ((12, 8), (8,)))
    x = Tensor(numbers(5, 12), dtype=half, requires_grad=True)
    F.linear(x, weight, bias).backward(cotangent := kept(numbers(5, 8, seed=1), half))
    np.testing.assert_allclose(weight.grad, x.data.T @ cotangent, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias.grad, cotangent.sum(axis=0), rtol=1e-5, atol=1e-6)
    assert not is_kept(weight.grad, half) and not is_kept(bias.grad, half)


def test_the_loss_of_many_tokens_does_not_underflow() -> None:
    """The mean's gradient in a logit is about 2.5e-7 here, where float16 has steps of 6e-8."""
    x = Tensor(numbers(1, 20_000, 2), dtype="float16", requires_grad=True)
    weight = Tensor(numbers(200, 2), requires_grad=True)
    targets = np.random.default_rng(0).integers(0, 200, (1, 20_000))
    loss = F.linear_cross_entropy(x, weight, targets)
    assert loss.half is None
    loss.backward()
    rounded = weight.grad
    weight.grad = None
    F.linear_cross_entropy(Tensor(x.data), weight, targets).backward()
    error = np.linalg.norm(rounded - weight.grad) / np.linalg.norm(weight.grad)
    assert error < 4 * UNIT["float16"]  # the logits' and the gradients' own rounding


# ---------------------------------------------------------------------------------------- the model


def gradients(model: GPT2, ids: np.ndarray) -> np.ndarray:
    model.loss(*ids).backward()
    return np.concatenate([p.grad.ravel() for p in model.parameters()])


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("half", HALF)
def test_a_model_trains_in_half_precision_beside_float32_parameters(
    half: str, norm_position: str
) -> None:
    config = GPT2Config(**SMALL, norm_position=norm_position)
    ids = np.random.default_rng(0).integers(0, 61, (2, 4, 16))
    exact = gradients(GPT2(config), ids)
    model = GPT2(config, compute=half)
    assert all(p.half is None and p.dtype == np.float32 for p in model.parameters())
    rounded = gradients(model, ids)
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 8 * UNIT[half]
    model = GPT2(config, compute=half)
    model.transformer.recompute = True
    np.testing.assert_array_equal(gradients(model, ids), rounded)  # recomputed bit for bit
    with definitions_only():
        plain = gradients(GPT2(config, compute=half), ids)
    assert np.linalg.norm(plain - rounded) / np.linalg.norm(exact) < 2 * UNIT[half]


def test_other_types_do_not_mix() -> None:
    with pytest.raises(ValueError, match="parameters of float32 cannot compute in float64"):
        GPT2(GPT2Config(**SMALL), compute="float64")


@pytest.mark.parametrize("half", HALF)
def test_the_residual_stream_stays_in_float32(half: str) -> None:
    model = GPT2(GPT2Config(**SMALL), compute=half)
    block = model.transformer.h[0]
    x = model.transformer.wte(np.arange(8)[None])
    assert x.half is None
    branch = block.mlp(block.ln_2(x))
    assert branch.half == block.ln_2(x).half == half and block(x).half is None
    post = GPT2(GPT2Config(**SMALL, norm_position="post"), compute=half).transformer.h[0]
    assert post.ln_2(x).half is None and post(x).half is None and post.mlp(x).half == half
    assert model(np.arange(8)[None]).half == half  # the logits


@pytest.mark.parametrize("half", HALF)
def test_weights_held_in_half_precision(half: str, tmp_path: Path) -> None:
    """Cast once when they are loaded: the same logits as casting them at each use, to the bit."""
    ids = np.random.default_rng(0).integers(0, 61, (2, 9))
    trained = GPT2(GPT2Config(**SMALL), compute=half)
    trained.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path, dtype=half)
    held = {name: p.half for name, p in model.named_parameters()}
    assert all((held[name] is None) == (".ln_" in name) for name in held)
    assert all(is_kept(p.data, half) for p in model.parameters() if p.half)
    embeddings = (trained.transformer.wte, trained.transformer.wpe)
    for table in embeddings:  # which training reads unrounded
        table.weight.data = kept(table.weight.data, half)
    with no_grad():
        np.testing.assert_array_equal(model(ids).data, trained.eval()(ids).data)
    with pytest.raises(ValueError, match=f'cannot be trained.*compute="{half}"'):
        optim.AdamW(model.parameters())
    again = tmp_path / "again"
    model.save_pretrained(again)
    with no_grad():
        restored = GPT2.from_pretrained(again, dtype=half)
        np.testing.assert_array_equal(restored(ids).data, model(ids).data)


@pytest.mark.parametrize("half", HALF)
def test_cached_decoding_gives_the_full_forward_s_logits(half: str) -> None:
    model = GPT2(GPT2Config(**SMALL), seed=1, dtype=half).eval()
    ids = np.random.default_rng(1).integers(0, 61, (2, 12))
    cache = KVCache(model, 2)
    with no_grad():
        full = model(ids).data
        for start, end in ((0, 5), (5, 6), (6, 12)):
            part = model(ids[:, start:end], cache).data
            assert is_kept(part, half)
            # The sums' order differs, so a number may round to its neighbour, and carry that on
            error = np.abs(part - full[:, start:end]).max() / np.abs(full).max()
            assert error <= 4 * UNIT[half]
    assert is_kept(cache.data[..., :12, :], half)


def final_loss(compute: str, steps: int = 200) -> float:
    """Mean loss over the last 20 steps of a small run on English, little of which is seen twice."""
    text = load_corpus("pydocs", "char")
    vocab_size = text.tokenizer.vocab_size
    config = GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=vocab_size, n_positions=32)
    model = GPT2(config, seed=2, compute=compute)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    windows, losses = Windows(text.train, 32), []
    for step in range(steps):
        loss = model.loss(*windows.batch(seed=3, step=step, batch_size=8))
        loss.backward()
        optim.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-20:]))


def test_200_steps_in_bfloat16_end_within_1_percent_of_float32() -> None:
    exact, rounded = final_loss("float32"), final_loss("bfloat16")
    frequencies = np.bincount(load_corpus("pydocs", "char").train)
    shares = frequencies[frequencies > 0] / frequencies.sum()
    assert exact < -(shares * np.log(shares)).sum() - 0.5  # it has learnt more than letters' shares
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.01)
