"""Texts with labels from files: what is read, what is refused in one line, how it is split."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tuning.labelled import (
    Columns,
    Example,
    label_names,
    label_numbers,
    read_examples,
    read_parts,
    read_texts,
    split,
    warn_if_unbalanced,
)


def examples_in(path: Path, content: str | bytes, columns: Columns = Columns()) -> list[tuple]:  # noqa: B008
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(example.text, example.label) for example in read_examples(path, columns)]


HAM = [("Hi", "ham"), ('"Win" now', "spam"), ("ok", "ham"), ("call", "spam")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'ham\tHi\nspam\t"Win" now\nham\tok\nspam\tcall\n'),  # as the SMS Spam Collection
        ("a.tsv", 'Hi\tham\r\n"Win" now\tspam\r\n\r\nok\tham\r\ncall\tspam'),
        ("a.tsv", 'id\tlabel\ttext\n1\tham\tHi\n2\tspam\t"Win" now\n3\tham\tok\n4\tspam\tcall\n'),
        ("a.csv", '\ufefflabel,text\nham,Hi\nspam,"""Win"" now"\nham,ok\nspam,call\n'),
        (
            "a.jsonl",
            '{"text": "Hi", "label": "ham"}\n{"label": "spam", "text": "\\"Win\\" now"}\n\n'
            '{"text": "ok", "label": "ham", "more": 1}\n{"text": "call", "label": "spam"}\n',
        ),
    ],
)
def test_the_formats(tmp_path: Path, name: str, content: str) -> None:
    assert examples_in(tmp_path / name, content) == HAM


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "a.parquet"
    texts, labels = map(list, zip(*HAM, strict=True))
    write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": texts, "label": labels}), path)
    assert [(e.text, e.label) for e in read_examples(path, Columns())] == HAM
    with pytest.raises(UserError, match=r"has no 'topic', only 'id', 'text', 'label': name"):
        read_examples(path, Columns(label="topic"))


def test_columns_of_other_names_and_fields_with_line_ends(tmp_path: Path) -> None:
    content = 'v1,v2\na,"one\ntwo, three"\nb,four\n'
    columns = Columns("v2", "v1", True)
    assert examples_in(tmp_path / "a.csv", content, columns) == [
        ("one\ntwo, three", "a"),
        ("four", "b"),
    ]


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    content = (
        '{"text": "a", "label": 10}\n{"text": "b", "label": 2.0}\n{"text": "c", "label": "1"}\n'
    )
    assert [label for _, label in examples_in(tmp_path / "a.jsonl", content)] == ["10", "2", "1"]
    examples = read_examples(tmp_path / "a.jsonl", Columns())
    assert label_names(examples) == ["1", "2", "10"]  # by their size
    assert label_numbers(examples, ["1", "2", "10"]).tolist() == [2, 1, 0]
    assert examples_in(tmp_path / "b.jsonl", '{"text": "a", "label": true}') == [("a", "true")]


WRONG = {
    "no header": (
        "a.csv",
        "the cat,ham\nthe dog,spam\n",
        "only 'the cat', 'ham': name .*; or, if these are a record and no names, put a header",
    ),
    "no column": (
        "a.csv",
        "v1,v2\nham,Hi\n",
        r"a\.csv: its header has no 'text', only 'v1', 'v2': name",
    ),
    "a header of other names": (
        "a.tsv",
        "v1\tv2\nham\tHi\nham\tHo\n",
        "its header has no 'label', only 'v1'",
    ),
    "a header with one of the names": (
        "a.tsv",
        "sentence\tlabel\nHi\t1\nHo\t1\n",
        "its header has no 'text', only 'sentence', 'label'",
    ),
    "three columns": ("a.tsv", "ham\tHi\t1\nham\tHo\t2\n", "its header has no 'text'"),
    "no tab": ("a.tsv", "ham\tHi\nham Ho\n", r"a\.tsv, line 2: 1 field between tabs"),
    "a tab in a text": ("a.tsv", "ham\tHi\nham\tH\to\n", r"a\.tsv, line 2: 3 fields between tabs"),
    "ragged": ("a.csv", "text,label\na,b,c\n", r"a\.csv, line 2: 3 fields under a header of 2"),
    "quotes": ("a.csv", 'text,label\n"a"b,c\n', r"a\.csv, line 2: .*correct the quotes"),
    "no key": ("a.jsonl", '{"text": "a"}', r"line 1 has no 'label', only 'text': name"),
    "no object": ("a.jsonl", "[1]\n[2]", "line 1: this is not a JSON object"),
    "no JSON": ("a.jsonl", '{"text": "a", "label": 1}\n{"te', r"line 2: this is not JSON \("),
    "half a character": (
        "a.jsonl",
        '{"text": "a", "label": "\\ud800"}',
        "line 1: there is half a character",
    ),
    "empty text": ("a.tsv", "ham\tHi\nham\t \n", r"a\.tsv, line 2: the text is empty: remove"),
    "no text": ("a.jsonl", '{"text": null, "label": 1}', "line 1: the text is null, not a string"),
    "no label": (
        "a.jsonl",
        '{"text": "a", "label": null}',
        "line 1: the label is null, not a word",
    ),
    "list": ("a.jsonl", '{"text": "a", "label": [1]}', r"line 1: the label is \[1\], not a word"),
    "empty label": ("a.csv", "text,label\na,\n", "line 2: the label is empty"),
    "mixed": (
        "a.csv",
        "text,label\na,sport\nb,c\nd,3\n",
        r"the label is a number in line 4 \('3'\) and a word in line 2 \('sport'\): make all",
    ),
    "lines of old Macs": ("a.csv", "text,label\ra,b\r", r"lines end in \\r alone, as on old Macs"),
    "nothing": ("a.tsv", "\n", "holds no examples"),
    "only a header": ("a.csv", "text,label\n", "holds no examples"),
    "another kind": (
        "a.txt",
        "ham\tHi\n",
        r"is not a table of texts: give \.jsonl, \.ndjson, \.json, \.csv",
    ),
    "not UTF-8": ("a.tsv", b"ham\t\xff\n", "is not UTF-8 text: byte 0xff at offset 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, message = WRONG[name]
    with pytest.raises(UserError, match=message) as caught:
        examples_in(tmp_path / file, content)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b\.tsv does not exist"):
        read_examples(tmp_path / "b.tsv", Columns())


def made(count: int, label: str) -> list[Example]:
    return [Example(f"{label} {i}", label, f"a.tsv, line {i}") for i in range(count)]


def test_one_label_only_and_an_unknown_one() -> None:
    with pytest.raises(UserError, match=r"^a\.tsv: 3 texts and one label, 'a': give texts of two"):
        label_names(made(3, "a"))
    with pytest.raises(
        UserError, match=r"^a\.tsv, line 0: the label 'c' is unknown: .* a, b; correct it"
    ):
        label_numbers([*made(2, "a"), *made(1, "c")], ["a", "b"])


@pytest.mark.parametrize(
    "labels", [["007", "7"], ["1E2", "100"], ["1234567890123456788", "1234567890123456789"]]
)
def test_numbers_that_are_names_stay_apart(
    labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{label}\ttext {label} {i}\n" for label in labels for i in range(9))
    (tmp_path / "d.tsv").write_text(rows)
    parts = read_parts(str(tmp_path / "d.tsv"), None, None, Columns())
    assert sorted(parts.labels) == sorted(labels) and not capsys.readouterr().err


def test_nan_is_no_number(tmp_path: Path) -> None:
    assert label_names([*made(2, "uncle"), *made(2, "nan")]) == ["nan", "uncle"]
    with pytest.raises(
        UserError, match=r"a number in line 3 \('1'\) and a word in line 2 \('nan'\)"
    ):
        examples_in(tmp_path / "a.csv", "text,label\na,nan\nb,1\n")


def test_a_label_may_be_a_number_of_any_size(tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "a", "label": {label}}}\n' for label in ("1" + 400 * "0", "2"))
    assert len(examples_in(tmp_path / "a.jsonl", lines)) == 2


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        ([f"{i / 10}" for i in range(20)] * 3, "20 labels such as '0.0' look like measurements"),
        ([*"aaa", *"bcdefgh"], "7 of 8 labels, such as 'b', have one text each"),
        (["1", "1.0", "2"] * 5, "the labels '1' and '1.0' are learned as two: write both as 1 if"),
        (["v1", "v1.0", "v2"] * 5, ""),
        ([f"{i / 2}" for i in range(11)] * 3, ""),  # grades
        ([f"{i}" for i in range(20)] * 3, ""),
    ],
)
def test_labels_that_are_no_classes_are_warned_of(
    labels: list[str], warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{label}\ttext {i}\n" for i, label in enumerate(labels))
    (tmp_path / "d.tsv").write_text("label\ttext\n" + rows)
    read_parts(str(tmp_path / "d.tsv"), None, None, Columns())
    said = capsys.readouterr().err
    assert (warning in said) if warning else not said


def test_an_imbalance_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_unbalanced([*made(29, "a"), *made(10, "b")], False)
    warn_if_unbalanced([*made(30, "a"), *made(10, "b")], True)
    assert capsys.readouterr().err == ""
    warn_if_unbalanced([*made(30, "a"), *made(10, "b")], False)
    assert "30 texts have the label 'a' and 10 the label 'b'" in capsys.readouterr().err


def test_a_split_has_all_examples_in_the_same_shares() -> None:
    examples = [*made(200, "a"), *made(50, "b"), *made(3, "c"), *made(1, "d")]
    parts = split(examples, [0.1, 0.2])
    assert sorted(e for part in parts for e in part) == sorted(examples)
    counts = [Counter(e.label for e in part) for part in parts]
    assert counts == [
        {"a": 140, "b": 35, "c": 1, "d": 1},
        {"a": 20, "b": 5, "c": 1},
        {"a": 40, "b": 10, "c": 1},
    ]
    assert split(examples, [0.1, 0.2]) == parts
    assert set(split(examples[::-1], [0.1, 0.2])[1]) != set(examples[:25])  # drawn by chance
    assert split(examples, [0.0, 0.0]) == [examples, [], []]


def test_the_same_text_is_in_one_part_only() -> None:
    # With the same label each time, and with several
    for labels, sizes in (("ab", [108, 36, 36]), ("abc", [126, 27, 27])):
        examples = [
            Example(f"text {i % 20}", labels[i % len(labels)], f"line {i}") for i in range(180)
        ]
        parts = split(examples, [0.2, 0.2])
        texts = [{e.text for e in part} for part in parts]
        assert [len(part) for part in parts] == sizes and sum(map(len, texts)) == 20


def test_parts_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, labels in (("a", "xyxyxyxyxy"), ("b", "xxy"), ("c", "xz")):
        rows = "".join(f"{label}\t{name}{i}\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.tsv").write_text("label\ttext\n" + rows)
    a, b, c = (str(tmp_path / f"{name}.tsv") for name in "abc")
    parts = read_parts(a, b, None, Columns(), fraction=0.2)
    assert [e.text for e in parts.validation] == ["b0", "b1", "b2"] and parts.labels == ["x", "y"]
    assert len(parts.train) == 8 and len(parts.test) == 2
    assert len(read_parts(a, b, b, Columns()).train) == 10 and not capsys.readouterr().err
    read_parts(a, b, a, Columns())
    expected = "warning: 10 of 10 texts to test on are learned from as well\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(UserError, match=r"c\.tsv, line 3: the label 'z' is unknown"):
        read_parts(a, None, c, Columns())


def test_texts_that_are_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("label\ttext\n" + "x\tone\ny\tone\n" * 60)
    with pytest.raises(UserError, match=r"120 texts \(1 different\) have 2 labels"):
        read_parts(str(tmp_path / "d.tsv"), None, None, Columns())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("xy", "2 texts have 2 labels: give more texts of each, or a file of them$"),
        (["0.5", "1.5", "2"], "3 texts have 3 labels, which look like measurements: give labels"),
    ],
)
def test_labels_that_no_two_texts_share(
    labels: Sequence[str], message: str, tmp_path: Path
) -> None:
    rows = "".join(f"{label}\ttext {i}\n" for i, label in enumerate(labels))
    (tmp_path / "d.tsv").write_text("label\ttext\n" + rows)
    with pytest.raises(UserError, match=f"too few texts to validate on: {message}"):
        read_parts(str(tmp_path / "d.tsv"), None, None, Columns())


def test_blank_lines_that_are_left_out_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, note in (
        ("one\n\n \ntwo\n", "new.txt: 2 blank lines left out\n"),
        ("one\n\ntwo", "new.txt: 1 blank line left out\n"),
        ("one\ntwo\n", ""),
    ):
        (tmp_path / "new.txt").write_text(content)
        texts = read_texts(str(tmp_path / "new.txt"), Columns())
        assert [e.text for e in texts] == ["one", "two"]
        said = capsys.readouterr().err
        assert said.startswith("note: ") == bool(note) and said.endswith(note)
    (tmp_path / "new.txt").write_text("")
    with pytest.raises(UserError, match=r"new\.txt"):
        read_texts(str(tmp_path / "new.txt"), Columns())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.csv", "a.jsonl", "a.json", "a.ndjson"])
def test_texts_without_labels(tmp_path: Path, name: str) -> None:
    contents = {
        "a.txt": "one\r\n\r\ntwo",
        "a.tsv": "text\tid\none\t1\ntwo\t2\n",
        "a.csv": "text\none\ntwo\n",
        "a.jsonl": '{"text": "one"}\n{"text": "two"}\n',
        "a.json": '[{"text": "one"},\n{"text": "two"}]\n',
        "a.ndjson": '[{"text": "one"}, {"text": "two"}]',
    }
    (tmp_path / name).write_text(contents[name])
    examples = read_texts(str(tmp_path / name), Columns())
    assert [(e.text, e.label) for e in examples] == [("one", None), ("two", None)]


@pytest.mark.parametrize(
    ("content", "texts", "note"),
    [
        ("1\tHello there\n2\tBuy now\n", ["Hello there", "Buy now"], "column 2 is taken for the t"),
        ("Hello there\t1\n", ["1"], "column 2 is taken for the texts, from the first line on: if"),
        ("ham\ta\nham\tb\n", ["a", "b"], ""),
        ("Text\tKind\na\t1\nb\t1\n", ["Text", "a", "b"], "column 1 .* give --text-field the name"),
    ],
)
def test_texts_of_a_table_without_a_header(
    content: str, texts: list[str], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tsv").write_text(content)
    assert [e.text for e in read_texts(str(tmp_path / "a.tsv"), Columns())] == texts
    said = capsys.readouterr().err
    assert re.search(note, said) if note else not said


def test_texts_from_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pipe(content: bytes) -> list[Example]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        return read_texts("-", Columns())

    assert pipe("grün\n\nb\x85c".encode()) == [
        ("grün", None, "stdin, line 1"),
        ("b\x85c", None, "stdin, line 3"),
    ]
    for marked in (b"\xef\xbb\xbfa\n", "\ufeffa\n".encode("utf-16-le")):
        assert [example.text for example in pipe(marked)] == ["a"]
    with pytest.raises(UserError, match="stdin is not UTF-8 text"):
        pipe(b"\xff")
    with pytest.raises(UserError, match="'klingon' is not a text encoding"):
        read_texts("-", Columns(), "klingon")
    with pytest.raises(UserError, match=r"^stdin: its lines end in \\r alone, as on old Macs"):
        pipe(b"one\rtwo\r")
    assert [example.text for example in pipe(b"one\rtwo\nb\r")] == ["one\rtwo", "b"]
    with pytest.raises(UserError, match="stdin holds no texts"):
        pipe(b"\n")
    assert "JSON" not in capsys.readouterr().err
    assert [example.text for example in pipe(b'{"text": "a"}\n')] == ['{"text": "a"}']
    assert "note: stdin looks like JSON and is read as it stands" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        read_texts("-", Columns())


def test_numbers_are_int64() -> None:
    assert label_numbers(made(2, "a"), ["a"]).dtype == np.int64
