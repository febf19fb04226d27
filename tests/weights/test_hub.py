"""Models from the Hub by name: what is fetched, what is kept, and what is said if it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import torch_files
from faults import Fault, Server, serving
from hub import hub_of, publish, refuse
from tiny_weights import ARRAYS, CONFIG, Arrays, assert_same

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.weights import hub, names
from micrograd_gpt.weights.formats import open_weights
from micrograd_gpt.weights.hub import Repository, fetch, repository_named
from micrograd_gpt.weights.pretrained import build
from micrograd_gpt.weights.releases import HuggingFace
from micrograd_gpt.weights.releases import fetch as fetch_release

NAME = "someone/tiny-gpt2"
FIRST, SECOND, THIRD = ("1" * 40, "2" * 40, "3" * 40)
API = f"/api/models/{NAME}/revision/main"


def files(arrays: Arrays = ARRAYS, **others: bytes) -> dict[str, bytes]:
    model = safetensors.numpy.save(arrays, {"format": "pt"})
    named = {name.replace("_json", ".json"): content for name, content in others.items()}
    return {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": model, **named}


def changed(by: float) -> Arrays:
    return {name: array + np.float32(by) for name, array in ARRAYS.items()}


@pytest.fixture(autouse=True)
def ask_again() -> None:
    """A process asks the Hub for a model once; each test is to be a process of its own."""
    hub._listing.cache_clear()


@pytest.fixture
def server() -> Iterator[Server]:
    revisions = {
        "main": (FIRST, files(tokenizer_json=b"{}", README_md=b"words")),
        "v1.0": (THIRD, files(changed(3))),
        "refs/pr/1": (SECOND, files(changed(2))),
    }
    with hub_of(NAME, revisions) as server:
        yield server


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def gone() -> str:
    with serving({}) as server:
        return server.url


def at(server: Server | str, cache: Path, name: str = NAME) -> Repository:
    """The repository of that name on this server."""
    found = repository_named(name)
    assert found
    url = server if isinstance(server, str) else server.url
    return Repository(found.name, found.revision, url, cache)


def got(server: Server) -> list[str]:
    """The files that were sent."""
    return [path for method, path, _ in server.requests if method == "GET" and "/api/" not in path]


# ---------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("distilbert/distilgpt2", Repository("distilbert/distilgpt2")),
        ("a/b@v1.0", Repository("a/b", "v1.0")),
        ("A-1/b_c.d@refs/pr/3", Repository("A-1/b_c.d", "refs/pr/3")),
        ("gpt2", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/b@x y", None),
        ("/a/b", None),
        ("./a", None),
        ("../a", None),
        ("a/..", None),
        ("a/", None),
        ("a/b..c", None),
        ("a/b--c", None),
        ("a/b.git", None),
        ("a/" + "b" * 97, None),
        ("a\\b", None),
        ("~/a", None),
        ("a/é", None),
        ("a/b\n", None),
        ("", None),
    ],
)
def test_what_can_be_a_name_on_the_hub(text: str, repository: Repository | None) -> None:
    assert repository_named(text) == repository
    if repository:
        assert str(repository) == text


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("124M", "124M"),
        ("1.5B", "1558M"),
        ("gpt2", "124M"),
        ("gpt2-medium", "355M"),
        ("gpt2-large", "774M"),
        ("openai-community/gpt2-xl", "1558M"),
        ("gpt2@main", None),
        ("distilgpt2", None),
        ("someone/gpt2", None),
        ("125M", None),
    ],
)
def test_the_names_everybody_types(here: Path, name: str, size: str | None) -> None:
    assert names.size_named(name) == size


def test_what_is_found_under_a_name(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fetched(repository: Repository, with_weights: bool) -> Path:
        asked.append((str(repository), with_weights))
        return Path("cache")

    monkeypatch.setattr(names, "fetch", fetched)
    for name in ("distilgpt2", "distilgpt2@v2", "gpt2@v3", "a/b"):
        assert names.find(name) == Path("cache")
    names.find("a/b", with_weights=False)
    assert asked == [
        ("distilbert/distilgpt2", True),
        ("distilbert/distilgpt2@v2", True),
        ("openai-community/gpt2@v3", True),
        ("a/b", True),
        ("a/b", False),
    ]
    # What is here wins, and where the other is likely to be meant, that is said.
    asked.clear()
    for name in ("gpt2", "distilgpt2", "openai-community/gpt2", "a/b", "a/b@c"):
        Path(name).mkdir(parents=True)
        assert names.find(name) == Path(name) and names.size_named(name) is None
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [
        "using the local gpt2",
        "using the local distilgpt2",
        "using the local openai-community/gpt2",
    ]
    assert asked == []
    for name in ("nowhere", "a/b/c", "no/such@", "", "x" * 300):
        with pytest.raises(UserError, match=r"is neither a file or folder, nor one of 124M.*Hub"):
            names.find(name)


# ---------------------------------------------------------------------------------------------
# Fetching


def test_a_model_is_fetched_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch(at(server, tmp_path))
    assert_same(build(open_weights(folder)))
    wanted = ("config.json", "tokenizer.json", "model.safetensors")
    assert got(server) == [f"/{NAME}/resolve/{FIRST}/{name}" for name in wanted]  # no README
    assert sorted(file.name for file in folder.iterdir()) == sorted(wanted)
    assert capsys.readouterr().err.count(f"fetching {NAME} from Hugging Face\n") == 1
    hub._listing.cache_clear()
    server.requests.clear()
    assert fetch(at(server, tmp_path)) == folder
    assert [path for _, path, _ in server.requests] == [API]  # only: which commit is it?
    assert capsys.readouterr().err == ""


def test_a_tuned_model_comes_with_its_template(tmp_path: Path) -> None:
    template = b"{instruction}\n{output}\n"
    with hub_of(NAME, {"main": (FIRST, files() | {"prompt_template.txt": template})}) as server:
        assert (fetch(at(server, tmp_path)) / "prompt_template.txt").read_bytes() == template


def test_config_and_tokenizer_without_weights(server: Server, tmp_path: Path) -> None:
    folder = fetch(at(server, tmp_path), with_weights=False)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "tokenizer.json"]
    # It does not count as fetched.
    with pytest.raises(UserError, match="cannot ask the Hugging Face Hub for"):
        fetch(at(gone(), tmp_path))
    assert fetch(at(server, tmp_path)) == folder
    assert (folder / "model.safetensors").exists()


def test_revisions(server: Server, tmp_path: Path) -> None:
    for revision, by in (("", 0), ("@v1.0", 3), ("@refs/pr/1", 2), (f"@{SECOND}", 2), ("@main", 0)):
        folder = fetch(at(server, tmp_path, NAME + revision))
        assert_same(build(open_weights(folder)), changed(by))
    with pytest.raises(UserError, match=f"^{NAME} has no revision 'v9' on the Hugging Face Hub$"):
        refuse(server, NAME, 404, "RevisionNotFound", "v9")
        fetch(at(server, tmp_path, f"{NAME}@v9"))


def test_a_new_commit_is_fetched(server: Server, tmp_path: Path) -> None:
    fetch(at(server, tmp_path))
    publish(server, NAME, "main", SECOND, files(changed(2)))
    hub._listing.cache_clear()
    assert_same(build(open_weights(fetch(at(server, tmp_path)))), changed(2))
    # The first is still there by its own name.
    assert_same(build(open_weights(fetch(at(server, tmp_path, f"{NAME}@{FIRST}")))))


def test_all_files_are_of_one_commit(server: Server, tmp_path: Path) -> None:
    first = fetch(at(server, tmp_path), with_weights=False)
    publish(server, NAME, "main", SECOND, files(changed(2)))  # while a script is running
    assert fetch(at(server, tmp_path)) == first


def test_the_cache_is_used_where_the_hub_cannot_be_asked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch(at(server, tmp_path))
    capsys.readouterr()
    assert fetch(at(gone(), tmp_path)) == folder
    said = capsys.readouterr().err
    assert said.endswith("; using the copy that was fetched before\n")
    assert said.count("\n") == 1
    refuse(server, NAME, 503, None)
    hub._listing.cache_clear()
    assert fetch(at(server, tmp_path)) == folder
    assert "the server answered 503; using the copy" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot ask .*, which is not a file or folder here: "):
        fetch(at(gone(), tmp_path, f"{NAME}@v1.0"))


@pytest.mark.parametrize(
    ("cached", "lacking"),
    [
        (("config.json", "model.safetensors"), "tokenizer"),
        (("config.json", "tokenizer.json"), "weights"),
    ],
)
def test_a_copy_that_other_programs_fetched_in_part_is_not_used(
    server: Server, tmp_path: Path, cached: tuple[str, ...], lacking: str
) -> None:
    """Without its tokenizer's files it would seem to have GPT-2's."""
    for name in cached:
        huggingface_hub.hf_hub_download(NAME, name, endpoint=server.url, cache_dir=tmp_path)
    with pytest.raises(UserError, match=f"cannot ask .*; the copy in the cache has no {lacking}"):
        fetch(at(gone(), tmp_path))
    whole = fetch(at(server, tmp_path))
    hub._listing.cache_clear()
    assert fetch(at(gone(), tmp_path)) == whole


def test_a_model_without_a_tokenizer_is_used_from_the_cache_too(tmp_path: Path) -> None:
    with hub_of(NAME, {"main": (FIRST, files())}) as server:
        absent = f"/{NAME}/resolve/{FIRST}/tokenizer.json"
        server.commits[absent] = FIRST
        folder = fetch(at(server, tmp_path))
    hub._listing.cache_clear()
    assert fetch(at(gone(), tmp_path)) == folder
    assert load_tokenizer(tmp_path).name == "gpt2"


def test_tokenizers_that_are_refused_by_name_are_fetched_for_that(tmp_path: Path) -> None:
    published = files() | {"spiece.model": b"\0"}
    with hub_of(NAME, {"main": (FIRST, published)}) as server:
        folder = fetch(at(server, tmp_path))
    with pytest.raises(UserError, match=r"spiece\.model is a SentencePiece tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("fault", [Fault(status=403), Fault(drop_after=100, reset=True)])
def test_a_download_that_breaks_off_is_continued(
    server: Server, tmp_path: Path, fault: Fault
) -> None:
    model = f"/{NAME}/resolve/{FIRST}/model.safetensors"
    server.faults[model] = [fault] * 9
    server.head_faults[model] = [fault] * 9 if fault.status else []
    with pytest.raises(UserError, match=f"cannot fetch {NAME}: "):
        fetch(at(server, tmp_path))
    with pytest.raises(
        UserError, match="cannot ask the Hugging Face Hub for"
    ):  # what is there is not taken for whole
        fetch(at(gone(), tmp_path))
    server.head_faults.clear()
    server.faults.clear()
    assert_same(build(open_weights(fetch(at(server, tmp_path)))))


def test_what_is_not_the_hub_s_file_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.faults[f"/{NAME}/resolve/{FIRST}/model.safetensors"] = [Fault(garbled=True)]
    with pytest.raises(UserError, match=r"^model\.safetensors is not what the Hub has .*sha256"):
        fetch(at(server, tmp_path))
    assert_same(build(open_weights(fetch(at(server, tmp_path)))))


def test_a_file_that_was_damaged_in_the_cache_is_named(server: Server, tmp_path: Path) -> None:
    blob = (fetch(at(server, tmp_path)) / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"remove {blob} and fetch it again"):
        open_weights(fetch(at(server, tmp_path)))
    blob.unlink()
    assert_same(build(open_weights(fetch(at(server, tmp_path)))))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    published, weight_map = {"config.json": json.dumps(CONFIG).encode()}, {}
    for i, tensors in enumerate((sorted(ARRAYS)[::2], sorted(ARRAYS)[1::2])):
        shard = f"{stem}-{i + 1:05d}-of-00002.{suffix}"
        arrays = {name: ARRAYS[name] for name in tensors}
        if suffix == "bin":
            torch_files.save(tmp_path / "shard", arrays)
        else:
            safetensors.numpy.save_file(arrays, tmp_path / "shard")
        published[shard] = (tmp_path / "shard").read_bytes()
        weight_map |= dict.fromkeys(tensors, shard)
    index = json.dumps({"weight_map": weight_map}).encode()
    published |= {f"{stem}.{suffix}.index.json": index, "other.safetensors": b"not asked for"}
    with hub_of(NAME, {"main": (FIRST, published)}) as server:
        folder = fetch(at(server, tmp_path / "cache"))
    assert_same(build(open_weights(folder)))
    assert not (folder / "other.safetensors").exists()


def test_a_model_of_pytorch_s_is_fetched_only_where_there_is_no_other(tmp_path: Path) -> None:
    pickled = (Path(__file__).parents[1] / "data/torch_files/old/pytorch_model.bin").read_bytes()
    config = json.dumps(CONFIG).encode()
    only = {"config.json": config, "pytorch_model.bin": pickled}
    with hub_of(NAME, {"main": (FIRST, only)}) as server:
        assert_same(build(open_weights(fetch(at(server, tmp_path)))))
    both = files() | {"pytorch_model.bin": pickled}
    with hub_of(NAME, {"main": (SECOND, both)}) as server:
        assert not (fetch(at(server, tmp_path)) / "pytorch_model.bin").exists()


# ---------------------------------------------------------------------------------------------
# What is said


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            404,
            "RepoNotFound",
            f"^{NAME} is neither a file or folder here nor a model on .* log in",
        ),
        (401, "RepoNotFound", f"^{NAME} is neither a file or folder here nor .* log in"),
        (403, "GatedRepo", "needs its owner's permission: .* log in"),
        (500, None, f"^cannot ask the Hugging Face Hub for {NAME}, .*: the server answered 500"),
        (200, None, r"its answer is not a Hub's \(a login page or a proxy\?\)$"),
    ],
)
def test_the_hub_s_refusals(
    server: Server, tmp_path: Path, status: int, code: str | None, message: str
) -> None:
    refuse(server, NAME, status, code)
    with pytest.raises(UserError, match=message) as caught:
        fetch(at(server, tmp_path))
    assert "\n" not in str(caught.value)
    assert got(server) == []


@pytest.mark.parametrize("token", ["folder", "file/token", "binary"])
def test_a_token_that_cannot_be_read_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    """Docker makes a folder of a file that it is to mount and that is not there."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "binary").write_bytes(b"\xff")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / token))
    with pytest.raises(UserError, match=f"^cannot ask the Hugging Face Hub for {NAME}, .*: ") as no:
        fetch(at(server, tmp_path))
    assert "\n" not in str(no.value)
    with pytest.raises(UserError, match=r"^cannot fetch openai-community/gpt2: ") as no:
        fetch_release("124M", [HuggingFace(server.url, tmp_path)], "")
    assert "\n" not in str(no.value)


def test_what_is_not_a_gpt2_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    llama = json.dumps({"model_type": "llama"}).encode()
    for published, message in (
        (files() | {"config.json": llama}, "model_type is 'llama'"),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"},
            r"is a LoRA adapter, .* \(hf download .* --revision \S+ --local-dir FOLDER\)$",
        ),
        ({"model.safetensors": b"x"}, r"has no config\.json on the .* Hub: it is not a GPT-2"),
        (
            {"config.json": json.dumps(CONFIG).encode(), "tf_model.h5": b"x"},
            "has no weights that can be read",
        ),
    ):
        with hub_of(NAME, {"main": (FIRST, published)}) as server:
            with pytest.raises(UserError, match=message):
                fetch(at(server, tmp_path / message[:5]))
            assert not [path for path in got(server) if not path.endswith("config.json")]


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.bin"
    pickle = torch_files.pickled({"x": torch_files.called("os system", "exit 1")})
    torch_files.write_zip(bad, pickle, {})
    published = {
        "config.json": json.dumps(CONFIG).encode(),
        "pytorch_model.bin": bad.read_bytes(),
    }
    with hub_of(NAME, {"main": (FIRST, published)}) as server:
        folder = fetch(at(server, tmp_path / "cache"))
    with pytest.raises(UserError, match=r"'os\.system'.*any code; .*spaces/safetensors/convert"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "is not a JSON object"),
        (b'{"weight_map": [1]}', "is not the index of a sharded set"),
        (b'{"weight_map": {"x": "../y"}}', r"the shard '\.\./y' is not a file beside the index"),
        (b'{"weight_map": {"x": "z.safetensors"}}', r"cannot read .*z\.safetensors"),
    ],
)
def test_a_wrong_index_of_shards_is_named(tmp_path: Path, index: bytes, message: str) -> None:
    config = json.dumps(CONFIG).encode()
    published = {"config.json": config, "model.safetensors.index.json": index, "../y": b"y"}
    with (
        hub_of(NAME, {"main": (FIRST, published)}) as server,
        pytest.raises(UserError, match=message),
    ):
        open_weights(fetch(at(server, tmp_path)))
    assert not [path for _, path, _ in server.requests if path.endswith("/y")]
