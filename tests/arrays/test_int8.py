"""Weights of int8: what they stand for, and that in every operation they stand for it."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import Tensor, layers, no_grad, optim
from micrograd_gpt.arrays import int8
from micrograd_gpt.arrays.int8 import Int8Matrix
from micrograd_gpt.arrays.precision import compute_dtype, hold_in
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.documents import load_documents
from micrograd_gpt.text.tokenizers import make_tokenizer
from micrograd_gpt.text.windows import Windows
from micrograd_gpt.variants import VariantConfig, VariantGPT2


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def model_of(dtype: str = "float32", **changes: int) -> GPT2:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 70, "vocab_size": 50, "n_positions": 30}
    model = GPT2(GPT2Config(**sizes | changes), seed=1).eval()
    if dtype == "int8":
        for name, parameter in model.named_parameters():
            int8.hold_in_int8(name, parameter)
    return model


@pytest.mark.parametrize(("k", "m"), [(64, 3), (1, 1), (1, 5), (5, 1), (65, 2), (700, 1100)])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_number_is_off_by_more_than_half_a_step_of_its_group(k: int, m: int, axis: int) -> None:
    w = numbers(k, m) if axis == 0 else numbers(m, k)
    q = int8.quantised(w, axis)
    assert q.dtype == np.int8 and q.shape == w.shape
    assert q.values.min() >= -127
    inner, wide = (w.T, q.astype("float32").T) if axis == 0 else (w, q.astype("float32"))
    for start in range(0, k, 64):
        part, ours = inner[:, start : start + 64], wide[:, start : start + 64]
        largest = np.abs(part).max(axis=1, keepdims=True)
        assert (np.abs(ours - part) <= largest / 253).all()  # and a rounding
        np.testing.assert_allclose(np.abs(ours).max(axis=1, keepdims=True), largest, rtol=1e-6)


def test_extreme_numbers() -> None:
    w = numbers(200, 4)
    w[70, 1], w[80, 2], w[199, 3] = np.inf, np.nan, -np.inf
    w[:, 0] = 0
    w[64:128, 0] = 1e-44  # a subnormal number, whose scale is not exact
    w[128:, 0] = 3e38
    quantised = int8.quantised(w, 0)
    assert not np.isinf(quantised.scales).any()  # 0 × infinity would warn at each use
    wide = quantised.astype("float32")
    assert (wide[:64, 0] == 0).all() and np.isfinite(wide[:, 0]).all()
    np.testing.assert_allclose(wide[128:, 0], 3e38, rtol=1e-6)
    damaged = np.isnan(wide)  # whole groups, and no others
    assert damaged[64:128, 1].all() and damaged[64:128, 2].all() and damaged[192:, 3].all()
    assert damaged.sum() == 64 + 64 + 8


def test_every_operation_sees_the_matrix_it_stands_for() -> None:
    w = int8.quantised(numbers(130, 7), 0)
    wide, table = w.astype("float32"), w.T
    x = numbers(3, 130)
    np.testing.assert_allclose(x @ w, x @ wide, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(w + 1, wide + 1)
    np.testing.assert_array_equal(np.abs(w), np.abs(wide))
    np.testing.assert_array_equal(w.sum(axis=0), wide.sum(axis=0))
    np.testing.assert_array_equal(np.concatenate([w, wide]), np.concatenate([wide, wide]))
    np.testing.assert_array_equal(w.T.astype("float32"), wide.T)
    np.testing.assert_array_equal(w.swapaxes(0, 1)[np.array([[2, 0]])], wide.T[[[2, 0]]])
    for index in (3, -1, slice(1, 5), (slice(None), 2), np.array([1, -1, 1]), wide.T > 0):
        np.testing.assert_array_equal(table[index], wide.T[index])
    np.testing.assert_array_equal(np.sum(a=w, axis=0), wide.sum(axis=0))
    assert repr(w) == repr(wide) and str(w) == str(wide)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, Int8Matrix.copy, lambda w: pickle.loads(pickle.dumps(w))],
    ids=["copy", "deepcopy", "its own copy", "pickle"],
)
def test_a_copy_stands_for_the_same_matrix(copied: Callable[[Int8Matrix], Int8Matrix]) -> None:
    w = int8.quantised(numbers(130, 7), 0)
    other = copied(w)
    assert not np.shares_memory(other.values, w.values)
    np.testing.assert_array_equal(other.values, w.values)
    np.testing.assert_array_equal(other.astype("float64"), w.astype("float64"))
    assert other.flags.f_contiguous and other.scales.flags.f_contiguous


WRITES: dict[str, Callable[[Int8Matrix], object]] = {
    "an element": lambda w: w.__setitem__(0, 1),
    "in place": lambda w: operator.imul(w, 2),
    "out": lambda w: np.add(1, 2, out=w),
    "add.at": lambda w: np.add.at(w, 0, 1),
    "copyto": lambda w: np.copyto(w, 0),
    "fill": lambda w: w.fill(0),
    "sort": lambda w: w.sort(),
    "scales": lambda w: setattr(w, "scales", w.scales * 2),
}


@pytest.mark.parametrize("how", WRITES)
def test_nothing_can_be_written_to_it(how: str) -> None:
    w = int8.quantised(numbers(130, 7), 0)
    before = w.astype("float32")
    message = "cannot be changed|read-only|no setter|can't set"
    with pytest.raises((TypeError, ValueError, AttributeError), match=message):
        WRITES[how](w)
    np.testing.assert_array_equal(w.astype("float32"), before)


def test_a_view_that_has_no_scales_says_so() -> None:
    with pytest.raises(TypeError, match="no scales"):
        int8.quantised(numbers(130, 7), 0).reshape(-1).astype("float32")


def test_layers_take_it_as_a_weight() -> None:
    w, table = int8.quantised(numbers(130, 7), 0), int8.quantised(numbers(11, 70), 1)
    wide, x, bias = w.astype("float32"), numbers(2, 3, 130), numbers(7)
    with no_grad():
        y = layers.linear(Tensor(x), Tensor(w), Tensor(bias)).data
        found = layers.embedding([[3, 10]], Tensor(table)).data
    np.testing.assert_allclose(y, x @ wide + bias, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found, table.astype("float32")[[[3, 10]]])


@pytest.mark.parametrize("kind", ["GPT-2", "a head of its own, another activation"])
def test_a_model_computes_what_its_weights_stand_for(kind: str) -> None:
    """The logits and the loss of one that holds those weights in float32, within rounding."""
    model, wide = model_of(), model_of()
    if kind != "GPT-2":
        config = vars(model.config) | {"tie_word_embeddings": False, "activation_function": "relu"}
        model, wide = (VariantGPT2(VariantConfig(**config), seed=1).eval() for _ in range(2))
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), wide.named_parameters(), strict=True
    ):
        int8.hold_in_int8(name, ours)
        theirs.data = ours.data.astype("float32")
    held = {name for name, p in model.named_parameters() if p.dtype == np.int8}
    assert "transformer.wte.weight" in held and "transformer.h.1.mlp.c_fc.weight" in held
    assert not any(part in name for name in held for part in ("wpe", "ln_", "bias"))
    ids = np.arange(2 * 20).reshape(2, 20) % 50
    with no_grad():
        logits = [m(ids).data for m in (model, wide)]
        losses = [m.loss(ids[:, :-1], ids[:, 1:]).item() for m in (model, wide)]
        cache = KVCache(model, 2)
        steps = [model(part, cache).data for part in np.split(ids, [17, 18], axis=1)]
    scale = np.abs(logits[1]).max()
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), logits[1], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert cache.data.dtype == logits[0].dtype == np.float32
    assert compute_dtype(model.transformer.wte.weight) == np.float32


@pytest.mark.slow
def test_a_trained_model_loses_less_than_half_a_percent() -> None:
    """Validation loss of a character model that has learned something, in each narrow type."""
    text = "\n\n".join(load_documents("pydocs"))[:300_000]
    tokenizer = make_tokenizer("char", text)
    ids = tokenizer.encode(text)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64}
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **shape))
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    training, held_out = Windows(ids[:-20_000], 64), Windows(ids[-20_000:], 64)
    for step in range(200):
        model.loss(*training.batch(0, step, 16)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def loss_of(model: GPT2) -> float:
        with no_grad():
            return model.loss(*held_out.batch(0, 0, 256)).item()

    exact, chance = loss_of(model), np.log(tokenizer.vocab_size)
    in_half, in_8_bits = copy.deepcopy(model), copy.deepcopy(model)
    hold_in(in_half, "bfloat16")
    for name, parameter in in_8_bits.named_parameters():
        int8.hold_in_int8(name, parameter)
    assert exact < 0.7 * chance
    assert loss_of(in_half) == pytest.approx(exact, rel=5e-3)
    assert loss_of(in_8_bits) == pytest.approx(exact, rel=5e-3)


def test_an_edited_product_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward pass, and in decoding, of which C otherwise computes a step in one call."""
    model, ids = model_of("int8"), np.arange(12).reshape(1, 12)
    with no_grad():
        before = model(ids).data
        monkeypatch.setattr(int8, "product", lambda x, weight: 2 * (x @ weight.astype("float32")))
        whole, cache = model(ids).data, KVCache(model)
        steps = [model(part, cache).data for part in np.split(ids, [9, 10], axis=1)]
    assert np.abs(whole - before).max() > 0.1 * np.abs(before).max()
    scale = np.abs(whole).max()
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0, atol=1e-5 * scale)


def edits() -> dict[str, Any]:
    """Other meanings of the parts of Int8Matrix."""
    operators, scales = Int8Matrix.__array_ufunc__, Int8Matrix.__dict__["scales"].fget

    def doubled(self: Int8Matrix, *args: Any, **kwargs: Any) -> Any:
        return 2 * operators(self, *args, **kwargs)

    return {
        "__array_ufunc__": doubled,
        "values": property(lambda self: self.view(np.ndarray) // 2),
        "scales": property(lambda self: 2 * scales(self)),
    }


@pytest.mark.parametrize("part", edits())
def test_an_edited_matrix_is_what_runs(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward pass, and in decoding, of which C otherwise computes a step in one call."""
    model, ids = model_of("int8"), np.arange(12).reshape(1, 12)

    def decoded() -> np.ndarray:
        cache = KVCache(model)
        parts = np.split(ids, [9, 10], axis=1)
        return np.concatenate([model(part, cache).data for part in parts], axis=1)

    with no_grad():
        before = decoded()
        monkeypatch.setattr(Int8Matrix, part, edits()[part])
        whole, steps = model(ids).data, decoded()
    scale = np.abs(whole).max()
    assert np.abs(whole - before).max() > 0.1 * scale
    np.testing.assert_allclose(steps, whole, rtol=0, atol=1e-5 * scale)


def test_it_is_not_for_training_nor_for_files(tmp_path: Path) -> None:
    model = model_of("int8")
    loss = model.loss([[1, 2]], [[2, 3]])
    with pytest.raises(RuntimeError, match="needs no gradient"):
        loss.backward()
    with pytest.raises(UserError, match="int8 cannot be saved"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        hold_in(model_of(), "int8")  # as integers without a scale


def test_a_folder_is_read_into_int8(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"unknown dtype 'int4': .*, float16, int8$"):
        GPT2.from_pretrained(tmp_path / "model", dtype="int4")
    model = GPT2.from_pretrained(tmp_path / "model", dtype="int8")
    for (name, ours), (_, expected) in zip(
        model.named_parameters(), model_of("int8").named_parameters(), strict=True
    ):
        assert ours.dtype == expected.dtype, name
        wide = (p.data.astype("float32") for p in (ours, expected))
        np.testing.assert_array_equal(*wide)
    with pytest.raises(UserError, match="int8 is for the CPU"):
        GPT2.from_pretrained(tmp_path / "model", dtype="int8", device="gpu")


def test_numpy_gets_the_numbers_of_a_tensor_and_not_its_integers() -> None:
    tensor = dict(model_of("int8").named_parameters())["transformer.h.0.mlp.c_fc.weight"]
    wanted = tensor.data.astype(np.float32)
    for got in (np.array(tensor), np.asarray(tensor), tensor.numpy(), np.asarray(tensor.numpy())):
        assert got.dtype == np.float32 and type(got) is np.ndarray
        assert (got == wanted).all()
    assert np.asarray(tensor, np.float64).dtype == np.float64
    assert tensor.numpy().max() < 1 < tensor.data.values.max()
