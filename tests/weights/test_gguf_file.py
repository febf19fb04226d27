"""GGUF: what llama.cpp is given computes what our model computes, and what cannot be is refused.

tests/reference/test_gguf.py reads the files, with the package that writes them.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt import nn, no_grad
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT
from micrograd_gpt.text.byte_pairs import AddedToken, BytePairTokenizer, GPT2Tokenizer
from micrograd_gpt.text.merges import SPELLING
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from micrograd_gpt.variants import VariantConfig
from micrograd_gpt.weights.gguf_file import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    check_exportable,
    gguf_tensors,
    gguf_vocabulary,
    write_gguf,
)

Tensors = dict[str, np.ndarray]


# --------------------------------------------------------------------------------------- the model


def gpt2_of_llama_cpp(tensors: Tensors, n_head: int, epsilon: float, ids: list[int]) -> np.ndarray:
    """The logits (T, V) that llama.cpp's gpt2 computes of its tensors, by NumPy in float64."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        heads = []
        parts = np.split(linear(x, f"{name}.attn_qkv"), 3 * n_head, axis=-1)  # (T, D) each
        for q, k, v in zip(*np.split(np.stack(parts), 3), strict=True):
            scores = np.where(np.tri(len(q)) == 1, q @ k.T / math.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))  # (T, T)
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(heads, axis=-1), f"{name}.attn_output")

    tensors = {name: array.astype("f8") for name, array in tensors.items()}
    x = tensors["token_embd.weight"][ids] + tensors["position_embd.weight"][: len(ids)]
    for layer in range(len([name for name in tensors if name.endswith("attn_qkv.weight")])):
        block = f"blk.{layer}"
        x = x + attention(norm(x, f"{block}.attn_norm"), block)
        up = linear(norm(x, f"{block}.ffn_norm"), f"{block}.ffn_up")
        up = up / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + linear(up, f"{block}.ffn_down")
    return norm(x, "output_norm") @ tensors.get("output.weight", tensors["token_embd.weight"]).T


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_head": 4, "n_layer": 3, "layer_norm_epsilon": 0.01},
        {"n_inner": 24, "activation_function": "gelu_new"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_head": 4},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_the_tensors_compute_our_logits(settings: dict[str, Any]) -> None:
    model = moved(make_model(factor=2, **settings))
    config, ids = model.config, [3, 1, 4, 1, 5, 9, 2, 6]
    tensors = dict(gguf_tensors(model, config.vocab_size))
    found = gpt2_of_llama_cpp(tensors, config.n_head, config.layer_norm_epsilon, ids)
    with no_grad():
        expected = model(np.array([ids])).data[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def moved(model: GPT2) -> GPT2:
    """Every parameter moved at random, so that no bias is 0 and no LayerNorm's weight 1."""
    rng = np.random.default_rng(5)
    for parameter in model.parameters():
        parameter.data += 0.1 * rng.standard_normal(parameter.shape, np.float32)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_left_out(tied: bool) -> None:
    model = moved(make_model(factor=2, tie_word_embeddings=tied))
    tensors = dict(gguf_tensors(model, 7))
    found = gpt2_of_llama_cpp(tensors, 2, model.config.layer_norm_epsilon, [3, 1, 4])
    expected = model(np.array([[3, 1, 4]])).data[0]  # (T, 11)
    np.testing.assert_allclose(found, expected[:, :7], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_model_itself_stays_as_it_is() -> None:
    model = make_model(scale_attn_by_inverse_layer_idx=True)
    before = [parameter.numpy().copy() for parameter in model.parameters()]
    dict(gguf_tensors(model, 7))
    for old, parameter in zip(before, model.parameters(), strict=True):
        np.testing.assert_array_equal(parameter.data, old)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activation_function", "gelu"),
        ("activation_function", "relu"),
        ("norm_position", "post"),
        ("position_embedding", "sinusoidal"),
    ],
)
def test_another_architecture_is_refused(setting: str, value: str) -> None:
    config = VariantConfig(2, 2, 16, 257, **{setting: value})
    with pytest.raises(UserError, match=rf"{setting} is '{value}', and llama\.cpp's gpt2 has only"):
        check_exportable(config, ByteTokenizer())


def test_blocks_that_share_weights_have_tensors_each() -> None:
    model = GPT2(GPT2Config(2, 1, 4, 257, 8))
    model.transformer.h = model.transformer.h[:1] * 2
    tensors = dict(gguf_tensors(model, 257))
    first, second = (tensors[f"blk.{i}.attn_qkv.weight"] for i in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_tensors_of_edited_code_are_refused() -> None:
    for edit, message in (
        (
            lambda h: setattr(h.mlp, "gate", nn.Linear(4, 4)),
            r"has transformer\.h\.1\.mlp\.gate\.bias",
        ),
        (
            lambda h: setattr(h.attn.c_attn, "bias", None),
            r"lacks transformer\.h\.1\.attn\.c_attn\.b",
        ),
    ):
        model = GPT2(GPT2Config(2, 1, 4, 257, 8))
        edit(model.transformer.h[1])
        with pytest.raises(UserError, match=f"the model {message}"):
            dict(gguf_tensors(model, 257))


# ----------------------------------------------------------------------------------- the tokenizer


def test_gpt2s_vocabulary() -> None:
    vocabulary = gguf_vocabulary(GPT2Tokenizer())
    assert len(vocabulary.tokens) == len(vocabulary.kinds) == 50257
    assert vocabulary.tokens[464] == "The" and vocabulary.tokens[3290] == "Ġdog"
    assert (vocabulary.tokens[-1], vocabulary.kinds[-1]) == (END_OF_TEXT, CONTROL)
    assert set(vocabulary.kinds[:-1]) == {NORMAL}
    assert len(vocabulary.merges) == 50000 and vocabulary.merges[0] == "Ġ t"


def test_bytes() -> None:
    vocabulary = gguf_vocabulary(ByteTokenizer())
    assert vocabulary.tokens == [*SPELLING, END_OF_TEXT] and vocabulary.merges == []
    assert vocabulary.kinds == [NORMAL] * 256 + [CONTROL]


MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]


def byte_pairs(
    *added: tuple[str, bool], merges: list[tuple[str, str]] = MERGES, **options: Any
) -> BytePairTokenizer:
    """Ids in an order of their own, and the added tokens (text, whether it is special)."""
    tokens = ["</s>", "Ġthe", "the", "th", *SPELLING, *options.get("more", ())]
    tokens_added = [
        AddedToken(text, len(tokens) + i, special, options.get("normalized", not special))
        for i, (text, special) in enumerate(added)
    ]
    end = AddedToken("</s>", 0, special=True, normalized=False)
    return BytePairTokenizer(
        {token: id for id, token in enumerate(tokens)},
        merges,
        [end, *tokens_added],
        options.get("special_tokens", {"eos_token": 0}),
    )


def test_another_models_vocabulary() -> None:
    """Ids in any order, and added tokens as they are, not spelled in bytes."""
    vocabulary = gguf_vocabulary(byte_pairs((" 犬", False), ("[PAD]", True)))
    assert vocabulary.tokens[:4] == ["</s>", "Ġthe", "the", "th"]
    assert vocabulary.tokens[-2:] == [" 犬", "[PAD]"]
    assert vocabulary.kinds[:2] == [CONTROL, NORMAL]
    assert vocabulary.kinds[-3:] == [NORMAL, USER_DEFINED, CONTROL]
    assert vocabulary.merges == ["t h", "th e", "Ġ the"]


def test_of_a_merge_that_is_listed_twice_the_last_counts() -> None:
    twice = [MERGES[1], MERGES[0], MERGES[1], MERGES[2]]
    assert gguf_vocabulary(byte_pairs(merges=twice)).merges == ["t h", "th e", "Ġ the"]


@pytest.mark.parametrize("text", ["dog", "a dog"])
def test_no_tokenizer_but_byte_pairs(text: str) -> None:
    for tokenizer in (CharTokenizer.from_text(text), WordTokenizer.from_text(text)):
        with pytest.raises(UserError, match=f"a {tokenizer.name} tokenizer cannot be exported"):
            check_exportable(GPT2Config(vocab_size=tokenizer.vocab_size), tokenizer)


def test_llama_cpp_needs_a_token_that_ends_a_text() -> None:
    with pytest.raises(UserError, match="no token that ends a text"):
        gguf_vocabulary(byte_pairs(special_tokens={"bos_token": 0}))


def test_a_token_that_is_not_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="its token '犬' is not spelled in bytes"):
        gguf_vocabulary(byte_pairs(more=["犬"]))


@pytest.mark.parametrize(
    ("added", "clash"),
    [
        ([("[a]", True), ("]b", True)], r"'\[a\]' and '\]b' overlap"),
        ([("dog", False), ("do", True)], "'do' and 'dog' overlap"),  # special ones come first here
        ([("abc", False), ("cab", False)], "overlap"),
    ],
)
def test_added_tokens_that_would_be_found_elsewhere_are_refused(
    added: list[tuple[str, bool]], clash: str
) -> None:
    with pytest.raises(UserError, match=clash):
        gguf_vocabulary(byte_pairs(*added))


def test_added_tokens_that_both_find_alike_are_not() -> None:
    for added in ([("  ", False), ("    ", False)], [("dog", False), ("dogs", False)]):
        assert gguf_vocabulary(byte_pairs(*added)).tokens[-1] == added[1][0]


# ------------------------------------------------------------------------------------- the package


def test_without_the_package_one_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'needs gguf: pip install "micrograd-gpt\[gguf\]"'):
        write_gguf(tmp_path / "a.gguf", GPT2(GPT2Config(1, 1, 4, 257, 8)), ByteTokenizer())
    assert list(tmp_path.iterdir()) == []
