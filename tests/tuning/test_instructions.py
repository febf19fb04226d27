"""Instructions: from conversations to batches, and the loss on answers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt.layers import IGNORE
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import Template
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from micrograd_gpt.tuning.conversations import Turn
from micrograd_gpt.tuning.instructions import (
    Example,
    Instructions,
    batch_of,
    encode,
)

BYTES = ByteTokenizer()
END = BYTES.end_of_text
SHORT = Template("{system}\n\n{instruction} {input}={output}")


# ----------------------------------------------------------------------------------------- tokens


def test_answers_count_and_end_with_end_of_text() -> None:
    turns = [Turn("a", "bc", "d", "s"), Turn("e", "f")]
    example = encode(turns, SHORT, BYTES)
    assert example.ids.tolist() == [*b"s\n\na d=bc", END, *b"e =f", END]
    assert [bool(counts) for counts in example.counted] == [
        *[False] * len("s\n\na d="),
        *[True] * len("bc|"),
        *[False] * len("e ="),
        *[True] * len("f|"),
    ]
    assert encode(turns, SHORT, BYTES, loss_on="all").counted.all()


def test_an_answer_that_does_not_count_is_only_read(capsys: pytest.CaptureFixture[str]) -> None:
    turns = [Turn("a", "b", counts=False), Turn("c", "d")]
    counted = encode(turns, SHORT, BYTES, loss_on="all").counted
    assert encode(turns, SHORT, BYTES).counted.tolist() == [False] * 8 + [True] * 2
    assert counted.tolist() == [True] * 3 + [False] * 2 + [True] * 5
    some = [[Turn("e", "f")], [Turn("g", "h", counts=False)]]
    assert len(make_task(some, some[:1]).train) == 1
    said = "note: 1 of 2 training examples have only answers of weight 0: left out\n"
    assert capsys.readouterr().err == said


def test_end_of_text_that_is_typed_ends_nothing() -> None:
    example = encode([Turn("<|endoftext|>", "<|endoftext|>")], SHORT, BYTES)
    assert (example.ids == END).sum() == 1


def make_task(*parts: list[list[Turn]], longest: int = 6, tokenizer: Any = BYTES) -> Instructions:
    return Instructions(*parts, SHORT, tokenizer, longest, 2, "answers", "data.json")


def test_what_is_too_long_or_unanswered_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversations = [[Turn("a", "b" * n)] for n in (1, 3, 4, 0)]  # and "a =", and end-of-text
    task = make_task(conversations, conversations[:2])
    assert task.lengths.tolist() == [4, 6]
    assert task.amount().startswith("2 examples of data.json, 10 tokens")
    assert make_task(conversations[:1], conversations[:1]).amount().startswith("1 example of data")
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "note: 1 of 4 training examples have an empty output: left out",
        "note: 1 of 4 training examples are longer than 6 tokens: left out",
    ]
    with pytest.raises(UserError, match=r"all training examples are too long: .* 4 tokens where 3"):
        make_task(conversations, conversations, longest=3)
    with pytest.raises(
        UserError,
        match=r"no validation example has an output that counts: .*, or give a --validation FILE",
    ):
        make_task(conversations, [[Turn("a", "")], [Turn("a", "b", counts=False)]])


def test_unknown_words_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    some = [[Turn("one", "two")]]
    make_task(some, some, longest=9, tokenizer=WordTokenizer.from_text("one = "))
    said = "examples and their template: 1 of 5 tokens are words that the tokenizer does not know"
    assert capsys.readouterr().err == "".join(
        f"note: the {what} {said}, all as one\n" for what in ("training", "validation")
    )


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    some = [[Turn("a", "b")]]
    with pytest.raises(UserError, match="the char tokenizer has no end-of-text token"):
        make_task(some, some, tokenizer=CharTokenizer("ab"))  # not even the template's characters


# ---------------------------------------------------------------------------------------- batches


def random_examples(count: int, seed: int = 0, vocabulary: int = 11) -> list[Example]:
    """Examples of 3 to 15 tokens, the latter half of each counted."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 16, count)
    return [
        Example(rng.integers(1, vocabulary, n, dtype=np.int32), np.arange(n) >= n // 2)
        for n in lengths
    ]


def test_a_batch_is_padded_on_the_right_and_only_answers_are_targets() -> None:
    first = Example(np.array([5, 6, 7], np.int32), np.array([False, False, True]))
    second = Example(np.array([1, 2, 3, 4, 5], np.int32), np.array([1, 0, 0, 1, 1], bool))
    batch = batch_of([first, second])
    assert batch.ids.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert batch.targets.tolist() == [[IGNORE, 7, IGNORE, IGNORE], [IGNORE, IGNORE, 4, 5]]
    assert (batch.count, batch.tokens) == (3, 6)
    assert batch.ids.dtype == batch.targets.dtype == np.int64


# ------------------------------------------------------------------------------------------- loss


def test_padding_changes_no_loss_and_no_gradient() -> None:
    examples = random_examples(5)
    batch = batch_of(examples)
    together, apart = make_model(factor=1), make_model(factor=1)
    loss = together.loss(batch.ids, batch.targets)
    loss.backward()
    total = 0.0
    for example in examples:
        alone = batch_of([example])
        part = apart.loss(alone.ids, alone.targets) * (alone.count / batch.count)
        part.backward()
        total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        scale = np.abs(theirs.grad).max()
        np.testing.assert_allclose(ours.grad, theirs.grad, atol=1e-5 * scale, err_msg=name)


def test_validation_is_the_mean_over_all_tokens_that_count() -> None:
    model = make_model(factor=1, vocab_size=257, n_positions=64)
    conversations = [[Turn("a", "b" * n)] for n in (1, 3, 9, 4, 2)]
    task = make_task(conversations, conversations, longest=64)
    batch = task.batch(np.arange(5))
    expected = model.loss(batch.ids, batch.targets).item()
    assert task.evaluate(model)["val_loss"] == pytest.approx(expected, rel=1e-6)
