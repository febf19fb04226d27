"""Preparing a large text: pieces that tokenize as the whole, the cache, interruptions, faults."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_tasks import deaf_from_the_start_and_later, encode_bytes, kill_yourself, total

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import data, prepare, shards
from micrograd_gpt.text.data import encode_documents, load_corpus, load_documents
from micrograd_gpt.text.prepare import BEGUN, cut, encode_texts, workers
from micrograd_gpt.text.shards import MANIFEST, Shards
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer

# Every character that Python or Unicode calls white space, and what GPT-2's pattern tells apart.
WHITE_SPACE = [chr(c) for c in range(0x110000) if chr(c).isspace()]
OTHERS = [
    "'",
    "s",
    "'s",
    "'re",
    "a",
    "Z",
    "é",
    "中",
    "1",
    "½",
    ".",
    "!",
    "\u0301",
    "_",
    "\u200b",
    "😀",
]
MIXED = st.lists(st.sampled_from([*WHITE_SPACE, *"  \n\n  \t", *OTHERS]), max_size=40).map("".join)


@contextmanager
def no_workers(processes: int | None = None) -> Iterator[prepare.Mapping]:
    yield map


# ----------------------------------------------------------------------------------------------
# Pieces


@given(
    texts=st.lists(MIXED | st.text(max_size=30), max_size=5),
    size=st.integers(1, 12),
    data=st.data(),
)
def test_pieces_tokenize_as_the_whole(texts: list[str], size: int, data: st.DataObject) -> None:
    def in_blocks(text: str) -> list[str]:
        at = data.draw(st.lists(st.integers(0, len(text)), max_size=4))
        return [text[a:b] for a, b in itertools.pairwise([0, *sorted(at), len(text)])]

    documents = [text for text in texts if text]
    whole = "\n\n".join(documents)
    for tokenizer in (
        GPT2Tokenizer(),
        ByteTokenizer(),
        CharTokenizer.from_text(whole + "\n"),
        WordTokenizer.from_text(whole),
    ):
        end_last = tokenizer.end_of_text is not None
        pieces = list(cut([in_blocks(text) for text in texts], end_last, size))
        ids = [encode_texts(piece, tokenizer) for piece in pieces]
        expected = encode_documents(documents, tokenizer)
        np.testing.assert_array_equal(np.concatenate([*ids, np.empty(0, int)]), expected)


RUNS = st.lists(
    st.text("abcdrstz", min_size=1, max_size=40)
    | st.text("0123456789", min_size=1, max_size=40)
    | st.text("-+=*/'", min_size=1, max_size=40)
    | st.sampled_from([" ", "\n", ", ", ".", "'s"]),
    max_size=20,
).map("".join)


@given(text=RUNS, size=st.integers(1, 12), block=st.integers(1, 50))
def test_a_run_that_is_too_long_is_cut_and_nothing_else_changes(
    text: str, size: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "LONGEST", 16)
        blocks = [text[i : i + block] for i in range(0, len(text), block)]
        pieces = [piece for (piece,) in cut([blocks], True, size)]
        assert pieces == [piece for (piece,) in cut([[text]], True, size)]
    assert "".join(pieces) == text and max(map(len, pieces), default=0) <= 16
    places = [0, *itertools.accumulate(map(len, pieces))]
    runs = [run.span() for run in re.finditer(r"[a-z]+|[0-9]+|[^a-z0-9\s]+|\s+", text)]
    may_differ: set[int] = set()
    for place in places[1:-1]:
        if not prepare.SAFE_PLACE.match(text, place):
            touched = [i for i, (start, end) in enumerate(runs) if start <= place <= end]
            for start, end in runs[max(0, touched[0] - 1) : touched[-1] + 2]:
                may_differ |= set(range(start, end + 1))
    gpt2 = GPT2Tokenizer()
    for tokens in (
        lambda part: [gpt2.decode([i]) for i in gpt2.encode(part)],
        WordTokenizer.PIECE.findall,
    ):
        whole = set(itertools.accumulate(map(len, tokens(text))))
        cut_up = {
            place + end
            for place, piece in zip(places, pieces, strict=False)
            for end in itertools.accumulate(map(len, tokens(piece)))
        }
        assert cut_up - may_differ == whole - may_differ


@given(text=st.text(max_size=60), size=st.integers(1, 12), block=st.integers(1, 50))
def test_characters_and_bytes_are_cut_anywhere(text: str, size: int, block: int) -> None:
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    pieces = list(cut([blocks], True, size, anywhere=True))
    assert all(len(piece) == size for (piece,) in pieces[:-1])
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_text(text)):
        ids = [encode_texts(piece, tokenizer) for piece in pieces]
        found = np.concatenate([*ids, np.empty(0, int)])
        np.testing.assert_array_equal(found, tokenizer.encode(text))


def test_only_letters_and_digits_come_before_a_mark_at_which_text_is_cut() -> None:
    """GPT-2's pattern goes by Unicode's categories, and Python's \\w is to mean the same here."""
    for code in range(0x110000):
        cut_after = prepare.SAFE_PLACE.match(chr(code) + ".", 1)
        assert not cut_after or unicodedata.category(chr(code))[0] in "LN", hex(code)


def test_text_without_white_space_takes_bounded_memory() -> None:
    """64 MB in blocks, as a file is read, and in one, as from a .jsonl file."""
    block = "abcdefghijklmnop" * (1 << 14)
    for anywhere, longest in ((False, prepare.LONGEST), (True, prepare.PIECE)):
        tracemalloc.start()
        pieces = cut([(block for _ in range(256))], True, anywhere=anywhere)
        lengths = [len(text) for (text,) in pieces]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(lengths) == 256 * len(block) and max(lengths) == longest
        assert peak < 6 * longest
    whole = block * 64
    assert "".join(text for (text,) in cut([[whole]], True)) == whole
    chinese = "天地玄黄宇宙洪荒。" * 100_000
    pieces = [text for (text,) in cut([[chinese]], True)]
    assert max(map(len, pieces)) < prepare.PIECE + 10 and "".join(pieces) == chinese
    assert all(piece[0] == "。" for piece in pieces[1:])


@pytest.mark.parametrize("space", WHITE_SPACE, ids=ascii)
def test_white_space_is_cut_where_it_is_safe(space: str) -> None:
    text = f"it's{space}{space}ab{space}\n{space}12 !{space}"
    pieces = [piece[0] for piece in cut([[text]], True, 1)]
    assert "".join(pieces) == text
    # The four of Python's white space that are none in GPT-2's pattern are left alone.
    assert pieces[1][0] == (" " if space in "\x1c\x1d\x1e\x1f" else space)


def test_pieces_are_about_as_long_as_asked_for() -> None:
    words = ["word " * 50, "one-long-word" * 20, "", "a b " * 3, "c"]
    pieces = list(cut([[text] for text in words], True, 40))
    assert [sum(map(len, piece)) for piece in pieces] == [44, *[40] * 5, 266, 13]
    assert pieces[-1] == ["", "a b a b a b ", "c", ""]
    assert list(cut([["a"], [""], []], True, 40)) == [["a"]]
    assert list(cut([[""], []], True, 40)) == []


def test_the_pieces_of_a_text_do_not_depend_on_its_blocks() -> None:
    text = "some words, and more of them\n" * 30
    for size in (1, 7, 100):
        blocks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(cut([blocks], True, 64)) == list(cut([[text]], True, 64))


# ----------------------------------------------------------------------------------------------
# Workers


def test_workers_give_results_in_order_and_draw_little_ahead() -> None:
    drawn = []

    def pieces() -> Iterator[list[str]]:
        for i in range(40):
            drawn.append(i)
            yield ["a" * i]

    with workers(2) as run:
        for i, length in enumerate(run(total, pieces())):
            assert length == i and len(drawn) <= i + 6
        with pytest.raises(UserError, match="lone surrogate"):
            list(run(encode_bytes, [["a"], ["\ud800"]]))
    assert i == 39


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot hold a signal back")
def test_workers_leave_ctrl_c_to_their_parent() -> None:
    with workers(1) as run:
        (deaf,) = run(deaf_from_the_start_and_later, [["a"]])
    assert deaf == (True, True)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_worker_that_is_killed_is_reported() -> None:
    with pytest.raises(UserError, match="a process that tokenizes was killed"), workers(1) as run:
        list(run(kill_yourself, [["a"]]))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal
            from micrograd_gpt.text.prepare import workers

            def pid(piece):
                return os.getpid()

            if __name__ == "__main__":
                with workers(1) as run:
                    print(*run(pid, [["a"]]), flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    package = str(Path(prepare.__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": package},
    )
    out, _ = child.communicate(timeout=60)  # returns when the last to hold the pipe, a worker, ends
    assert int(out) > 0 and child.returncode == -signal.SIGKILL


# ----------------------------------------------------------------------------------------------
# A corpus through shards


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SMALL", 0)
    monkeypatch.setattr(prepare, "PIECE", 50)
    monkeypatch.setattr(prepare, "PIECES_IN_SHARD", 4)
    monkeypatch.setattr(prepare, "workers", no_workers)


def write_texts(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("The cat sat on the mat. It's 12 o'clock!\n\n" * 30)
    (folder / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"Document {i}.\n" * (i % 9)}) + "\n" for i in range(30))
    )
    (folder / "c.md").write_text("é" * 70)


def prepared(cache: Path) -> Path:
    (folder,) = (cache / "tokens").iterdir()
    return folder


def test_an_old_vocabulary_is_not_taken_for_a_changed_text(
    tmp_path: Path, small_sizes: None
) -> None:
    """A resumed run, which is then refused, prepares the changed text in a folder of its own."""
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma " * 30)
    old = load_corpus(text, "word", 0.25, cache_folder=tmp_path / "cache").tokenizer
    text.write_text("delta epsilon zeta eta " * 30)
    load_corpus(text, old, 0.25, cache_folder=tmp_path / "cache")
    fresh = load_corpus(text, "word", 0.25, cache_folder=tmp_path / "cache").tokenizer
    assert b"delta" in fresh.tokens and b"alpha" not in fresh.tokens


@pytest.mark.parametrize("name", ["char", "byte", "word", "gpt2"])
def test_a_large_text_gives_the_ids_of_a_small_one(
    name: str, tmp_path: Path, small_sizes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SMALL", 50_000_000)
        expected = load_corpus(tmp_path / "texts", name, 0.25, cache_folder=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    corpus = load_corpus(tmp_path / "texts", name, 0.25, cache_folder=tmp_path / "cache")
    assert isinstance(corpus.train, Shards) and isinstance(expected.train, np.ndarray)
    np.testing.assert_array_equal(corpus.train[:], expected.train)
    np.testing.assert_array_equal(corpus.validation[:], expected.validation)
    assert corpus.tokenizer.to_dict() == expected.tokenizer.to_dict()
    assert corpus.bytes_per_token == expected.bytes_per_token
    folder = prepared(tmp_path / "cache")
    assert str(folder) in capsys.readouterr().err
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["tokens"] == len(expected.train) + len(expected.validation)
    assert manifest["tokenizer"] == expected.tokenizer.to_dict()
    assert len(manifest["shards"]) > 2
    assert [Path(source["path"]).name for source in manifest["sources"]] == [
        "a.txt",
        "b.jsonl",
        "c.md",
    ]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [MANIFEST, *(shard["file"] for shard in manifest["shards"])]
    )
    moved = load_corpus(
        folder, name, 0.25, cache_folder=tmp_path / "cache"
    )  # is a folder of shards like any other
    np.testing.assert_array_equal(moved.train[:], expected.train)


def test_real_workers_give_the_same_ids(
    tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "workers", lambda processes: workers(2))
    write_texts(tmp_path / "texts")
    corpus = load_corpus(tmp_path / "texts", "word", cache_folder=tmp_path / "cache")
    documents = load_documents(tmp_path / "texts")
    expected = encode_documents(documents, WordTokenizer.from_text("\n\n".join(documents)))
    np.testing.assert_array_equal(np.concatenate([corpus.train[:], corpus.validation[:]]), expected)


class Spy:
    """Counts the pieces that are encoded, and stops before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded, self.stop_before = 0, -1
        encode = prepare._encode

        def counting(settings: str, piece: list[str]) -> np.ndarray:
            if self.encoded == self.stop_before:
                raise KeyboardInterrupt
            self.encoded += 1
            return encode(settings, piece)

        monkeypatch.setattr(prepare, "_encode", counting)

    def since(self) -> int:
        count, self.encoded = self.encoded, 0
        return count


def test_prepared_once_and_again_when_the_source_changed(
    tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, cache, source = Spy(monkeypatch), tmp_path / "cache", tmp_path / "texts"
    write_texts(source)

    def tokens(tokenizer: Any = "gpt2", **settings: Any) -> list[int]:
        corpus = load_corpus(source, tokenizer, cache_folder=cache, **settings)
        return [*corpus.train[:].tolist(), *corpus.validation[:].tolist()]

    def whole() -> list[int]:
        return encode_documents(load_documents(source), GPT2Tokenizer()).tolist()

    assert tokens() == whole() and spy.since() > 8
    assert tokens() == tokens(GPT2Tokenizer()) == whole() and spy.since() == 0
    os.utime(source / "a.txt", ns=(1, 1))  # another time, the same bytes: read, noted
    assert tokens() == whole() and spy.since() == 0
    assert json.loads((prepared(cache) / MANIFEST).read_text())["sources"][0]["modified_ns"] == 1
    text = (source / "a.txt").read_text()
    (source / "a.txt").write_text(text.replace("cat", "dog"))
    assert tokens() == whole() and spy.since() > 8
    (source / "a.txt").write_text("shorter\n" * 9)
    assert tokens() == whole() and spy.since() > 0
    (source / "d.txt").write_text("another file")
    assert tokens() == whole() and spy.since() > 0
    (source / "a.txt").unlink()
    assert tokens() == whole() and spy.since() > 0
    assert len(list((cache / "tokens").iterdir())) == 1
    tokens("byte"), tokens(encoding="latin-1")
    assert len(list((cache / "tokens").iterdir())) == 3


@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_an_interrupted_preparation_goes_on(
    name: str, tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, cache, source = Spy(monkeypatch), tmp_path / "cache", tmp_path / "texts"
    learned: list[str] = []
    learn: Callable[..., Any] = prepare._learn
    monkeypatch.setattr(prepare, "_learn", lambda *a: learned.append(a[0]) or learn(*a))
    write_texts(source)
    spy.stop_before = 10
    with pytest.raises(KeyboardInterrupt):
        load_corpus(source, name, cache_folder=cache)
    folder = prepared(cache)
    names = ["tokens_000000.bin", "tokens_000001.bin"]
    assert sorted(p.name for p in folder.iterdir()) == [BEGUN, *names]
    before = [(folder / n).stat().st_mtime_ns for n in names]
    abandoned, recent = folder / ".tokens_000002.bin.1.tmp", folder / ".tokens_000002.bin.2.tmp"
    for path in (abandoned, recent):
        path.write_bytes(b"half")
    os.utime(abandoned, ns=(1, 1))
    spy.stop_before = -1
    first = spy.since()
    corpus = load_corpus(source, name, cache_folder=cache)
    ids = np.concatenate([corpus.train[:], corpus.validation[:]])
    np.testing.assert_array_equal(ids, encode_documents(load_documents(source), corpus.tokenizer))
    assert [(folder / n).stat().st_mtime_ns for n in names] == before
    documents = [[text] for text in load_documents(source)]
    pieces = len(list(cut(documents, name == "gpt2", anywhere=name == "char")))
    assert first == 10 and spy.since() == pieces - 8 and learned == [name]
    assert recent.exists() and not abandoned.exists() and not (folder / BEGUN).exists()


@pytest.mark.parametrize(("changed", "value"), [("PIECE", 30), ("LONGEST", 60)])
def test_an_interrupted_preparation_of_another_text_is_forgotten(
    changed: str, value: int, tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, cache, source = Spy(monkeypatch), tmp_path / "cache", tmp_path / "a.txt"
    source.write_text("one two three\n" * 100)
    spy.stop_before = 10
    with pytest.raises(KeyboardInterrupt):
        load_corpus(source, "byte", cache_folder=cache)
    spy.stop_before = -1
    source.write_text("One Two Three\n" * 100)
    corpus = load_corpus(source, "byte", cache_folder=cache)
    assert corpus.tokenizer.decode(corpus.train[:14]) == "One Two Three\n"
    # Pieces of another size would make other shards.
    (prepared(cache) / MANIFEST).unlink()
    spy.stop_before = spy.encoded + 5
    with pytest.raises(KeyboardInterrupt):
        load_corpus(source, "byte", cache_folder=cache)
    spy.stop_before = -1
    monkeypatch.setattr(prepare, changed, value)
    spy.since()
    corpus = load_corpus(source, "byte", cache_folder=cache)
    assert spy.since() == len(list(cut([["One Two Three\n" * 100]], True, anywhere=True)))
    assert corpus.tokenizer.decode(np.concatenate([corpus.train[:], corpus.validation[:]])) == (
        "One Two Three\n" * 100
    )


def test_a_resumed_run_finds_the_shards_of_its_vocabulary(
    tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, cache, source = Spy(monkeypatch), tmp_path / "cache", tmp_path / "a.txt"
    source.write_text("one two three\n" * 100)
    tokenizer = load_corpus(source, "char", cache_folder=cache).tokenizer
    assert spy.since() > 0
    again = CharTokenizer(tokenizer.to_dict()["vocabulary"])
    assert load_corpus(source, again, cache_folder=cache).tokenizer.vocab_size == 9
    assert spy.since() == 0
    larger = CharTokenizer.from_text("one two three\nxyz")  # as another text would have given
    for _ in range(2):
        assert load_corpus(source, larger, cache_folder=cache).tokenizer.vocab_size == 12
    load_corpus(source, "char", cache_folder=cache)
    assert spy.since() > 0 and len(list((cache / "tokens").iterdir())) == 2
    with pytest.raises(UserError, match="is not among the 3 characters"):
        load_corpus(source, CharTokenizer("one"), cache_folder=cache)


# ----------------------------------------------------------------------------------------------
# Faults


def test_a_large_text_without_text(tmp_path: Path, small_sizes: None) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9)
    for name in ("gpt2", "char", "word"):
        with pytest.raises(UserError, match=r"the text of .*a\.jsonl is empty"):
            load_corpus(tmp_path / "a.jsonl", name, cache_folder=tmp_path / "cache")


def test_a_large_text_in_another_encoding(tmp_path: Path, small_sizes: None) -> None:
    (tmp_path / "a.txt").write_bytes(b"some words\n" * 100 + b"caf\xe9")
    with pytest.raises(UserError, match="byte 0xe9 at offset 1103"):
        load_corpus(tmp_path, "gpt2", cache_folder=tmp_path / "cache")
    corpus = load_corpus(tmp_path, "gpt2", encoding="latin-1", cache_folder=tmp_path / "cache")
    assert corpus.tokenizer.decode(corpus.validation[:]).endswith("words\ncafé")


def test_a_source_that_changes_meanwhile(
    tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some words\n" * 100)
    encode = prepare._encode

    def changing(settings: str, piece: list[str]) -> np.ndarray:
        os.utime(source, ns=(1, 1))
        return encode(settings, piece)

    monkeypatch.setattr(prepare, "_encode", changing)
    with pytest.raises(UserError, match=r"a\.txt changed while it was read: run this again"):
        load_corpus(source, "gpt2", cache_folder=tmp_path / "cache")
    assert not (prepared(tmp_path / "cache") / MANIFEST).exists()


def test_a_full_disk_keeps_what_is_whole(
    tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    write_shard: Callable[[Path, Iterable[np.ndarray]], None] = shards.write_shard

    def full_at_the_third(path: Path, arrays: Iterable[np.ndarray]) -> None:
        if path.name == "tokens_000002.bin":
            raise UserError(f"cannot write {path}: No space left on device")
        write_shard(path, arrays)

    monkeypatch.setattr(prepare, "write_shard", full_at_the_third)
    with pytest.raises(UserError, match="No space left on device"):
        load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    monkeypatch.setattr(prepare, "write_shard", write_shard)
    spy = Spy(monkeypatch)
    load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    assert spy.since() == len(list(cut([["some words\n" * 100]], True))) - 8


@pytest.mark.parametrize("damage", ["{", "{}", '{"sources": 1}', '{"sources": [{"path": "a"}]}'])
def test_a_damaged_manifest_in_the_cache(damage: str, tmp_path: Path, small_sizes: None) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    (prepared(tmp_path / "cache") / MANIFEST).write_text(damage)
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as caught:
        load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(tmp_path: Path, small_sizes: None) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write") as caught:
        load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_ids_of_a_large_text_are_uint16(tmp_path: Path, small_sizes: None) -> None:
    characters = [chr(c) for c in range(0x10000, 0x10000 + (1 << 16) + 1)]
    (tmp_path / "a.txt").write_text("".join(characters), "utf-8")
    with pytest.raises(UserError, match="has 65,537 different characters"):
        load_corpus(tmp_path / "a.txt", "char", cache_folder=tmp_path / "cache")


def test_rare_words_are_forgotten_when_there_are_too_many(
    tmp_path: Path, small_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "MOST_WORDS", 20)
    rare = [f"w{i}" for i in range(300)]
    text = "".join(f"common {word} usual\n" for word in rare)
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(tmp_path / "a.txt", "word", cache_folder=tmp_path / "cache")
    assert corpus.tokenizer.tokens[2:6] == [b" ", b"\n", b"common", b"usual"]
    assert corpus.tokenizer.vocab_size < 2 + 20 + 30
    assert corpus.bytes_per_token is None  # some words' text is lost
