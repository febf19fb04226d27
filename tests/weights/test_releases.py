"""OpenAI's weights from both servers, and everything that can go wrong on the way.

The servers run on 127.0.0.1 and serve a tiny model under the name of the smallest size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from faults import Fault, Server, serving
from tiny_weights import ARRAYS, CONFIG, DATA, TINY, assert_same, bare, with_masks

from micrograd_gpt.support.download import download
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights import names, releases
from micrograd_gpt.weights.config import SIZES
from micrograd_gpt.weights.pretrained import build
from micrograd_gpt.weights.releases import (
    OPENAI_FILES,
    HuggingFace,
    OpenAI,
    Release,
    fetch,
    open_release,
    ways_out,
)

# ---------------------------------------------------------------------------------------------
# OpenAI's store


@pytest.fixture
def tiny_124m(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the committed model pass for 124M."""
    monkeypatch.setitem(SIZES, "124M", TINY)
    data = DATA / "saver" / OPENAI_FILES[-1]
    with serving(hub_files()) as s:
        sha256 = hashlib.sha256(s.files[HUB_MODEL]).hexdigest()
    release = Release("openai-community/gpt2", sha256, data.stat().st_size)
    monkeypatch.setitem(releases.RELEASES, "124M", release)


@pytest.fixture
def store(tiny_124m: None) -> Iterator[Server]:
    files = {f"/124M/{name}": (DATA / "saver" / name).read_bytes() for name in OPENAI_FILES}
    with serving(files) as server:
        yield server


STORE_DATA = f"/124M/{OPENAI_FILES[-1]}"


def test_openai_s_files_are_fetched_once(store: Server, tmp_path: Path) -> None:
    source = OpenAI(store.url, tmp_path)
    assert source.cached("124M") is None
    for name in ("124M", "117M", "124M"):
        assert_same(build(open_release(name, [source])))
    assert sorted(p.name for p in (tmp_path / "124M").iterdir()) == sorted(OPENAI_FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["124M"]
    assert [path for _, path, _ in store.requests] == [f"/124M/{n}" for n in OPENAI_FILES]


def test_a_broken_download_is_not_taken_for_whole(store: Server, tmp_path: Path) -> None:
    source = OpenAI(store.url, tmp_path)
    store.faults[STORE_DATA] = [Fault(drop_after=25_000), Fault(status=500)]
    with pytest.raises(UserError, match="500"):
        fetch("124M", [source])
    assert [p.name for p in tmp_path.iterdir()] == ["124M.part"]
    assert source.cached("124M") is None
    assert_same(build(open_release("124M", [source])))
    assert store.ranges(STORE_DATA) == [None, "bytes=25000-", "bytes=25000-"]
    assert store.ranges("/124M/model.ckpt.index") == [None]  # was kept from the first try


@pytest.mark.parametrize("name", OPENAI_FILES)
def test_what_is_damaged_on_the_way_is_thrown_away(
    store: Server, tmp_path: Path, name: str
) -> None:
    source = OpenAI(store.url, tmp_path)
    good = store.files[f"/124M/{name}"]
    bad = bytes([good[0] ^ 1]) + good[1:]
    store.files[f"/124M/{name}"] = bad
    with pytest.raises(
        UserError, match=r"thrown away: .*(checksum|damaged|does not name a checkpoint)"
    ):
        fetch("124M", [source])
    assert list(tmp_path.iterdir()) == []
    store.files[f"/124M/{name}"] = good
    assert_same(build(open_release("124M", [source])))


def test_a_data_file_of_the_wrong_length_is_refused(store: Server, tmp_path: Path) -> None:
    store.files[STORE_DATA] = store.files[STORE_DATA][:-4]
    with pytest.raises(UserError, match="has 32,316 bytes, the published one 32,320"):
        fetch("124M", [OpenAI(store.url, tmp_path)])


def test_another_size_under_the_name_is_refused(
    store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "124M", TINY | {"n_head": 2})
    with pytest.raises(UserError, match="is not GPT-2 124M: its n_head is 4, not 2"):
        open_release("124M", [OpenAI(store.url, tmp_path)])


@pytest.mark.parametrize("name", OPENAI_FILES[:3])
def test_a_file_of_unknown_length_that_is_cut_is_thrown_away(
    store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # As from a server that tells no length and breaks off: taken for whole until it is read.
    def cut(url: str, path: Path, *known: Any) -> None:
        download(url, path, *known)
        if path.name == name:
            os.truncate(path, 20)

    source = OpenAI(store.url, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(releases, "download", cut)
        with pytest.raises(UserError, match="thrown away"):
            fetch("124M", [source])
    assert list(tmp_path.iterdir()) == []
    assert_same(build(open_release("124M", [source])))


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_text("x")


OPENAI_DAMAGE: dict[str, tuple[str, Any, bool]] = {
    "flipped bit in a tensor": (OPENAI_FILES[-1], flip_last_bit, True),
    "flipped bit in the index": (
        OPENAI_FILES[2],
        lambda p: p.write_bytes(p.read_bytes()[1:]),
        False,
    ),
    "missing data": (OPENAI_FILES[-1], Path.unlink, False),
    "missing hparams": ("hparams.json", Path.unlink, False),
    "another size": (
        "hparams.json",
        lambda p: p.write_text(p.read_text().replace("4", "2")),
        False,
    ),
    "empty folder": ("", lambda p: [file.unlink() for file in p.iterdir()], False),
    "no folder": ("checkpoint", replace_by_a_file, False),
}


@pytest.mark.parametrize("damage", OPENAI_DAMAGE)
def test_a_damaged_cached_checkpoint_is_fetched_again(
    store: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    name, spoil, verify = OPENAI_DAMAGE[damage]
    source = OpenAI(store.url, tmp_path)
    folder = fetch("124M", [source])
    spoil(folder / name)
    capsys.readouterr()
    assert_same(build(open_release("124M", [source], verify)))
    said = capsys.readouterr().err.splitlines()
    assert str(folder) in said[0] and said[0].endswith(": this copy is removed")
    assert said[1:] == ["fetching GPT-2 124M from OpenAI"]


def test_a_damaged_copy_that_stays_is_named(
    store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = OpenAI(store.url, tmp_path)
    folder = fetch("124M", [source])
    flip_last_bit(folder / OPENAI_FILES[-1])
    # Without the verification it is found while it is read.
    with pytest.raises(UserError, match=f"checksum of .* is wrong; remove {folder} and fetch"):
        build(open_release("124M", [source]))

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", forbidden)
    with pytest.raises(UserError, match=rf"^{folder} is damaged: remove it \(Permission denied\)"):
        open_release("124M", [source], verify=True)


def test_the_cache_is_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "micrograd-gpt" / "openai" / "355M"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert OpenAI().cached("355M") == folder


# ---------------------------------------------------------------------------------------------
# The Hugging Face Hub

HUB_MODEL = "/openai-community/gpt2/resolve/main/model.safetensors"
HUB_CONFIG = "/openai-community/gpt2/resolve/main/config.json"


def hub_files() -> dict[str, bytes]:
    model = safetensors.numpy.save(with_masks(bare(ARRAYS)), {"format": "pt"})
    return {HUB_MODEL: model, HUB_CONFIG: json.dumps(CONFIG).encode()}


@pytest.fixture
def hub(tiny_124m: None) -> Iterator[Server]:
    with serving(hub_files()) as server:
        yield server


def test_the_hub_s_files_are_fetched_once(hub: Server, tmp_path: Path) -> None:
    source = HuggingFace(hub.url, tmp_path)
    for _ in range(2):
        assert_same(build(open_release("124M", [source])))
    assert hub.ranges(HUB_MODEL) == [None]
    asked = len(hub.requests)
    assert source.cached("124M") and len(hub.requests) == asked  # the cache needs no network


def test_the_hub_s_dropped_connection_is_resumed(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HuggingFace(hub.url, tmp_path)
    hub.faults[HUB_MODEL] = [Fault(drop_after=20_000)]
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub's, before it retries
    for place in (
        "constants",
        "file_download",
    ):  # how little it keeps; where, depends on its version
        name = f"huggingface_hub.{place}.DOWNLOAD_CHUNK_SIZE"
        monkeypatch.setattr(name, 5000, raising=False)
    try:
        fetch("124M", [source])
    except UserError:  # versions that leave the next try to the user
        assert source.cached("124M") is None
        fetch("124M", [source])
    assert_same(build(open_release("124M", [source])))
    assert hub.ranges(HUB_MODEL) == [None, "bytes=20000-"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=404), "answered 404"),
        (Fault(status=403), "answered 403"),
        (Fault(status=500), "answered 500"),
        (Fault(status=200), "cannot fetch openai-community/gpt2"),
    ],
)
def test_the_hub_s_refusals(hub: Server, tmp_path: Path, fault: Fault, message: str) -> None:
    for path in (HUB_MODEL, HUB_CONFIG):
        hub.head_faults[path] = [fault] * 9
        hub.faults[path] = [fault] * 9
    source = HuggingFace(hub.url, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        fetch("124M", [source], ways_out([source]))
    assert "--source openai" in str(caught.value) and "--from" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert source.cached("124M") is None


def test_a_hub_file_that_is_not_the_published_one_is_thrown_away(
    hub: Server, tmp_path: Path
) -> None:
    source = HuggingFace(hub.url, tmp_path)
    good = hub.files[HUB_MODEL]
    hub.files[HUB_MODEL] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(UserError, match=r"thrown away: .*sha256"):
        fetch("124M", [source])
    assert source.cached("124M") is None
    assert not any(blob.stat().st_size > 30_000 for blob in tmp_path.rglob("blobs/*"))
    hub.files[HUB_MODEL] = good
    assert_same(build(open_release("124M", [source])))


def test_a_hub_file_that_is_damaged_is_thrown_away(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for the sizes whose checksum is not known here: the length must be the header's.
    release = Release("openai-community/gpt2")
    monkeypatch.setitem(releases.RELEASES, "124M", release)
    hub.files[HUB_MODEL] = hub.files[HUB_MODEL][:-1]
    source = HuggingFace(hub.url, tmp_path)
    with pytest.raises(UserError, match=r"thrown away: .*not a whole safetensors file"):
        fetch("124M", [source])
    assert source.cached("124M") is None


def test_a_hub_config_that_is_damaged_is_thrown_away(hub: Server, tmp_path: Path) -> None:
    source = HuggingFace(hub.url, tmp_path)
    good = hub.files[HUB_CONFIG]
    for bad in (
        b"<html>",
        good.replace(b"61", b"62"),
        good.replace(b'"n_head": 4', b'"n_head": 2'),
    ):
        hub.files[HUB_CONFIG] = bad
        with pytest.raises(UserError, match="thrown away"):
            fetch("124M", [source])
        assert source.cached("124M") is None
    hub.files[HUB_CONFIG] = good
    assert_same(build(open_release("124M", [source])))


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "config"])
def test_a_damaged_hub_cache_is_fetched_again(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = HuggingFace(hub.url, tmp_path)
    folder = fetch("124M", [source])
    match damage:
        case "flipped bit":
            flip_last_bit(folder / "model.safetensors")
            build(open_release("124M", [source]))  # not looked for, unless asked to
        case "cut short":
            os.truncate(folder / "model.safetensors", 20_000)
        case "config":
            (folder / "config.json").write_text("{")
    capsys.readouterr()
    assert_same(build(open_release("124M", [source], verify=damage == "flipped bit")))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].endswith(": this copy is removed")
    assert_same(build(open_release("124M", [HuggingFace(gone(), tmp_path)], verify=True)))


# ---------------------------------------------------------------------------------------------
# One source after the other


def gone() -> str:
    with serving({}) as server:
        return server.url


def test_openai_stands_in_for_hugging_face(
    store: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face = HuggingFace(gone(), tmp_path / "hub")
    sources = [hugging_face, OpenAI(store.url, tmp_path / "openai")]
    assert_same(build(open_release("124M", sources)))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fetching GPT-2 124M from Hugging Face"
    assert said[1].startswith("cannot fetch openai-community/gpt2: ")
    assert said[2:] == ["fetching GPT-2 124M from OpenAI"]
    # Once it is here, nobody is asked again, and nothing is said.
    assert_same(build(open_release("124M", [hugging_face, OpenAI(gone(), tmp_path / "openai")])))
    assert capsys.readouterr().err == ""


def test_with_no_network_both_reasons_are_named_and_no_script_s_flags(tmp_path: Path) -> None:
    sources = [HuggingFace(gone(), tmp_path), OpenAI(gone(), tmp_path)]
    with pytest.raises(UserError) as caught:
        fetch("1558M", sources)
    message = str(caught.value)
    assert "openai-community/gpt2-xl" in message and "1558M/checkpoint" in message
    assert "give the path of their file or folder instead of the size" in message
    assert "--" not in message and "\n" not in message
    with pytest.raises(UserError, match="unknown GPT-2 size '2B'"):
        fetch("2B", sources)


def test_every_release_has_a_size() -> None:
    assert releases.RELEASES.keys() == SIZES.keys()
    assert releases.RELEASES["124M"].openai_data_bytes == 497_759_232


def test_a_folder_that_is_called_as_a_size_is_named(
    tiny_124m: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "124M").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "open_release", lambda size: size)
    assert names.open_model("124M") == "124M"
    assert "for what is here, write ./124M\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="124M does not hold a model"):
        names.open_model("./124M")
    assert names.open_model("355M") == "355M" and not capsys.readouterr().err
