"""The classifier live against Transformers' GPT2ForSequenceClassification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import no_grad, optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning.batches import padded
from micrograd_gpt.tuning.classification import encode, label_texts
from micrograd_gpt.tuning.classifier import (
    GPT2Classifier,
    load_classifier,
    set_layers,
    write_classifier,
)
from micrograd_gpt.tuning.labelled import Example

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENIZER = ByteTokenizer()
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 257, "n_positions": 40}
LABELS = ["a b", "c", "d"]
TEXTS = ["Win cash!", "x", "<|endoftext|>", "ends with it<|endoftext|>", "grün 😀", "\x00\x00"]


def relative_error(ours: np.ndarray, theirs: Any) -> float:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier of ours with biases and LayerNorms moved off their 0 and 1."""
    model = GPT2Classifier(GPT2(GPT2Config(**SHAPE), seed=1), LABELS, seed=2)
    rng = np.random.default_rng(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.05 * rng.standard_normal(parameter.shape, np.float32)
    write_classifier(model, tmp_path, TOKENIZER)
    return tmp_path


def theirs_in(folder: Path) -> Any:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is transformers.GPT2ForSequenceClassification
    return model.eval()


def batch_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    examples = [Example(text, None, text) for text in texts]
    ids = encode(examples, TOKENIZER, 40, "test")
    return padded(ids, TOKENIZER.end_of_text), np.array([*map(len, ids)])


def test_logits_loss_and_every_gradient(folder: Path) -> None:
    ours, theirs = load_classifier(folder), theirs_in(folder)
    ids, lengths = batch_of(TEXTS)
    labels = np.array([0, 1, 2, 0, 1, 2])
    result = theirs(torch.tensor(ids), labels=torch.tensor(labels))
    result.loss.backward()
    assert relative_error(ours(ids, lengths).data, result.logits.detach()) < 1e-5
    loss = ours.loss(ids, lengths, labels)
    loss.backward()
    assert loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-4, name


@pytest.mark.parametrize("which", ["all", "last", "head"])
def test_ten_adamw_steps(folder: Path, which: str) -> None:
    ours, theirs = load_classifier(folder), theirs_in(folder)
    set_layers(ours, which)
    learning = {name for name, p in ours.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, p in theirs.named_parameters():
        p.requires_grad = name in learning
        groups[p.ndim < 2]["params"] += [p] if name in learning else []
    groups = [group for group in groups if group["params"]]
    their_optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.1)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    optimizer = optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.1)
    rng, losses = np.random.default_rng(4), []
    for _ in range(10):
        ids, lengths = batch_of([TEXTS[i] for i in rng.integers(0, 6, 4)])
        labels = rng.integers(0, 3, 4)
        their_loss = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss
        their_loss.backward()
        loss = ours.loss(ids, lengths, labels)
        loss.backward()
        losses.append(loss.item())
        assert loss.item() == pytest.approx(their_loss.item(), rel=1e-4)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert optim.clip_grad_norm(parameters, 0.5) == pytest.approx(norm.item(), rel=1e-4)
        their_optimizer.step()
        their_optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(losses)) == 10


def test_their_tokenizer_and_pipeline_give_our_results(folder: Path) -> None:
    """Also for a text that ends with the characters of the token that is their padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids, lengths = batch_of(TEXTS)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="np")
    np.testing.assert_array_equal(encoded["input_ids"], ids)
    assert encoded["attention_mask"].sum(1).tolist() == lengths.tolist()
    ours = load_classifier(folder)
    results = [*label_texts(ours, [Example(t, None, t) for t in TEXTS], TOKENIZER, 4)]
    pipe = transformers.pipeline("text-classification", str(folder), top_k=None, batch_size=6)
    for result, theirs in zip(results, pipe(TEXTS), strict=True):
        assert theirs[0]["label"] == result["label"]
        for row in theirs:
            assert result["probabilities"][row["label"]] == pytest.approx(row["score"], rel=1e-4)


def test_without_a_padding_token_they_take_one_text_at_a_time(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text("abcdefghij")
    config = GPT2Config(**{**SHAPE, "vocab_size": tokenizer.vocab_size})
    model = GPT2Classifier(GPT2(config, seed=1), LABELS, seed=2).eval()
    write_classifier(model, tmp_path, tokenizer)
    theirs, encode_theirs = (
        theirs_in(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    for text in ("abc", "jjjj", "aaaa"):
        ids = encode_theirs(text, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == tokenizer.encode(text).tolist()
        with torch.no_grad(), no_grad():
            ours = model(ids.numpy(), [len(text)]).data
            assert relative_error(ours, theirs(ids).logits) < 1e-5


def test_we_load_what_transformers_saves(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        **SHAPE, id2label={0: "no", 1: "yes"}, pad_token_id=256, bos_token_id=256, eos_token_id=256
    )
    theirs = transformers.GPT2ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_classifier(tmp_path)
    assert ours.labels == ["no", "yes"]
    ids, lengths = batch_of(TEXTS)
    with torch.no_grad(), no_grad():
        logits = theirs(torch.tensor(ids)).logits
    assert relative_error(ours(ids, lengths).data, logits) < 1e-5


def test_a_new_head_is_drawn_as_transformers_draws_it() -> None:
    body = GPT2(GPT2Config(1, 1, 512, 10, 10))
    ours = GPT2Classifier(body, [*map(str, range(40))], seed=1).score.weight.data
    assert abs(ours.mean()) < 1e-3 and ours.std() == pytest.approx(0.02, rel=0.03)
