"""The scripts, called as a user calls them, with names from the Hub and nanoGPT's checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch_files
from faults import Server, serving
from hub import hub_of, refuse

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.weights.pretrained import from_pretrained
from micrograd_gpt.weights.saving import save_pretrained

ROOT = Path(__file__).parents[2]
NAME = "someone/tiny-gpt2"
FIRST, SECOND = ("1" * 40, "2" * 40)
TEXT = "The quick brown fox jumps over the lazy dog. \n"
TOKENIZER = CharTokenizer("".join(sorted(set(TEXT))))


def model(seed: int) -> GPT2:
    return GPT2(GPT2Config(1, 2, 8, TOKENIZER.vocab_size, 32), seed)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    revisions = {}
    for seed, (revision, commit) in enumerate({"main": FIRST, "v2": SECOND}.items()):
        folder = tmp_path_factory.mktemp(revision)
        save_pretrained(model(seed), folder, TOKENIZER)
        revisions[revision] = commit, {file.name: file.read_bytes() for file in folder.iterdir()}
    with hub_of(NAME, revisions) as server:
        yield server


class Shell:
    """Runs scripts in a folder of their own, with an empty cache, against a server."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(folder / "hf"),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def run(self, script: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment | env,
            check=False,
        )


@pytest.fixture
def shell(tmp_path: Path, server: Server) -> Shell:
    return Shell(tmp_path, server)


def numbers(gpt2: GPT2) -> bytes:
    return b"".join(p.numpy().tobytes() for p in gpt2.parameters())


@pytest.mark.slow
def test_load_gpt2(shell: Shell) -> None:
    for name, folder, seed in ((NAME, "tiny-gpt2", 0), (f"{NAME}@v2", "tiny-gpt2", 1)):
        done = shell.run("load_gpt2.py", "--from", name, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert f"fetching {name} from Hugging Face" in done.stderr
        out = shell.folder / "models" / folder
        assert numbers(from_pretrained(GPT2, out)) == numbers(model(seed))
        assert (out / "tokenizer.json").exists()
    # Offline, what was fetched is used, and nothing else is found.
    done = shell.run("load_gpt2.py", "--from", NAME, "--out", "again", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "fetching" not in done.stderr
    assert numbers(from_pretrained(GPT2, shell.folder / "again")) == numbers(model(0))
    done = shell.run("load_gpt2.py", "--from", "someone/else", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cannot ask the Hugging Face Hub for someone/else, which")
    assert "offline" in done.stderr


@pytest.mark.slow
def test_generate(shell: Shell) -> None:
    args = ("--prompt", "The ", "--greedy", "--max-new-tokens", "8")
    texts = [shell.run("generate.py", "--model", name, *args) for name in (NAME, f"{NAME}@v2")]
    assert [done.returncode for done in texts] == [0, 0], texts
    assert len(texts[0].stdout) == len("The ") + 8 + 1 and texts[0].stdout != texts[1].stdout
    offline = shell.run("generate.py", "--model", f"{NAME}@v2", *args, HF_HUB_OFFLINE="1")
    assert offline.stdout == texts[1].stdout and offline.stderr == ""


@pytest.mark.slow
def test_train_gpt2(shell: Shell) -> None:
    (shell.folder / "text.txt").write_text(TEXT * 40)
    args = ("--data", "text.txt", "--init-from", f"{NAME}@v2")
    done = shell.run("train_gpt2.py", *args, "--plan", "--rate", "1")
    assert done.returncode == 0, done.stderr
    assert not [*shell.folder.rglob("model.safetensors")]  # a plan needs no weights
    done = shell.run("train_gpt2.py", *args, "--max-steps", "1", "--learning-rate", "1e-9")
    assert done.returncode == 0, done.stderr
    trained = from_pretrained(GPT2, shell.folder / "out")
    for (name, a), b in zip(trained.named_parameters(), model(1).parameters(), strict=True):
        np.testing.assert_allclose(a.data, b.data, atol=1e-7, err_msg=name)
    state = json.loads((shell.folder / "out" / "trainer_state.json").read_text())
    assert f"{NAME}@v2" in json.dumps(state)
    done = shell.run("train_gpt2.py", "--resume", "--max-steps", "2", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("script", "flag"),
    [("load_gpt2.py", "--from"), ("generate.py", "--model"), ("train_gpt2.py", "--init-from")],
)
def test_a_name_of_nothing_is_one_line(
    shell: Shell, server: Server, script: str, flag: str
) -> None:
    refuse(server, "no/such", 404, "RepoNotFound")
    (shell.folder / "nothing").mkdir()
    more = () if script != "generate.py" else ("--prompt", "x")
    for name, message in {
        "nowhere": "'nowhere' is neither a file or folder, nor one of 124M, 355M, 774M, 1558M, nor",
        "no/such": "no/such is neither a file or folder here nor a model on the Hugging Face Hub",
        "nothing": "nothing does not hold a model: it needs model.safetensors",
        "~/run": "~/run begins with ~, which no shell has replaced by a home folder",
    }.items():
        done = shell.run(script, flag, name, *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
        assert not (shell.folder / "out").exists() and not (shell.folder / "models").exists()


@pytest.mark.slow
def test_a_checkpoint_of_nanogpt_s(shell: Shell) -> None:
    arrays = {name: p.numpy() for name, p in model(0).named_parameters()}
    state = {
        name: np.ascontiguousarray(array.T if array.ndim == 2 and ".h." in name else array)
        for name, array in arrays.items()
    }
    arguments = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 32, "bias": True}
    arguments |= {"vocab_size": TOKENIZER.vocab_size, "dropout": 0.0}
    torch_files.save(shell.folder / "ckpt.pt", {"model": state, "model_args": arguments})
    done = shell.run("load_gpt2.py", "--from", "ckpt.pt")
    assert done.returncode == 0, done.stderr
    written = shell.folder / "models" / "ckpt"
    assert numbers(from_pretrained(GPT2, written)) == numbers(model(0))
    assert json.loads((written / "config.json").read_text())["activation_function"] == "gelu"
    assert "no tokenizer is written" in done.stderr
    characters = dict(enumerate(sorted(set(TEXT))))
    (shell.folder / "meta.pkl").write_bytes(pickle.dumps({"itos": characters}))  # its vocabulary
    done = shell.run("load_gpt2.py", "--from", "ckpt.pt", "--overwrite")
    assert "no tokenizer" not in done.stderr
    assert load_tokenizer(written).to_dict() == TOKENIZER.to_dict()
    done = shell.run("generate.py", "--model", "ckpt.pt", "--prompt", "a")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_short_name_is_one_of_openai_s_sizes(tmp_path: Path) -> None:
    with serving({}) as server:
        shell = Shell(tmp_path, server)
        done = shell.run("load_gpt2.py", "--from", "gpt2", "--openai-url", server.url)
        assert done.returncode == 2
        assert "fetching GPT-2 124M from Hugging Face" in done.stderr
        asked = {path for _, path, _ in server.requests}
        assert asked >= {"/openai-community/gpt2/resolve/main/model.safetensors"}
        done = shell.run("load_gpt2.py", "--from", "gpt2", "--size", "355M")
        assert done.returncode == 2
