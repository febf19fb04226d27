"""LoRA: what is computed, what is trained, and the files, without anybody else's code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from small_gpt2 import make_model
from tiny_weights import CONFIG, TINY, hf_folder

from micrograd_gpt import Tensor, no_grad
from micrograd_gpt.arrays.int8 import hold_in_int8
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.nn import Draws, Dropout, LayerNorm, Linear
from micrograd_gpt.optim import AdamW
from micrograd_gpt.runs.recompute import recompute_blocks
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import written_as_set
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.tuning.lora import (
    LAYERS,
    add_lora,
    load_adapter,
    lora_layers,
    trained_parameters,
)
from micrograd_gpt.weights.adapters import (
    open_adapter,
    open_language_adapter,
    with_adapter,
)
from micrograd_gpt.weights.language_model import load_language_model
from micrograd_gpt.weights.names import config_named, open_model, tokenizer_folder
from micrograd_gpt.weights.saving import save_pretrained, write_model

IDS = np.random.default_rng(0).integers(0, 11, (2, 9))
NAME = "base_model.model.transformer.h.0.attn.c_attn"


def with_lora(layer_names: Any = LAYERS, seed: int = 4, **settings: Any) -> GPT2:
    """A small model with additions, both matrices of each random."""
    model = make_model()
    add_lora(model, **{"rank": 3, "alpha": 6.0, "layer_names": layer_names, **settings})
    rng = np.random.default_rng(seed)
    for parameter in trained_parameters(model):
        parameter.data = rng.normal(0, 0.1, parameter.shape).astype(np.float32)
    return model


def logits(model: GPT2) -> np.ndarray:
    with no_grad():
        return model(IDS).data


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def test_a_layer_with_an_addition_computes_what_the_paper_says() -> None:
    model = with_lora(["attn.c_attn"])
    layer = model.transformer.h[1].attn.c_attn
    x = np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)
    w, b = layer.weight.data, layer.bias.data
    delta = 6.0 / 3 * layer.lora_A.data @ layer.lora_B.data
    assert layer.lora_A.shape == (16, 3) and layer.lora_B.shape == (3, 48)
    np.testing.assert_allclose(layer(Tensor(x)).data, x @ (w + delta) + b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["definitions", "numpy", "c"])
def test_training_begins_at_the_model_as_it_was(level: str) -> None:
    model = make_model()
    with at_most(level):
        before = logits(model)
        add_lora(model, rank=2, layer_names=LAYERS)
        np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize(
    "variant", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}]
)
def test_a_variant_s_queries_stay_scaled(variant: dict[str, Any], tmp_path: Path) -> None:
    """Before training nothing has changed, and what is trained is what is folded in later."""
    model = make_model(factor=2, **variant)
    model.save_pretrained(tmp_path / "base")
    before = logits(model)
    add_lora(model, rank=3, layer_names=LAYERS, base=str(tmp_path / "base"))
    np.testing.assert_array_equal(logits(model), before)
    for i, parameter in enumerate(trained_parameters(model)):
        parameter.data = np.random.default_rng(i).normal(0, 0.1, parameter.shape).astype("f4")
    model.save_pretrained(tmp_path / "adapter")
    assert error(logits(model), before) > 0.01
    assert error(logits(GPT2.from_pretrained(tmp_path / "adapter")), logits(model)) < 1e-5


class WithoutBias(Linear):
    def __init__(self, base: Linear) -> None:
        self.weight, self.norm = base.weight, LayerNorm(base.weight.shape[1])
        self.dropout = Dropout(0.5, Draws(0))

    def __call__(self, x: Any) -> Tensor:
        return self.norm(self.dropout(x @ self.weight).tanh())


def test_a_layer_of_one_s_own_computes_as_before() -> None:
    model = make_model()
    for block in model.transformer.h:
        block.attn.c_attn = WithoutBias(block.attn.c_attn)
    before, parameters = model.eval()([[1, 2, 3]]).numpy(), set(model.parameters())
    add_lora(model.train(), rank=2)
    np.testing.assert_array_equal(model.eval()([[1, 2, 3]]).numpy(), before)
    assert parameters < set(model.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize(
    ("layer_names", "expected"),
    [
        (("c_attn",), {"attn.c_attn"}),
        (("c_proj",), {"attn.c_proj", "mlp.c_proj"}),
        (("mlp.c_proj", "c_fc"), {"mlp.c_proj", "mlp.c_fc"}),
        (LAYERS, set(LAYERS)),
    ],
)
def test_layers_are_chosen_by_name(layer_names: tuple[str, ...], expected: set[str]) -> None:
    names = set(lora_layers(with_lora(layer_names)))
    assert names == {f"transformer.h.{i}.{name}" for i in range(2) for name in expected}


def test_only_the_additions_are_trained() -> None:
    model = with_lora(["c_attn", "mlp.c_fc"])
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    optimizer = AdamW(trained_parameters(model), lr=0.1)
    assert [m.shape for m in optimizer.m] == [(16, 3), (3, 48), (16, 3), (3, 64)] * 2
    losses = []
    for _ in range(3):
        loss = model.loss(IDS[:, :-1], IDS[:, 1:])
        loss.backward()
        losses.append(loss.item())
        assert all((p.grad is None) != ("lora_" in name) for name, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not np.array_equal(p.data, before[n])}
    assert changed == {name for name in before if "lora_" in name}


def test_blocks_that_are_computed_again_give_the_same_gradients() -> None:
    grads = []
    for again in (False, True):
        model = with_lora()
        if again:
            recompute_blocks(model)
        model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        grads.append([parameter.grad for parameter in trained_parameters(model)])
    for plain, recomputed in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, recomputed)


def test_dropout_is_before_the_addition_alone_and_only_while_training() -> None:
    model = with_lora(["c_attn"], dropout=0.5)
    plain = with_lora(["c_attn"])
    np.testing.assert_array_equal(logits(model.eval()), logits(plain))
    assert error(logits(model.train()), logits(plain)) > 1e-3
    for layer in lora_layers(model).values():
        layer.lora_B.data = 0 * layer.lora_B.data
    np.testing.assert_array_equal(logits(model), logits(make_model()))


def test_decoding_with_additions_is_what_the_forward_says() -> None:
    """The kernels that decode whole blocks know nothing of additions: they must not take these."""
    model = with_lora().eval()
    cache, steps = KVCache(model, 2), []
    with no_grad():
        for i in range(IDS.shape[1]):
            steps.append(model(IDS[:, i : i + 1], cache).data)
    assert error(np.concatenate(steps, 1), logits(model)) < 1e-5


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_pretrained(make_model(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    with_lora(base=str(base)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_saved_and_loaded_it_is_the_same(adapter: Path, base: Path) -> None:
    model = GPT2.from_pretrained(base)
    load_adapter(model, adapter)
    np.testing.assert_array_equal(logits(model), logits(with_lora()))
    assert len(trained_parameters(model)) == 2 * 2 * 4
    layer = next(iter(lora_layers(model).values()))
    assert (layer.rank, layer.alpha) == (3, 6.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_adapter_s_folder_is_its_base_with_the_additions_folded_in(
    adapter: Path, dtype: str
) -> None:
    model = GPT2.from_pretrained(adapter, dtype=dtype)
    assert not lora_layers(model)
    assert error(logits(model), logits(with_lora())) < 1e-5
    assert error(logits(make_model()), logits(with_lora())) > 1e-2


def test_the_files_are_peft_s(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6.0}
    expected |= {"fan_in_fan_out": True, "bias": "none", "lora_dropout": 0.0}
    expected |= {"base_model_name_or_path": str(base), "target_modules": sorted(LAYERS)}
    assert expected.items() <= config.items()
    arrays = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    assert len(arrays) == 2 * 4 * 2
    layer = with_lora().transformer.h[0].attn.c_attn
    np.testing.assert_array_equal(arrays[f"{NAME}.lora_A.weight"], layer.lora_A.data.T)  # (r, in)
    np.testing.assert_array_equal(arrays[f"{NAME}.lora_B.weight"], layer.lora_B.data.T)  # (out, r)


def test_the_scale_may_be_by_the_root_of_the_rank(adapter: Path, base: Path) -> None:
    """Kalajdzievski 2023 (arXiv:2312.03732), as PEFT's use_rslora."""
    rewrite(adapter, use_rslora=True)
    load_adapter(model := GPT2.from_pretrained(base), adapter)
    expected = with_lora(alpha=6.0 * 3**0.5)
    np.testing.assert_allclose(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


def test_a_base_on_the_hub_keeps_its_revision(base: Path, tmp_path: Path) -> None:
    """It has a setting of its own, as in PEFT, which would look for OWNER/NAME@REVISION."""
    with_lora(base="some/body@v2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/body", "v2")
    assert open_adapter(tmp_path).base == "some/body@v2"
    rewrite(tmp_path, revision="main")
    assert open_adapter(tmp_path).base == "some/body"
    rewrite(tmp_path, revision="v2", base_model_name_or_path=str(base))
    assert open_adapter(tmp_path).base == str(base)


def test_a_set_that_was_decided_on_is_completed(adapter: Path, tmp_path: Path) -> None:
    """As after a power cut between the decision and the last renaming (support/file_sets.py)."""
    (tmp_path / "new").mkdir()
    adapter.rename(tmp_path / "new" / ".saved")
    assert error(logits(GPT2.from_pretrained(tmp_path / "new")), logits(with_lora())) < 1e-5


def test_the_tokenizer_is_the_adapter_s_or_else_its_base_s(tmp_path: Path) -> None:
    letters = CharTokenizer("abcdefghij\n")
    save_pretrained(make_model(), tmp_path / "base", letters)
    with_lora(base=str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    for expected in ("base", "adapter"):
        assert open_model(str(tmp_path / "adapter")).folder == tmp_path / expected
        assert tokenizer_folder(str(tmp_path / "adapter")) == tmp_path / expected
        letters.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "model_config.json").unlink()  # PEFT writes none
    assert open_model(str(tmp_path / "adapter")).folder == tmp_path / "base"
    (tmp_path / "adapter" / "prompt_template.txt").touch()  # a user's
    assert open_model(str(tmp_path / "adapter")).folder == tmp_path / "adapter"
    (tmp_path / "adapter" / "prompt_template.txt").unlink()
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert open_model(str(tmp_path / "adapter")).folder == tmp_path / "adapter"


def test_a_run_s_adapter_is_the_model_of_scripts_that_are_given_none(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CharTokenizer("abcdefghijk").save(base)
    adapter.rename(adapter.with_name("out"))
    monkeypatch.chdir(adapter.parent)
    model, tokenizer, template = load_language_model(None)
    assert error(logits(model), logits(with_lora())) < 1e-5
    assert tokenizer.decode([10]) == "k" and template is None


def test_an_adapter_of_a_model_in_int8_is_saved(base: Path, tmp_path: Path) -> None:
    model = with_lora(base=str(base))
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            hold_in_int8(name, parameter)
    model.save_pretrained(tmp_path / "new")
    assert error(logits(GPT2.from_pretrained(tmp_path / "new")), logits(with_lora())) < 1e-5


def test_the_shape_is_the_base_s_also_where_a_config_lies_beside(adapter: Path) -> None:
    (adapter / "config.json").write_text(json.dumps(CONFIG))
    assert config_named(str(adapter)) == make_model().config


def test_in_a_folder_is_what_was_saved_last(base: Path) -> None:
    plain = make_model(seed=8)
    for model in (with_lora(base="124M"), plain):
        with written_as_set(base) as new:  # as runs do; a model's own method refuses it
            write_model(model, new)
        whole = model is plain
        assert (base / "model.safetensors").exists() == (base / "config.json").exists() == whole
        if whole:
            np.testing.assert_array_equal(logits(GPT2.from_pretrained(base)), logits(plain))
            assert not list(base.glob("*adapt*"))  # which Transformers would add to it


def test_an_adapter_does_not_take_its_base_s_place(base: Path) -> None:
    model = with_lora(base=str(base))
    with pytest.raises(UserError, match="holds the adapter's own base: give another folder"):
        model.save_pretrained(base)
    assert GPT2.from_pretrained(base)
    model.save_pretrained(base.parent)  # beside it
    with_lora().save_pretrained(base.parent)  # an adapter was there


@pytest.mark.parametrize("name", [None, "124M"])
def test_neither_kind_of_model_is_saved_over_the_other(
    name: str | None, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="base holds a whole model, which an adapter would replace"):
        with_lora(base=name).save_pretrained(base)
    make_model().save_pretrained(base)
    with_lora(base=name).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter holds an adapter, which a whole model would"):
        make_model().save_pretrained(tmp_path / "adapter")
    assert GPT2.from_pretrained(base) and open_adapter(tmp_path / "adapter")


def test_an_adapter_replaces_no_file_of_another_program_s(base: Path, tmp_path: Path) -> None:
    (tmp_path / "hparams.json").write_text("{}")
    with_lora(base=str(base)).save_pretrained(tmp_path)
    assert open_adapter(tmp_path) and (tmp_path / "hparams.json").read_text() == "{}"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ckpt.pt").touch()
    with pytest.raises(UserError, match=r"perhaps the adapter's base: .*add_lora"):
        with_lora(base=None).save_pretrained(tmp_path / "other")


def test_dropout_of_additions_is_off_in_a_model_that_is_not_training(
    base: Path, tmp_path: Path
) -> None:
    with_lora(base=str(base), dropout=0.5).save_pretrained(tmp_path / "adapter")
    model = GPT2.from_pretrained(base)  # in evaluation mode
    load_adapter(model, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(model), logits(model))
    assert (logits(model.train()) != logits(model)).any()


def test_an_adapter_of_openai_s_model_names_it_as_the_hub_does(tmp_path: Path) -> None:
    with_lora(base="124M").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "openai-community/gpt2"


# ------------------------------------------------------------------------------------- bad input


def rewrite(adapter: Path, change: dict[str, Any] | None = None, **config: Any) -> None:
    """Change an adapter's settings, and its arrays: None takes one away."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    file = adapter / "adapter_model.safetensors"
    arrays = safetensors.numpy.load_file(file) | (change or {})
    kept = {name: array for name, array in arrays.items() if array is not None}
    safetensors.numpy.save_file(kept, file)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, {"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is supported"),
        ({}, {"use_dora": True}, "use_dora is True"),
        ({}, {"bias": "all"}, "bias is 'all'"),
        ({}, {"alpha_pattern": {"h.0": 4}}, "alpha_pattern is"),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({}, {"lora_alpha": "16"}, "lora_alpha must be a number, not '16'"),
        ({}, {"base_model_name_or_path": None}, "does not name its model"),
        ({}, {"base_model_name_or_path": "/gone"}, "names its base, but '/gone' is neither"),
        (
            {},
            {"base_model_name_or_path": "/gone"},
            "if it was moved, correct base_model_name_or_path there",
        ),
        ({f"{NAME}.lora_B.weight": None}, {}, "lora_A and lora_B of transformer.h.0.attn.c_attn"),
        (
            {f"{NAME}.lora_A.weight": np.zeros((2, 16), "f4")},
            {},
            "lora_A and lora_B of transformer.h.0.attn.c_attn do not fit together",
        ),
        ({f"{NAME}.lora_A.weight": np.zeros(16, "f4")}, {}, "where a matrix is needed"),
        (
            {"base_model.model.lm_head.weight": np.zeros((11, 16), "f4")},
            {},
            "'base_model.model.lm_head.weight' is not a low-rank addition",
        ),
    ],
)
def test_what_is_not_a_plain_adapter_is_refused(
    adapter: Path, change: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    rewrite(adapter, change, **config)
    with pytest.raises(UserError, match=message) as refusal:
        GPT2.from_pretrained(adapter)
    assert str(adapter) in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_adapter_without_additions_is_refused(adapter: Path) -> None:
    arrays = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    rewrite(adapter, dict.fromkeys(arrays))
    with pytest.raises(UserError, match="holds no low-rank additions"):
        GPT2.from_pretrained(adapter)


def test_an_adapter_in_peft_s_older_format_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"but only adapter_model\.safetensors is read"):
        GPT2.from_pretrained(adapter)


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = hf_folder(tmp_path / "other", config={**CONFIG, **TINY})
    rewrite(adapter, base_model_name_or_path=str(other))
    assert (
        GPT2.from_pretrained(adapter).config.vocab_size == 61
    )  # its layers are of the same shapes
    save_pretrained(make_model(n_layer=1), tmp_path / "shallow")
    rewrite(adapter, base_model_name_or_path=str(tmp_path / "shallow"))
    message = r"is for another model: it adds to a transformer.h.1.attn.c_attn of shape \(16, 48\)"
    with pytest.raises(UserError, match=message):
        GPT2.from_pretrained(adapter)
    with pytest.raises(UserError, match=message):
        load_adapter(make_model(n_layer=1), adapter)


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    with_lora(base=str(adapter)).save_pretrained(tmp_path / "second")
    with pytest.raises(
        UserError, match=r"second is an adapter itself: merge that with python load_gpt2\.py --from"
    ):
        GPT2.from_pretrained(tmp_path / "second")


@pytest.mark.parametrize("damage", ["cut", "absent"])
def test_a_damaged_file_is_named(adapter: Path, damage: str) -> None:
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-5])
    message = {"cut": "not a whole safetensors file", "absent": "No such file or directory"}[damage]
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors.*{message}"):
        GPT2.from_pretrained(adapter)


@pytest.mark.parametrize("layer_names", [["attn"], ["c_attn", "ln_1"], ["wte"], []])
def test_a_layer_that_there_is_not(layer_names: list[str]) -> None:
    with pytest.raises(UserError, match="choose from attn\\.c_attn, attn"):
        add_lora(make_model(), 2, layer_names=layer_names)


def test_a_model_takes_additions_once(adapter: Path) -> None:
    model = with_lora()
    for again in (lambda: add_lora(model, rank=1), lambda: load_adapter(model, adapter)):
        with pytest.raises(UserError, match="has LoRA's additions already: load it anew"):
            again()


def test_a_rank_above_the_layer_s_is_refused_before_memory_is_asked_for() -> None:
    model = make_model()  # 16 wide
    with pytest.raises(
        UserError, match=r"^--lora-rank 1,000,000,000,000 is above 16, .*: lower it"
    ):
        add_lora(model, 10**12)
    add_lora(model, 16)


def test_folding_an_adapter_into_another_model_of_its_shape_is_said(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    with_adapter(open_model(str(base)), open_language_adapter(adapter))
    assert capsys.readouterr().err == ""
    with_adapter(open_model(str(other)), open_language_adapter(adapter))
    note = f"note: {adapter} was trained on {base}, not on {other}"
    assert capsys.readouterr().err == note + "\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank of LoRA must be a whole number of at least 1, not 0"),
        ({"rank": 2.5}, "at least 1, not 2.5"),
        ({"rank": 2, "alpha": 0}, "alpha of LoRA must be .* not 0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha of LoRA must be a finite number, .* is nan"),
        ({"rank": 2, "dropout": 2}, r"must be a probability in \[0, 1\), not 2"),
        ({"rank": 2, "layer_names": "c_attn"}, r"a list of names: write \['c_attn'\]"),
        ({"rank": 2, "layer_names": "c_attn, mlp.c_fc"}, r"write \['c_attn', 'mlp\.c_fc'\]"),
    ],
)
def test_an_addition_that_would_add_nothing_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    model = GPT2(GPT2Config(1, 1, 4, 5, 8))
    with pytest.raises(ValueError, match=message):
        add_lora(model, **settings)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not lora_layers(model)


def test_numbers_of_numpy_are_saved(base: Path, tmp_path: Path) -> None:
    model = make_model()
    numbers = {"rank": np.int64(2), "alpha": np.float32(4), "dropout": np.float32(0.5)}
    add_lora(model, **numbers, base=str(base))
    model.save_pretrained(tmp_path / "new")
    config = open_adapter(tmp_path / "new").config
    assert [config[name] for name in ("r", "lora_alpha", "lora_dropout")] == [2, 4, 0.5]


def test_an_adapter_that_does_not_fit_changes_nothing(adapter: Path, tmp_path: Path) -> None:
    other = GPT2(GPT2Config(1, 2, 32, 11, 16))
    add_lora(other, rank=2)
    other.save_pretrained(tmp_path / "other")
    model = make_model()
    before = logits(model)
    with pytest.raises(UserError, match="other is for another model"):
        load_adapter(model, tmp_path / "other")
    np.testing.assert_array_equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    load_adapter(model, adapter)
    assert lora_layers(model)


def test_a_block_that_stands_in_several_places_gets_one_addition(tmp_path: Path) -> None:
    model = make_model(n_layer=3)
    model.transformer.h = model.transformer.h[:1] * 3
    expected = logits(model)
    add_lora(model, 2)
    (layer,) = {id(layer): layer for layer in lora_layers(model).values()}.values()
    assert type(layer.base) is Linear and (logits(model) == expected).all()
    layer.lora_B.data += 1
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = make_model(n_layer=3)
    again.transformer.h = again.transformer.h[:1] * 3
    load_adapter(again, tmp_path)
    assert (logits(again) == expected).all()
    plain = gradients(model)
    recompute_blocks(model)
    for a, b in zip(gradients(model), plain, strict=True):
        np.testing.assert_array_equal(a, b)


def gradients(model: GPT2) -> list[Any]:
    model.loss(IDS, IDS).backward()
    found = [parameter.grad for parameter in trained_parameters(model)]
    for parameter in trained_parameters(model):
        parameter.grad = None
    return found
