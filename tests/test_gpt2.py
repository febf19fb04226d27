"""GPT-2: against what Transformers computed, and against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt import no_grad, optim
from micrograd_gpt.gpt2 import GPT2, SIZES, GPT2Config, KVCache, size_name
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.tensor_files import TensorFile

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 23, "n_positions": 12}
DROPOUT = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}


def random_ids(*shape: int, vocab_size: int = 23, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest element of the reference."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ------------------------------------------------------------------------------ Transformers' GPT-2


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    file = TensorFile(Path(__file__).parent / "data" / "gpt2_reference.safetensors")
    return {name: file.read(name) for name in file.shapes}


@pytest.fixture
def reference_model(reference: dict[str, np.ndarray]) -> GPT2:
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=67, n_positions=16)
    model = GPT2(config, initialize=False)
    for name, parameter in model.named_parameters():
        parameter.data[...] = reference[f"weight.{name}"]
    return model


def test_logits_equal_transformers(reference: dict[str, np.ndarray], reference_model: GPT2) -> None:
    logits = reference_model(reference["inputs"][0])
    assert relative_error(logits.data, reference["logits"]) < 1e-5


def test_names_are_the_checkpoints(reference: dict[str, np.ndarray], reference_model: GPT2) -> None:
    theirs = {
        n.removeprefix("weight."): a.shape for n, a in reference.items() if "weight." in n[:7]
    }
    assert {n: p.shape for n, p in reference_model.named_parameters()} == theirs


def test_gradients_equal_transformers(
    reference: dict[str, np.ndarray], reference_model: GPT2
) -> None:
    loss = reference_model.loss(reference["inputs"][0], reference["targets"][0])
    assert loss.item() == pytest.approx(reference["losses"][0], rel=1e-5)
    loss.backward()
    for name, parameter in reference_model.named_parameters():
        assert relative_error(parameter.grad, reference[f"gradient.{name}"]) < 1e-4, name


def test_ten_adamw_steps_equal_pytorch(
    reference: dict[str, np.ndarray], reference_model: GPT2
) -> None:
    model = reference_model
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for inputs, targets in zip(reference["inputs"], reference["targets"], strict=True):
        loss = model.loss(inputs, targets)
        loss.backward()
        losses.append(loss.item())
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-4)


# -------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize(
    ("size", "count"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_parameter_counts(size: str, count: int) -> None:
    assert GPT2(GPT2Config(**SIZES[size]), initialize=False).n_parameters == count


def test_initialisation() -> None:
    config = GPT2Config(n_layer=8, n_head=4, n_embd=128, vocab_size=1000, n_positions=64)
    parameters = dict(GPT2(config, seed=3).named_parameters())
    for name, parameter in parameters.items():
        if parameter.ndim == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 1/sqrt(2 * 8) = 1/4
            expected = 0.01 if "wpe" in name else expected
            assert parameter.data.std() == pytest.approx(expected, rel=0.05), name
        else:
            assert (parameter.data == (1 if "ln_" in name and "weight" in name else 0)).all(), name
    again = dict(GPT2(config, seed=3).named_parameters())
    other = dict(GPT2(config, seed=4).named_parameters())
    name = "transformer.h.1.mlp.c_fc.weight"
    assert (again[name].data == parameters[name].data).all()
    assert (other[name].data != parameters[name].data).any()


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("position_embedding", ["learned", "sinusoidal"])
def test_every_architecture_learns(norm_position: str, position_embedding: str) -> None:
    config = GPT2Config(**SMALL, norm_position=norm_position, position_embedding=position_embedding)
    model = GPT2(config)
    ids = random_ids(4, 13)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(40):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(23), rel=0.05) and losses[-1] < 0.5 * losses[0]


def test_sinusoidal_positions_are_the_papers() -> None:
    model = GPT2(GPT2Config(**SMALL, position_embedding="sinusoidal"))
    waves = model.transformer.waves.data
    assert waves.shape == (12, 16)
    for position, channel in ((0, 0), (3, 0), (3, 1), (7, 6), (7, 7)):
        angle = position / 10000 ** ((channel - channel % 2) / 16)
        expected = np.cos(angle) if channel % 2 else np.sin(angle)
        assert waves[position, channel] == pytest.approx(expected, abs=1e-6)
    assert not any("wpe" in name for name, _ in model.named_parameters())


def test_float64_and_float32_agree() -> None:
    ids = random_ids(2, 12)
    half, double = (GPT2(GPT2Config(**SMALL), dtype=t)(ids).data for t in ("float32", "float64"))
    assert half.dtype == np.float32 and double.dtype == np.float64
    np.testing.assert_allclose(half, double, rtol=0, atol=1e-6 * np.abs(double).max())


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model = GPT2(GPT2Config(**SMALL), dtype="float64")
    ids, targets = random_ids(2, 12), random_ids(2, 12, seed=1)
    logits = model(ids).data
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], -1).mean()
    assert model.loss(ids, targets).item() == pytest.approx(expected, rel=1e-12)
    last = model(ids, last_only=True)
    np.testing.assert_allclose(last.data, logits[:, -1:], rtol=1e-12)


# ----------------------------------------------------------------------------------- KV cache


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("position_embedding", ["learned", "sinusoidal"])
@pytest.mark.parametrize("cuts", [[1], [5], [3, 4, 9], list(range(1, 12))])
def test_cached_logits_equal_uncached(
    norm_position: str, position_embedding: str, cuts: list[int]
) -> None:
    config = GPT2Config(**SMALL, norm_position=norm_position, position_embedding=position_embedding)
    model = GPT2(config, seed=1).eval()
    for p in model.parameters():
        p.data *= 3  # attention that is far from uniform
    ids = random_ids(3, 12)
    with no_grad():
        whole = model(ids).data
        cache = KVCache(model, batch_size=3)
        parts = [model(part, cache).data for part in np.split(ids, cuts, axis=1)]
    assert relative_error(np.concatenate(parts, axis=1), whole) < 1e-5


def test_cache_is_for_decoding_and_has_its_size() -> None:
    model = GPT2(GPT2Config(**SMALL))
    cache = KVCache(model, batch_size=3, capacity=5)
    assert cache.data.nbytes == 2 * 2 * 16 * 5 * 3 * 4
    with pytest.raises(RuntimeError, match="use it within no_grad"):
        model(random_ids(3, 4), cache)
    with no_grad(), pytest.raises(ValueError, match="holds 5 positions"):
        model(random_ids(3, 6), KVCache(model, batch_size=3, capacity=5))


# ------------------------------------------------------------------------------------ dropout


def test_dropout_acts_in_training_alone_and_follows_its_seed() -> None:
    model = GPT2(GPT2Config(**SMALL, **DROPOUT))
    ids = random_ids(2, 13)

    def loss() -> float:
        return model.loss(ids[:, :-1], ids[:, 1:]).item()

    model.random.reseed(5, 1)
    first = loss()
    second = loss()
    model.random.reseed(5, 1)
    assert loss() == first != second
    model.eval()
    quiet = loss()
    assert quiet == loss() != first
    model.train().set_dropout(0)
    assert loss() == quiet
    config = GPT2Config(**SMALL)
    GPT2(config).set_dropout(0.5)
    assert config.attn_pdrop == 0


@pytest.mark.parametrize("which", DROPOUT)
def test_each_dropout_is_where_its_name_says(which: str) -> None:
    ids = random_ids(2, 12)
    with_it = GPT2(GPT2Config(**SMALL, **{which: 0.5}))
    without = GPT2(GPT2Config(**SMALL))
    assert (with_it(ids).data != without(ids).data).any()
    np.testing.assert_array_equal(with_it.eval()(ids).data, without(ids).data)


# ------------------------------------------------------------------------------------- mistakes


def test_wrong_ids_are_named() -> None:
    model = GPT2(GPT2Config(**SMALL))
    with pytest.raises(ValueError, match=r"shape \(B, T\), not \(3,\)"):
        model(random_ids(3))
    with pytest.raises(ValueError, match="13 tokens do not fit n_positions = 12"):
        model(random_ids(1, 13))
    with pytest.raises(ValueError, match="token id 23 is outside the vocabulary of 23"):
        model(np.array([[23]]))
    with pytest.raises(ValueError, match=r"targets \(1, 3\) for rows of shape \(1, 4\)"):
        model.loss(random_ids(1, 4), random_ids(1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1"),
        ({"n_head": 3}, r"n_embd \(16\) must be a multiple of n_head \(3\)"),
        ({"attn_pdrop": 1.0}, "attn_pdrop must be a probability"),
        ({"norm_position": "middle"}, "norm_position must be one of"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 17}, "n_inner is 17"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_configs_no_model_can_have(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        GPT2Config.from_dict({**SMALL, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_inner", [{}, {"n_inner": None}, {"n_inner": 64}])
@pytest.mark.parametrize("n_embd", [None, {}, [], [16], "16", True, 16.0])
def test_a_width_that_is_no_whole_number(n_embd: object, n_inner: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"n_embd must be a whole number|n_inner is") as caught:
        GPT2Config.from_dict({**SMALL, **n_inner, "n_embd": n_embd})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n_layer", "n_head", "vocab_size", "n_positions"])
@pytest.mark.parametrize("value", [None, {}, [], "2", True, 2.0])
def test_other_sizes_that_are_no_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name} must be a whole number of at least 1, not "):
        GPT2Config.from_dict({**SMALL, name: value})


@pytest.mark.parametrize(
    "value",
    [None, {}, [], "1e-5", True, 0, 0.0, -1e-5, float("nan"), float("inf"), 10**400],
    ids=lambda value: repr(value)[:9],
)
def test_a_layer_norm_epsilon_that_is_no_positive_number(value: object) -> None:
    message = "layer_norm_epsilon must be a finite number above 0, not "
    with pytest.raises(UserError, match=message) as caught:
        GPT2Config.from_dict({**SMALL, "layer_norm_epsilon": value})
    assert "\n" not in str(caught.value)
    assert GPT2Config.from_dict({**SMALL, "layer_norm_epsilon": 1}).layer_norm_epsilon == 1


def test_config_round_trip() -> None:
    for extra in ({}, {"norm_position": "post"}, {"position_embedding": "sinusoidal"}, DROPOUT):
        config = GPT2Config(**SMALL, **extra)
        assert GPT2Config.from_dict(config.to_dict()) == config
        # A variant must not pass for a GPT-2: Transformers would compute something else.
        assert (config.to_dict()["model_type"] == "gpt2") == config.is_gpt2
    with pytest.raises(UserError, match=r"config\.json lacks n_embd, n_head"):
        GPT2Config.from_dict({"n_layer": 2, "vocab_size": 3, "n_positions": 4})
    assert size_name("345M") == "355M" and size_name("124M") == "124M"
    with pytest.raises(UserError, match="unknown GPT-2 size '125M'"):
        size_name("125M")
