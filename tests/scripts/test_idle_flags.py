"""Flags that say nothing, or nothing in this use, are refused by name: one line, status 2."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from training import SMALL, metrics, script

from micrograd_gpt.support.errors import UserError


@pytest.mark.parametrize(
    "flags",
    [
        *(
            f"train_gpt2 --{flag}="
            for flag in ("data", "out", "tokenizer", "init-from", "encoding")
        ),
        *(f"finetune_gpt2 classify --{flag}=" for flag in ("data", "model", "predict", "out")),
        "finetune_gpt2 instruct --template=",
        *(
            f"generate --{flag}="
            for flag in ("model", "prompts", "text-field", "encoding", "microscope")
        ),
        *(f"evaluate_gpt2 classify --{flag}=" for flag in ("text-field", "label-field")),
        "evaluate_gpt2 last-word --encoding=",
        *(f"load_gpt2 --{flag}=" for flag in ("from", "out", "export")),
    ],
)
def test_an_empty_text_is_refused(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be the current folder, as a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    name, *words = flags.split()
    flag = words[-1].rstrip("=")
    with pytest.raises(UserError, match=rf"^argument {flag}: must not be empty"):
        script(name).main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("train_gpt2 --devices 2", "--devices does nothing without --plan: give that too"),
        ("train_gpt2 --rate 5", "--rate does nothing without --plan"),
        ("train_gpt2 --interconnect 1", "--interconnect does nothing without --plan"),
        ("train_gpt2 --plan --rate 1e300", "--rate must be from 1e-12 to 1e12, not"),
        ("train_gpt2 --plan --rate 1 --interconnect 1e-300", "--interconnect must be from 1e-12 "),
        ("train_gpt2 --allow-changes", "--allow-changes does nothing without --resume"),
        ("finetune_gpt2 classify --data x.tsv --rate 5", "--rate does nothing without --plan"),
        ("finetune_gpt2 instruct --allow-changes", "--allow-changes does nothing without --resume"),
        ("finetune_gpt2 classify --model m --predict x --seed 3", "--seed does nothing with"),
        ("train_gpt2 --max-steps 1 --min-lr 1", "--min-lr 1 is above --learning-rate 0.003"),
        ("train_gpt2 --max-steps 1 --learning-rate 1e-4 --min-lr 2e-4", "--min-lr 0.0002 is above"),
        ("finetune_gpt2 classify --data x.tsv --min-lr 1", "--min-lr 1 is above --learning-rate"),
        ("train_gpt2 --data \udcff.txt", "--data must be a text in UTF-8"),
        ("train_gpt2 --out \udcff", "--out must be a text in UTF-8"),
        ("finetune_gpt2 classify --data \udcff.tsv", "--data must be a text in UTF-8"),
        ("load_gpt2 --from 124M --source huggingface --openai-url http://x", "--from says where"),
        ("load_gpt2 --source huggingface --openai-url http://x", "--openai-url is for what is"),
        ("train_gpt2 --text-field body", "--text-field body is for records .*, and pydocs holds"),
        ("train_gpt2 --tf32", "--tf32 is for --device gpu: leave it out, or add --device gpu"),
        ("generate --prompt a --batch-size 3", "--batch-size is for several prompts"),
        (
            "generate --prompt a --prompt b --batch-size 3 --num-beams 2",
            "--batch-size does nothing with --num-beams",
        ),
        ("generate --prompts a.txt --text-field body", "--text-field is for records .*, and a.txt"),
        (
            "finetune_gpt2 classify --model m --predict a.txt --text-field body",
            "--text-field is for tables .*, and --predict a.txt has a text a",
        ),
        (
            "finetune_gpt2 classify --model m --predict --label-field body",
            "--label-field does nothing with --predict",
        ),
    ],
)
def test_a_flag_that_does_nothing_or_cannot_be_meant_is_refused(
    flags: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *words = flags.split()
    with pytest.raises(UserError, match=f"^{problem}"):
        script(name).main(words)
    assert list(tmp_path.iterdir()) == []


def test_validation_covers_the_same_windows_whatever_the_batch(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """So that runs can be compared: here of one model, which does not learn."""
    losses = []
    for batch_size in ("2", "5"):
        out = tmp_path / batch_size
        flags = [*SMALL, "--max-steps", "1", "--eval-batches", "1", "--learning-rate", "1e-30"]
        flags += ["--batch-size", batch_size]
        train_gpt2.main(["--data", str(text), "--out", str(out), *flags])
        losses.append(metrics(out)[-1]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        "train_gpt2 --overwrite --out",
        "train_gpt2 --out",
        "train_gpt2 --resume --out",
        "train_gpt2 --data",
        "finetune_gpt2 classify --data x.tsv --overwrite --out",
        "finetune_gpt2 classify --data",
        "finetune_gpt2 instruct --data",
        "evaluate_gpt2 last-word --data",
        "generate --prompts",
    ],
)
def test_a_name_that_is_too_long_is_one_line(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *words = flags.split()
    with pytest.raises(UserError, match=r"cannot (write|read)( to)? xxx"):
        script(name).main([*words, "x" * 300])


def test_a_text_field_needs_records_somewhere(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    flags = [*SMALL, "--data", str(text), "--text-field", "body", "--max-steps", "1", "--out"]
    with pytest.raises(UserError, match=f"--text-field body is for records .* and {text} holds"):
        train_gpt2.main([*flags, str(tmp_path / "out")])
    records = tmp_path / "validation.jsonl"
    records.write_text(json.dumps({"body": text.read_text()}), encoding="utf-8")
    assert train_gpt2.main([*flags, str(tmp_path / "out"), "--validation", str(records)]) == 0


def test_gradients_are_not_clipped_at_0_and_a_long_warm_up_is_said(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest norm there is changes nothing either."""
    flags = [*SMALL, "--data", str(text), "--max-steps", "2", "--warmup-steps", "5"]
    losses = []
    for clip in ("0", "1e30", "1e-3"):
        out = tmp_path / clip
        assert train_gpt2.main([*flags, "--grad-clip", clip, "--out", str(out)]) == 0
        losses.append((out / "model.safetensors").read_bytes())
    assert losses[0] == losses[1] != losses[2]
    assert "note: --warmup-steps 5 is longer than --max-steps 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "train_gpt2 --data a.txt --data b.txt",
        "train_gpt2 --out a --out=b",
        "train_gpt2 --config a.toml --config b.toml",
        "generate --model a --model b",
        "evaluate_gpt2 perplexity --data a.txt --data b.txt",
        "finetune_gpt2 classify --data a.csv --data b.csv",
        "finetune_gpt2 instruct --config a.toml --config b.toml",
    ],
)
def test_of_two_paths_none_is_dropped(words: str) -> None:
    name, *flags = words.split()
    with pytest.raises(UserError, match=r"was given twice, with a\S* and with b\S*: give one"):
        script(name).main(flags)


def test_of_two_numbers_the_last_counts(train_gpt2: ModuleType) -> None:
    flags = train_gpt2.parse_flags(["--seed", "1", "--seed=2", "--data", "a", "--data", "a"])
    assert (flags["seed"], flags["data"]) == (2, "a")
