"""load_gpt2.py: what it writes, prints and exits with, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import training
from faults import Fault, Server, fill_disk, kill, needs_fork, run_with_fault, serving

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support import cli, files
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text import hugging_face
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer
from micrograd_gpt.text.template import Template, save_template, template_of
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning.lora import add_lora, trained_parameters
from micrograd_gpt.weights import pretrained, releases, saving
from micrograd_gpt.weights.config import SIZES, published_shape, read_config
from micrograd_gpt.weights.releases import OPENAI_FILES, Release
from micrograd_gpt.weights.saving import save_pretrained
from micrograd_gpt.weights.tensor_files import TensorFile

SCRIPT = Path(__file__).parents[2] / "load_gpt2.py"
DATA = Path(__file__).parents[1] / "data" / "tf_checkpoint"
# The smallest model that takes GPT-2's own tokens, so that the final check can run on it.
TINY = GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=32)
TINY_SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 32}
DATA_SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 16, "vocab_size": 61, "n_positions": 32}


@pytest.fixture
def script() -> ModuleType:
    return training.script("load_gpt2")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with TINY in it, random weights."""
    save_pretrained(GPT2(TINY, seed=3), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


# ---------------------------------------------------------------------------------------------
# What it writes


def test_a_local_folder_is_converted(
    script: ModuleType, source: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--from", str(source), "--out", "new"]) == 0
    assert sorted(p.name for p in (here / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert tree(source)["model.safetensors"] == tree(here / "new")["model.safetensors"]
    assert load_tokenizer(here / "new").name == "gpt2"
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["transformer.wte.weight", "(50257,", "4)", "float32", "201,028"]
    assert out[-2].split() == ["16", "parameters", "201,408"]
    assert out[-1] == "check: nothing to compare with, this is not one of OpenAI's sizes"


def test_openai_s_folder_is_converted(script: ModuleType, here: Path) -> None:
    assert script.main(["--from", str(DATA / "saver"), "--out", "new"]) == 0
    expected = safetensors.numpy.load_file(DATA / "expected.safetensors")
    got = safetensors.numpy.load_file("new/model.safetensors")
    assert len(got) == len(expected) == 28
    for theirs, ours in {
        "model/h1/attn/c_proj/w": "transformer.h.1.attn.c_proj.weight",  # square: not transposed
        "model/wpe": "transformer.wpe.weight",
        "model/ln_f/b": "transformer.ln_f.bias",
    }.items():
        np.testing.assert_array_equal(got[ours], expected[theirs].reshape(got[ours].shape))
    # Its vocabulary of 61 is no tokenizer's we know.
    assert sorted(p.name for p in Path("new").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_what_is_stored(script: ModuleType, source: Path, here: Path, dtype: str) -> None:
    assert script.main(["--from", str(source), "--out", "new", "--dtype", dtype]) == 0
    entries = TensorFile("new/model.safetensors").entries.values()
    assert {e.dtype.name for e in entries} == {dtype}
    assert json.loads(Path("new/config.json").read_text())["dtype"] == dtype
    # What was stored loads, and is stored again as it is.
    assert script.main(["--from", "new", "--out", "again", "--dtype", dtype]) == 0
    assert tree(here / "new") == tree(here / "again")


def test_the_model_s_own_tokenizer_goes_with_it(script: ModuleType, here: Path) -> None:
    tokenizer = CharTokenizer("abc")
    config = GPT2Config(1, 1, 4, tokenizer.vocab_size, 8)
    save_pretrained(GPT2(config), here / "source", tokenizer)
    assert script.main(["--from", "source", "--out", "new"]) == 0
    assert load_tokenizer("new").encode("cab").tolist() == tokenizer.encode("cab").tolist()


@pytest.fixture
def adapter(source: Path, tmp_path: Path) -> Path:
    """A folder with an adapter for `source`, both matrices of each addition other than zero."""
    model = GPT2.from_pretrained(source)
    add_lora(model, rank=2, base=str(source))
    for parameter in trained_parameters(model):
        parameter.data = np.full(parameter.shape, 0.3, np.float32)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged(
    script: ModuleType, source: Path, adapter: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--from", str(source), "--merge", str(adapter), "--out", "new"]) == 0
    total = capsys.readouterr().out.splitlines()[-2]
    assert total.split() == ["16", "parameters", "201,408"]  # as many as before
    old, new = (TensorFile(f / "model.safetensors") for f in (source, here / "new"))
    for name in old.entries:
        changed = name == "transformer.h.0.attn.c_attn.weight"
        scale = 2.0  # alpha is twice the rank; each product of a row and a column is 2 × 0.3 × 0.3
        expected = old.read(name) + (scale * 0.18 if changed else 0)
        np.testing.assert_allclose(new.read(name), expected, rtol=1e-6)
    assert script.main(["--from", str(adapter)]) == 0  # it knows its base
    assert tree(here / "models" / "adapter") == tree(here / "new")
    again = ["--from", str(adapter), "--merge", str(adapter), "--out", "twice"]
    assert script.main(again) == 0  # an adapter into what another one made
    name = "transformer.h.0.attn.c_attn.weight"
    twice = TensorFile(here / "twice" / "model.safetensors").read(name)
    np.testing.assert_allclose(twice, old.read(name) + 2 * scale * 0.18, rtol=1e-6)


def test_the_template_of_a_tuned_model_goes_with_it(
    script: ModuleType,
    source: Path,
    adapter: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    GPT2Tokenizer().save(source)
    for folder, text in ((source, "{instruction}={output}"), (adapter, "{instruction}:{output}")):
        save_template(Template(text), folder)
    merge = ["--from", str(source), "--merge", str(adapter), "--out", "new"]
    for arguments, prompt in ((["--from", str(source), "--out", "new"], "a="), (merge, "a:")):
        assert script.main([*arguments, "--overwrite"]) == 0
        template = template_of("new")
        assert template and template.prompt("a") == prompt
        assert "chat_template" in json.loads(Path("new/tokenizer_config.json").read_text())
    (source / "prompt_template.txt").unlink()
    Path("new/generation_config.json").write_text('{"eos_token_id": 1}')
    Path("new/mine.txt").touch()
    assert "chat template" not in capsys.readouterr().err
    assert script.main(["--from", str(source), "--out", "new", "--overwrite"]) == 0
    assert f"the chat template in {source} is left out" in capsys.readouterr().err
    assert template_of("new") is None  # it was of the model that was there before
    assert not Path("new/generation_config.json").exists()  # Transformers would go by it
    assert Path("new/mine.txt").exists()


def test_what_cannot_be_merged(script: ModuleType, source: Path, adapter: Path, here: Path) -> None:
    base = ["--from", str(source)]
    with pytest.raises(UserError, match=r"source holds no adapter: there is no adapter_config"):
        script.main([*base, "--merge", str(source)])
    with pytest.raises(UserError, match=r"^there is no folder own/lora: .* fetch one that is on"):
        script.main([*base, "--merge", "own/lora"])
    with pytest.raises(UserError, match=r"model\.safetensors is no folder: give the adapter's"):
        script.main([*base, "--merge", str(adapter / "adapter_model.safetensors")])
    ByteTokenizer().save(adapter)  # as a run's folder has its tokenizer
    with pytest.raises(UserError, match="is folded into its base already: leave --merge out"):
        script.main(["--from", str(adapter), "--merge", str(adapter), "--out", "twice"])
    with pytest.raises(UserError, match="is a part of an adapter: give the folder"):
        script.main(["--from", str(adapter / "adapter_model.safetensors")])
    for taken in (source, adapter):
        with pytest.raises(UserError, match="is where the weights come from"):
            script.main([*base, "--merge", str(adapter), "--out", str(taken)])
    with pytest.raises(UserError, match="is where the weights come from"):
        script.main(["--from", str(adapter), "--out", str(adapter)])
    assert not list(here.iterdir())


def test_an_adapter_knows_what_it_is_merged_into(
    script: ModuleType, source: Path, adapter: Path, here: Path
) -> None:
    assert script.main(["--merge", str(adapter), "--out", "new"]) == 0
    assert script.main(["--from", str(source), "--merge", str(adapter), "--out", "told"]) == 0
    assert tree(here / "new") == tree(here / "told")


def test_a_base_that_is_gone_is_said_to_be_named_by_the_adapter(
    script: ModuleType, adapter: Path, here: Path
) -> None:
    shutil.copytree(adapter, here / "mine")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone"
    (here / "mine" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"mine/adapter_config\.json names its base, but '/gone'"):
        script.main(["--merge", "mine", "--out", "new"])
    with pytest.raises(UserError, match=r"^'/gone' is neither"):
        script.main(["--from", "/gone", "--merge", "mine", "--out", "new"])


def test_an_adapter_is_looked_at_before_anything_is_fetched(
    script: ModuleType, source: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr(script, "open_release", fetched)
    for size in ([], ["--size", "355M"]):
        with pytest.raises(UserError, match="source holds no adapter"):
            script.main([*size, "--merge", str(source)])
    with pytest.raises(UserError, match=r"--source is for OpenAI's sizes, and .*source is none"):
        script.main(["--merge", str(adapter), "--source", "openai"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"does not name its model .*load_gpt2\.py --from MODEL --merge"
    ):
        script.main(["--merge", str(adapter)])


def test_openai_s_model_with_an_adapter_is_not_openai_s(
    script: ModuleType, source: Path, adapter: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its check must not ask for the published continuation."""
    monkeypatch.setitem(SIZES, "124M", TINY_SHAPE)
    claimed = ["--from", str(source), "--size", "124M"]
    assert script.main([*claimed, "--out", "refused"]) == 1
    assert script.main([*claimed, "--merge", str(adapter), "--out", "new"]) == 0


def test_out_is_named_after_what_it_holds(
    script: ModuleType, source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.main(["--from", str(source)])
    assert [p.name for p in (here / "models").iterdir()] == ["source"]
    script.main(["--from", str(source / "model.safetensors")])
    assert sorted(p.name for p in (here / "models").iterdir()) == ["model", "source"]
    monkeypatch.setitem(SIZES, "355M", TINY_SHAPE)
    script.main(["--from", str(source)])
    assert (here / "models" / "gpt2-355M" / "config.json").exists()


# ---------------------------------------------------------------------------------------------
# The check


@pytest.fixture
def tiny_124m(script: ModuleType, source: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let TINY pass for 124M, and its own greedy ids for the published ones."""
    monkeypatch.setitem(SIZES, "124M", TINY_SHAPE)
    model = pretrained.from_pretrained(GPT2, source)
    ids = script.greedy(model, script.PROMPT, 20)
    monkeypatch.setitem(script.PUBLISHED_IDS, "124M", ids)
    return ids


def test_the_published_ids_are_the_published_ones(script: ModuleType) -> None:
    published = "464 3290 373 1043 287 257 2214 1474 262 16246 286 2688 290 2688 27262 13 198 198"
    assert " ".join(map(str, script.PUBLISHED_IDS["124M"])) == f"{published} 464 3290"


def test_greedy_takes_the_likeliest(script: ModuleType, source: Path) -> None:
    model = pretrained.from_pretrained(GPT2, source, dtype="float64")
    ids = script.greedy(model, [464, 3290], 20)
    assert len(ids) == 20 and ids[:2] == [464, 3290]
    logits = model(np.array([ids])).data[0]
    assert logits[1:-1].argmax(-1).tolist() == ids[2:]


def test_the_right_ids_pass(
    script: ModuleType,
    source: Path,
    here: Path,
    tiny_124m: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for size in ([], ["--size", "124M"]):
        assert script.main(["--from", str(source), "--out", "new", "--overwrite", *size]) == 0
        *_, ids, text, verdict = capsys.readouterr().out.splitlines()
        assert ids == "greedy ids: " + " ".join(map(str, tiny_124m))
        assert text.startswith("greedy text: 'The dog")
        assert verdict.startswith("check: passed")


def test_other_ids_fail_only_if_the_weights_are_said_to_be_openai_s(
    script: ModuleType,
    source: Path,
    here: Path,
    tiny_124m: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(script.PUBLISHED_IDS, "124M", [*tiny_124m[:-1], 0])
    assert script.main(["--from", str(source), "--out", "new"]) == 0
    assert capsys.readouterr().out.endswith(
        "check: nothing to compare with, these are not OpenAI's weights for 124M\n"
    )
    assert script.main(["--from", str(source), "--out", "other", "--size", "117M"]) == 1
    captured = capsys.readouterr()
    assert "check: FAILED, the published ids are 464 3290" in captured.out
    assert captured.err.endswith("the check failed: other is not written\n")
    assert [p.name for p in here.iterdir()] == ["new"]


def test_the_check_comes_before_what_is_printed(
    script: ModuleType, source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reader that has gone away, as of `| head -1`, breaks the first thing printed.
    def gone(*_: object) -> None:
        raise BrokenPipeError

    checked = []
    check = script.check
    monkeypatch.setattr(
        script, "check", lambda *a, **k: checked.append(check(*a, **k)) or checked[0]
    )
    monkeypatch.setattr(script, "print", gone, raising=False)
    monkeypatch.setattr(script, "say", lambda message: None)
    with pytest.raises(BrokenPipeError):
        script.main(["--from", str(source), "--out", "new"])
    assert checked and (here / "new" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 50258},
        {"n_positions": 512},
        {"n_head": 6},
        {"norm_position": "post"},
        {"position_embedding": "sinusoidal"},
    ],
)
def test_a_published_size_is_all_of_its_shape(script: ModuleType, change: dict[str, Any]) -> None:
    def size(**shape: Any) -> str | None:
        return script.published_size(read_config({**published_shape("124M"), **shape}))

    assert size() == "124M"
    assert size(n_layer=48, n_head=25, n_embd=1600) == "1558M"
    assert size(**change) is None


def test_a_size_without_published_ids_says_so(
    script: ModuleType,
    source: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(SIZES, "774M", TINY_SHAPE)
    assert script.main(["--from", str(source), "--size", "774M"]) == 0
    assert "nothing to compare with, no ids are published for 774M" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Fetching


@pytest.fixture
def servers(
    script: ModuleType, source: Path, tiny_124m: list[int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Server]]:
    """The Hub and OpenAI's store. What the latter has is DATA, of another vocabulary."""
    monkeypatch.setitem(releases.RELEASES, "124M", Release("openai-community/gpt2"))
    monkeypatch.setitem(SIZES, "124M", DATA_SHAPE)
    store_files = {f"/124M/{name}": (DATA / "saver" / name).read_bytes() for name in OPENAI_FILES}
    with serving({}) as hub, serving(store_files) as store:
        yield hub, store


def test_source_openai(
    script: ModuleType,
    here: Path,
    servers: tuple[Server, Server],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, store = servers
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    store.faults[f"/124M/{OPENAI_FILES[-1]}"] = [Fault(drop_after=9_000), Fault(status=403)]
    args = ["--source", "openai", "--openai-url", store.url, "--size", "117M"]
    with pytest.raises(UserError, match="answered 403"):
        script.main(args)
    assert not (here / "models").exists()
    with pytest.raises(UserError, match="no_such"):
        script.main([*args, "--no_such"])
    # DATA's vocabulary is too small for the prompt: the check can't be run.
    monkeypatch.setattr(script, "check", lambda *_, claimed: (claimed, []))
    assert script.main(args) == 0
    assert (here / "models" / "gpt2-124M" / "model.safetensors").exists()
    assert store.ranges(f"/124M/{OPENAI_FILES[-1]}")[1:] == ["bytes=9000-", "bytes=9000-"]
    assert "fetching GPT-2 124M from OpenAI" in capsys.readouterr().err


def test_what_is_cached_is_verified(
    script: ModuleType, here: Path, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = servers
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setattr(script, "check", lambda *_, claimed: (claimed, []))
    args = ["--source", "openai", "--openai-url", store.url, "--overwrite"]
    assert script.main(args) == 0
    good = tree(here)
    (data,) = here.rglob(OPENAI_FILES[-1])
    data.write_bytes(bytes(data.stat().st_size))
    assert script.main(args) == 0
    assert tree(here) == good


def test_with_no_network_one_line_names_the_ways_out(tmp_path: Path) -> None:
    with serving({}) as server:
        url = server.url
    result = run(
        *("--out", tmp_path / "new", "--openai-url", url),
        HF_ENDPOINT=url,
        HF_HOME=str(tmp_path / "hf"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert (result.returncode, result.stdout) == (2, "")
    *said, error = result.stderr.splitlines()
    assert error.startswith("error: cannot fetch openai-community/gpt2: ")
    assert error.endswith("try --from with the file or folder, if you have it")
    only = run("--source", "openai", "--openai-url", url, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "; try --source huggingface, or --from with the file or folder" in only.stderr
    assert said[0] == "fetching GPT-2 124M from Hugging Face"
    assert said[-1] == "fetching GPT-2 124M from OpenAI"
    assert not (tmp_path / "new").exists()


def test_hf_hub_offline_is_obeyed(tmp_path: Path) -> None:
    with serving({}) as server:
        result = run(
            *("--source", "huggingface", "--out", tmp_path / "new"),
            HF_ENDPOINT=server.url,
            HF_HOME=str(tmp_path),
            HF_HUB_OFFLINE="1",
        )
        assert server.requests == []
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "offline" in error and "--source openai" in error


# ---------------------------------------------------------------------------------------------
# Mistakes and faults


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "2B"], "unknown GPT-2 size '2B'"),
        (["--size", ""], "unknown GPT-2 size ''"),  # as of a variable that is not set
        (["--merge", ""], "argument --merge: must not be empty"),
        (["--from", "nowhere"], "'nowhere' is neither a file or folder, nor one of 124M"),
        (["--from", "x", "--source", "openai"], "give one of them"),
        (["--source", "torrent"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        (["--export", "a.bin"], r"--export writes GGUF: end a\.bin in \.gguf"),
        (["--export", "a.gguf", "--out", "b"], "a file and --out a folder: give one of them"),
    ],
)
def test_mistakes_are_named(script: ModuleType, here: Path, args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script.main(args)
    assert list(here.iterdir()) == []


def test_a_size_that_is_not_what_is_there(script: ModuleType, source: Path, here: Path) -> None:
    with pytest.raises(UserError, match="source holds no published size, not 355M"):
        script.main(["--from", str(source), "--size", "345M"])
    assert list(here.iterdir()) == []


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(
    script: ModuleType,
    source: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What can be, tests/reference/test_gguf.py exports."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    save_pretrained(GPT2(GPT2Config(1, 1, 4, 3, 8)), here / "char", CharTokenizer("abc"))
    for model, message in (
        (source, r'needs gguf: pip install "micrograd-gpt\[gguf\]"'),
        ("char", "a char tokenizer cannot be exported"),
        (DATA / "saver", "the tokenizer has 50257 tokens and the model 61"),
    ):
        with pytest.raises(UserError, match=message):
            script.main(["--from", str(model), "--export", "a.gguf"])
    assert capsys.readouterr().err == ""
    assert [p.name for p in here.iterdir()] == ["char"]


def test_the_source_is_not_overwritten(script: ModuleType, source: Path) -> None:
    before = tree(source)
    for path in (source, source / "model.safetensors"):
        with pytest.raises(UserError, match="choose another --out"):
            script.main(["--from", str(path), "--out", str(source), "--dtype", "float16"])
    assert tree(source) == before


def test_a_linked_source_is_not_overwritten(script: ModuleType, source: Path, here: Path) -> None:
    (here / "linked").symlink_to(source)
    (here / "links").mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / "links" / name).symlink_to(source / name)
    before = tree(source)
    for path in ("linked", "linked/model.safetensors", "links", "links/model.safetensors"):
        for out in (str(source), "linked"):
            with pytest.raises(UserError, match="choose another --out"):
                script.main(["--from", path, "--out", out, "--dtype", "float16"])
    assert tree(source) == before


def test_openai_s_folder_may_lie_in_out_but_not_be_it(script: ModuleType, here: Path) -> None:
    shutil.copytree(DATA / "saver", here / "models" / "tf")
    (here / "link").symlink_to("models/tf")
    before = tree(here / "models" / "tf")
    for source, out in (("models/tf", "models/tf"), ("models/tf", "link"), ("link", "models/tf")):
        with pytest.raises(UserError, match="choose another --out"):
            script.main(["--from", source, "--out", out])
    assert script.main(["--from", "models/tf", "--out", "models"]) == 0
    assert tree(here / "models" / "tf") == before
    assert TensorFile("models/model.safetensors").shapes


def test_a_training_run_is_not_overwritten(script: ModuleType, source: Path, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"run holds a training run .*: choose another --out"):
        script.main(["--from", str(source), "--out", "run"])
    assert list(tree(here)) == ["run/trainer_state.json"]


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "ckpt.pt"],
)
def test_another_model_is_not_replaced_unasked(
    script: ModuleType, source: Path, here: Path, name: str
) -> None:
    (here / "new").mkdir()
    (here / "new" / name).write_bytes(b"another")
    (here / "models").mkdir()
    (here / "new").rename(here / "models" / "source")
    for flags in ([], ["--out", "models/source"]):
        with pytest.raises(
            UserError, match=r"models/source holds a model: --overwrite it, or give"
        ):
            script.main(["--from", str(source), *flags])
    assert tree(here) == {f"models/source/{name}": b"another"}
    assert script.main(["--from", str(source), "--overwrite"]) == 0
    written = pretrained.from_pretrained(GPT2, here / "models" / "source")
    assert (
        written.transformer.wpe.weight.data == GPT2(TINY, seed=3).transformer.wpe.weight.data
    ).all()


def test_a_model_s_folder_is_refused_before_anything_is_fetched(
    script: ModuleType, source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("it was fetched")

    for name in ("open_release", "find"):
        monkeypatch.setattr(script, name, fetched)
    shutil.copytree(source, here / "models" / "gpt2-124M")
    for flags in ([], ["--from", "gpt2"], ["--from", "some/one", "--out", str(source)]):
        with pytest.raises(UserError, match="holds a model: --overwrite it, or give another --out"):
            script.main(flags)


def test_shards_of_an_older_model_do_not_stay(script: ModuleType, source: Path, here: Path) -> None:
    old = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    old += ["model.safetensors.index.json", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin"]
    (here / "new").mkdir()
    for name in (*old, "model-notes.safetensors"):
        (here / "new" / name).write_bytes(b"{}")
    assert script.main(["--from", str(source), "--out", "new", "--overwrite"]) == 0
    assert sorted(tree(here / "new")) == [
        *("config.json", "model-notes.safetensors", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]


def test_an_exported_file_is_not_replaced_unasked(
    script: ModuleType, source: Path, here: Path
) -> None:
    (here / "a.gguf").write_bytes(b"another")
    with pytest.raises(UserError, match=r"a\.gguf exists already: --overwrite it, or give another"):
        script.main(["--from", str(source), "--export", "a.gguf"])


def test_a_tokenizer_that_cannot_be_used_is_not_taken_for_gpt2_s(
    script: ModuleType, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor can it be after the model was converted."""
    save_pretrained(GPT2(GPT2Config(1, 1, 2, 50257, 8)), here / "old")
    for name, content in (("tokenizer.json", "{"), ("vocab.txt", "[UNK]")):
        (here / "old" / name).write_text(content)
        assert script.main(["--from", "old", "--out", "new", "--overwrite"]) == 0
        assert f"(any files of one are copied as they are): old/{name}" in capsys.readouterr().err
        with pytest.raises(UserError, match=f"new/{name} is"):
            load_tokenizer(here / "new")
        (here / "old" / name).unlink()


def test_a_file_alone_wants_its_config(script: ModuleType, source: Path, here: Path) -> None:
    shutil.copy(source / "model.safetensors", here / "alone.safetensors")
    with pytest.raises(UserError, match=r"four sizes: put the model's config\.json there"):
        script.main(["--from", "alone.safetensors", "--out", "new"])
    shutil.copy(source / "config.json", here)
    assert script.main(["--from", "alone.safetensors", "--out", "new"]) == 0


def test_an_older_tokenizer_does_not_stay(script: ModuleType, here: Path) -> None:
    CharTokenizer("abc").save(here / "new")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (here / "new" / name).write_text("{}")
    (here / "new" / "notes.txt").write_text("mine")
    assert script.main(["--from", str(DATA / "saver"), "--out", "new", "--overwrite"]) == 0
    assert sorted(tree(here / "new")) == ["config.json", "model.safetensors", "notes.txt"]


@pytest.mark.parametrize("out", [".", "new", "a/b/c"])
def test_everything_is_written_inside_of_out(
    script: ModuleType, source: Path, here: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    moved = []

    def recorded(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def move(old: Path, new: Path) -> None:
            assert Path(out) in Path(old).parents  # so never across a mount point
            moved.append(Path(new))
            rename(old, new)

        return move

    for call in ("rename", "replace"):
        monkeypatch.setattr(os, call, recorded(getattr(os, call)))
    assert script.main(["--from", str(source), "--out", out]) == 0
    written = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert {Path(out) / name for name in written} <= {*moved}
    assert sorted(tree(here / out)) == written
    assert len(list((here / out).iterdir())) == 4


@pytest.mark.slow
@needs_fork
def test_killed_at_any_moment_it_leaves_a_whole_folder(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old model with its tokenizer, or the new one, which has none; never parts of both."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only time would be lost
    before, after = (GPT2(GPT2Config(layers, 1, 4, 3, 8)) for layers in (1, 2))
    found = []
    for number in count():
        out = tmp_path / str(number)
        save_pretrained(before, out, CharTokenizer("abc"))
        status = run_with_fault(
            lambda out=out: script.write_folder(after, out, None, "float16"), kill, number
        )
        layers = pretrained.from_pretrained(GPT2, out).config.n_layer
        names = sorted(p.name for p in out.iterdir() if p.name != ".saving")
        written = ["config.json", "model.safetensors"]
        tokenizer = ["tokenizer.json", "tokenizer_config.json"]
        assert names == (written if layers == 2 else [*written, *tokenizer]), number
        found.append(layers)
        if status == 0:
            break
        assert status == 9
    assert found == sorted(found) and set(found) == {1, 2} and len(found) > 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("layers", [1, 30])  # less and more than is kept before it is written
def test_output_on_a_full_device_is_one_line(tmp_path: Path, layers: int, unbuffered: str) -> None:
    save_pretrained(GPT2(GPT2Config(layers, 1, 4, 9, 8)), tmp_path / "source")
    args = [str(SCRIPT), "--from", str(tmp_path / "source"), "--out", str(tmp_path / "new")]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert result.returncode == 2
    *_, error = result.stderr.splitlines()
    assert error == "error: cannot write output: No space left on device"
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_other_faults_of_the_system_are_not_called_output() -> None:
    def main() -> int:
        raise IsADirectoryError(21, "Is a directory", "some file")

    with pytest.raises(IsADirectoryError, match="some file"):
        cli.run(main)


def test_a_name_too_long_is_one_line(script: ModuleType, source: Path, here: Path) -> None:
    with pytest.raises(UserError, match=r"^'x+' is neither a file or folder"):
        script.main(["--from", "x" * 300])
    with pytest.raises(UserError, match=r"cannot write x.*: File name too long"):
        script.main(["--from", str(source), "--out", "x" * 300])
    assert list(here.iterdir()) == []


def test_a_damaged_file_leaves_nothing(source: Path, tmp_path: Path) -> None:
    os.truncate(source / "model.safetensors", 1000)
    result = run("--from", source, "--out", tmp_path / "new")
    assert (result.returncode, result.stdout) == (2, "")
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"error: {source / 'model.safetensors'} has 1,000 bytes that are not a")
    assert not (tmp_path / "new").exists()


def test_status_and_output_streams(source: Path, tmp_path: Path) -> None:
    result = run("--from", source, "--out", tmp_path / "new")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 18
    assert result.stderr.splitlines() == [
        f"loading {source / 'model.safetensors'}",
        f"wrote {tmp_path / 'new'}, weights stored as float32",
    ]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("room", [0, 100, 100_000])
def test_a_full_disk_changes_nothing(
    script: ModuleType,
    source: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    before: bool,
) -> None:
    if before:
        save_pretrained(GPT2(GPT2Config(1, 1, 4, 9, 8)), here / "new")
    old = tree(here)
    fill_disk(monkeypatch, files, room)
    with pytest.raises(UserError, match=r"^cannot write new/model\.safetensors: No space left on"):
        script.main(["--from", str(source), "--out", "new", "--overwrite"])
    assert tree(here) == old
    assert [p.name for p in here.iterdir()] == (["new"] if before else [])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_disk_that_fills_up_at_the_last_files_changes_nothing(
    script: ModuleType, source: Path, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_pretrained(GPT2(GPT2Config(1, 1, 4, 9, 8)), here / "new")
    old = tree(here)

    def full(path: Path, text: str) -> None:
        if path.name == name:
            fill_disk(monkeypatch, files, 0)
        files.write_text(path, text)

    for module in (saving, hugging_face):
        monkeypatch.setattr(module, "write_text", full)
    with pytest.raises(UserError, match=rf"cannot write .*{name}: No space left on device; what"):
        script.main(["--from", str(source), "--out", "new", "--overwrite"])
    assert tree(here) == old and len(list(here.iterdir())) == 1


def test_a_forbidden_folder(
    script: ModuleType, source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        script.main(["--from", str(source), "--out", "file/new"])

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "open", forbidden, raising=False)
    with pytest.raises(UserError, match="Permission denied"):
        script.main(["--from", str(source), "--out", "new"])
    assert [p.name for p in here.iterdir()] == ["file"]
