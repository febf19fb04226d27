"""Where text comes from: files of every kind, read in chunks, and what is wrong with them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import pickle
import re
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from faults import serving
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import decoding, documents, tables
from micrograd_gpt.text.decoding import Form
from micrograd_gpt.text.documents import (
    BY_NAME,
    check_text_field,
    find_files,
    load_documents,
    read_documents,
)


def test_pydocs_are_the_topics_sorted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    documents = load_documents("pydocs")
    assert sum(map(len, documents)) > 100_000
    monkeypatch.setattr(pydoc_data.topics, "topics", {"b": "second", "c": "", "a": "first"})
    assert load_documents("pydocs") == ["first", "second"]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="without its manual"):
        load_documents("pydocs")


def test_line_ends_are_kept_unless_the_form_says_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text"
    path.write_bytes("one\r\ntwo\rthree\n é".encode())
    assert load_documents(path) == load_documents(str(path)) == ["one\r\ntwo\rthree\n é"]
    assert capsys.readouterr().err == ""
    assert load_documents(path, Form(line_ends="lf")) == ["one\ntwo\nthree\n é"]
    assert (
        rf"note: {path}: \r\n and \r were read as \n; --line-ends keep" in capsys.readouterr().err
    )


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_a_line_end_across_two_chunks_is_one(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(b"1\r\n\r\r\n2\r")
    assert load_documents(tmp_path / "a.txt", Form(line_ends="lf")) == ["1\n\n\n2\n"]


def test_texts_in_records_have_line_ends_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1\\r\\n2"}\r\n')
    (tmp_path / "b.csv").write_bytes(b'text\r\n"3\r\n4"\r\n')
    assert load_documents(tmp_path, Form(line_ends="lf")) == ["1\n2", "3\n4"]
    assert f"note: 2 files, {tmp_path / 'a.jsonl'}" in capsys.readouterr().err
    assert load_documents(tmp_path) == ["1\r\n2", "3\r\n4"]


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
    refused("-", "'-' does not exist: .*; /dev/stdin is what is piped in")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_path_that_is_called_as_a_text_is_named(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "_shakespeare", lambda: tmp_path / "fetched")
    (tmp_path / "fetched").write_text("fetched")
    (tmp_path / name).write_text("mine")
    assert load_documents(name) != ["mine"]
    assert f"for what is here, write ./{name}\n" in capsys.readouterr().err
    assert load_documents(f"./{name}") == ["mine"] and not capsys.readouterr().err


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


@pytest.mark.slow
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
        patch.setattr(decoding, "CHUNK", chunk)
        (chunks,) = read_documents(path, Form(encoding), read.append)
        assert "".join(chunks) == text.removeprefix("\ufeff")
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
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(data)
    message = (
        f"a.txt is not {encoding.upper()} text: byte 0x{data[offset]:02x} at offset {offset}; "
        "give its encoding with --encoding"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_documents(tmp_path, Form(encoding))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"to be"), "is gzip: unpack it first"),
        (b"PAR1\x15\x04\x15\xf4", r"is Parquet: call it \.parquet"),
        (b"\x93NUMPY\x01\0v\0", "is an array of NumPy's: write token ids into train.bin"),
        (pickle.dumps([1, 2]), "is a pickle, which is not opened"),
        (bz2.compress(b"to be"), "is bzip2"),
        (lzma.compress(b"to be"), "is xz"),
        (b"PK\x03\x04 ...", "is zip, as .docx"),
        (b"%PDF-1.4 all in ASCII", "is PDF: save it as plain text first"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_text_that_is_packed_is_not_read_as_it_is(
    data: bytes, message: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_documents(tmp_path, Form(encoding))
    with pytest.raises(UserError, match=f"the prompts {message}"):
        decoding.decoded(data, "the prompts")


def test_the_encoding_is_one_that_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    assert load_documents(tmp_path, Form("latin-1")) == ["naïve"]
    for encoding in ("latin-99", "base64", "a\0b", ""):
        with pytest.raises(UserError, match="is not a text encoding"):
            load_documents(tmp_path, Form(encoding))
    with pytest.raises(UserError, match="is not UTF-16 text"):  # and has no byte order mark
        load_documents(tmp_path, Form("utf-16"))


# ----------------------------------------------------------------------------------------------
# Many documents in a file


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_jsonl(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    texts = ["one\r\ntwo", "", "dré \u2028 \U0001f600", "last"]
    lines = [json.dumps({"id": 1, "text": t}, ensure_ascii=t == "one\r\ntwo") for t in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n\n".join(lines).encode())
    (tmp_path / "b.txt").write_text("end\n")
    assert load_documents(tmp_path) == ["one\r\ntwo", "dré \u2028 \U0001f600", "last", "end\n"]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode("utf-16"))
    assert load_documents(tmp_path / "a.jsonl", Form("utf-16")) == [t for t in texts if t]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', "line 3: this is not JSON (Unterminated string"),
        (
            '{"txt": "a", "id": 7}',
            "line 3 has no 'text', only 'txt', 'id': name what holds it",
        ),
        ("{}", "line 3 has no 'text', only none"),
        (
            '{"text": 1}',
            "line 3: 'text' is 1, not a text: correct it, or name another with --text-",
        ),
        ('["text"]', "line 3: this is ['text'], not an object with the key 'text'"),
        ("7", "line 3: this is 7, not an object"),
        ("[" * 100_000, "line 3: this is not JSON (nested too deeply)"),
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
    monkeypatch.setattr(tables, "BATCH", 3)
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
    refused("has no 'text', only 'body': name what holds it with --text-field")
    parquet.write_table(pyarrow.table({"文本": texts}), path)
    refused("has no 'text', only '文本': name what holds it with --text-field")
    parquet.write_table(pyarrow.table({"body": texts}), path)
    assert load_documents(path, Form(field="body")) == texts
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    refused("the column 'text' holds int64 and no texts: name another")
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), path)
    refused(r"the column 'text' holds list<.*> and no texts: name another")
    parquet.write_table(pyarrow.table([texts, texts], names=["text", "text"]), path)
    refused("has 'text' twice: rename or remove one")
    kinds = [pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
    kinds += [pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []  # since 16
    for kind in kinds:
        parquet.write_table(pyarrow.table({"text": pyarrow.array([*texts, *texts], kind)}), path)
        assert load_documents(path) == texts * 2
    path.write_bytes(b"PAR1 and nothing more")
    refused("cannot read")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r'needs pyarrow: pip install "micrograd-gpt\[parquet\]"'):
        load_documents(tmp_path)


# ----------------------------------------------------------------------------------------------
# Texts as others have written them


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\u4e2d \U0001f600".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes('{"text": "two"}\n'.encode(encoding))
    (tmp_path / "c.csv").write_bytes("text,n\nthree,3\n".encode(encoding))
    assert load_documents(tmp_path) == ["é\u4e2d \U0001f600", "two", "three"]


def test_a_mark_of_an_encoding_that_was_named_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 2)  # a character: only the first can be the mark
    path = tmp_path / "a.txt"
    for encoding in ("utf-16-le", "utf-16-be"):
        path.write_bytes("\ufeffa\ufeff".encode(encoding))
        assert load_documents(path, Form(encoding)) == ["a\ufeff"]
    path.write_bytes(b"\xff\xfea")
    assert load_documents(path, Form("latin-1")) == ["ÿþa"]  # as the user says


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / ".cache"  # the folder that is asked for may be hidden
    for name in ("a.txt", "._a.txt", ".git/x.txt", ".ipynb_checkpoints/a.txt", "b/._c.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"\x00\xff" if "._" in name else name.encode())
    assert load_documents(source) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_to_a_folder_is_followed_once(tmp_path: Path) -> None:
    texts, outside = tmp_path / "texts", tmp_path / "outside"
    (texts / "z").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (texts / "z" / "a.txt").write_text("a")
    (outside / "deep" / "b.txt").write_text("b")
    (texts / "before").symlink_to(texts / "z")  # what is there already
    (texts / "linked").symlink_to(outside)
    (texts / "again").symlink_to(outside / "deep")
    (outside / "deep" / "loop").symlink_to(texts)
    (outside / "self").symlink_to(outside)
    assert load_documents(texts) == ["b", "a"]
    names = [file.relative_to(texts).as_posix() for file in find_files(texts)]
    assert names == ["again/b.txt", "z/a.txt"]


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read anything
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        load_documents(tmp_path)


def test_files_of_other_kinds_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.pdf", "c.pdf", "LICENSE"):
        (tmp_path / name).write_text(name)
    assert load_documents(tmp_path) == ["a.txt"]
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 3 files of other kinds left out (.pdf, LICENSE)\n"
    )
    (tmp_path / "data-00000-of-00001.arrow").touch()  # of Hugging Face's datasets
    load_documents(tmp_path)
    assert "(.pdf, LICENSE, .arrow; a dataset's to_parquet(…)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"id": 1, "body": "one, 1"}\n{"body": "two"}'),
        ("a.ndjson", '{"body": "one, 1"}\n\n{"body": "two"}\n'),
        ("a.json", '[{"id": 1, "body": "one, 1"},\n {"body": "two"}]'),
        ("a.json", '{"body": "one, 1"}\n{"body": "two"}\n'),
        ("a.csv", 'id,body\n1,"one, 1"\n2,two\n'),
        ("a.CSV", 'body\r\n"one, 1"\r\n\r\ntwo\r\n'),
        ("a.tsv", "body\tid\none, 1\t1\ntwo\t2\n"),
    ],
)
def test_records_of_every_kind(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, newline="")
    assert load_documents(tmp_path / name, Form(field="body")) == ["one, 1", "two"]
    assert load_documents(tmp_path, Form(field="body")) == ["one, 1", "two"]
    with pytest.raises(
        UserError, match=r"has no 'text', only .*'body'.* with --text-field, or remove the file"
    ):
        load_documents(tmp_path / name)


def piped(content: str) -> str:
    """A path that gives this content once, as `<(…)` in a shell does."""
    read, write = os.pipe()

    def fill() -> None:
        with open(write, "wb") as pipe:
            pipe.write(content.encode())

    threading.Thread(target=fill, daemon=True).start()  # a pipe holds only some of it at a time
    return f"/dev/fd/{read}"


NOT_RECORDS = "is read as it stands, not as records: those in a pipe are JSON objects, one a line"
of_pipes = pytest.mark.skipif(os.name == "nt", reason="Windows has no paths of pipes")


@of_pipes
def test_records_may_be_piped(capsys: pytest.CaptureFixture[str]) -> None:
    first = "one, 1 " * 60_000  # longer than what is read at a time
    for field in ("text", "body"):
        rows = [json.dumps({"id": 1, field: text}) for text in (first, "two")]
        for content in (
            "\n".join(rows),
            f"[{rows[0]},\n {rows[1]}]",
            f"[{rows[0]}, {rows[1]}]",
            f"\ufeff{rows[0]}\r\n{rows[1]}",
            json.dumps([{field: first}, {field: "two"}], indent=1),
        ):
            source, form = piped(content), Form(field=field)
            check_text_field(field, [source])
            assert load_documents(source, form) == [first, "two"]
        one = json.dumps({"id": 1, field: "one"}, indent=1)
        assert load_documents(piped(one), Form(field=field)) == ["one"]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="line 2 has no 'text', only 'a'"):
        load_documents(piped('{"text": "one"}\n{"a": 1}\n'))


@of_pipes
def test_what_is_piped_and_is_no_records_is_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("one\ntwo", "[text", '["text"]'):
        assert load_documents(piped(content)) == [content]
    assert capsys.readouterr().err == ""
    for content in (
        '{"a": "text"}',
        '{"text": "a"} is how a record looks.\nIt has a text.',
        '{\n"text": "a"\n}\n{\n"text": "b"\n}\n',
        '[{"a": "text"}]',
    ):
        assert load_documents(piped(content)) == [content]
        assert NOT_RECORDS in capsys.readouterr().err
    for content in ("one\ntwo", "id,body\n1,two\n", '{"text": "one"}'):
        assert load_documents(piped(content), Form(field="body")) == [content]
        assert NOT_RECORDS in capsys.readouterr().err


@of_pipes
def test_a_file_behind_the_name_of_a_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    with open(tmp_path / "a.jsonl") as file:  # as with `< a.jsonl`
        source = f"/dev/fd/{file.fileno()}"
        check_text_field("body", [source])
        assert load_documents(source, Form(field="body")) == ["one", "two"]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm")
def test_a_file_in_shared_memory_is_what_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir="/dev/shm", suffix=".txt") as file:
        print('{"text": "one"}', file=file, flush=True)
        assert load_documents(file.name) == ['{"text": "one"}\n']
        assert "call it .json" in capsys.readouterr().err
        with pytest.raises(UserError, match="--text-field body is for records"):
            check_text_field("body", [file.name])


def test_a_field_may_have_lines_and_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"He said ""no"".\nI left.\n"\n')
    (tmp_path / "b.tsv").write_text('text\n"quoted"\n')
    assert load_documents(tmp_path) == ['He said "no".\nI left.\n', '"quoted"']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"name": "x",\n "version": 1}', "record 1 has no 'text', only 'name', 'vers"),
        ("a.json", '{"name": "x",\n "version": 1', "line 1: this is not JSON"),
        ("a.json", '["one", "two"]', "record 1: this is 'one', not an object with the key 'text'"),
        ("a.json", '[{"text": "a"}', "the list: this is not JSON"),
        ("a.csv", "text,n\none,1\ntwo\n", "line 3: 1 field under a header of 2"),
        ("a.csv", 'text\n"one" two\n', "line 2: ',' expected after '\"': correct the quotes"),
        ("a.csv", 'text\n"one\ntwo\nthree\n', "the record that line 2 begins: unexpected end"),
        ("a.tsv", "a\tb\n", "its header has no 'text', only 'a', 'b'"),
        ("a.json", '[{"instruction": "a"}]', "learn from them with finetune_gpt2.py instruct"),
        ("a.jsonl", '{"messages": []}', "learn from them with finetune_gpt2.py instruct"),
    ],
)
def test_what_is_not_a_record_is_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_documents(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_records_without_a_text_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"text": null}', "null", '{"text": "a\\ud800b"}', '{"text": "kept"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert load_documents(tmp_path / "a.jsonl") == ["kept"]
    said = "3 records left out: 2 without a text (null), 1 with half a character (a lone surrogate)"
    assert capsys.readouterr().err == f"note: {tmp_path / 'a.jsonl'}: {said}\n"


def test_parquet_leaves_out_what_jsonl_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    half = b"a\xed\xa0\x80b"  # a lone surrogate, as some writers encode it
    column = pyarrow.array([b"one", None, half, b"two"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path)
    assert load_documents(path) == ["one", "two"]
    said = "2 records left out: 1 without a text (null), 1 with half a character (a lone surrogate)"
    assert capsys.readouterr().err == f"note: {path}: {said}\n"


def test_a_run_inside_of_its_data_is_not_learned_from(tmp_path: Path) -> None:
    texts = ["data/a.txt", "data/out/notes.txt", "data/config.json", "data/vocab.json"]
    weights = ["data/out/model.safetensors", "data/out/best/model.safetensors"]
    own = ["data/out/config.json", "data/out/metrics.jsonl", "data/out/best/tokenizer.json"]
    of_a_run_that_has_begun = [f"data/new/{name}" for name in ("settings.toml", "samples.jsonl")]
    for name in (*texts, *weights, *own, *of_a_run_that_has_begun):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    found = find_files(tmp_path / "data")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in found) == sorted(texts)


def test_links_that_lead_nowhere_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they are in folders of git-annex and DVC, and left by programs that were removed."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert len(find_files(tmp_path)) == 2 and capsys.readouterr().err == ""
    for name, said in (("b.txt", "1 link"), ("latest", "2 links")):
        (tmp_path / name).symlink_to(tmp_path / "lost")
        assert len(find_files(tmp_path)) == 2
        note = f"note: {tmp_path}: {said} to nowhere left out ({tmp_path / 'b.txt'})\n"
        assert capsys.readouterr().err == note
    for name in ("a.txt", "link.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="has no text files"):
        find_files(tmp_path)
    assert "note: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n{"text": "b"}\n', '\n[\n  {"a": 1}]', "{}", "[a]"]
)
def test_a_text_that_looks_like_records_is_noticed(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert load_documents(path) == [text]
    note = f"note: {path} looks like JSON and is read as it stands"
    said = capsys.readouterr().err
    assert said.startswith(note) == (":" in text)
    if text.startswith('{"text"'):  # what is advised helps
        assert said.endswith("call it .json\n")
        assert load_documents(path.rename(tmp_path / "a.json")) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_a_list_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    for text in ('[\n{"text": "a"},\n{"text": "b"}\n]\n', '[{"text": "a"}, {"text": "b"}]'):
        (tmp_path / name).write_text(text)
        assert load_documents(tmp_path / name) == ["a", "b"]
    for text, problem in (
        ('["a"]\n["b"]\n', r"line 1: this is \['a'\], not an object with the key 'text'"),
        ('[{"text": "a"},\n', "the list: this is not JSON"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}, {problem}"):
            load_documents(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_null_characters_are_noticed(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Hello".encode(encoding))
    assert load_documents(path)[0].replace("\0", "") == "Hello"
    assert "null characters" in (said := capsys.readouterr().err) and encoding in said
    assert load_documents(path, Form(encoding)) == ["Hello"]
    capsys.readouterr()
    path.write_text("a log with one null\0 in a line\n")
    load_documents(path)
    assert "null characters, as a file that is no text has\n" in capsys.readouterr().err
    path.write_bytes("Hello".encode(encoding))
    load_documents(path, Form(encoding))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.csv", "text,text\na,b\n", "its header has 'text' twice: rename or remove one"),
        ("x.csv", "text;label\na;b\n", "its header has semicolons .*: put commas in their place$"),
        ("x.csv", "text\tlabel\na\tb\n", r"its header has tabs .*: call the file \.tsv$"),
        (
            "x.jsonl",
            '{"text": "a", "n": %s}' % ("9" * 5000),
            r"not JSON \(Exceeds [^;]*\): correct",
        ),
    ],
)
def test_advice_about_a_file_helps_whoever_has_it(
    name: str, content: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem):
        load_documents(tmp_path / name)
