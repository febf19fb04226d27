"""Instructions: from a file to batches, and the loss on answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt.layers import IGNORE
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import Template
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning.instructions import (
    Batches,
    Example,
    Turn,
    answer_loss,
    encode,
    encode_all,
    read_conversations,
)

BYTES = ByteTokenizer()
END = BYTES.end_of_text
SHORT = Template("{system}\n\n{instruction} {input}={output}")


def written(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def chat(*said: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


# ------------------------------------------------------------------------------------------ files


def test_instructions_with_and_without_input(tmp_path: Path) -> None:
    items = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "output": "Hi", "more": 1},
        {"instruction": "Ask.", "input": None, "output": ""},
    ]
    expected = [[Turn("Add.", "3", "1 2")], [Turn("Greet.", "Hi")], [Turn("Ask.", "")]]
    assert read_conversations(written(tmp_path, items)) == expected
    lines = "\ufeff" + "\n\n".join(map(json.dumps, items)) + "\r\n"
    assert read_conversations(written(tmp_path, lines, "data.jsonl")) == expected


def test_messages(tmp_path: Path) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = written(tmp_path, [chat(*said), chat(("system", "s"), *said)])
    plain, with_system = read_conversations(path)
    assert plain == [Turn("a", "b"), Turn("c", "d")]
    assert with_system == [Turn("a", "b", system="s"), Turn("c", "d")]


A = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.json has no examples"),
        ([], "data.json has no examples"),
        ({"data": [A]}, "data.json holds no list of examples"),
        ("[1,", r"data.json: this cannot be read as JSON \(.*\); correct it"),
        ("[" * 100_000, "cannot be read as JSON"),
        ([A, "b"], "data.json, example 2 is not an object"),
        ([A, {"instruction": "a"}], r"example 2 has no 'output' \(fields: instruction\)"),
        ([{"text": "a", "output": "b"}], r"has no 'instruction' \(fields: text, output\)"),
        ([{}], r"has no 'instruction' \(fields: none\)"),
        ([{**A, "output": 3}], "example 1: 'output' is 3, and must be a text"),
        ([{**A, "instruction": ""}], "example 1: the instruction is empty"),
        ([chat(("human", "a"), ("assistant", "b"))], "example 1: unknown role 'human'"),
        ([chat((["user"], "a"))], r"unknown role \['user'\]"),
        ([chat(("user", "a"))], "the roles are user; "),
        ([chat()], "the roles are none; "),
        ([chat(("system", "a"))], "the roles are system; "),
        ([chat(("assistant", "b"), ("user", "a"))], "the roles are assistant, user; "),
        ([chat(("user", "a"), ("system", "s"), ("assistant", "b"))], "take turns"),
        ([chat(("user", ["a"]), ("assistant", "b"))], r"'content' is \[\"a\"\]"),
        ([{"messages": "a"}], "messages are a list of objects"),
    ],
)
def test_what_cannot_be_learned_from(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_conversations(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, f"{json.dumps(A)}\n\n{{", "data.jsonl")
    with pytest.raises(UserError, match=r"data.jsonl, line 3: this cannot be read as JSON"):
        read_conversations(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        read_conversations(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match=r"latin.json is not UTF-8 text \(byte 2\)"):
        read_conversations(tmp_path / "latin.json")


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


def test_end_of_text_that_is_typed_ends_nothing() -> None:
    example = encode([Turn("<|endoftext|>", "<|endoftext|>")], SHORT, BYTES)
    assert (example.ids == END).sum() == 1


def test_what_is_too_long_or_unanswered_is_left_out_and_counted() -> None:
    conversations = [[Turn("a", "b" * n)] for n in (1, 3, 4, 0)]  # and "a =", and end-of-text
    encoded = encode_all(conversations, SHORT, BYTES, block_size=6)
    assert [len(example.ids) for example in encoded.examples] == [5, 7]
    assert (encoded.too_long, encoded.unanswered) == (1, 1)
    with pytest.raises(UserError, match="longer than --block-size 3: the shortest has 4 tokens"):
        encode_all(conversations, SHORT, BYTES, block_size=3)
    with pytest.raises(UserError, match="no example has an output"):
        encode_all([[Turn("a", "")]], SHORT, BYTES, block_size=6)


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    with pytest.raises(UserError, match="the char tokenizer has no end-of-text token"):
        encode_all([[Turn("a", "b")]], SHORT, CharTokenizer("ab ="), block_size=6)


# ---------------------------------------------------------------------------------------- batches


def random_examples(count: int, seed: int = 0, vocabulary: int = 11) -> list[Example]:
    """Examples of 3 to 15 tokens, the latter half of each counted."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 16, count)
    return [
        Example(rng.integers(1, vocabulary, n, dtype=np.int32), np.arange(n) >= n // 2)
        for n in lengths
    ]


def rows(ids: np.ndarray, targets: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """The inputs and targets of each example, without the padding, which is 0."""
    lengths = (ids != 0).sum(axis=1)
    return [(i[:n].tolist(), t[:n].tolist()) for i, t, n in zip(ids, targets, lengths, strict=True)]


def test_a_batch_is_padded_on_the_right_and_only_answers_are_targets() -> None:
    first = Example(np.array([5, 6, 7], np.int32), np.array([False, False, True]))
    second = Example(
        np.array([1, 2, 3, 4, 5], np.int32), np.array([True, False, False, True, True])
    )
    ids, targets = next(Batches([second, first], padding=9).in_order(2))
    assert ids.tolist() == [[5, 6, 9, 9], [1, 2, 3, 4]]
    assert targets.tolist() == [[IGNORE, 7, IGNORE, IGNORE], [IGNORE, IGNORE, 4, 5]]
    assert ids.dtype == targets.dtype == np.int64


def test_every_epoch_has_each_example_once_in_another_order() -> None:
    batches = Batches(random_examples(23))
    assert batches.per_epoch(4) == 6
    epochs = [
        [row for number in range(start, start + 6) for row in rows(*batches.batch(3, number, 4))]
        for start in (0, 6)
    ]
    in_order = [row for batch in batches.in_order(4) for row in rows(*batch)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(in_order)


def test_a_batch_is_a_function_of_the_seed_and_its_number() -> None:
    examples = random_examples(23)
    batches, others = Batches(examples), Batches(examples)
    for number in (13, 2):
        for ours, theirs in zip(
            batches.batch(3, number, 4), others.batch(3, number, 4), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(batches.batch(4, 2, 4)[0], batches.batch(3, 2, 4)[0])


def test_batches_have_like_lengths() -> None:
    examples = random_examples(400)
    batches = Batches(examples)
    padded = sum(batches.batch(0, number, 8)[0].size for number in range(50))
    assert padded < 1.05 * sum(len(example.ids) - 1 for example in examples)


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": False}])
def test_the_loss_is_the_models_without_the_work_for_prompts(variant: dict[str, Any]) -> None:
    ids, targets = Batches(random_examples(5)).batch(0, 0, 5)
    losses, gradients = [], []
    for loss_of in (answer_loss, lambda model, *batch: model.loss(*batch)):
        model = make_model(factor=1, **variant)
        loss = loss_of(model, ids, targets)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        scale = np.abs(gradients[1][name]).max()
        np.testing.assert_allclose(gradient, gradients[1][name], atol=1e-5 * scale, err_msg=name)


def test_padding_changes_no_loss_and_no_gradient() -> None:
    examples = random_examples(5)
    ids, targets = Batches(examples).batch(0, 0, 5)
    together, apart = make_model(factor=1), make_model(factor=1)
    loss = answer_loss(together, ids, targets)
    loss.backward()
    total, count = 0.0, (targets != IGNORE).sum()
    for example in examples:
        batch = next(Batches([example]).in_order(1))
        part = answer_loss(apart, *batch) * ((batch[1] != IGNORE).sum() / count)
        part.backward()
        total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        scale = np.abs(theirs.grad).max()
        np.testing.assert_allclose(ours.grad, theirs.grad, atol=1e-5 * scale, err_msg=name)
