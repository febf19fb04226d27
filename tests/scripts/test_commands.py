"""One command for all scripts, as a wheel installs it, and the habits that all scripts share."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from training import script

import micrograd_gpt
from micrograd_gpt.__main__ import SCRIPTS
from micrograd_gpt.support.errors import UserError

ROOT = Path(__file__).parents[2]
ASK = "from micrograd_gpt.support.cli import command"
COMMAND = "micrograd-gpt generate"
FILES = sorted(path.name for path in ROOT.glob("*.py"))


def run(*words: str, cwd: Path = ROOT, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment
    )


def test_every_script_is_a_command() -> None:
    assert set(FILES) <= set(SCRIPTS.values())
    text = run("-m", "micrograd_gpt").stdout
    for name, file in SCRIPTS.items():
        assert (file in text) == (f"  {name} " in text) == (file in FILES)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", [name for name, file in SCRIPTS.items() if file in FILES])
def test_a_command_is_the_script(name: str, tmp_path: Path) -> None:
    command = run("-m", "micrograd_gpt", name, "--help", cwd=tmp_path)
    file = run(str(ROOT / SCRIPTS[name]), "--help", cwd=tmp_path)
    assert command.returncode == 0 and command.stdout == file.stdout != ""


def test_a_command_that_there_is_not() -> None:
    done = run("-m", "micrograd_gpt", "trian")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "invalid choice: 'trian'" in done.stderr


@pytest.mark.parametrize("file", FILES)
def test_every_script_says_its_version(file: str) -> None:
    done = run(file, "--version")
    assert (done.returncode, done.stdout) == (0, f"micrograd-gpt {micrograd_gpt.__version__}\n")


def test_a_wheel_holds_the_scripts_once_and_inside_the_package(tmp_path: Path) -> None:
    """It is unpacked as pip would, and its command used where there is no checkout."""
    pytest.importorskip("setuptools")
    source, place, elsewhere = (tmp_path / name for name in ("source", "place", "elsewhere"))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if not names:
        pytest.skip("this is not a git checkout")
    for name in names:
        if name.startswith("micrograd_gpt/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    elsewhere.mkdir()
    build = "from setuptools import build_meta as b; print(b.build_wheel('..'))"
    built = run("-c", build, cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        archive.extractall(place)
    top = {name.split("/")[0] for name in files}
    version = micrograd_gpt.__version__
    assert top == {"micrograd_gpt", f"micrograd_gpt-{version}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "micrograd_gpt").rglob("*.py")}
    assert sources | {f"micrograd_gpt/scripts/{file}" for file in FILES} == {
        name for name in files if name.endswith(".py")
    }
    done = run("-m", "micrograd_gpt", "train", "--lr", "1", cwd=elsewhere, path=place)
    assert done.returncode == 2 and "did you mean --learning-rate?" in done.stderr
    done = run("-c", f"{ASK}; print(command('generate.py'))", cwd=elsewhere, path=place)
    assert done.stdout == "micrograd-gpt generate\n", done.stderr  # as in a notebook


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([str(ROOT / "train_gpt2.py")], "python generate.py"),
        (["-m", "micrograd_gpt", "train"], "python -m micrograd_gpt generate"),
        (["-c", "from micrograd_gpt.__main__ import main; main()", "train"], COMMAND),
    ],
    ids=["its file", "the module", "the command"],
)
def test_what_is_advised_to_try_is_called_as_this_script_was(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    small = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--max-steps=1", "--eval-batches=1"]
    done = run(*words, *small, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"try: {expected} --model out --prompt=The", done.stderr


# ---------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train_gpt2.py", "--lr", "0.1"], "--lr 0.1: did you mean --learning-rate?"),
        (["train_gpt2.py", "--max_iters=9"], "--max_iters=9: did you mean --max-steps?"),
        (["train_gpt2.py", "--n_layers", "2"], "did you mean --n-layer?"),
        (["train_gpt2.py", "--hidden-size", "64"], "did you mean --n-embd?"),
        (["train_gpt2.py", "--batch_size=x"], "--batch-size: must be a whole number, not 'x'"),
        (["train_gpt2.py", "--beta1", "x"], "--beta1: must be a number, not 'x'"),
        (["train_gpt2.py", "--zzz"], "unrecognized arguments: --zzz; see"),
        (["finetune_gpt2.py", "instruct", "--lr=1"], "did you mean --learning-rate?"),
        (
            ["finetune_gpt2.py", "instruct", "--predict", "x"],
            "unrecognized arguments: --predict x;",
        ),
        (["generate.py", "--temprature", "1"], "did you mean --temperature?"),
        (["generate.py", "--fp16"], "did you mean --dtype?"),
        (["generate.py", "--d-model", "1"], "--d-model 1; see"),  # and is not near --model
        (["generate.py", "--max_length", "1"], "did you mean --max-new-tokens?"),
        (["generate.py", "--top_k", "x"], "--top-k: must be a whole number, not 'x'"),
        (["train_gpt2.py", "--data", "a.txt", __file__], ".py: no flag goes with it; of several"),
        (["generate.py", "The dog"], "unrecognized arguments: The dog; see"),
        (["load_gpt2.py", "--ouput", "x"], "did you mean --out?"),
    ],
)
def test_a_flag_that_there_is_not(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        script(words[0].removesuffix(".py")).main(words[1:])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_flags_are_a_list() -> None:
    with pytest.raises(TypeError, match="main takes a list of words, not '--plan'"):
        script("train_gpt2").main("--plan")


def test_a_text_that_looks_like_a_flag_stays_what_it_is(tmp_path: Path) -> None:
    done = run(str(ROOT / "generate.py"), "--prompts=a_b", "--stop=--top_k", cwd=tmp_path)
    assert done.returncode == 2 and "cannot read a_b" in done.stderr
