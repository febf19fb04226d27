"""finetune_gpt2.py with --lora-rank: what is trained, written, resumed and used, and mistakes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.numpy
import training
from training import metrics

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.cli import quoted
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.tuning.classifier import load_classifier
from micrograd_gpt.variants import VariantConfig, VariantGPT2

Main = Callable[..., int]
ADAPTER = "adapter_model.safetensors"
BLOCKS, WIDTH, RANK = 2, 16, 2


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained language model that reads bytes."""
    folder = tmp_path_factory.mktemp("base")
    GPT2(GPT2Config(BLOCKS, 2, WIDTH, 257, 32), seed=5).save_pretrained(folder, ByteTokenizer())
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts with three labels, which their first letter gives away."""
    rng = np.random.default_rng(0)
    rows = ["text\tlabel\n"]
    for i in range(60):
        label = ("ant", "bee", "cat")[i % 3]
        rows.append(f"{label[0]}{''.join(rng.choice(list('xyz'), 4))} {i}\t{label}\n")
    path = tmp_path / "data.tsv"
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def classify(finetune_gpt2: ModuleType, base: Path, data: Path) -> Main:
    """classify(out, *flags): fine-tunes here, with the script's `main`."""

    def main(out: Path, *flags: object, resume: bool = False, model: Path = base) -> int:
        start = ["--model", model, "--data", data, "--learning-rate", 0.02, "--lora-rank", RANK]
        start = ["--resume"] if resume else start
        return finetune_gpt2.main(["classify", *map(str, [*start, "--out", out, *flags])])

    return main


@pytest.mark.slow
def test_an_adapter_is_trained_and_used(
    classify: Main,
    finetune_gpt2: ModuleType,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    fast = ["--epochs", 10, "--learning-rate", 0.06, "--dropout", 0]
    assert classify(out, *fast, "--lora-layers", "c_attn,mlp.c_fc") == 0
    trained = BLOCKS * RANK * (WIDTH + 3 * WIDTH + WIDTH + 4 * WIDTH) + 3 * WIDTH
    printed = capsys.readouterr()
    assert f"training {trained:,} parameters" in printed.err
    assert re.search(r"\(at most \d+ tokens a step\)", printed.err)
    assert printed.out.startswith("validation: accuracy 100.0% of 6 texts")
    for folder in (out, out / "best"):
        assert not (folder / "model.safetensors").exists()
        arrays = safetensors.numpy.load_file(folder / ADAPTER)
        assert sum(array.size for array in arrays.values()) == trained
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["task_type"], config["r"], config["lora_alpha"]) == ("SEQ_CLS", 2, 4)
        assert config["base_model_name_or_path"] == str(base)
    moments = safetensors.numpy.load_file(out / "optimizer.safetensors")
    assert sum(moment.size for moment in moments.values()) == 2 * trained
    model = load_classifier(out / "best")
    assert model.labels == ["ant", "bee", "cat"]
    new = tmp_path / "new.txt"
    new.write_text("byxz 99\ncxyy 99\n", encoding="utf-8")
    assert finetune_gpt2.main(["classify", "--model", str(out), "--predict", str(new)]) == 0
    answers = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert answers == ["bee", "cat"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_exactly(classify: Main, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--dropout", 0.1, "--save-interval", 4, "--keep", 1, "--log-interval", 1]
    assert classify(straight, *flags, "--max-steps", 6, "--recompute") == 0
    shutil.copytree(straight / "step-000004", resumed)  # as a run stopped there leaves it
    assert classify(resumed, resume=True) == 0
    for name in (ADAPTER, "optimizer.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes(), name
    losses = [[row["train_loss"] for row in metrics(folder)] for folder in (straight, resumed)]
    assert losses[0][4:] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
def test_a_run_is_not_resumed_on_another_base(
    classify: Main, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, out = tmp_path / "changed", tmp_path / "out"
    shutil.copytree(base, changed)
    assert classify(out, "--max-steps", 1, model=changed) == 0
    model = GPT2.from_pretrained(changed)
    model.transformer.ln_f.bias.data += 0.5
    model.save_pretrained(changed)
    with pytest.raises(UserError, match="changed has other weights now than when the run in"):
        classify(out, "--max-steps", 2, resume=True)
    worse = ["--max-steps", 2, "--learning-rate", 9, "--allow-changes"]
    capsys.readouterr()
    assert classify(out, *worse, resume=True) == 0  # and says best/'s scores
    assert "out/best is an adapter for other weights of the base" in capsys.readouterr().err
    assert load_classifier(out / "best").labels == ["ant", "bee", "cat"]


@pytest.mark.slow
def test_a_run_is_resumed_on_a_base_that_was_moved(
    classify: Main, base: Path, tmp_path: Path
) -> None:
    before, after, out = tmp_path / "before", tmp_path / "after", tmp_path / "out"
    shutil.copytree(base, before)
    assert classify(out, "--max-steps", 1, model=before) == 0
    before.rename(after)
    assert classify(out, "--max-steps", 2, "--model", after, resume=True) == 0
    assert load_classifier(out).labels == ["ant", "bee", "cat"]
    after.rename(again := tmp_path / "again")
    with pytest.raises(UserError, match=f"^the base of the adapter in {out}.*say with --model"):
        classify(out, "--max-steps", 3, resume=True)
    worse = ["--max-steps", 4, "--learning-rate", 9, "--keep", 1, "--allow-changes"]
    assert classify(out, *worse, "--model", again, resume=True) == 0  # and says best/'s scores
    for folder in (out, out / "best", out / "step-000002"):
        assert load_classifier(folder).labels == ["ant", "bee", "cat"]
    GPT2(GPT2Config(BLOCKS, 2, WIDTH, 257, 32), seed=6).save_pretrained(before, ByteTokenizer())
    with pytest.raises(UserError, match="before has other weights now than when the run in"):
        classify(out, "--max-steps", 5, "--model", before, resume=True)


def test_a_run_is_resumed_from_another_working_directory(
    classify: Main, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's own file has the whole path of its base."""
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(base.parent)
    assert classify(out, "--max-steps", 1, model=Path(base.name)) == 0
    monkeypatch.chdir(other)
    assert classify(out, "--max-steps", 2, resume=True) == 0
    with pytest.raises(
        UserError, match=r"--lora-rank 2, not 3: .* start another run in another --"
    ):
        classify(out, "--lora-rank", 3, resume=True)  # not with --model out, which is an adapter


def test_a_flag_that_a_resumed_run_began_without_is_said_so(classify: Main, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert classify(out, "--max-steps", 1) == 0
    for flag, value in (("--lora-alpha", RANK), ("--block-size", 31), ("--block-size", 33)):
        with pytest.raises(
            UserError, match=f"began without {flag}: leave the flag out to resume, or "
        ):
            classify(out, flag, value, resume=True)


def test_an_adapter_is_not_used_on_another_base(
    finetune_gpt2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, out, new = tmp_path / "changed", tmp_path / "out", str(tmp_path / "new")
    GPT2(GPT2Config(1, 1, 8, 257, 99)).save_pretrained(changed, ByteTokenizer())
    data = tmp_path / "data.jsonl"
    rows = ({"instruction": f"say {i}", "output": f"{i}"} for i in range(20))
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    start = ["instruct", "--model", changed, "--data", data, "--out", out, "--lora-rank", RANK]
    assert finetune_gpt2.main([*map(str, start), "--max-steps", "1"]) == 0
    load, generate = training.script("load_gpt2"), training.script("generate")
    assert generate.main(["--model", str(out), "--instruction", "a", "--max-new-tokens", "1"]) == 0
    model = GPT2.from_pretrained(changed)
    model.transformer.ln_f.bias.data += 0.5
    model.save_pretrained(changed)
    with pytest.raises(UserError, match=f"changed has other weights now than when {out} was tr"):
        generate.main(["--model", str(out), "--instruction", "a"])
    capsys.readouterr()
    assert load.main(["--from", str(changed), "--merge", str(out), "--out", new]) == 0
    assert f"note: {out} was trained on other weights than" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_and_a_whole_model_replace_each_other(
    classify: Main, finetune_gpt2: ModuleType, base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--max-steps", "2", "--overwrite"]
    whole = ["classify", "--model", str(base), "--data", str(data), "--out", str(out), *flags]
    for is_adapter in (True, False, True):
        assert (classify(out, *flags) if is_adapter else finetune_gpt2.main(whole)) == 0
        for folder in (out, out / "best"):
            found = {file.name for file in folder.iterdir()}
            assert ({"config.json", "model.safetensors"} <= found) == (not is_adapter)
            assert ({ADAPTER, "adapter_config.json", "model_config.json"} <= found) == is_adapter
            assert load_classifier(folder).labels == ["ant", "bee", "cat"]


def test_an_adapter_s_folder_is_taken(classify: Main, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert classify(out, "--max-steps", 1) == 0
    for name in ("trainer_state.json", "optimizer.safetensors"):
        (out / name).unlink()
    with pytest.raises(UserError, match="out holds a model: --overwrite it"):
        classify(out, "--max-steps", 1)


def test_a_classifier_s_adapter_writes_no_text_and_is_not_merged(
    classify: Main, base: Path, tmp_path: Path
) -> None:
    assert classify(tmp_path / "out", "--max-steps", 1) == 0
    with pytest.raises(UserError, match="is a classifier, which labels texts and writes none"):
        training.script("generate").main(["--model", str(tmp_path / "out"), "--prompt", "a"])
    merge = ["--from", str(base), "--merge", str(tmp_path / "out"), "--out", str(tmp_path / "new")]
    with pytest.raises(UserError, match="is a classifier's adapter: use it as it is"):
        training.script("load_gpt2").main(merge)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-layers", "c_attn,head"], r"there is no 'head'; choose from attn\.c_attn"),
        (["--train-layers", "last"], "--lora-rank says what learns, and so does --train-layers"),
        (["--lora-alpha", "0"], "--lora-alpha must be above 0"),
    ],
)
def test_mistakes_are_one_line(
    classify: Main, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        classify(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [["--lora-alpha", "4"], ["--lora-layers", "c_attn"]])
def test_lora_s_flags_need_a_rank(
    finetune_gpt2: ModuleType, data: Path, tmp_path: Path, flag: list[str]
) -> None:
    """What is said before a model is loaded, or as here found to be missing."""
    start = ["classify", "--model", "none", "--data", str(data), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="give --lora-rank too"):
        finetune_gpt2.main([*start, *flag])


def test_an_adapter_cannot_be_the_base_of_another(classify: Main, tmp_path: Path) -> None:
    first = tmp_path / "the first"
    assert classify(first, "--max-steps", 1) == 0
    with pytest.raises(UserError, match=re.escape(f"--from {quoted(first)} --out FOLDER")):
        classify(tmp_path / "second", model=first)


@pytest.mark.parametrize("inside", ["", "best", "model.safetensors"])
def test_a_run_does_not_remove_the_model_that_it_starts_from(
    classify: Main,
    finetune_gpt2: ModuleType,
    base: Path,
    data: Path,
    tmp_path: Path,
    inside: str,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(base, out)
    shutil.copytree(base, out / "best")
    whole = ["classify", "--model", str(out / inside), "--data", str(data), "--out", str(out)]
    with pytest.raises(UserError, match="which is needed: give another --out"):
        classify(out, "--overwrite", "--max-steps", 1, model=out / inside)
    with pytest.raises(UserError, match="which is needed: give another --out"):  # without LoRA too
        finetune_gpt2.main([*whole, "--overwrite"])
    assert GPT2.from_pretrained(out) and GPT2.from_pretrained(out / "best")
    assert classify(out, "--plan", "--rate", 1, model=out / inside) == 0  # which writes nothing
    if not inside:  # a folder below it is not touched
        assert classify(tmp_path, "--max-steps", 1, model=out) == 0


def test_a_classifier_s_adapter_may_have_a_base_with_a_head(
    classify: Main, finetune_gpt2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = VariantConfig(BLOCKS, 2, WIDTH, 257, 32, tie_word_embeddings=False)
    untied, new = tmp_path / "untied", tmp_path / "new.txt"
    VariantGPT2(config, seed=5).save_pretrained(untied, ByteTokenizer())
    assert classify(tmp_path / "out", "--max-steps", 1, model=untied) == 0
    new.write_text("byxz\n", encoding="utf-8")
    capsys.readouterr()
    assert (
        finetune_gpt2.main(["classify", "--model", str(tmp_path / "out"), "--predict", str(new)])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["text"] == "byxz"
