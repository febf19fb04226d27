"""Preparing a large text: the ids of a small one, the cache, interruptions, faults."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_folders import END, MERGES, vocabulary

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import prepare, shards
from micrograd_gpt.text.byte_pairs import AddedToken, BytePairTokenizer, GPT2Tokenizer
from micrograd_gpt.text.corpus import encode_documents, load_corpus
from micrograd_gpt.text.decoding import Form
from micrograd_gpt.text.documents import load_documents
from micrograd_gpt.text.pieces import cut
from micrograd_gpt.text.prepare import PROGRESS
from micrograd_gpt.text.shard_files import MANIFEST
from micrograd_gpt.text.shards import Shards
from micrograd_gpt.text.tokenizers import CharTokenizer, WordTokenizer
from micrograd_gpt.text.workers import ParallelMap, worker_pool

SIZE = 50  # characters of a piece


class InThisProcess:
    """Stands in for the workers: counts the pieces they encode, and stops before one of them."""

    def __init__(self) -> None:
        self.collected, self.encoded, self.stop_before = 0, 0, -1
        self.on_encoding: Callable[[], object] = lambda: None

    @contextmanager
    def pool(self, processes: int | None = None) -> Iterator[ParallelMap]:
        yield self.map

    def map(self, function: Callable[[list[str]], Any], pieces: Iterable[list[str]]) -> Any:
        for piece in pieces:
            result = function(piece)
            if isinstance(result, np.ndarray):  # ids; what is collected are sets and counts
                if self.encoded == self.stop_before:
                    raise KeyboardInterrupt
                self.encoded += 1
                self.on_encoding()
            else:
                self.collected += 1
            yield result

    def since(self) -> int:
        """How many pieces were encoded since this was last asked."""
        count, self.encoded = self.encoded, 0
        return count


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    """Every text is large, its pieces and shards are small; returns what encodes the pieces."""
    stand_in = InThisProcess()
    monkeypatch.setattr("micrograd_gpt.text.corpus.MOST_IN_MEMORY", 0)
    monkeypatch.setattr(prepare, "PIECE_SIZE", SIZE)
    monkeypatch.setattr(prepare, "PIECES_PER_SHARD", 4)
    monkeypatch.setattr(prepare, "worker_pool", stand_in.pool)
    return stand_in


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


def test_a_large_text_with_another_model_s_tokenizer(
    tmp_path: Path, workers: InThisProcess
) -> None:
    write_texts(tmp_path / "texts")
    tokens, cache = vocabulary(), tmp_path / "cache"
    size = len(tokens)
    end, mat = AddedToken(END, size, True, False), AddedToken(" mat", size + 1, False, True)
    tokenizer = BytePairTokenizer(tokens, MERGES, [end, mat], {"eos_token": size})
    expected = encode_documents(load_documents(tmp_path / "texts"), tokenizer)
    corpus = load_corpus(tmp_path / "texts", tokenizer, 0.25, cache_folder=cache)
    np.testing.assert_array_equal([*corpus.train[:], *corpus.validation[:]], expected)
    assert {size, size + 1} <= set(expected.tolist()) and len(list(cache.rglob("*.bin"))) > 2
    again = load_corpus(prepared(cache), tokenizer, 0.25, cache_folder=cache)
    np.testing.assert_array_equal(again.train[:], corpus.train[:])
    with pytest.raises(UserError, match="give --tokenizer and the folder with its files"):
        load_corpus(prepared(cache), "gpt2", 0.25, cache_folder=cache)
    cut = BytePairTokenizer(tokens, MERGES, [end, mat._replace(content="U.S.")], {})
    with pytest.raises(
        UserError, match=r"added token .U\.S\.., within which a large text may be cut"
    ):
        load_corpus(tmp_path / "texts", cut, 0.25, cache_folder=cache)


def test_an_old_vocabulary_is_not_taken_for_a_changed_text(
    tmp_path: Path, workers: InThisProcess
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
    name: str, tmp_path: Path, workers: InThisProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("micrograd_gpt.text.corpus.MOST_IN_MEMORY", 50_000_000)
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
    tmp_path: Path, workers: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "worker_pool", lambda processes: worker_pool(2))
    write_texts(tmp_path / "texts")
    corpus = load_corpus(tmp_path / "texts", "word", cache_folder=tmp_path / "cache")
    documents = load_documents(tmp_path / "texts")
    expected = encode_documents(documents, WordTokenizer.from_text("\n\n".join(documents)))
    np.testing.assert_array_equal(np.concatenate([corpus.train[:], corpus.validation[:]]), expected)


def test_prepared_once_and_again_when_the_source_changed(
    tmp_path: Path, workers: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, source = tmp_path / "cache", tmp_path / "texts"
    write_texts(source)

    def tokens(tokenizer: Any = "gpt2", **settings: Any) -> list[int]:
        corpus = load_corpus(source, tokenizer, cache_folder=cache, **settings)
        return [*corpus.train[:].tolist(), *corpus.validation[:].tolist()]

    def whole() -> list[int]:
        return encode_documents(load_documents(source), GPT2Tokenizer()).tolist()

    assert tokens() == whole() and workers.since() > 8
    assert tokens() == tokens(GPT2Tokenizer()) == whole() and workers.since() == 0
    os.utime(source / "a.txt", ns=(1, 1))  # another time, the same bytes: read, noted
    assert tokens() == whole() and workers.since() == 0
    assert json.loads((prepared(cache) / MANIFEST).read_text())["sources"][0]["modified_ns"] == 1
    text = (source / "a.txt").read_text()
    (source / "a.txt").write_text(text.replace("cat", "dog"))
    assert tokens() == whole() and workers.since() > 8
    (source / "a.txt").write_text("shorter\n" * 9)
    assert tokens() == whole() and workers.since() > 0
    (source / "d.txt").write_text("another file")
    assert tokens() == whole() and workers.since() > 0
    (source / "a.txt").unlink()
    assert tokens() == whole() and workers.since() > 0
    assert len(list((cache / "tokens").iterdir())) == 1
    tokens("byte"), tokens(form=Form("latin-1"))
    assert len(list((cache / "tokens").iterdir())) == 3


@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_an_interrupted_preparation_goes_on(
    name: str, tmp_path: Path, workers: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, source = tmp_path / "cache", tmp_path / "texts"
    write_texts(source)
    workers.stop_before = 10
    with pytest.raises(KeyboardInterrupt):
        load_corpus(source, name, cache_folder=cache)
    folder = prepared(cache)
    names = ["tokens_000000.bin", "tokens_000001.bin"]
    assert sorted(p.name for p in folder.iterdir()) == [PROGRESS, *names]
    before = [(folder / n).stat().st_mtime_ns for n in names]
    abandoned, recent = folder / ".tokens_000002.bin.1.tmp", folder / ".tokens_000002.bin.2.tmp"
    for path in (abandoned, recent):
        path.write_bytes(b"half")
    os.utime(abandoned, ns=(1, 1))
    workers.stop_before = -1
    first = workers.since()
    corpus = load_corpus(source, name, cache_folder=cache)
    ids = np.concatenate([corpus.train[:], corpus.validation[:]])
    np.testing.assert_array_equal(ids, encode_documents(load_documents(source), corpus.tokenizer))
    assert [(folder / n).stat().st_mtime_ns for n in names] == before
    documents = [[text] for text in load_documents(source)]
    pieces = len(list(cut(documents, name == "gpt2", SIZE, anywhere=name == "char")))
    assert first == 10 and workers.since() == pieces - 8
    assert workers.collected == (pieces if name == "char" else 0)  # only the first time
    assert recent.exists() and not abandoned.exists() and not (folder / PROGRESS).exists()
    os.utime(recent, ns=(1, 1))
    load_corpus(source, name, cache_folder=cache)  # which finds all shards there
    assert workers.since() == 0 and not recent.exists()


@pytest.mark.parametrize(("changed", "value"), [("PIECE_SIZE", 30), ("LONGEST_PIECE", 60)])
def test_an_interrupted_preparation_of_another_text_is_forgotten(
    changed: str,
    value: int,
    tmp_path: Path,
    workers: InThisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, source = tmp_path / "cache", tmp_path / "a.txt"
    source.write_text("one two three\n" * 100)
    workers.stop_before = 10
    with pytest.raises(KeyboardInterrupt):
        load_corpus(source, "byte", cache_folder=cache)
    workers.stop_before = -1
    source.write_text("One Two Three\n" * 100)
    corpus = load_corpus(source, "byte", cache_folder=cache)
    assert corpus.tokenizer.decode(corpus.train[:14]) == "One Two Three\n"
    # Pieces of another size would make other shards.
    (prepared(cache) / MANIFEST).unlink()
    workers.stop_before = workers.encoded + 5
    with pytest.raises(KeyboardInterrupt):
        load_corpus(source, "byte", cache_folder=cache)
    workers.stop_before = -1
    monkeypatch.setattr(prepare, changed, value)
    workers.since()
    corpus = load_corpus(source, "byte", cache_folder=cache)
    size = value if changed == "PIECE_SIZE" else SIZE
    assert workers.since() == len(list(cut([["One Two Three\n" * 100]], True, size, anywhere=True)))
    assert corpus.tokenizer.decode(np.concatenate([corpus.train[:], corpus.validation[:]])) == (
        "One Two Three\n" * 100
    )


def test_a_resumed_run_finds_the_shards_of_its_vocabulary(
    tmp_path: Path, workers: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, source = tmp_path / "cache", tmp_path / "a.txt"
    source.write_text("one two three\n" * 100)
    tokenizer = load_corpus(source, "char", cache_folder=cache).tokenizer
    assert workers.since() > 0
    again = CharTokenizer(tokenizer.to_dict()["vocabulary"])
    assert load_corpus(source, again, cache_folder=cache).tokenizer.vocab_size == 9
    assert workers.since() == 0
    larger = CharTokenizer.from_text("one two three\nxyz")  # as another text would have given
    for _ in range(2):
        assert load_corpus(source, larger, cache_folder=cache).tokenizer.vocab_size == 12
    load_corpus(source, "char", cache_folder=cache)
    assert workers.since() > 0 and len(list((cache / "tokens").iterdir())) == 2
    with pytest.raises(
        UserError, match="not among the 3 characters of the text that this char tokenizer was made"
    ):
        load_corpus(source, CharTokenizer("one"), cache_folder=cache)


# ----------------------------------------------------------------------------------------------
# Faults


def test_a_large_text_without_text(tmp_path: Path, workers: InThisProcess) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9)
    for name in ("gpt2", "char", "word"):
        with pytest.raises(UserError, match=r"a\.jsonl contains no text: give"):
            load_corpus(tmp_path / "a.jsonl", name, cache_folder=tmp_path / "cache")


def test_a_large_text_in_another_encoding(tmp_path: Path, workers: InThisProcess) -> None:
    (tmp_path / "a.txt").write_bytes(b"some words\n" * 100 + b"caf\xe9")
    with pytest.raises(UserError, match="byte 0xe9 at offset 1103"):
        load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    corpus = load_corpus(
        tmp_path / "a.txt", "gpt2", form=Form("latin-1"), cache_folder=tmp_path / "cache"
    )
    assert corpus.tokenizer.decode(corpus.validation[:]).endswith("words\ncafé")


def test_a_source_that_changes_meanwhile(
    tmp_path: Path, workers: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some words\n" * 100)
    workers.on_encoding = lambda: os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.txt changed while it was read: run this again"):
        load_corpus(source, "gpt2", cache_folder=tmp_path / "cache")
    assert not (prepared(tmp_path / "cache") / MANIFEST).exists()


def test_a_full_disk_keeps_what_is_whole(
    tmp_path: Path, workers: InThisProcess, monkeypatch: pytest.MonkeyPatch
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
    workers.since()
    load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    assert workers.since() == len(list(cut([["some words\n" * 100]], True, SIZE))) - 8


@pytest.mark.parametrize("damage", ["{", "{}", '{"sources": 1}', '{"sources": [{"path": "a"}]}'])
def test_a_damaged_manifest_in_the_cache(
    damage: str, tmp_path: Path, workers: InThisProcess
) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    folder = prepared(tmp_path / "cache")
    (folder / MANIFEST).write_text(damage)
    with pytest.raises(
        UserError,
        match=rf"manifest\.json is damaged.*: remove {folder}, and the text is tokenized again$",
    ) as caught:
        load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokens_000000.bin", PROGRESS])
def test_what_is_damaged_in_the_cache_is_made_again_once_removed(
    name: str, tmp_path: Path, workers: InThisProcess
) -> None:
    def load(tokenizer: str | GPT2Tokenizer = "gpt2") -> Any:
        return load_corpus(tmp_path / "a.txt", tokenizer, cache_folder=tmp_path / "cache").train[:]

    (tmp_path / "a.txt").write_text("some words\n" * 100)
    expected = load()
    folder = prepared(tmp_path / "cache")
    if name == PROGRESS:  # as while a preparation is interrupted
        (folder / MANIFEST).unlink()
        (folder / name).touch()
    with open(folder / name, "ab") as file:
        file.write(b"{")
    for tokenizer in ("gpt2", GPT2Tokenizer()):
        with pytest.raises(
            UserError, match=rf"{name} is damaged.*: remove {folder}, and the text is "
        ):
            load(tokenizer)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(load(), expected)


def test_a_cache_that_cannot_be_written(tmp_path: Path, workers: InThisProcess) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write") as caught:
        load_corpus(tmp_path / "a.txt", "gpt2", cache_folder=tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_ids_of_a_large_text_are_uint16(tmp_path: Path, workers: InThisProcess) -> None:
    characters = [chr(c) for c in range(0x10000, 0x10000 + (1 << 16) + 1)]
    (tmp_path / "a.txt").write_text("".join(characters), "utf-8")
    with pytest.raises(UserError, match=r"char tokenizer of .* has 65,537 ids, more .*: give less"):
        load_corpus(tmp_path / "a.txt", "char", cache_folder=tmp_path / "cache")


def test_rare_words_are_forgotten_when_there_are_too_many(
    tmp_path: Path, workers: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "MOST_WORDS", 20)
    rare = [f"w{i}" for i in range(300)]
    text = "".join(f"common {word} usual\n" for word in rare)
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(tmp_path / "a.txt", "word", cache_folder=tmp_path / "cache")
    assert corpus.tokenizer.tokens[2:6] == [b" ", b"\n", b"common", b"usual"]
    assert corpus.tokenizer.vocab_size < 2 + 20 + 30
    assert corpus.bytes_per_token is None  # some words' text is lost


def test_a_large_text_is_read_as_a_small_one(
    tmp_path: Path, workers: InThisProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line ends, special tokens and records that are left out."""
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": null}\n{"text": "one\\r\\ntwo"}\n{"text": "a<|endoftext|>b"}\n' * 20
    )
    for special in (False, True):
        form = Form(line_ends="auto", special_tokens=special)
        source, cache = tmp_path / "a.jsonl", tmp_path / "cache"
        words = load_corpus(source, "word", form=form, cache_folder=cache).tokenizer.tokens
        assert (b"endoftext" in words) != special and b"two" in words
        capsys.readouterr()
        corpus = load_corpus(source, "byte", form=form, cache_folder=cache)
        ids = np.concatenate([corpus.train[:], corpus.validation[:]]).tolist()
        text = [*b"one\ntwo", 256, *(b"a", b"a<|endoftext|>")[not special]]
        text += [256, *b"b", 256] if special else [*b"b", 256]
        assert ids == text * 20
        err = capsys.readouterr().err
        assert "20 records left out: 20 without a text (null)" in err
        assert err.count("were read as") == 1
