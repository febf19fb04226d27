"""A model's folder is written whole, wherever the process is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import kill, needs_fork, run_with_fault

from micrograd_gpt import nn
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.weights.config import read_config
from micrograd_gpt.weights.gguf_file import write_gguf
from micrograd_gpt.weights.pretrained import from_pretrained
from micrograd_gpt.weights.saving import save_pretrained
from micrograd_gpt.weights.tensor_files import TensorFile


@pytest.mark.slow
@needs_fork
def test_killed_at_any_moment_it_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only time would be lost
    texts = {1: "abc", 2: "abcd"}
    models = {n: GPT2(GPT2Config(n, 1, 4, len(texts[n]), 8)) for n in texts}
    tokenizers = {n: CharTokenizer(text) for n, text in texts.items()}
    found = []
    for number in count():
        folder = tmp_path / str(number)
        save_pretrained(models[1], folder, tokenizers[1])
        status = run_with_fault(
            lambda folder=folder: save_pretrained(models[2], folder, tokenizers[2]), kill, number
        )
        model = from_pretrained(GPT2, folder)
        layers = model.config.n_layer
        assert load_tokenizer(folder).to_dict() == tokenizers[layers].to_dict(), number
        for ours, theirs in zip(model.parameters(), models[layers].parameters(), strict=True):
            np.testing.assert_array_equal(ours.data, theirs.data)
        found.append(layers)
        if status == 0:
            break
        assert status == 9
    assert found == sorted(found) and set(found) == {1, 2} and len(found) > 12


def test_an_empty_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=5, n_positions=4))
    with pytest.raises(UserError, match="the name of the folder is empty"):
        model.save_pretrained("")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_parameters_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a reload of nn.py, of whose classes its layers are not."""
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=5, n_positions=4))
    save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(nn, "Module", type("Module", (), {}))
    monkeypatch.setattr(nn, "Parameter", type("Parameter", (), {}))
    with pytest.raises(ValueError, match=r"has no parameters to save: if nn\.py was loaded again"):
        save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


class Own(Tokenizer):
    """Of another kind than the package's."""

    def _encode(self, text: str) -> np.ndarray:
        return np.zeros(len(text), np.int32)

    def to_dict(self) -> dict[str, Any]:
        return {}


def test_a_tokenizer_that_is_not_the_models_is_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=5, n_positions=4))
    with pytest.raises(UserError, match="has 257 tokens, and the model room for 5: give the"):
        model.save_pretrained(tmp_path / "new", ByteTokenizer())
    for other in ("gpt2", "", CharTokenizer, Own([b"a"], None)):
        with pytest.raises(TypeError, match=r"the tokenizer, .*, is not one of ours: load_tokeniz"):
            model.save_pretrained(tmp_path / "new", other)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""
    model.save_pretrained(tmp_path / "new", CharTokenizer("ab"))  # more room than there are tokens
    assert (tmp_path / "new" / "model.safetensors").exists()
    note = "has 2 tokens, and its model 5: make one with GPT2Config(vocab_size=2, …)"
    assert note in capsys.readouterr().err


def test_a_tokenizer_of_another_vocabulary_that_stays_in_the_folder_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CharTokenizer("abc").save(tmp_path)
    for size, is_said in (3, False), (64, False), (5, True):  # 64: padded
        model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=size, n_positions=4))
        for _ in range(2):  # it is said once
            model.save_pretrained(tmp_path)
        note = "keeps the tokenizer that is there, which may not be this model's: give"
        assert capsys.readouterr().err.count(note) == is_said


def test_the_ids_of_a_tokenizer_that_stays_in_the_folder_stay_too(tmp_path: Path) -> None:
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=257, n_positions=4))
    model.save_pretrained(tmp_path, ByteTokenizer())
    config = (tmp_path / "config.json").read_text()
    GPT2.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads(config)["eos_token_id"] == 256  # Transformers stops there
    assert (tmp_path / "config.json").read_text() == config
    smaller = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=5, n_positions=4))
    for damage in (None, "{"):
        smaller.save_pretrained(tmp_path)
        assert read_config(tmp_path).vocab_size == 5
        assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None
        (tmp_path / "config.json").write_text(damage or config)


def test_a_config_of_numpys_numbers_is_saved_as_any_other(tmp_path: Path) -> None:
    numbers = {name: np.int64(4) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config = GPT2Config(**numbers, n_positions=8, resid_pdrop=np.float32(0.5))  # type: ignore[arg-type]
    GPT2(config).save_pretrained(tmp_path)
    assert GPT2.from_pretrained(tmp_path).config == config == GPT2Config(4, 4, 4, 4, 8, 0, 0, 0.5)


class WithHeads(GPT2):
    """A subclass with parameters of its own, one by a name that Transformers has for a head."""

    def __init__(self, config: GPT2Config, seed: int = 0, init: nn.Init | None = None) -> None:
        super().__init__(config, seed, init)
        self.extra, self.v_head = nn.Linear(4, 2), nn.Linear(4, 1)


def test_a_subclass_with_parameters_of_its_own_is_loaded_as_it_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = WithHeads(GPT2Config(1, 1, 4, 5, 8))
    model.save_pretrained(tmp_path)
    again = WithHeads.from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        np.testing.assert_array_equal(ours.data, theirs.data, err_msg=name)
    assert "left out" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a tensor that the model does not have: 'extra\.bias'"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "n_head", 4),
        lambda model: setattr(model.config, "n_layer", 3),
        lambda model: setattr(model.config, "n_embd", 16),
        lambda model: setattr(model.config, "vocab_size", 12),
        lambda model: setattr(model.config, "n_positions", 4),
        lambda model: setattr(model.config, "layer_norm_epsilon", 1e-3),
        lambda model: model.transformer.h.pop(),
        lambda model: setattr(model.transformer.h[1].attn, "n_head", 4),
        lambda model: setattr(model.transformer.ln_f, "eps", 1e-6),
    ],
)
def test_a_model_that_its_config_does_not_describe_is_not_saved(
    tmp_path: Path, change: Callable[[GPT2], object]
) -> None:
    model = GPT2(GPT2Config(2, 2, 8, 11, 8))
    change(model)
    with pytest.raises(ValueError, match=r"the config says .*: make them agree"):
        save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"the config says .*: make them agree"):
        write_gguf(tmp_path / "model.gguf", model, ByteTokenizer())
    assert not list(tmp_path.iterdir())


def test_a_subclass_makes_its_parts_in_its_own_way(tmp_path: Path) -> None:
    class Mine(GPT2):
        def __init__(self, config: GPT2Config, seed: int = 0, init: nn.Init | None = None) -> None:
            super().__init__(config, seed, init)
            self.extra = nn.LayerNorm(config.n_embd, eps=1e-6)
            self.transformer.h[0].attn.n_head = 4
            self.transformer.ln_f.eps = 1e-6

    model, ids = Mine(GPT2Config(2, 2, 8, 11, 8)), [[1, 2, 3]]
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(Mine.from_pretrained(tmp_path)(ids).data, model(ids).data)


def test_parts_of_ones_own_are_saved(tmp_path: Path) -> None:
    model = GPT2(GPT2Config(2, 2, 8, 11, 8))
    model.transformer.h[0].attn = nn.Linear(8, 8)  # type: ignore[assignment]
    model.transformer.h[0].own = nn.LayerNorm(8, 1e-6)  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path)
    assert "transformer.h.0.own.bias" in TensorFile(tmp_path / "model.safetensors").entries


def test_a_model_that_was_changed_together_with_its_config_is_saved(tmp_path: Path) -> None:
    model, ids = GPT2(GPT2Config(2, 2, 8, 11, 8)), [[1, 2, 3]]
    body, config = model.transformer, model.config
    body.h.pop()
    body.wpe.weight = nn.Parameter(body.wpe.weight.data[:4])
    body.h[0].attn.n_head = 4
    config.n_layer, config.n_positions, config.n_head = 1, 4, 4
    save_pretrained(model, tmp_path / "model")
    again = GPT2.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(again(ids).data, model(ids).data)
