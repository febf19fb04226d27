"""Texts with labels as a task: what tells one from another, what is said of texts, the results."""

from __future__ import annotations

import numpy as np
import pytest

from micrograd_gpt.arrays.precision import compute_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from micrograd_gpt.tuning.classification import Classification, label_log_probs, label_texts
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
            (parts(), 20),
            (parts(texts=["onet", "wo and three", *TEXTS[2:]]), 20),  # the same one after another
        )
    }
    assert len(found) == 6 and task(parts()).fingerprint() in found


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


def test_what_is_left_of_a_cut_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    task(parts(), longest=1)
    assert "4 of 4 training texts are cut off after 1 token\n" in capsys.readouterr().err


def test_texts_to_label_that_no_memory_is_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2Classifier(GPT2(GPT2Config(1, 2, 8, 257, 16)), ["a", "b"]).eval()
    texts = [Example(f"text {i}", None, f"line {i}") for i in range(10_000)]
    monkeypatch.setattr("micrograd_gpt.arrays.memory.available_memory", lambda: 10**6)
    with pytest.raises(UserError, match=r"for 90,000 tokens at once.*: lower --batch-size"):
        next(label_texts(model, texts, ByteTokenizer(), 10**8))
    assert len([*label_texts(model, texts[:10], ByteTokenizer(), 10**8)]) == 10  # of so few


@pytest.mark.filterwarnings("error")  # NumPy's words on what overflows would come first
def test_labels_are_not_given_by_what_is_no_number() -> None:
    model = GPT2Classifier(GPT2(GPT2Config(1, 2, 8, 257, 16)), ["a", "b"]).eval()
    texts = [Example("text", None, "line 1")]
    model.score.weight.data *= 1e7
    [*label_texts(model, texts, ByteTokenizer(), 1)]
    with (
        compute_in("float16"),
        pytest.raises(UserError, match=r"not finite in float16, .*: try bfloat16 or float32"),
    ):
        next(label_texts(model, texts, ByteTokenizer(), 1))
    model.score.weight.data[0, 0] = np.nan
    with pytest.raises(UserError, match=r"not finite: its weights are damaged, or .* edited"):
        next(label_texts(model, texts, ByteTokenizer(), 1))


def test_unknown_words_are_said_of_what_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    words = WordTokenizer.from_text("one two and")
    Classification(parts(), words, 10, 3, "data.tsv")
    said = "note: the training texts: 6 of 14 tokens are words that the tokenizer does not know"
    assert [line.split(", all")[0] for line in capsys.readouterr().err.splitlines()] == [said]
    model = GPT2Classifier(GPT2(GPT2Config(1, 2, 8, words.vocab_size, 16)), ["a", "b"]).eval()
    list(label_texts(model, parts().train * 40, words, 1))  # which are labelled 64 at a time
    said = "note: the given texts have words that the tokenizer does not know, all as one\n"
    assert capsys.readouterr().err == said


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
