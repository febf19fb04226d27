"""The variants of GPT-2, each alone and some together, in all that a model is used for."""

from __future__ import annotations

import math
import pickle
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_cupy
import numpy as np
import pytest
from gradcheck import check_gradients
from learning import assert_learns
from training import SMALL as SMALL_RUN
from training import assert_same, script

from micrograd_gpt import Tensor, layers, no_grad
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs.dropout import set_dropout
from micrograd_gpt.runs.plan import Plan
from micrograd_gpt.runs.recompute import recompute_blocks
from micrograd_gpt.tensor import concatenate
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.variants import ACTIVATIONS, VariantConfig, VariantGPT2, scaled_queries
from micrograd_gpt.weights.pretrained import from_pretrained

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 23, "n_positions": 12}
FOR_LEARNING = [
    {"norm_position": norm, "position_embedding": position}
    for norm in ("pre", "post")
    for position in ("learned", "sinusoidal")
]
RELATIVES: list[dict[str, Any]] = [
    {"activation_function": "gelu"},
    {"activation_function": "relu", "n_inner": 24},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "activation_function": "quick_gelu"},
    {"tie_word_embeddings": False},
    {
        "activation_function": "silu",
        "n_inner": 80,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
]


def name_of(choice: dict[str, Any]) -> str:
    return "-".join(str(v) if v not in (True, False) else k for k, v in choice.items())


EVERY = pytest.mark.parametrize("choice", [*FOR_LEARNING, *RELATIVES], ids=name_of)
EVERY_RELATIVE = pytest.mark.parametrize("choice", RELATIVES, ids=name_of)


def variant(choice: dict[str, Any], seed: int = 0) -> VariantGPT2:
    return VariantGPT2(VariantConfig(**SMALL, **choice), seed=seed)


def favouring(choice: dict[str, Any]) -> VariantGPT2:
    """A model whose attention is far from uniform, and with biases."""
    model = variant(choice, seed=1).eval()
    for i, p in enumerate(model.parameters()):
        p.data *= 3
        if p.ndim == 1:
            p.data += np.random.default_rng(i).standard_normal(p.shape).astype(np.float32) / 10
    return model


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 23, shape)


@EVERY
def test_every_architecture_learns(choice: dict[str, Any]) -> None:
    assert_learns(variant(choice), random_ids(4, 13))


@EVERY
@pytest.mark.parametrize("cuts", [[1], [5], [3, 4, 9], list(range(1, 12))])
def test_cached_logits_equal_uncached(choice: dict[str, Any], cuts: list[int]) -> None:
    model, ids = favouring(choice), random_ids(3, 12)
    with no_grad():
        whole, cache = model(ids).data, KVCache(model, batch_size=3)
        parts = [model(part, cache).data for part in np.split(ids, cuts, axis=1)]
    error = np.abs(np.concatenate(parts, axis=1) - whole).max() / np.abs(whole).max()
    assert error < 1e-5


@EVERY
def test_every_level_computes_the_same(choice: dict[str, Any]) -> None:
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
    with pytest.raises(ValueError, match="not a VariantConfig"):
        GPT2(config)


# ----------------------------------------------------------------------- the activation functions


EXACT = {
    "gelu_new": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
def test_an_activation_is_the_function_of_that_name(
    name: str, dtype: str, tolerance: float
) -> None:
    x = np.concatenate([np.linspace(-30, 30, 1201), [-1e-8, 0, 1e-8]]).astype(dtype)
    y = ACTIVATIONS[name](Tensor(x)).data
    assert y.dtype == dtype
    expected = np.array([EXACT[name](float(value)) for value in x])
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


def test_exact_gelu_keeps_the_digits_of_its_tail() -> None:
    """Where 1 + erf would cancel; to -5 in float32, and as far as there are numbers in float64."""
    for dtype, lowest, tolerance in (("float32", -5, 2e-6), ("float64", -37, 1e-12)):
        x = np.linspace(lowest, 0, 500)[:-1].astype(dtype)
        y = ACTIVATIONS["gelu"](Tensor(x)).data
        expected = [EXACT["gelu"](float(value)) for value in x]
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=0)


def test_exact_gelu_of_many_numbers_is_that_of_a_few_at_a_time() -> None:
    x = np.random.default_rng(0).standard_normal((3, 100_003)).astype(np.float32)
    many = Tensor(x, requires_grad=True)
    whole = ACTIVATIONS["gelu"](many)
    whole.backward(x)
    for columns in np.array_split(np.arange(100_003), 10):
        few = Tensor(x[:, columns], requires_grad=True)
        part = ACTIVATIONS["gelu"](few)
        part.backward(few.data)
        np.testing.assert_allclose(whole.data[:, columns], part.data, rtol=1e-6)
        np.testing.assert_allclose(many.grad[:, columns], few.grad, rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(), (7,), (3, 40)])
def test_the_gradient_of_an_activation(name: str, shape: tuple[int, ...]) -> None:
    x = 2 * np.random.default_rng(0).standard_normal(shape)
    check_gradients(ACTIVATIONS[name], np.where(np.abs(x) < 0.1, 0.5, x))  # relu has a kink


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_activation_is_computed_wide_and_kept_narrow(name: str, dtype: str) -> None:
    x = Tensor(np.linspace(-6, 6, 300, dtype=np.float32).astype(dtype), requires_grad=True)
    y = ACTIVATIONS[name](x)
    y.backward(np.ones(300))
    wide = Tensor(x.data.astype(np.float32), requires_grad=True)
    expected = ACTIVATIONS[name](wide)
    expected.backward(np.ones(300))
    assert y.dtype == x.grad.dtype == x.dtype
    np.testing.assert_array_equal(y.data, expected.data.astype(x.dtype))
    np.testing.assert_array_equal(x.grad, wide.grad.astype(x.dtype))


def test_an_edited_gelu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = variant({"n_inner": 24}), random_ids(2, 5)
    with_relu = variant({"n_inner": 24, "activation_function": "relu"})
    monkeypatch.setattr(layers, "gelu", Tensor.relu)
    np.testing.assert_array_equal(model(ids).data, with_relu(ids).data)


# ---------------------------------------------------- what differs, in words other than the code's


def test_scores_by_layer_are_those_of_smaller_queries() -> None:
    """GPT-2 with the queries' columns divided by the number of the layer, or freed from √D."""
    for choice, factors in (
        ({"scale_attn_by_inverse_layer_idx": True}, (1, 1 / 2)),
        ({"scale_attn_weights": False}, (math.sqrt(8), math.sqrt(8))),
    ):
        model, ids = favouring(choice), random_ids(2, 12)
        plain = GPT2(GPT2Config(**SMALL)).eval()
        for ours, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            ours.data[...] = theirs.data
        for block, factor in zip(plain.transformer.h, factors, strict=True):
            for parameter in block.attn.c_attn.parameters():
                parameter.data[..., :16] *= factor
        assert (
            np.abs(plain(ids).data - model(ids).data).max() < 1e-5 * np.abs(plain(ids).data).max()
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_queries_of_half_precision_are_rounded_once(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(dtype)
    scaled = scaled_queries(Tensor(x), 1 / 3).data
    assert scaled.dtype == dtype
    np.testing.assert_array_equal(scaled[:, :16], (x[:, :16].astype("float32") / 3).astype(dtype))
    np.testing.assert_array_equal(scaled[:, 16:], x[:, 16:])


def test_a_head_of_its_own_gives_the_logits_and_leaves_the_embedding_alone() -> None:
    model, ids = favouring({"tie_word_embeddings": False}), random_ids(2, 5)
    assert [name for name, _ in model.named_parameters()][-1] == "lm_head.weight"
    before, hidden = model(ids).data, model.hidden(ids).data
    np.testing.assert_allclose(before, hidden @ model.lm_head.weight.data.T, rtol=1e-4, atol=1e-5)
    model.lm_head.weight.data *= 2
    np.testing.assert_allclose(model(ids).data, 2 * before, rtol=1e-6)
    np.testing.assert_array_equal(model(ids, last_only=True).data, model(ids).data[:, -1:])


@pytest.mark.parametrize(
    "choice", [{"n_inner": 64}, {"activation_function": "gelu_pytorch_tanh"}], ids=name_of
)
def test_what_is_gpt2_under_another_name_is_gpt2(choice: dict[str, Any]) -> None:
    assert VariantConfig(**SMALL, **choice) == VariantConfig(**SMALL)


# ------------------------------------------------------------------- all that a model is used for


@EVERY_RELATIVE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_recomputed_blocks_give_the_same_gradients(choice: dict[str, Any], dtype: str) -> None:
    ids, grads = random_ids(2, 12), []
    for again in (False, True):
        model = variant(choice, seed=1)
        set_dropout(model, 0.2)
        if again:
            recompute_blocks(model)
        model.draws.reseed(5)
        with compute_in(dtype):
            model.loss(ids, ids).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        np.testing.assert_array_equal(recomputed, plain)


@EVERY_RELATIVE
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_relative_held_in_another_type(choice: dict[str, Any], dtype: str) -> None:
    """Rounding moves the logits a little; the cache is of that type, and changes nothing more."""
    model, ids = favouring(choice), random_ids(2, 12)
    with no_grad():
        exact = model(ids).data
        hold_in(model, dtype)
        whole, cache = model(ids).data.astype(np.float64), KVCache(model, batch_size=2)
        parts = [model(part, cache).data.astype(np.float64) for part in np.split(ids, [5, 6], 1)]
    assert cache.data.dtype == model.transformer.h[0].mlp.c_fc.weight.dtype == dtype
    step = {"float64": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert np.abs(whole - exact).max() < 10 * step * np.abs(exact).max()
    assert np.abs(np.concatenate(parts, 1) - whole).max() < 4 * step * np.abs(exact).max()


@EVERY
def test_guesses_and_beams_decide_as_the_model_without_a_cache(choice: dict[str, Any]) -> None:
    """Also past the context length."""
    model, prompt = favouring(choice), np.array([1, 2, 3, 4] * 2)
    for how in (
        {"temperature": 0, "speculate": "prompt-lookup"},
        {"seed": 4, "top_k": 5, "speculate": "prompt-lookup"},
        {"seed": 4, "num_samples": 3},
        {"num_beams": 3, "num_samples": 2},
    ):
        how = how | {"max_new_tokens": 20, "end_of_text": None}
        slow = model.generate(prompt, **{**how, "speculate": None, "use_cache": False})
        np.testing.assert_array_equal(model.generate(prompt, **how), slow)


@EVERY_RELATIVE
def test_a_relative_on_arrays_of_a_gpu(choice: dict[str, Any]) -> None:
    """On arrays that refuse what CuPy's refuse, at the level that no kernel belongs to."""
    ids, results = random_ids(2, 12), []
    for device in ("cpu", "gpu"):
        with fake_cupy.installed(), at_most("fused"):
            model = variant(choice, seed=1)
            move(model, device)
            loss = model.loss(ids, ids)
            loss.backward()
            results.append([loss.numpy(), *(Tensor(p.grad).numpy() for p in model.parameters())])
    for on_cpu, on_gpu in zip(*results, strict=True):
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-5, atol=1e-6)


@EVERY_RELATIVE
def test_a_relative_comes_back_from_its_folder(choice: dict[str, Any], tmp_path: Path) -> None:
    model = favouring(choice)
    model.save_pretrained(tmp_path)
    again = from_pretrained(GPT2, tmp_path)
    assert type(again) is VariantGPT2 and again.config == model.config
    for (name, ours), (other, theirs) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        np.testing.assert_array_equal(ours.data, theirs.data)


@EVERY_RELATIVE
def test_the_plan_counts_a_relative_s_parameters(choice: dict[str, Any]) -> None:
    model = variant(choice)
    plan = Plan(model.config, 2, 8)
    assert plan.n_parameters == plan.n_in_gpt2 == sum(p.size for p in model.parameters())
    assert "measured here on one and two blocks" in plan.report(max_steps=10)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("choice", [{}, *RELATIVES], ids=name_of)
def test_given_weights_are_trained_stopped_and_resumed(
    choice: dict[str, Any],
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With dropout; the run that was stopped equals the one that was not."""
    tokenizer = CharTokenizer.from_text(text.read_text())
    config = VariantConfig(**SMALL | {"vocab_size": tokenizer.vocab_size}, **choice)
    VariantGPT2(config).save_pretrained(tmp_path / "start", tokenizer)
    flags = ["--data", text, "--init-from", tmp_path / "start", *SMALL_RUN[8:], "--recompute"]
    flags += ["--dropout", 0.1, "--max-steps", 6, "--save-interval", 3, "--keep", 1]
    assert train_gpt2.main([*map(str, flags), "--plan", "--rate", "1"]) == 0
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train_gpt2.main([*map(str, flags), "--out", str(straight)]) == 0
    shutil.copytree(straight / "step-000003", stopped)  # as a run stopped there leaves it
    assert train_gpt2.main(["--resume", "--out", str(stopped)]) == 0
    assert_same(straight, stopped)
    capsys.readouterr()
    load_gpt2 = script("load_gpt2")
    assert load_gpt2.main(["--from", str(stopped), "--out", str(tmp_path / "converted")]) == 0
    table = capsys.readouterr().out
    count = sum(p.size for p in from_pretrained(GPT2, tmp_path / "converted").parameters())
    assert f" parameters {count:,} " in " ".join(table.split())


def test_a_variant_takes_a_config_of_variants_and_can_be_pickled() -> None:
    with pytest.raises(ValueError, match="VariantGPT2 takes a VariantConfig, not a GPT2Config"):
        VariantGPT2(GPT2Config(**SMALL))  # type: ignore[arg-type]
    ids = [[1, 2, 3]]
    for activation in ACTIVATIONS:
        model = VariantGPT2(VariantConfig(**SMALL, activation_function=activation, n_inner=24))
        again = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(again(ids).data, model(ids).data)
