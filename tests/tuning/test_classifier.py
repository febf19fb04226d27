"""The classifier: what its head reads, which layers learn, what its folder says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt import optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config, Transformer
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning.classifier import (
    GPT2Classifier,
    build_classifier,
    load_classifier,
    set_layers,
    write_classifier,
)
from micrograd_gpt.weights.names import open_language_model, open_model

LABELS = ["ham", "spam", "other"]
IDS = np.random.default_rng(0).integers(0, 11, (4, 9))
LENGTHS = np.array([9, 1, 4, 6])


def classifier(**config: object) -> GPT2Classifier:
    return GPT2Classifier(make_model(**config), LABELS, seed=1)


def test_the_head_reads_the_last_token_of_each_text() -> None:
    model = classifier()
    logits = model(IDS, LENGTHS).data
    assert logits.shape == (4, 3)
    for i, length in enumerate(LENGTHS):
        alone = model(IDS[i : i + 1, :length], [length]).data
        np.testing.assert_allclose(logits[i : i + 1], alone, rtol=1e-5, atol=1e-6)
        shorter = model(IDS[i : i + 1, :length], [max(1, length - 1)]).data
        assert length == 1 or not np.allclose(shorter, alone, rtol=1e-2)


@pytest.mark.parametrize("padding", [0, 5, 10])
def test_padding_changes_neither_results_nor_gradients(padding: int) -> None:
    model, labels = classifier(), np.array([0, 1, 2, 1])
    results = []
    for fill, more in ((3, 0), (padding, 4)):
        ids = np.full((4, 9 + more), fill)
        for row, given, length in zip(ids, IDS, LENGTHS, strict=True):
            row[:length] = given[:length]
        loss = model.loss(ids, LENGTHS, labels)
        loss.backward()
        results.append([loss.data, *(p.grad for p in model.parameters())])
        for parameter in model.parameters():
            parameter.grad = None
    for ours, theirs in zip(*results, strict=True):
        error = np.abs(ours - theirs).max()
        assert error < 1e-5 * np.abs(theirs).max()  # sums of more rows, some of them 0


def test_ids_may_be_a_list() -> None:
    model = classifier()
    np.testing.assert_array_equal(model(IDS.tolist(), LENGTHS).data, model(IDS, LENGTHS).data)
    with pytest.raises(ValueError, match=r"do not fit token ids of shape \(9,\)"):
        model(IDS[0], [9])


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2, -1], ["ant", "bee", "cat", "ant"]])
def test_labels_that_are_no_numbers_of_theirs(labels: list[object]) -> None:
    with pytest.raises(ValueError, match="labels are given as numbers from 0 to 2, not"):
        classifier().loss(IDS, LENGTHS, labels)


def test_a_label_of_minus_100_is_ignored() -> None:
    model = classifier()
    expected = model.loss(IDS[:2], LENGTHS[:2], [0, 1]).item()
    found = model.loss(IDS, LENGTHS, [0, 1, -100, -100]).item()
    assert found == pytest.approx(expected, rel=1e-6)  # means of as many numbers, in float32


@pytest.mark.parametrize("lengths", [[9, 1, 4], [9, 0, 4, 6], [9, 1, 4, 10], [9.0, 1, 4, 6]])
def test_lengths_that_do_not_fit(lengths: list[float]) -> None:
    with pytest.raises(ValueError, match=r"lengths .* do not fit token ids of shape \(4, 9\)"):
        classifier()(IDS, lengths)


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "a"]])
def test_labels_that_make_no_classifier(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="two different labels or more"):
        GPT2Classifier(make_model(), labels)


def test_which_layers_learn() -> None:
    head = {"score.weight"}
    last = {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    model = classifier()
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    last |= {name for name in before if name.startswith("transformer.h.1.")}
    learning = {"head": head, "last": head | last, "all": set(before)}
    for which, expected in learning.items():
        model = classifier()
        set_layers(model, which)
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        assert len(optimizer.m) == len(expected)
        model.loss(IDS, LENGTHS, [0, 1, 2, 1]).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
        optimizer.step()
        changed = {n for n, p in model.named_parameters() if not np.array_equal(p.data, before[n])}
        assert changed == expected
    with pytest.raises(ValueError, match="'none' is none of all, last, head"):
        set_layers(model, "none")


def test_the_gradients_of_the_last_layers_are_those_of_all() -> None:
    """Freezing saves the work of the others, and changes nothing else."""
    gradients = {}
    for which in ("all", "last"):
        model = classifier()
        set_layers(model, which)
        model.loss(IDS, LENGTHS, [0, 1, 2, 1]).backward()
        gradients[which] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, grad in gradients["last"].items():
        np.testing.assert_array_equal(grad, gradients["all"][name], err_msg=name)


def test_a_folder_of_ours(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    body = GPT2(GPT2Config(1, 2, 8, tokenizer.vocab_size, 16), seed=3)
    model = GPT2Classifier(body, LABELS, seed=4, longest=12)
    write_classifier(model, tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["id2label"] == {"0": "ham", "1": "spam", "2": "other"}
    assert config["label2id"] == {"ham": 0, "spam": 1, "other": 2}
    assert config["pad_token_id"] == tokenizer.end_of_text == 256
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<|endoftext|>" and settings["model_max_length"] == 12
    again = load_classifier(tmp_path)
    assert (again.labels, again.longest) == (LABELS, 12)
    theirs = dict(again.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.data, theirs[name].data)
    assert not again.training


def test_a_tokenizer_without_a_token_to_spare_has_no_padding(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text("abcdefghijk")
    write_classifier(classifier(), tmp_path, tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] is None
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": False, "activation_function": "relu"}, {"norm_position": "post"}],
)
def test_a_variant_keeps_its_architecture(tmp_path: Path, config: dict[str, object]) -> None:
    model = classifier(**config).eval()
    write_classifier(model, tmp_path, CharTokenizer.from_text("abcdefghijk"))
    again = load_classifier(tmp_path)
    np.testing.assert_array_equal(again(IDS, LENGTHS).data, model(IDS, LENGTHS).data)


def test_the_head_of_a_language_model_is_left_out(tmp_path: Path) -> None:
    """As of the base of an adapter, in which edited code may have given it a bias."""
    write_classifier(model := classifier().eval(), tmp_path, CharTokenizer.from_text("abcdefghijk"))
    weights = open_model(str(tmp_path))
    wte = weights.tensors["transformer.wte.weight"]
    more = {"lm_head.weight": wte, "lm_head.bias": wte}
    again = build_classifier(dataclasses.replace(weights, tensors=weights.tensors | more))
    np.testing.assert_array_equal(again(IDS, LENGTHS).data, model(IDS, LENGTHS).data)


def test_blocks_that_share_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ALBERT, of an edited gpt2.py: the file has each block, and both ways read it."""
    make = Transformer.__init__

    def shared(self: Transformer, *args: Any) -> None:
        make(self, *args)
        self.h = self.h[:1] * len(self.h)

    with monkeypatch.context() as edit:
        edit.setattr(Transformer, "__init__", shared)
        write_classifier(model := classifier().eval(), tmp_path, CharTokenizer.from_text("abcde"))
        shared_again = load_classifier(tmp_path)
    assert len(shared_again.parameters()) == len(model.parameters())
    for again in (shared_again, load_classifier(tmp_path)):
        np.testing.assert_array_equal(again(IDS, LENGTHS).data, model(IDS, LENGTHS).data)


def changed_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "language")
    with pytest.raises(UserError, match="is a language model, not a classifier: make one of it"):
        load_classifier(tmp_path / "language")
    folder = tmp_path / "classifier"
    write_classifier(classifier(), folder, CharTokenizer.from_text("abcdefghijk"))
    with pytest.raises(UserError, match="is a classifier, which labels texts and writes none"):
        open_language_model(str(folder))
    changed_config(folder, problem_type="regression")
    with pytest.raises(UserError, match="not regression"):
        load_classifier(folder)
    four = {"0": "a", "1": "b", "2": "c", "3": "d"}
    for wrong in (
        {"0": "a", "1": "b"},
        {"0": "a", "1": "a", "2": "b"},
        ["a", "b", "c"],
        "abc",
        four,
        {"0": "a", "1": None, "2": "c"},
    ):
        changed_config(folder, problem_type=None, id2label=wrong)
        with pytest.raises(UserError, match="id2label does not name 3 labels"):
            load_classifier(folder)
    changed_config(folder, id2label=None)
    assert load_classifier(folder).labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
