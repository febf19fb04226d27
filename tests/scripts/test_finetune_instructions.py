"""Teaching a model to follow instructions, by the scripts: it answers, runs survive, mistakes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from training import assert_same, metrics, script

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import Template
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer

ANSWERS = {"a": "one", "b": "two", "c": "three"}
ITEMS = [
    {"instruction": f"{word}{'!' * n}", "input": "" if n % 2 else word, "output": answer}
    for word, answer in ANSWERS.items()
    for n in range(10)
]
SHORT = "{instruction}\n\n{input}\n\n={output}\n"
FAST = ["--learning-rate", "0.01", "--dropout", "0", "--batch-size", "6"]
Main = Callable[..., int]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained language model that reads bytes."""
    folder = tmp_path_factory.mktemp("base")
    GPT2(GPT2Config(2, 2, 16, 257, 64), seed=5).save_pretrained(folder, ByteTokenizer())
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ITEMS), encoding="utf-8")
    return path


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.txt"
    path.write_text(SHORT, encoding="utf-8")
    return path


@pytest.fixture
def instruct(finetune_gpt2: ModuleType, base: Path, data: Path, template: Path) -> Main:
    """instruct(out, *flags): fine-tunes here, with the script's `main`. A flag wins over ours."""

    def main(out: Path, *flags: object, resume: bool = False) -> int:
        ours = {"--model": base, "--data": data, "--template": template}
        left = [word for flag in ours.items() if flag[0] not in flags for word in flag]
        start = ["--resume"] if resume else [*left, *FAST]
        return finetune_gpt2.main(["instruct", *map(str, [*start, "--out", out, *flags])])

    return main


def answer(capsys: pytest.CaptureFixture[str], model: Path, *flags: str) -> dict[str, Any]:
    """What generate.py answers."""
    capsys.readouterr()
    assert script("generate").main(["--model", str(model), "--json", "--greedy", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_learns_to_answer_and_to_stop(
    instruct: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--max-steps", 130, "--eval-interval", 130, "--save-interval", 130]
    assert instruct(out, *flags) == 0
    printed = capsys.readouterr().out
    assert "instruction: " in printed and "expected: " in printed
    assert metrics(out)[-1]["val_loss"] < 0.1
    assert re.search(r"validation loss 0\.0\d+ nats per token, perplexity 1\.\d\d\n", printed)
    for model in (out, out / "best"):  # with each is the template that it was tuned with
        said = answer(capsys, model, "--instruction", "c!!", "--input", "c")
        assert (said["prompt"], said["text"]) == ("c!!\n\nc\n\n=", "three")
        assert said["stopped"] == "end-of-text"


def test_prompts_are_learned_only_with_loss_on_all(instruct: Main, tmp_path: Path) -> None:
    flags = ["--max-steps", 1, "--log-interval", 1]
    losses = []
    for name, more in (("some", []), ("all", ["--loss-on", "all"])):
        instruct(tmp_path / name, *flags, *more)
        losses.append(metrics(tmp_path / name)[0]["train_loss"])
    assert losses[0] != losses[1]


def test_a_run_that_was_stopped_goes_on_exactly(
    instruct: Main, template: Path, tmp_path: Path
) -> None:
    """Also without the template's file: the run has it."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--dropout", 0.1, "--grad-accum-steps", 2, "--keep", 1, "--batch-size", 2]
    flags += ["--epochs", 2, "--save-interval", 5, "--log-interval", 1]
    assert instruct(straight, *flags) == 0
    shutil.copytree(straight / "step-000010", resumed)  # as a run stopped there leaves it
    template.unlink()
    assert instruct(resumed, resume=True) == 0
    assert_same(straight, resumed)
    losses = [[(r["step"], r["train_loss"]) for r in metrics(f)] for f in (straight, resumed)]
    assert losses[0][10:] == losses[1]
    assert metrics(straight)[-1]["val_loss"] == metrics(resumed)[-1]["val_loss"]


def test_accumulated_gradients_are_those_of_the_big_batch(instruct: Main, tmp_path: Path) -> None:
    """The mean is over the tokens that count in a step, of which micro-batches have unequal
    numbers."""
    flags = ["--epochs", 1, "--log-interval", 1]
    instruct(tmp_path / "big", "--batch-size", 9, *flags)
    instruct(tmp_path / "parts", "--batch-size", 3, "--grad-accum-steps", 3, *flags)
    for ours, theirs in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "big"), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_tuned_model_is_tuned_on_with_its_own_template(
    finetune_gpt2: ModuleType, instruct: Main, data: Path, tmp_path: Path
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    instruct(once, "--max-steps", 1)
    flags = ["instruct", "--model", str(once), "--data", str(data), "--max-steps", "1"]
    assert finetune_gpt2.main([*flags, "--out", str(twice)]) == 0
    assert (twice / "prompt_template.txt").read_text() == SHORT


def test_without_a_template_it_is_the_one_that_help_shows(
    finetune_gpt2: ModuleType,
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["instruct", "--model", str(base), "--data", str(data), "--max-steps", "1"]
    assert finetune_gpt2.main([*flags, "--out", str(tmp_path / "out")]) == 0
    saved = (tmp_path / "out" / "prompt_template.txt").read_text()
    assert saved == Template().text + "\n"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        finetune_gpt2.main(["instruct", "--help"])
    shown = capsys.readouterr().out
    assert all(f"    {line}\n" in shown for line in saved.splitlines() if line)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", [], "has no items"),
        ('{"data": []}', [], "holds no list"),
        ([{"instruction": "a", "input": "b"}], [], "has no 'output'"),
        ([{"instruction": "a", "output": ""}, {"instruction": "b", "output": ""}], [], "no train"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], [], "unknown role 'bot'"),
        (ITEMS, ["--block-size", "3"], "or a model of more context (and leave out a --block-size"),
        (ITEMS, ["--block-size", "65"], "--block-size is at most 64"),
        (ITEMS[:1], [], "no two different instructions"),
        (ITEMS, ["--template", "{data}"], "has no place {instruction}"),
        (ITEMS, ["--template", "none.txt"], "cannot read none.txt"),
        (ITEMS, ["--validation", "none.json"], "cannot read none.json"),
        (ITEMS, ["--validation", "0.2"], "--validation is a file here, and 0.2 is none"),
        (ITEMS, ["--model", "{letters}"], "the char tokenizer has no end-of-text token"),
        (ITEMS, ["--loss-on", "prompts"], "invalid choice: 'prompts'"),
    ],
)
def test_mistakes_are_one_line(
    instruct: Main, data: Path, tmp_path: Path, content: Any, flags: list[str], message: str
) -> None:
    data.write_text(content if isinstance(content, str) else json.dumps(content))
    letters = tmp_path / "letters"
    tokenizer = CharTokenizer("".join(sorted({*"=\n!abc", *"onetwthree"})))
    GPT2(GPT2Config(1, 1, 8, tokenizer.vocab_size, 64)).save_pretrained(letters, tokenizer)
    named = [flag.replace("{data}", str(data)).replace("{letters}", str(letters)) for flag in flags]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        instruct(tmp_path / "out", *named)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
