"""nanoGPT's ckpt.pt: with and without biases, padding and torch.compile, and what can be wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_weights import ARRAYS, TINY, Arrays, assert_same
from torch_files import save

from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.formats import open_weights
from micrograd_gpt.weights.pretrained import build, from_pretrained

DATA = Path(__file__).parents[1] / "data" / "torch_files"
ARGUMENTS = {
    **{"n_layer": 2, "n_head": 4, "n_embd": 16, "vocab_size": 61},
    **{"block_size": 32, "bias": True, "dropout": 0.0},
}


def state(arrays: Arrays = ARRAYS, prefix: str = "") -> Arrays:
    """The arrays as nanoGPT has them: a Linear's weight (n_out, n_in), and the head beside wte."""
    tensors = {name: a.T if a.ndim == 2 and ".h." in name else a for name, a in arrays.items()}
    tensors["lm_head.weight"] = arrays["transformer.wte.weight"]
    return {prefix + name: np.ascontiguousarray(array) for name, array in tensors.items()}


def checkpoint(path: Path, tensors: Any, **arguments: Any) -> Path:
    saved = {"model": tensors, "model_args": ARGUMENTS | arguments, "iter_num": 5}
    save(path, saved)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_checkpoint_s_numbers(file: Path, prefix: str, dtype: str) -> None:
    checkpoint(file, state(prefix=prefix), dropout=0.25)
    model = from_pretrained(GPT2, file, dtype=dtype)
    assert_same(model, dtype=dtype)
    config = vars(model.config)
    assert {name: config[name] for name in TINY} == TINY
    assert config["embd_pdrop"] == config["attn_pdrop"] == config["resid_pdrop"] == 0.25


def test_the_folder_of_a_run_is_its_checkpoint(tmp_path: Path) -> None:
    shutil.copy(DATA / "ckpt.pt", tmp_path)
    assert_same(build(open_weights(tmp_path)))


def test_causal_masks_are_left_out(file: Path) -> None:
    mask = np.tril(np.ones((1, 1, 32, 32), "f4"))
    checkpoint(file, state() | {f"transformer.h.{i}.attn.bias": mask for i in range(2)})
    assert_same(build(open_weights(file)))


def test_a_model_without_biases_gets_zeros(file: Path) -> None:
    weights = {name: array for name, array in ARRAYS.items() if not name.endswith(".bias")}
    checkpoint(file, state(weights), bias=False)
    zeros = {name: np.zeros_like(array) for name, array in ARRAYS.items()}
    assert_same(build(open_weights(file)), zeros | weights)
    checkpoint(file, state(weights), bias=True)
    with pytest.raises(UserError, match=r"lacks 'transformer\.h\.0\.attn\.c_attn\.bias'"):
        build(open_weights(file))


def test_padding_of_the_vocabulary_is_left_out(file: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((50304, 16), dtype="f4")
    tokens[50257:] = 100  # would win every choice
    padded = ARRAYS | {"transformer.wte.weight": tokens}
    model = build(open_weights(checkpoint(file, state(padded), vocab_size=50304)))
    assert model.config.vocab_size == 50257
    assert_same(model, padded | {"transformer.wte.weight": tokens[:50257]})
    with no_grad():
        assert model(np.array([[0, 50256]])).shape == (1, 2, 50257)


def test_other_vocabularies_are_whole(file: Path) -> None:
    tokens = np.ones((50305, 16), "f4")
    checkpoint(file, state(ARRAYS | {"transformer.wte.weight": tokens}), vocab_size=50305)
    assert open_weights(file).config.vocab_size == 50305


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no tensors": ([], {}, "does not hold a dict of tensors"),
    "a tensor twice": (
        state() | state(prefix="_orig_mod."),
        {},
        r"holds 'transformer\.\w+.*' twice",
    ),
    "another head": (
        state() | {"lm_head.weight": ARRAYS["transformer.wte.weight"] + 1},
        {},
        "lm_head.weight differs",
    ),
    "not transposed": (ARRAYS, {}, r"c_attn\.weight has shape \(48, 16\)"),
    "no number of heads": (state(), {"n_head": None}, "no whole number n_head"),
    "a truth value of layers": (state(), {"n_layer": True}, "no whole number n_layer"),
    "a context in words": (state(), {"block_size": "32"}, "no whole number block_size"),
    "other layers": (state(), {"n_layer": 3}, "model_args says n_layer 3, the tensors 2"),
    "another context": (state(), {"block_size": 64}, "n_positions 64, the tensors 32"),
    "heads that do not fit": (state(), {"n_head": 5}, "multiple of n_head"),
    "no heads": (state(), {"n_head": 0}, "n_head must be a whole number of at least 1"),
    "dropout in words": (state(), {"dropout": "none"}, "dropout that is not a number"),
    "dropout of everything": (state(), {"dropout": 1.0}, "_pdrop must be a probability"),
    "a padded vocabulary": (state(), {"vocab_size": 64}, "vocab_size 64, the tensors 61"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_is_one_line_that_says_what(file: Path, wrong: str) -> None:
    tensors, arguments, message = WRONG[wrong]
    checkpoint(file, tensors, **arguments)
    with pytest.raises(UserError, match=message) as caught:
        build(open_weights(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_arguments_that_are_no_dict(file: Path) -> None:
    save(file, {"model": state(), "model_args": [1, 2]})
    with pytest.raises(UserError, match="model_args are not a dict"):
        open_weights(file)
