"""LoRA live against PEFT: files both ways, logits, gradients, AdamW's steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import no_grad, optim
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.tuning.classifier import GPT2Classifier, load_classifier, write_classifier
from micrograd_gpt.tuning.lora import (
    LAYERS,
    add_lora,
    load_adapter,
    lora_layers,
    trained_parameters,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 211, "n_positions": 40}
SHORT = [["c_attn"], ["attn.c_proj", "mlp.c_fc"], list(LAYERS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model, with biases and LayerNorms moved off their 0 and 1."""
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, **quiet, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def their_lora(base: Path, layers: list[str], **settings: Any) -> Any:
    """PEFT's LoRA on the base, with both matrices of each addition random."""
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 12, "fan_in_fan_out": True, **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=layers, **settings)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], shape)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def our_logits(model: GPT2, ids: np.ndarray) -> np.ndarray:
    with no_grad():
        return model(ids).data


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def their_loss(model: Any, ids: np.ndarray) -> Any:
    logits = model(torch.tensor(ids[:, :-1])).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
    )


def gradient_of(model: Any, name: str) -> np.ndarray:
    """PEFT's gradient of what we call `name`: its matrices are ours, transposed."""
    layer, _, which = name.rpartition(".")
    return model.get_parameter(f"base_model.model.{layer}.{which}.default.weight").grad.numpy().T


@pytest.mark.parametrize("layers", SHORT)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_we_load_what_peft_saves(
    base: Path, tmp_path: Path, layers: list[str], settings: dict[str, Any]
) -> None:
    theirs = their_lora(base, layers, **settings)
    theirs.save_pretrained(tmp_path)
    ids, plain = random_ids(3, 20), GPT2.from_pretrained(base)
    before = our_logits(plain, ids)
    load_adapter(plain, tmp_path)
    expected = their_logits(theirs, ids)
    assert relative_error(before, expected) > 0.01
    assert relative_error(our_logits(plain, ids), expected) < 1e-5
    merged = GPT2.from_pretrained(tmp_path)  # the adapter's folder is a model
    assert not lora_layers(merged)
    assert relative_error(our_logits(merged, ids), expected) < 1e-5


@pytest.mark.parametrize(
    "variant", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}]
)
def test_additions_to_scaled_queries_are_scaled(
    base: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | variant
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    theirs = their_lora(tmp_path / "base", ["c_attn"])
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours := GPT2.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = random_ids(3, 20)
    expected = their_logits(theirs, ids)
    for model in (ours, GPT2.from_pretrained(tmp_path / "adapter")):
        assert relative_error(our_logits(model, ids), expected) < 1e-5


@pytest.mark.parametrize("layers", SHORT)
def test_peft_loads_what_we_save(base: Path, tmp_path: Path, layers: list[str]) -> None:
    ours = GPT2.from_pretrained(base)
    add_lora(ours, rank=4, alpha=12, layer_names=layers, base=str(base))
    rng = np.random.default_rng(2)
    for parameter in trained_parameters(ours):
        parameter.data = rng.normal(0, 0.1, parameter.shape).astype(np.float32)
    ours.save_pretrained(tmp_path)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(3, 20)
    assert relative_error(our_logits(ours, ids), their_logits(theirs, ids)) < 1e-5
    # and what PEFT writes of it is what we wrote
    theirs.save_pretrained(tmp_path / "again")
    written, again = (
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path, tmp_path / "again")
    )
    assert written == again
    known = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {**known, **config, "target_modules": None} == {**known, "target_modules": None}


@pytest.mark.parametrize("layers", SHORT)
def test_ten_steps_are_peft_s(base: Path, tmp_path: Path, layers: list[str]) -> None:
    """Gradients of the first step, then the losses of ten steps of AdamW."""
    theirs = their_lora(base, layers)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours := GPT2.from_pretrained(base).train(), tmp_path)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    their_adamw = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    our_adamw = optim.AdamW(trained_parameters(ours), lr=1e-2)
    assert len(trained) == len(our_adamw.parameters) == 2 * len(lora_layers(ours))
    for step in range(10):
        ids = np.random.default_rng(step).integers(0, SHAPE["vocab_size"], (4, 21))
        their_loss_now = their_loss(theirs, ids)
        their_loss_now.backward()
        our_loss_now = ours.loss(ids[:, :-1], ids[:, 1:])
        our_loss_now.backward()
        assert our_loss_now.item() == pytest.approx(their_loss_now.item(), rel=1e-4)
        for name, parameter in ours.named_parameters():
            if step == 0 and parameter.requires_grad:
                assert relative_error(parameter.grad, gradient_of(theirs, name)) < 1e-4, name
            assert parameter.requires_grad or parameter.grad is None, name
        for optimizer in (their_adamw, our_adamw):
            optimizer.step()
            optimizer.zero_grad()


def test_the_initial_values_are_distributed_as_peft_s(base: Path) -> None:
    ours = GPT2.from_pretrained(base)
    add_lora(ours, rank=8)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, fan_in_fan_out=True)
    theirs = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base), config)
    values = dict(theirs.named_parameters())
    layers = lora_layers(ours)
    assert len(layers) == SHAPE["n_layer"]  # PEFT's default layers
    for name, layer in layers.items():
        a, b = (
            values[f"base_model.model.{name}.lora_{x}.default.weight"].detach().numpy()
            for x in "AB"
        )
        assert not layer.lora_B.data.any() and not b.any()
        # of 384 uniform numbers
        assert np.abs(layer.lora_A.data).max() == pytest.approx(np.abs(a).max(), rel=0.05)
        assert layer.lora_A.data.std() == pytest.approx(a.std(), rel=0.1)


# ------------------------------------------------------------------------------------ classifiers

LENGTHS = np.array([7, 20, 1])  # of the texts in random_ids(3, 20)


def our_labels(model: GPT2Classifier, ids: np.ndarray) -> np.ndarray:
    with no_grad():
        return model(ids, LENGTHS).data


def their_labels(model: Any, ids: np.ndarray) -> np.ndarray:
    """Text by text, so that nothing is padded and the last token is the text's."""
    with torch.no_grad():
        rows = [
            model.eval()(torch.tensor(r[None, :n])).logits
            for r, n in zip(ids, LENGTHS, strict=True)
        ]
    return torch.cat(rows).numpy()


def test_peft_loads_the_adapter_of_our_classifier(base: Path, tmp_path: Path) -> None:
    ours = GPT2Classifier(GPT2.from_pretrained(base), ["ant", "bee", "cat"], seed=3)
    add_lora(ours, rank=4, alpha=12, base=str(base))
    rng = np.random.default_rng(2)
    for parameter in trained_parameters(ours):
        parameter.data = rng.normal(0, 0.1, parameter.shape).astype(np.float32)
    write_classifier(ours, tmp_path, ByteTokenizer())
    ids = random_ids(3, 20)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert relative_error(our_labels(ours, ids), their_labels(theirs, ids)) < 1e-5


def test_we_load_the_adapter_of_their_classifier(base: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=12, fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    ids, ours = random_ids(3, 20), load_classifier(tmp_path)
    assert ours.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert relative_error(our_labels(ours, ids), their_labels(theirs, ids)) < 1e-5
    fresh = GPT2Classifier(GPT2.from_pretrained(base), ours.labels)
    load_adapter(fresh, tmp_path)
    assert relative_error(our_labels(fresh, ids), their_labels(theirs, ids)) < 1e-5
    shutil.copytree(base, tmp_path / "base")  # as distilgpt2, which has one label in its config
    config = json.loads((base / "config.json").read_text()) | {"id2label": {"0": "LABEL_0"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert load_classifier(tmp_path).labels == ours.labels
