"""GPT-2: compared with numbers that Transformers computed, and with itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from learning import assert_learns
from safetensors.numpy import load_file

from micrograd_gpt import Tensor, functional, layers, no_grad, optim
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.generation.ten_lines import sample
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.nn import Dropout
from micrograd_gpt.runs.dropout import set_dropout

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 23, "n_positions": 12}
DROPOUT = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}


def random_ids(*shape: int, vocab_size: int = 23, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape)


def small_model(dtype: str = "float32", seed: int = 0, **dropout: float) -> GPT2:
    model = GPT2(GPT2Config(**SMALL, **dropout), seed=seed)
    hold_in(model, dtype)
    return model


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest element of the reference."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ------------------------------------------------------------------------------ Transformers' GPT-2


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return load_file(Path(__file__).parent / "data" / "gpt2_reference.safetensors")


@pytest.fixture(params=["definitions", "fused", "numpy", "c"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The model from `layers.py` alone, and with the stand-ins of each level."""
    with at_most(request.param):
        yield request.param


@pytest.fixture
def reference_model(reference: dict[str, np.ndarray]) -> GPT2:
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=67, n_positions=16)
    model = GPT2(config)
    for name, parameter in model.named_parameters():
        parameter.data[...] = reference[f"weight.{name}"]
    return model


def test_logits_equal_transformers(
    reference: dict[str, np.ndarray], reference_model: GPT2, level: str
) -> None:
    logits = reference_model(reference["inputs"][0])
    assert relative_error(logits.data, reference["logits"]) < 1e-5


def test_names_are_the_checkpoints(reference: dict[str, np.ndarray], reference_model: GPT2) -> None:
    theirs = {
        n.removeprefix("weight."): a.shape for n, a in reference.items() if "weight." in n[:7]
    }
    assert {n: p.shape for n, p in reference_model.named_parameters()} == theirs


def test_gradients_equal_transformers(
    reference: dict[str, np.ndarray], reference_model: GPT2, level: str
) -> None:
    loss = reference_model.loss(reference["inputs"][0], reference["targets"][0])
    assert loss.item() == pytest.approx(reference["losses"][0], rel=1e-5)
    loss.backward()
    for name, parameter in reference_model.named_parameters():
        assert relative_error(parameter.grad, reference[f"gradient.{name}"]) < 1e-4, name


def test_ten_adamw_steps_equal_pytorch(
    reference: dict[str, np.ndarray], reference_model: GPT2, level: str
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


SIZES = {  # n_layer, n_head, n_embd, as in the paper's table 2, and how many parameters
    "124M": (12, 12, 768, 124_439_808),
    "355M": (24, 16, 1024, 354_823_168),
    "774M": (36, 20, 1280, 774_030_080),
    "1558M": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size: str) -> None:
    n_layer, n_head, n_embd, count = SIZES[size]
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    # Memory that is never written to takes no room; this layout spares Linear a copy.
    model = GPT2(config, init=lambda shape, std: np.empty(shape[::-1], np.float32).T)
    assert sum(p.size for p in model.parameters()) == count


def test_the_default_is_the_small_gpt2() -> None:
    c = GPT2Config()
    assert (c.n_layer, c.n_head, c.n_embd) == SIZES["124M"][:3]
    assert (c.vocab_size, c.n_positions, c.layer_norm_epsilon) == (50257, 1024, 1e-5)


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


def test_it_learns() -> None:
    assert_learns(GPT2(GPT2Config(**SMALL)), random_ids(4, 13))


def test_float64_and_float32_agree() -> None:
    ids = random_ids(2, 12)
    single, double = small_model("float32")(ids).data, small_model("float64")(ids).data
    assert single.dtype == np.float32 and double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-6 * np.abs(double).max())


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model = small_model("float64")
    ids, targets = random_ids(2, 12), random_ids(2, 12, seed=1)
    logits = model(ids).data
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], -1).mean()
    assert model.loss(ids, targets).item() == pytest.approx(expected, rel=1e-12)
    last = model(ids, last_only=True)
    np.testing.assert_allclose(last.data, logits[:, -1:], rtol=1e-12)


# ----------------------------------------------------------------------------------- KV cache


@pytest.mark.parametrize("cuts", [[1], [5], [3, 4, 9], list(range(1, 12))])
def test_cached_logits_equal_uncached(cuts: list[int], level: str) -> None:
    model = small_model(seed=1).eval()
    for p in model.parameters():
        p.data *= 3  # attention that is far from uniform
    ids = random_ids(3, 12)
    with no_grad():
        whole = model(ids).data
        cache = KVCache(model, batch_size=3)
        parts = [model(part, cache).data for part in np.split(ids, cuts, axis=1)]
    assert relative_error(np.concatenate(parts, axis=1), whole) < 1e-5
    assert cache.length == 12


def test_rows_of_different_lengths_and_rows_that_are_copied(level: str) -> None:
    model, ids = small_model(seed=1).eval(), random_ids(3, 8)
    lengths = [2, 5, 3]
    with no_grad():
        whole = model(ids).data
        cache = KVCache(model, batch_size=3)
        for row, length in enumerate(lengths):
            model(ids[row : row + 1, :length], cache.rows(row, row + 1))
        with pytest.raises(ValueError, match="differ in length"):
            _ = cache.length
        new = np.stack([ids[row, n : n + 2] for row, n in enumerate(lengths)])
        logits = model(new, cache).data
        for row, n in enumerate(lengths):
            assert relative_error(logits[row], whole[row, n : n + 2]) < 1e-5
        cache.copy_rows([1, 1, 2])
        assert list(cache.lengths) == [7, 7, 5]
        again = model(np.stack([ids[1, 7:], ids[1, 7:], ids[2, 5:6]]), cache).data
        assert relative_error(again[0], whole[1, 7:]) < 1e-5
        cache.lengths[:] = 2  # set back: the rest is forgotten
        logits = model(ids[[1, 1, 2], 2:6], cache).data
        assert relative_error(logits, whole[[1, 1, 2], 2:6]) < 1e-5


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

    model.draws.reseed(5, 1)
    first = loss()
    second = loss()
    model.draws.reseed(5, 1)
    assert loss() == first != second
    model.eval()
    quiet = loss()
    assert quiet == loss() != first
    set_dropout(model.train(), 0)
    assert loss() == quiet
    model.transformer.h[0].extra = Dropout(0.3)  # as in an edited model: it keeps that
    set_dropout(model, 0.5)
    assert (model.transformer.h[0].extra.p, model.transformer.drop.p) == (0.3, 0.5)
    assert model.transformer.h[0].extra.draws is model.draws  # so that a run can go on
    config = GPT2Config(**SMALL)
    set_dropout(GPT2(config), 0.5)
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
    with pytest.raises(ValueError, match=r"targets of shape \(1, 3\) for rows of shape \(1, 4\)"):
        model.loss(random_ids(1, 4), random_ids(1, 3))
    with pytest.raises(ValueError, match="a KV cache of 2 rows for a batch of 1"), no_grad():
        model(random_ids(1, 4), KVCache(model, 2))
    with pytest.raises(ValueError, match="token ids must be integers, not float64"):
        model(random_ids(1, 4) * 1.0)
    for nothing, shape in (([], r"\(0,\)"), ([[]], r"\(1, 0\)"), (random_ids(0, 4), r"\(0, 4\)")):
        with pytest.raises(ValueError, match=rf"token ids of shape \(B, T\), not {shape}"):
            model(nothing)
    assert model(random_ids(1, 4).tolist()).shape == model(Tensor(random_ids(1, 4))).shape


def test_a_config_no_model_can_have() -> None:
    with pytest.raises(ValueError, match=r"n_embd \(16\) must be a multiple of n_head \(3\)"):
        GPT2Config(**SMALL | {"n_head": 3})


# ----------------------------------------------------------------- from layers.py alone, and fast


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("faster", ["fused", "numpy"])
def test_gradients_of_the_layers_alone_equal_the_fused_ones(faster: str, dropout: float) -> None:
    ids, targets = random_ids(2, 12), random_ids(2, 12, seed=1)
    targets[0, :4] = -100
    results = []
    for level in ("definitions", faster):
        model = small_model("float64", seed=1, **dict.fromkeys(DROPOUT, dropout))
        for p in model.parameters():
            p.data += 0.1 * np.random.default_rng(p.shape).standard_normal(p.shape)
        with at_most(level):
            loss = model.loss(ids, targets)
            loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (alone, composed), (fast, fused) = results
    assert fast == pytest.approx(alone, rel=1e-12)
    for name in composed:
        assert relative_error(fused[name], composed[name]) < 1e-12, name


def test_what_backs_the_definitions_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """At "definitions" a debugger steps through layers.py: nothing fused, no kernel."""
    for module_of in (functional, layers, optim):
        for definition in list(vars(module_of).values()):
            for level in getattr(definition, "stand_ins", ()):
                monkeypatch.setitem(definition.stand_ins, level, forbidden)
                definition.choices.cache_clear()
    try:
        model, ids = small_model(embd_pdrop=0.1, attn_pdrop=0.1), random_ids(2, 12)
        with pytest.raises(AssertionError):
            model(ids)
        with at_most("definitions"):
            model.loss(ids, ids).backward()
            optim.clip_grad_norm(model.parameters(), 1.0)
            optim.AdamW(model.parameters()).step()
    finally:
        monkeypatch.undo()
        for module_of in (functional, layers, optim):
            for definition in vars(module_of).values():
                if hasattr(definition, "choices"):
                    definition.choices.cache_clear()


def forbidden(*args: object, **kwargs: object) -> None:
    raise AssertionError("something stood in")


TWENTY_STEPS = """if True:
    import numpy as np
    from micrograd_gpt import optim
    from micrograd_gpt.gpt2 import GPT2, GPT2Config
    from micrograd_gpt.runs.dropout import set_dropout
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=41, n_positions=24)
    model = GPT2(config, seed=1)
    set_dropout(model, 0.1)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        ids = np.random.default_rng(step).integers(0, 41, (4, 25)) // 2
        model.draws.reseed(0, step)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optim.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(loss.item())
"""


def losses_with(kernels: str) -> list[float]:
    result = subprocess.run(
        [sys.executable, "-c", TWENTY_STEPS],
        env=os.environ | {"MICROGRAD_GPT_KERNELS": kernels},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [float(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_twenty_steps_in_the_definitions_give_the_losses_of_the_fast_run() -> None:
    fast = losses_with("")
    assert len(fast) == 20 and fast[-1] < fast[0] - 0.2
    for kernels in ("definitions", "numpy"):
        np.testing.assert_allclose(losses_with(kernels), fast, rtol=1e-4)


# ---------------------------------------------------------------------------- sampling in ten lines


def test_greedy_sampling_is_the_argmax_of_the_full_forward() -> None:
    model = small_model(seed=1).eval()
    for p in model.parameters():
        p.data *= 5
    prompt = random_ids(2, 3)
    expected = prompt
    for _ in range(15):  # past the context length: the oldest tokens fall out of view
        with no_grad():
            logits = model(expected[:, -12:]).data[:, -1]
        expected = np.concatenate([expected, logits.argmax(-1)[:, None]], axis=1)
    ids = sample(model, prompt, 15, temperature=0)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(sample(model, prompt.tolist(), 15, temperature=0), expected)
    assert len(set(ids[0])) > 3  # it is not one token again and again


def test_sampling_follows_the_softmax_and_its_seed() -> None:
    model, prompt = small_model(seed=1).eval(), np.zeros((4000, 1), int)
    for p in model.parameters():
        p.data *= 5
    ids = sample(model, prompt, 1, temperature=0.8, seed=3)
    np.testing.assert_array_equal(ids, sample(model, prompt, 1, temperature=0.8, seed=3))
    assert (ids != sample(model, prompt, 1, temperature=0.8, seed=4)).any()
    with no_grad():
        logits = model(prompt[:1]).data[0, -1].astype(np.float64) / 0.8
    p = np.exp(logits - logits.max())
    p /= p.sum()
    shares = np.bincount(ids[:, 1], minlength=23) / 4000
    assert (np.abs(shares - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-3).all()


def test_targets_are_no_cache() -> None:
    ids = np.zeros((1, 2), int)
    for targets in (ids, ids.tolist()):
        with pytest.raises(TypeError, match=r"model\.loss\(ids, targets\)"):
            small_model()(ids, targets)
    with pytest.raises(ValueError, match="GPT2 takes a GPT2Config, not a dict"):
        GPT2({"n_layer": 1})  # type: ignore[arg-type]
