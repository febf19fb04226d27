"""config.json: what is read is what was written, and nothing else passes for a GPT-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.variants import VariantConfig, VariantGPT2
from micrograd_gpt.weights.config import (
    SIZES,
    config_json,
    is_gpt2,
    model_class,
    published_shape,
    read_config,
    read_hparams,
    size_name,
)
from micrograd_gpt.weights.saving import save_pretrained

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 23, "n_positions": 9}
DROPOUT = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}
VARIANTS: list[dict[str, Any]] = [
    {"norm_position": "post", "position_embedding": "learned"},
    {"norm_position": "pre", "position_embedding": "sinusoidal"},
    {"norm_position": "post", "position_embedding": "sinusoidal"},
]


@pytest.mark.parametrize("extra", [{}, DROPOUT, {"layer_norm_epsilon": 1e-6}])
def test_what_is_written_is_read(extra: dict[str, float]) -> None:
    config = GPT2Config(**SMALL, **extra)
    assert read_config(config_json(config, "float32", {"eos_token": 22})) == config


def test_the_keys_are_transformers() -> None:
    assert config_json(GPT2Config(**SMALL), "float16", {"bos_token": 21, "eos_token": 22}) == {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_ctx": 9,
        "tie_word_embeddings": True,
        **SMALL,
        **dict.fromkeys(DROPOUT, 0.0),
        "layer_norm_epsilon": 1e-5,
        "dtype": "float16",
        "bos_token_id": 21,
        "eos_token_id": 22,
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_does_not_pass_for_a_gpt2(tmp_path: Path, variant: dict[str, Any]) -> None:
    """Transformers would load it, and compute something else."""
    model = VariantGPT2(VariantConfig(**SMALL, **variant))
    save_pretrained(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "micrograd-gpt" and "architectures" not in values
    assert {key: values[key] for key in variant} == variant
    config = read_config(tmp_path)
    assert config == model.config and not is_gpt2(config)
    assert model_class(config, GPT2) is VariantGPT2


RELATIVES: list[dict[str, Any]] = [
    {"activation_function": "gelu"},
    {"n_inner": 40},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    {"activation_function": "relu", "n_inner": 1, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("relative", RELATIVES)
def test_a_relative_is_a_gpt2_to_transformers(relative: dict[str, Any]) -> None:
    config = read_config({**SMALL, **relative})
    assert config == VariantConfig(**SMALL, **relative)
    assert not is_gpt2(config) and model_class(config) is VariantGPT2
    values = config_json(config, "float32")
    assert values["model_type"] == "gpt2" and values["architectures"] == ["GPT2LMHeadModel"]
    assert {key: values[key] for key in relative} == relative
    assert read_config(values) == config


def test_a_relative_may_be_for_learning_too() -> None:
    config = VariantConfig(**SMALL, norm_position="post", activation_function="relu", n_inner=40)
    values = config_json(config, "float32")
    assert values["model_type"] == "micrograd-gpt" and read_config(values) == config


@pytest.mark.parametrize(
    "same",
    [
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"n_inner": 64},
        {"n_inner": None},
        {"n_ctx": 9},
        {"n_ctx": 1024},  # n_positions counts
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": False},
        {"scale_attn_weights": True, "tie_word_embeddings": True, "summary_type": "cls_index"},
    ],
)
def test_a_gpt2_in_other_words_is_plain_gpt2(same: dict[str, Any]) -> None:
    config = read_config({**SMALL, **same})
    assert config == GPT2Config(**SMALL) and type(config) is GPT2Config


@pytest.mark.parametrize(
    ("name", "ours"), [("swish", "silu"), ("gelu_python", "gelu"), ("quick_gelu", "quick_gelu")]
)
def test_other_names_of_activation_functions(name: str, ours: str) -> None:
    config = read_config({**SMALL, "activation_function": name})
    assert config_json(config, "float32")["activation_function"] == ours


def test_the_oldest_files_name_the_context_only() -> None:
    shape = {key: value for key, value in SMALL.items() if key != "n_positions"}
    assert read_config({**shape, "n_ctx": 9}) == GPT2Config(**SMALL)


def test_gpt2_is_not_a_variant() -> None:
    class Mine(GPT2):
        pass

    for config in (VariantConfig(**SMALL), read_config({**SMALL, "norm_position": "pre"})):
        assert is_gpt2(config) and model_class(config, Mine) is Mine
        assert read_config(config_json(config, "float32")) == GPT2Config(**SMALL)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n_layer": 0}, ": n_layer must be a whole number of at least 1"),
    ({"n_head": 3}, r": n_embd \(16\) must be a multiple of n_head \(3\)"),
    ({"attn_pdrop": 1.0}, ": attn_pdrop must be a probability"),
    ({"norm_position": "middle"}, ": norm_position must be one of"),
    ({"position_embedding": []}, ": position_embedding must be one of"),
    ({"activation_function": "mish"}, ": activation_function must be one of .*, not 'mish'"),
    ({"activation_function": ["relu"]}, ": activation_function must be one of"),
    ({"tie_word_embeddings": "no"}, ": tie_word_embeddings must be one of"),
    ({"scale_attn_weights": None}, ": scale_attn_weights must be one of"),
    ({"scale_attn_by_inverse_layer_idx": 2}, ": scale_attn_by_inverse_layer_idx must be one of"),
    ({"n_inner": 0}, ": n_inner must be a whole number of at least 1, not 0"),
    ({"n_inner": 40.0}, ": n_inner must be a whole number"),
    ({"add_cross_attention": True}, ": add_cross_attention is True; only False is supported"),
    ({"model_type": "llama"}, ": model_type is 'llama'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_config_no_model_can_have_is_one_line_that_names_the_file(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^config.json{message}"):
        read_config({**SMALL, **change})
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json{message}") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_inner", [{}, {"n_inner": None}, {"n_inner": 64}])
@pytest.mark.parametrize("n_embd", [None, {}, [], [16], "16", True, 16.0])
def test_a_width_that_is_not_a_whole_number(n_embd: object, n_inner: dict[str, object]) -> None:
    with pytest.raises(UserError, match="n_embd must be a whole number") as caught:
        read_config({**SMALL, **n_inner, "n_embd": n_embd})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n_layer", "n_head", "vocab_size", "n_positions"])
@pytest.mark.parametrize("value", [None, {}, [], "2", True, 2.0])
def test_other_sizes_that_are_not_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name} must be a whole number of at least 1, not "):
        read_config({**SMALL, name: value})


@pytest.mark.parametrize(
    "value",
    [None, {}, [], "1e-5", True, 0, 0.0, -1e-5, float("nan"), float("inf"), 10**400],
    ids=lambda value: repr(value)[:9],
)
def test_a_layer_norm_epsilon_that_is_not_a_positive_number(value: object) -> None:
    message = "layer_norm_epsilon must be a finite number above 0, not "
    with pytest.raises(UserError, match=message) as caught:
        read_config({**SMALL, "layer_norm_epsilon": value})
    assert "\n" not in str(caught.value)
    assert read_config({**SMALL, "layer_norm_epsilon": 1}).layer_norm_epsilon == 1


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^config\.json lacks n_embd, n_head$"):
        read_config({"n_layer": 2, "vocab_size": 3, "n_positions": 4})
    with pytest.raises(UserError, match=rf"^{tmp_path} holds no model: there is no config\.json"):
        read_config(tmp_path)


def test_hparams_are_named_as_openai_names_them() -> None:
    hparams = {"n_vocab": 23, "n_ctx": 9, "n_embd": 16, "n_head": 2, "n_layer": 2}
    assert read_hparams(hparams, "x") == GPT2Config(**SMALL)
    # The names stand in the path too, which must stay what it is.
    with pytest.raises(UserError, match=r"^vocab_size/hparams\.json: n_vocab must be a whole"):
        read_hparams({**hparams, "n_vocab": 0}, Path("vocab_size") / "hparams.json")


def test_sizes_by_name() -> None:
    assert size_name("345M") == "355M" and size_name("124M") == "124M"
    with pytest.raises(UserError, match="unknown GPT-2 size '125M'"):
        size_name("125M")
    for size in SIZES:
        assert read_config(published_shape(size)) == GPT2Config(**SIZES[size])


def test_a_config_that_says_nothing_is_not_one_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json lacks n_embd"):
        read_config(tmp_path)
