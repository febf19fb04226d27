"""Token shards: several files used as one stream; ours, nanoGPT's and llm.c's; damaged ones."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import shards
from micrograd_gpt.text.corpus import load_corpus
from micrograd_gpt.text.decoding import Form
from micrograd_gpt.text.shard_files import FORMAT, MANIFEST
from micrograd_gpt.text.shards import Shards, open_shard, write_shard
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from micrograd_gpt.text.windows import Windows

IDS = np.random.default_rng(0).integers(0, 50257, 1000).astype("<u2")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def llm_c(ids: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    """A shard as llm.c's dev/data/data_common.py writes it."""
    return struct.pack("<256i", magic, version, len(ids), *[0] * 253) + ids.tobytes()


def ours(folder: Path, parts: list[np.ndarray], tokenizer: dict[str, object]) -> None:
    counts = []
    for i, ids in enumerate(parts):
        write_shard(folder / f"tokens_{i:06d}.bin", [ids[:3], ids[3:]])
        counts.append({"file": f"tokens_{i:06d}.bin", "tokens": len(ids)})
    manifest = {"format": FORMAT, "tokenizer": tokenizer, "shards": counts}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def refused(folder: Path, message: str, tokenizer: str = "gpt2") -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_corpus(folder, tokenizer)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------
# Several as one


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    at=st.integers(-2, 40),
    data=st.data(),
)
def test_shards_are_one_array(lengths: list[int], at: int, data: st.DataObject) -> None:
    ends = np.cumsum([0, *lengths])
    whole = np.arange(100, 100 + ends[-1], dtype=np.uint16)
    shards = Shards([whole[a:b] for a, b in itertools.pairwise(ends)])
    assert len(shards) == len(whole)
    for index in (slice(None), slice(2, 5), slice(-3, None), slice(None, None, -2), slice(9, 2)):
        np.testing.assert_array_equal(shards[index], whole[index])
    if len(whole):
        positions = st.lists(st.integers(0, len(whole) - 1), min_size=6, max_size=6)
        index = np.array(data.draw(positions)).reshape(2, 3)
        found = shards[index]
        assert found.dtype == np.uint16 and type(found) is np.ndarray
        np.testing.assert_array_equal(found, whole[index])
    before, after = shards.split(at)
    np.testing.assert_array_equal(before[:], whole[: max(at, 0)])
    np.testing.assert_array_equal(after[:], whole[max(at, 0) :])
    for outside in (-1, len(whole)):
        with pytest.raises(IndexError):
            shards[np.array([outside])]


def test_windows_over_shards_are_those_over_the_whole(tmp_path: Path) -> None:
    (tmp_path / "a_train_0.bin").write_bytes(llm_c(IDS[:333]))
    (tmp_path / "a_train_1.bin").write_bytes(llm_c(IDS[333:337]))
    (tmp_path / "a_train_2.bin").write_bytes(llm_c(IDS[337:]))
    corpus = load_corpus(tmp_path, "gpt2", validation=0.25)
    assert isinstance(corpus.train, Shards)
    for part in corpus.train.parts:
        while isinstance(part, np.ndarray):
            part = part.base
        assert isinstance(part, mmap.mmap)
    one, other = Windows(corpus.train, 8), Windows(IDS[:750], 8)
    for step in range(40):
        for got, expected in zip(one.batch(7, step, 5), other.batch(7, step, 5), strict=True):
            assert got.dtype == np.int64 and type(got) is np.ndarray
            np.testing.assert_array_equal(got, expected)
    for got, expected in zip(
        Windows(corpus.validation, 8).evenly_spaced(15, 3),
        Windows(IDS[750:], 8).evenly_spaced(15, 3),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


# ----------------------------------------------------------------------------------------------
# Formats


def test_nanogpts_shards(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("the text they were made from")
    IDS[:900].tofile(tmp_path / "train.bin")
    corpus = load_corpus(tmp_path, "gpt2")
    np.testing.assert_array_equal(corpus.train[:], IDS[:810])  # a tenth validates
    np.testing.assert_array_equal(corpus.validation[:], IDS[810:900])
    IDS[900:].tofile(tmp_path / "val.bin")
    corpus = load_corpus(str(tmp_path), "gpt2")
    np.testing.assert_array_equal(corpus.train[:], IDS[:900])
    np.testing.assert_array_equal(corpus.validation[:], IDS[900:])
    assert corpus.tokenizer.name == "gpt2" and corpus.name == str(tmp_path)
    alone = load_corpus(tmp_path / "train.bin", "gpt2")
    np.testing.assert_array_equal(alone.train[:], IDS[:810])


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8", ">i4", "<f8"])
@pytest.mark.parametrize("largest", [65, 50257, 100_000])
def test_ids_that_are_not_two_bytes_each_are_refused(
    dtype: str, largest: int, tmp_path: Path
) -> None:
    ids = (np.random.default_rng(0).random(1000) ** 3 * largest).astype(int)  # often small ones
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    refused(tmp_path, "train.bin seems to hold ids of four or eight bytes each")
    ids.clip(0, 50256).astype("<u2").tofile(tmp_path / "train.bin")
    assert load_corpus(tmp_path, "gpt2").train[:].tolist() == ids.clip(0, 50256)[:900].tolist()


def test_a_few_ids_may_have_zeros_among_them(tmp_path: Path) -> None:
    ids = np.arange(40, dtype="<u2") % 2  # as the halves of wider ids have
    ids.tofile(tmp_path / "train.bin")
    assert load_corpus(tmp_path, CharTokenizer(["\n", "1"])).train[:].tolist() == ids[:36].tolist()


def test_the_ids_of_characters_are_not_taken_for_wider_ones_in_silence(tmp_path: Path) -> None:
    """Ids of four bytes, and those of single digits a line each, are the same bytes."""
    np.random.default_rng(0).integers(1, 10, 1000).astype("<i4").tofile(tmp_path / "train.bin")
    entries = dict(enumerate("\n123456789"))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": entries}))
    refused(tmp_path, "train.bin seems to hold ids of four or eight bytes each", "char")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_called_bin_is_no_shard(
    tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, path = "Größe, the quick \x1b[1mbrown fox. " * 80, tmp_path / "my.bin"
    path.write_bytes(text.encode(encoding))
    corpus = load_corpus(path, "gpt2")
    ids = [*corpus.train[:], *corpus.validation[:]]
    assert corpus.tokenizer.decode(ids) == text
    assert f"{path} is read as the text that it begins as, not as tok" in capsys.readouterr().err
    for name in ("train.bin", "val.bin"):
        path.rename(path := tmp_path / name)
    IDS.tofile(tmp_path / "train.bin")
    refused(tmp_path, "val.bin is a text and holds no token ids: rename it to val.txt, or")


def test_a_text_called_bin_in_an_encoding_with_a_byte_a_character(tmp_path: Path) -> None:
    (tmp_path / "my.bin").write_bytes("café ".encode("latin-1") * 400)
    refused(tmp_path / "my.bin", "my.bin is not UTF-8 text: byte 0xe9 at offset 3; give its enc")
    corpus = load_corpus(tmp_path / "my.bin", "byte", form=Form("latin-1"))
    assert corpus.tokenizer.decode(corpus.train[:6]) == "café "


@pytest.mark.parametrize("first", [0xFEFF, 0xFFFE, 0xBBEF, 0x0101])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16-le", "cp1252"])
def test_an_encoding_says_nothing_about_ids(tmp_path: Path, first: int, encoding: str) -> None:
    """It may have been given for the text to validate on."""
    ids = np.random.default_rng(0).integers(0, 1 << 16, 1000).astype("<u2")
    ids |= 0x0101  # so that no byte is 0
    ids[0] = first
    ids.tofile(tmp_path / "my.bin")
    (tmp_path / "val.txt").write_text("a text" * 100, encoding=encoding)
    tokenizer = CharTokenizer([*" aetx", *map(chr, range(0x10000, 0x1FFFB))])
    corpus = load_corpus(tmp_path / "my.bin", tokenizer, tmp_path / "val.txt", Form(encoding))
    np.testing.assert_array_equal(corpus.train[:], ids)


def test_llm_cs_shards(tmp_path: Path) -> None:
    for i, part in enumerate([IDS[:400], IDS[400:900]], start=1):
        (tmp_path / f"fineweb_train_{i:06d}.bin").write_bytes(llm_c(part))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(llm_c(IDS[900:]))
    corpus = load_corpus(tmp_path, "gpt2")
    np.testing.assert_array_equal(corpus.train[:], IDS[:900])
    np.testing.assert_array_equal(corpus.validation[:], IDS[900:])


def test_our_shards_are_llm_cs_with_a_manifest(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [IDS[:10], IDS[10:10], IDS[10:].astype(np.int32)])
    assert (tmp_path / "a.bin").read_bytes() == llm_c(IDS)
    np.testing.assert_array_equal(open_shard(tmp_path / "a.bin"), IDS)
    write_shard(tmp_path / "empty.bin", [])
    assert len(open_shard(tmp_path / "empty.bin")) == 0
    (tmp_path / "folder").mkdir()
    ours(tmp_path / "folder", [IDS[:700], IDS[700:]], {"tokenizer": "gpt2"})
    corpus = load_corpus(tmp_path / "folder", "gpt2")
    np.testing.assert_array_equal(corpus.train[:], IDS[:900])
    np.testing.assert_array_equal(corpus.validation[:], IDS[900:])


def test_a_manifest_brings_its_vocabulary(tmp_path: Path) -> None:
    char = CharTokenizer("abc")
    ours(tmp_path, [np.array([0, 1, 2, 1], np.uint16)], char.to_dict())
    corpus = load_corpus(tmp_path, "char", 0.5)
    assert corpus.tokenizer.decode(corpus.validation[:]) == "cb"
    assert load_corpus(tmp_path, char).tokenizer.to_dict() == char.to_dict()
    with pytest.raises(UserError, match="made with a different char vocabulary, of 3 entries"):
        load_corpus(tmp_path, CharTokenizer("abcd"))
    refused(
        tmp_path,
        "were made with the char tokenizer, as manifest.json beside them says, not gpt2: give",
        "gpt2",
    )
    with pytest.raises(UserError, match=r"not gpt2: give the text itself, or start from scratch w"):
        load_corpus(tmp_path, GPT2Tokenizer())


# ----------------------------------------------------------------------------------------------
# Damage


def test_shards_that_name_no_vocabulary_need_a_fixed_one(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(np.arange(100, dtype="<u2").tobytes())
    refused(tmp_path, "give that: --tokenizer byte or gpt2", "char")
    refused(tmp_path, "give that: --tokenizer byte or gpt2", "word")
    vocabulary = CharTokenizer([chr(c) for c in range(100)])
    assert load_corpus(tmp_path, vocabulary).tokenizer is vocabulary


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(np.arange(257, dtype="<u2").tobytes())
    (tmp_path / "val.bin").write_bytes(np.array([5, 257], "<u2").tobytes())
    message = (
        "val.bin holds the token id 257, but the byte tokenizer has only 257 ids: give the tex"
    )
    refused(tmp_path, message, "byte")
    assert len(load_corpus(tmp_path, "gpt2").train) == 257
    (tmp_path / "x_train_1.bin").write_bytes(llm_c(np.array([50257], "<u2")))
    refused(tmp_path, "x_train_1.bin holds the token id 50257")
    (tmp_path / "ours").mkdir()
    ours(tmp_path / "ours", [np.array([300], np.uint16)], ByteTokenizer().to_dict())
    refused(tmp_path / "ours", "tokens_000000.bin holds the token id 300", "byte")


def test_flags_for_text_are_told_of_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    IDS.tofile(tmp_path / "train.bin")
    load_corpus(tmp_path, "gpt2")
    assert not capsys.readouterr().err
    for form in (Form(special_tokens=True), Form(encoding="latin-1")):
        load_corpus(tmp_path, "gpt2", form=form)
        note = f"note: {tmp_path} holds tokens: --encoding and --special-tokens are for text\n"
        assert capsys.readouterr().err == note


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\0dd")
    refused(tmp_path, f"{tmp_path / 'train.bin'} is damaged: it has 3 bytes, and ids of two bytes")
    (tmp_path / "val.bin").write_bytes(b"\0dd")
    (tmp_path / "train.bin").write_bytes(b"\0ven")
    refused(tmp_path, "val.bin is damaged")
    shard = tmp_path / "a_train_0.bin"
    for content, message in [
        (llm_c(IDS)[:-1], "is damaged: it has 3,023 bytes where its header says 3,024"),
        (llm_c(IDS) + b"ab", "is damaged: it has 3,026 bytes"),
        (llm_c(IDS)[:1000], "is damaged: it has 1,000 bytes, fewer than its header"),
        (llm_c(IDS)[:4], "is damaged: it has 4 bytes, fewer than its header"),
        (llm_c(IDS, version=7), "is a token shard of version 7, and only version 1"),
        (
            llm_c(IDS, magic=20240801),
            "does not begin with the magic number 20240520",
        ),
        (IDS.tobytes(), "does not begin with the magic number 20240520"),
        (b"", "does not begin with the magic number 20240520"),
    ]:
        shard.write_bytes(content)
        refused(tmp_path, message)
        refused(tmp_path, str(shard))


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    ours(tmp_path, [IDS], {"tokenizer": "gpt2"})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for change, message in [
        ({"shards": [{"file": "tokens_000000.bin", "tokens": 999}]}, "has 1,000 tokens where"),
        ({"shards": [{"file": "tokens_000007.bin", "tokens": 1}]}, "cannot read"),
        ({"shards": [{"file": "tokens_000000.bin"}]}, "manifest.json is damaged"),
        ({"shards": []}, "manifest.json is damaged"),
        ({"tokenizer": "gpt2"}, "manifest.json is damaged"),
        ({"format": "another"}, "is not the manifest of token shards"),
    ]:
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | change))
        refused(tmp_path, message)
    (tmp_path / MANIFEST).write_text("{")
    refused(tmp_path, "manifest.json is damaged")
    (tmp_path / MANIFEST).unlink()
    refused(tmp_path, "has shards but no manifest.json: preparing them was interrupted")


@pytest.mark.parametrize("name", ["a_train_1.bin", "a_val_1.bin", "val.bin", "tokens_000001.bin"])
@pytest.mark.parametrize("damage", ["a folder", "a dangling link", "refused"])
def test_a_shard_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    (tmp_path / "train.bin" if name == "val.bin" else tmp_path / "a_train_0.bin").write_bytes(
        llm_c(IDS)
    )
    path = tmp_path / name
    if name.startswith("tokens"):
        ours(tmp_path, [IDS, IDS], {"tokenizer": "gpt2"})
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(llm_c(IDS))

        def refuse(file: Path, *args: Any) -> Any:
            if file == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return open(file, *args)

        monkeypatch.setattr(shards, "open", refuse, raising=False)
    refused(tmp_path, f"cannot read {path}: ")


def test_a_name_that_cannot_be_a_path_is_one_line() -> None:
    refused(Path("a" * 5000), "cannot read a")
    refused(Path("a" * 5000 + ".bin"), "cannot read a")


def test_ids_are_read_once(tmp_path: Path) -> None:
    """Shards that were found good are recognized by their time stamps and not read again."""
    folder, cache = tmp_path / "shards", tmp_path / "cache"
    folder.mkdir()
    shard = folder / "train.bin"

    def write(ids: np.ndarray, time: int) -> None:
        shard.write_bytes(ids.astype("<u2").tobytes())
        os.utime(shard, ns=(time, time))

    bad = IDS.copy()
    bad[-1] = 65_000
    write(IDS, time=1)
    load_corpus(folder, "gpt2", cache_folder=cache)
    assert list(folder.iterdir()) == [shard]
    write(bad, time=1)
    load_corpus(folder, "gpt2", cache_folder=cache)
    with pytest.raises(UserError, match="tokenizer has only 257 ids"):  # another vocabulary
        load_corpus(folder, "byte", cache_folder=cache)
    write(bad, time=2)
    for _ in range(2):  # what was found bad is not remembered
        with pytest.raises(UserError, match="holds the token id 65000"):
            load_corpus(folder, "gpt2", cache_folder=cache)


def test_ids_are_read_each_time_where_nothing_can_be_remembered(tmp_path: Path) -> None:
    shard, cache = tmp_path / "train.bin", tmp_path / "a file"
    cache.write_text("no folder")
    shard.write_bytes(IDS[:500].tobytes())
    os.utime(shard, ns=(1, 1))
    assert len(load_corpus(shard, "gpt2", cache_folder=cache).train) == 450
    shard.write_bytes(np.append(IDS[:499], 65_000).astype("<u2").tobytes())
    os.utime(shard, ns=(1, 1))
    with pytest.raises(UserError, match="holds the token id 65000"):
        load_corpus(shard, "gpt2", cache_folder=cache)


def test_the_small_set_of_llm_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "tiny_shakespeare_train.bin", [np.arange(300)])
    write_shard(tmp_path / "tiny_shakespeare_val.bin", [np.arange(40)])
    (tmp_path / "._tiny_shakespeare_train.bin").write_bytes(b"of macOS")
    (tmp_path / "._tiny_shakespeare_val_1.bin").write_bytes(b"of macOS")
    corpus = load_corpus(tmp_path, "gpt2", cache_folder=tmp_path / "cache")
    assert (len(corpus.train), len(corpus.validation)) == (300, 40)
    with pytest.raises(
        UserError, match=r"has validation shards of its own: leave --validation 0.2"
    ):
        load_corpus(tmp_path, "gpt2", 0.2, cache_folder=tmp_path / "cache")
    assert "left out" not in capsys.readouterr().err
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert len(load_corpus(tmp_path, "gpt2", cache_folder=tmp_path / "cache").train) == 300
    assert "train.bin is left out, beside the shards tiny_sh" in capsys.readouterr().err
    write_shard(tmp_path / "fineweb_train_000001.bin", [np.arange(300)])
    with pytest.raises(UserError, match=r"several data sets \(fineweb, tiny_shakespeare\)"):
        load_corpus(tmp_path, "gpt2", cache_folder=tmp_path / "cache")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a file that is mapped as it is")
def test_a_shard_that_is_cut_short_while_it_is_in_use_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    IDS.tofile(path)  # less than a page: the system would read zeros where the ids were
    ids = Shards([open_shard(path, headerless=True)]).split(500)[1]
    np.testing.assert_array_equal(ids[np.array([0])], IDS[500:501])
    os.truncate(path, 10)  # as by another run of what made it
    with pytest.raises(UserError, match=r"train\.bin was cut short while it was in use"):
        ids[np.array([0])]
