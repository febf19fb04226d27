"""A run's folder: what is written is what is read, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt import checkpoint, files, optim
from micrograd_gpt.errors import UserError
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.tensor_files import TensorFile, write_safetensors
from micrograd_gpt.tokenizers import CharTokenizer, load_tokenizer

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 5, "n_positions": 6}
TOKENIZER = CharTokenizer.from_text("abcde")


def trained(steps: int = 2, seed: int = 0) -> tuple[GPT2, optim.AdamW]:
    model = GPT2(GPT2Config(**SHAPE), seed=seed)
    optimizer = optim.AdamW(model.parameters())
    ids = np.arange(10).reshape(2, 5) % 5
    for _ in range(steps):
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {"seed": 3})
    again, moments = trained(0, seed=9)
    checkpoint.load_run(tmp_path, again, moments)
    assert moments.steps == 2 and checkpoint.load_settings(tmp_path) == {"seed": 3}
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    for a, b in zip(optimizer.m + optimizer.v, moments.m + moments.v, strict=True):
        np.testing.assert_array_equal(a, b)
    assert load_tokenizer(tmp_path).decode([0, 4]) == "ae"
    assert checkpoint.load_config(tmp_path) == model.config


def test_the_folder_is_a_hugging_face_folder(tmp_path: Path) -> None:
    model, _ = trained()
    model.save_pretrained(tmp_path, TOKENIZER)
    assert {f.name for f in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    file = TensorFile(tmp_path / "model.safetensors")
    assert file.metadata["format"] == "pt" and "lm_head.weight" not in file.shapes
    assert file.shapes["transformer.h.0.attn.c_attn.weight"] == (8, 24)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["eos_token_id"] is None
    assert config["n_layer"] == 1 and config["activation_function"] == "gelu_new"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_may_be_stored_smaller(tmp_path: Path, dtype: str) -> None:
    model, _ = trained()
    model.save_pretrained(tmp_path, dtype=dtype)
    stored = TensorFile(tmp_path / "model.safetensors").read("transformer.wte.weight")
    ours = model.transformer.wte.weight.data
    half_a_unit = 2**-8 if dtype == "bfloat16" else 2**-11  # of the stored mantissa's last bit
    np.testing.assert_allclose(stored, ours, rtol=half_a_unit, atol=2**-25)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_a_set_of_two_steps_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    model.save_pretrained(tmp_path, metadata={"step": "3"})
    with pytest.raises(UserError, match=r"model\.safetensors is of step 3, .* of step 2"):
        checkpoint.load_run(tmp_path, model, optimizer)


def test_what_is_missing_or_of_another_model_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    with pytest.raises(UserError, match=r"holds no run to resume: there is no trainer_state\.json"):
        checkpoint.load_run(tmp_path, model, optimizer)
    with pytest.raises(UserError, match=r"holds no model: there is no config\.json"):
        checkpoint.load_config(tmp_path)
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    wider = GPT2(GPT2Config(**{**SHAPE, "n_embd": 12}))
    with pytest.raises(UserError, match=r"has shape \(5, 8\), the model's is \(5, 12\)"):
        checkpoint.load_run(tmp_path, wider, optim.AdamW(wider.parameters()))
    deeper = GPT2(GPT2Config(**{**SHAPE, "n_layer": 2}))
    with pytest.raises(UserError, match=r"lacks transformer\.h\.1\."):
        checkpoint.load_run(tmp_path, deeper, optim.AdamW(deeper.parameters()))
    weights = {name: p.data for name, p in model.named_parameters()}
    write_safetensors(
        tmp_path / "model.safetensors", {**weights, "surplus": np.zeros(2)}, {"step": "2"}
    )
    with pytest.raises(UserError, match="has surplus, which the model has not"):
        checkpoint.load_run(tmp_path, model, optimizer)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*trainer_state\.json"):
        checkpoint.load_run(tmp_path, model, optimizer)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="it is JSON, but no object"):
        checkpoint.load_config(tmp_path)


# ------------------------------------------------------------------------- files are whole or not


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    files.write_text(target, "old")
    with pytest.raises(ZeroDivisionError), files.written_whole(target) as file:
        file.write(b"half")
        assert target.read_text() == "old"
        _ = 1 / 0
    assert target.read_text() == "old" and [f.name for f in target.parent.iterdir()] == ["file.txt"]
    files.write_text(target, "new ü")
    assert target.read_text("utf-8") == "new ü"
    assert [f.name for f in target.parent.iterdir()] == ["file.txt"]
