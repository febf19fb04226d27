"""Texts with labels as a task: what tells one from another, what is said of texts, the results."""

from __future__ import annotations

import numpy as np
import pytest

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning.classification import Classification, label_log_probs
from micrograd_gpt.tuning.classifier import GPT2Classifier
from micrograd_gpt.tuning.labelled import Example, Parts

TEXTS = ["one", "two and three", "four", "five is the last"]


def parts(labels: str = "abab", texts: list[str] = TEXTS) -> Parts:
    pairs = zip(texts, labels, strict=True)
    examples = [Example(text, label, f"line {i}") for i, (text, label) in enumerate(pairs, 1)]
    return Parts(examples, examples[:2], examples[1:3], ["a", "b"])


def task(given: Parts, longest: int = 10, **more: bool) -> Classification:
    return Classification(given, ByteTokenizer(), longest, 3, "data.tsv", **more)


def test_data_with_other_texts_or_labels_has_another_fingerprint() -> None:
    found = {
        task(given, longest).fingerprint()
        for given, longest in (
            (parts(), 10),
            (parts(), 9),
            (parts("abbb"), 10),
            (parts(texts=[*TEXTS[:3], "five"]), 10),
        )
    }
    assert len(found) == 4 and task(parts()).fingerprint() in found


def test_long_texts_are_cut_off_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    made = task(parts())
    assert made.lengths.tolist() == [3, 10, 4, 10]
    assert made.batch(np.array([0, 1])).ids.tolist() == [
        [*b"one", 0, 0, 0, 0, 0, 0, 0],
        [*b"two and th"],
    ]
    assert capsys.readouterr().err.splitlines() == [
        "note: 2 of 4 training texts are cut off after 10 tokens",
        "note: 1 of 2 validation texts are cut off after 10 tokens",
        "note: 1 of 2 test texts are cut off after 10 tokens",
    ]


def test_a_text_that_the_tokenizer_cannot_express_is_named() -> None:
    with pytest.raises(UserError, match=r"^line 2: the character 't'"):
        Classification(parts(), CharTokenizer.from_text("one"), 10, 3, "data.tsv")


def test_results_are_in_the_order_of_the_texts_whatever_the_batches() -> None:
    model = GPT2Classifier(GPT2(GPT2Config(1, 2, 8, 257, 16), seed=1), ["a", "b"], seed=2).eval()
    ids = [np.frombuffer(text.encode(), np.uint8).astype(int) for text in TEXTS]
    found = label_log_probs(model, ids, batch_size=2)
    np.testing.assert_allclose(np.exp(found).sum(1), 1)
    for row, one in zip(found, ids, strict=True):
        logits = model(one[None], [len(one)]).data[0].astype(float)
        np.testing.assert_allclose(row, logits - np.log(np.exp(logits).sum()), rtol=1e-5)


def test_the_validation_loss_is_the_mean_over_texts() -> None:
    made = task(parts(), longest=16)
    model = GPT2Classifier(GPT2(GPT2Config(1, 2, 8, 257, 16), seed=1), ["a", "b"], seed=2).eval()
    row = made.evaluate(model)
    batch = made.batch(np.array([0, 1]))  # the validation texts are the first two
    assert row["val_loss"] == pytest.approx(made.loss(model, batch).item(), rel=1e-5)
    given = model(batch.ids, batch.lengths).data.argmax(1)
    assert row["val_accuracy"] == (given == batch.labels).mean()
    assert made.scores(model, made.validation).accuracy == row["val_accuracy"]
