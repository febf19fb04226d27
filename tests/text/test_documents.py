"""Where text comes from: files of every kind, read in chunks, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
from faults import serving
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import documents
from micrograd_gpt.text.documents import load_documents, read_documents


def test_pydocs_are_the_topics_sorted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    documents = load_documents("pydocs")
    assert sum(map(len, documents)) > 100_000
    monkeypatch.setattr(pydoc_data.topics, "topics", {"b": "second", "c": "", "a": "first"})
    assert load_documents("pydocs") == ["first", "second"]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="without its manual"):
        load_documents("pydocs")


def test_a_text_file_is_taken_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffone\r\ntwo\rthree\n é".encode())
    assert load_documents(path) == load_documents(str(path)) == ["\ufeffone\r\ntwo\rthree\n é"]


def test_a_name_with_a_folder_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydocs").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert load_documents("./pydocs") == ["mine"]
    assert load_documents("pydocs") != ["mine"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.MD", "a/b/c.rst", "a.txt", "empty.txt", "no.py", "a/no.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    (tmp_path / "folder.txt").mkdir()
    assert load_documents(tmp_path) == ["a.txt", "a/b/c.rst", "a/z.MD", "b.txt"]


def test_what_holds_no_text_is_named(tmp_path: Path) -> None:
    def refused(source: Path | str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_documents(source)
        assert "\n" not in str(caught.value)

    bad, empty = tmp_path / "bad.txt", tmp_path / "empty.txt"
    bad.write_bytes(b"caf\xc3\xa9 \xff")
    empty.write_bytes(b"")
    (tmp_path / "folder").mkdir()
    refused(bad, rf"{re.escape(str(bad))} is not UTF-8 text: byte 0xff at offset 6")
    refused(tmp_path, "byte 0xff at offset 6")
    refused(empty, f"{re.escape(str(empty))} contains no text: give")
    refused(
        tmp_path / "folder",
        r"folder has no text files \(\*\.txt, \*\.md, .*, \*\.parquet\) and no token shards",
    )
    refused("shakspeare", "'shakspeare' does not exist: give pydocs, shakespeare, or the path")


def test_shakespeare_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "To be,\r\nor not to bé.\n" * 100
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(documents, "SHAKESPEARE_SIZE", len(text.encode()))
    monkeypatch.setattr(documents, "SHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    with serving({"/input.txt": text.encode()}) as server:
        monkeypatch.setattr(documents, "SHAKESPEARE_URL", f"{server.url}/input.txt")
        assert load_documents("shakespeare") == load_documents("shakespeare") == [text]
        assert server.ranges("/input.txt") == [None]
    cached = tmp_path / "micrograd-gpt" / "shakespeare.txt"
    assert cached.read_bytes() == text.encode()
    assert load_documents("shakespeare") == [text]  # needs no network now
    cached.write_text("not Shakespeare")
    with pytest.raises(UserError, match=r"; or give a text file .* --data PATH$") as caught:
        load_documents("shakespeare")
    assert "cannot fetch" in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------
# Encodings


@given(
    text=st.text(max_size=60),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be", "gb18030"]),
    chunk=st.integers(1, 9),
)
def test_chunks_are_the_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, encoding: str, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(text.encode(encoding))
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK", chunk)
        (chunks,) = read_documents(path, encoding, read.append)
        assert "".join(chunks) == text
    assert sum(read) == path.stat().st_size and max(read, default=0) <= chunk


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(
    ("encoding", "data", "offset"),
    [
        ("utf-8", b"caf\xc3\xa9 \xff", 6),
        ("utf-8", b"caf\xc3\xa9 \xe2\x82", 6),  # cut off inside a character
        ("utf-8-sig", b"\xef\xbb\xbfcaf\xff", 6),
        ("utf-16", b"\xff\xfea\x00\x00\xdc", 4),
        ("shift_jis", b"abc\x82\xa0\x82\xff", 5),
        ("ascii", b"caf\xc3", 3),
    ],
)
def test_a_wrong_byte_is_named_with_its_offset(
    encoding: str,
    data: bytes,
    offset: int,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(documents, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(data)
    message = (
        f"a.txt is not {encoding.upper()} text: byte 0x{data[offset]:02x} at offset {offset}; "
        "give its encoding with --encoding"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_documents(tmp_path, encoding)


def test_the_encoding_is_one_that_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    assert load_documents(tmp_path, "latin-1") == ["naïve"]
    for encoding in ("latin-99", "base64", "a\0b", ""):
        with pytest.raises(UserError, match="is not a text encoding"):
            load_documents(tmp_path, encoding)
    with pytest.raises(UserError, match="is not UTF-16 text"):  # and has no byte order mark
        load_documents(tmp_path, "utf-16")


# ----------------------------------------------------------------------------------------------
# Many documents in a file


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_jsonl(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK", chunk)
    texts = ["one\r\ntwo", "", "dré \u2028 \U0001f600", "last"]
    lines = [json.dumps({"id": 1, "text": t}, ensure_ascii=t == "one\r\ntwo") for t in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n\n".join(lines).encode())
    (tmp_path / "b.txt").write_text("end\n")
    assert load_documents(tmp_path) == ["one\r\ntwo", "dré \u2028 \U0001f600", "last", "end\n"]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode("utf-16"))
    assert load_documents(tmp_path / "a.jsonl", "utf-16") == [t for t in texts if t]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', 'line 3: this is not a JSON object with a string called "text"'),
        ('{"txt": "a"}', "line 3: this is not a JSON object"),
        ('{"text": 1}', "line 3: this is not a JSON object"),
        ('["text"]', "line 3: this is not a JSON object"),
        ("7", "line 3: this is not a JSON object"),
        ("[" * 100_000, "line 3: this is not a JSON object"),
        ('{"text": "a\\ud800b"}', r"line 3: the text has a lone surrogate, '\ud800'"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n\n{line}\n')
    with pytest.raises(UserError, match=re.escape(f"a.jsonl, {message}")) as caught:
        load_documents(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "ROWS", 3)
    texts = [f"text {i} é" for i in range(10)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": range(12), "text": [*texts, None, ""]}), path)
    assert load_documents(tmp_path) == texts
    read: list[int] = []
    assert len(list(read_documents(path, on_read=read.append))) == 11
    assert sum(read) == path.stat().st_size and len(read) == 4

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_documents(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    parquet.write_table(pyarrow.table({"body": texts}), path)
    refused('has no column of strings called "text"')
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    refused('has no column of strings called "text"')
    path.write_bytes(b"PAR1 and nothing more")
    refused("cannot read")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'micrograd-gpt\[parquet\]'"):
        load_documents(tmp_path)
