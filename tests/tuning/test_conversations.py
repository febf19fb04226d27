"""Conversations: read from files of two forms, refused where something is wrong, and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tuning.conversations import Turn, read_conversations, read_parts, split


def written(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def chat(*said: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_instructions_with_and_without_input(tmp_path: Path) -> None:
    items = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "output": "Hi", "more": 1},
        {"instruction": "Ask.", "input": None, "output": ""},
    ]
    expected = [[Turn("Add.", "3", "1 2")], [Turn("Greet.", "Hi")], [Turn("Ask.", "")]]
    assert read_conversations(written(tmp_path, items)) == expected
    lines = "\ufeff" + "\n\n".join(map(json.dumps, items)) + "\r\n"
    for name in ("data.jsonl", "data.json"):  # as many call a file of lines
        assert read_conversations(written(tmp_path, lines, name)) == expected


def test_messages(tmp_path: Path) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = written(tmp_path, [chat(*said), chat(("system", "s"), *said)])
    plain, with_system = read_conversations(path)
    assert plain == [Turn("a", "b"), Turn("c", "d")]
    assert with_system == [Turn("a", "b", system="s"), Turn("c", "d")]


def test_an_answer_of_weight_0_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As OpenAI's files mark an answer that is not to be learned."""
    talk = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    talk["messages"][1]["weight"], talk["messages"][3]["weight"] = 0, 1
    (turns,) = read_conversations(written(tmp_path, [talk]))
    assert turns == [Turn("a", "b", counts=False), Turn("c", "d")]
    assert capsys.readouterr().err == ""
    talk["messages"][1]["weight"] = 0.5
    path = written(tmp_path, [talk, {**A, "instruction": "z"}])
    read_parts(path, None)
    assert f"note: {path}: 'weight' left out" in capsys.readouterr().err


A = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.json has no items"),
        ([], "data.json has no items"),
        ({"data": [A]}, "data.json holds no list"),
        ("[1,", r"data.json: this is not JSON \(.*\): correct it"),
        ("[" * 100_000, "this is not JSON"),
        ([{**A, "output": "\ud800"}], "item 1: there is half a character"),
        ([A, "b"], "data.json, item 2: this is not a JSON object"),
        ([A, {"instruction": "a"}], r"item 2 has no 'output' \(fields: instruction\)"),
        ([{"text": "a", "output": "b"}], r"has no 'instruction' \(fields: text, output\)"),
        ([{"conversations": []}], "each example needs instruction and output, or messages of a"),
        ([{}], r"has no 'instruction' \(fields: none\)"),
        ([{**A, "output": 3}], "item 1: 'output' is 3, and must be a text"),
        ([{**A, "instruction": ""}], "item 1: the instruction is empty"),
        ([chat(("human", "a"), ("assistant", "b"))], "item 1: unknown role 'human'"),
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
    with pytest.raises(UserError, match=r"data.jsonl, line 3: this is not JSON"):
        read_conversations(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    table = written(tmp_path, "instruction,output\na,b\n", "data.csv")
    with pytest.raises(UserError, match=r"data\.csv is a table: convert it to \.jsonl"):
        read_conversations(table)
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        read_conversations(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match=r"latin\.json is not UTF-8 text: byte 0xff"):
        read_conversations(tmp_path / "latin.json")
    assert read_conversations(written(tmp_path, [A]), "latin-1") == [[Turn("a", "b")]]


# ------------------------------------------------------------------------------------------ parts


def test_a_tenth_is_for_validation_and_nothing_is_in_both_parts() -> None:
    conversations = [[Turn(f"{i % 50}", str(i))] for i in range(200)]
    train, validation = split(conversations)
    assert sorted(train + validation) == sorted(conversations)
    assert {c[0].instruction for c in train}.isdisjoint(c[0].instruction for c in validation)
    assert len(validation) == 20 and split(conversations) == (train, validation)
    assert len(split([[Turn(str(i), "")] for i in range(20_000)])[1]) == 1000


def test_parts_from_one_file_or_two(tmp_path: Path) -> None:
    items = [{"instruction": f"{i}", "output": "b"} for i in range(3)]
    path = written(tmp_path, items)
    assert [len(part) for part in read_parts(path, None)] == [2, 1]
    other = written(tmp_path, items[:2], "other.json")
    assert [len(part) for part in read_parts(path, other)] == [3, 2]
    with pytest.raises(UserError, match="has no two different instructions"):
        read_parts(written(tmp_path, [A, {**A, "output": "c"}]), None)


def test_what_is_validated_on_as_well_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [{"instruction": f"{i}", "output": "b"} for i in range(3)]
    path = written(tmp_path, items)
    other = written(tmp_path, [{**items[0], "output": "c"}, A], "other.json")
    read_parts(path, other)
    said = "warning: 1 of 2 examples to validate on are learned from as well\n"
    assert capsys.readouterr().err == said
    read_parts(path, written(tmp_path, [A], "other.json"))
    assert capsys.readouterr().err == ""


def test_conversations_that_only_begin_alike_are_not_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hello = [("user", "Hi"), ("assistant", "Hello")]
    first, second, again = (
        chat(*hello, ("user", asked), ("assistant", answer)) for asked, answer in ("aA", "bB", "aC")
    )
    path = written(tmp_path, [first])
    read_parts(path, written(tmp_path, [second], "other.json"))
    assert capsys.readouterr().err == ""
    read_parts(path, written(tmp_path, [second, again], "other.json"))
    assert "warning: 1 of 2 examples to validate on are learned" in capsys.readouterr().err


def test_fields_that_are_left_out_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [{**A, "instruction": f"{i}", "context": "c", "input": "d", "id": ""} for i in range(3)]
    talk = chat(("user", "a"), ("assistant", "b")) | {"input": "x", "role": "y"}
    talk["messages"][1]["end_turn"] = True
    path = written(tmp_path, [*items, talk])
    read_parts(path, None)
    expected = f"note: {path}: 'context', 'end_turn', 'input', 'role' left out: nothing is "
    expected += "learned from such fields\n"
    assert capsys.readouterr().err == expected
