"""Fine-tuning by the script: what it learns, how runs survive, what is refused in one line."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from training import ROOT, assert_same, everything, metrics, weights

from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning.classification import Classification
from micrograd_gpt.tuning.classifier import load_classifier

WORDS = {"ham": "cat mat tree bird home", "spam": "cash win prize free call"}
FAST = ["--learning-rate", "0.01", "--dropout", "0", "--batch-size", "8"]
Main = Callable[..., int]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained language model that reads bytes."""
    folder = tmp_path_factory.mktemp("base")
    GPT2(GPT2Config(2, 2, 16, 257, 32), seed=5).save_pretrained(folder, ByteTokenizer())
    return folder


def write_data(path: Path, count: int = 80, ham_each: int = 2, seed: int = 0) -> Path:
    """Texts of words that give their label away, `ham_each` ham for each spam."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = "spam" if i % (ham_each + 1) == 0 else "ham"
        words = rng.choice(WORDS[label].split(), rng.integers(1, 4))
        rows.append(f"{label}\t{' '.join(words)} {i}\n")
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "spam.tsv")


@pytest.fixture
def classify(finetune_gpt2: ModuleType, base: Path, data: Path) -> Main:
    """classify(out, *flags): fine-tunes here, with the script's `main`."""

    def main(out: Path, *flags: object, resume: bool = False, model: Path = base) -> int:
        start = ["--resume"] if resume else ["--model", model, "--data", data, *FAST]
        return finetune_gpt2.main(["classify", *map(str, [*start, "--out", out, *flags])])

    return main


def script(*flags: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "finetune_gpt2.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload]


# -------------------------------------------------------------------------- learning and labelling


def test_it_learns_and_labels_new_texts(
    classify: Main,
    finetune_gpt2: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert classify(out, "--epochs", 10) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("validation: accuracy 100.0% of 8 texts")
    assert "\ntest: accuracy 100.0% of 8 texts" in printed and "(1) ham" in printed
    scores = json.loads((out / "scores.json").read_text())
    assert scores["test"]["labels"]["spam"]["f1"] == scores["validation"]["accuracy"] == 1
    for name in ("loss", "confusion-validation", "confusion-test"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    last = metrics(out)[-1]
    assert last["step"] == 80 and last["val_accuracy"] == 1 and last["val_loss"] < 0.1
    assert load_classifier(out / "best").labels == ["ham", "spam"]

    def answers() -> list[tuple[str, str]]:
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for row in rows:
            assert sum(row["probabilities"].values()) == pytest.approx(1)
            assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        return [(row["text"], row["label"]) for row in rows]

    model = ["classify", "--model", str(out / "best")]
    expected = [("win cash 999", "spam"), ("the bird – cat", "ham")]
    new = tmp_path / "new.txt"
    new.write_text("".join(f"{text}\n" for text, _ in expected), encoding="utf-8")
    assert finetune_gpt2.main([*model, "--predict", str(new)]) == 0
    assert answers() == expected
    for flags in ([], ["--predict"], ["--predict", "-"]):
        monkeypatch.setattr(sys, "stdin", piped(new.read_bytes()))
        assert finetune_gpt2.main([*model, *flags]) == 0
        assert answers() == expected


def piped(content: bytes) -> SimpleNamespace:
    return SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False)


def test_long_texts_are_cut_off_in_training_and_afterwards_alike(
    classify: Main, finetune_gpt2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 1, "--block-size", 9)
    error = capsys.readouterr().err
    assert "training texts are cut off after 9 tokens" in error
    assert "CPU kernels: " in error
    new = tmp_path / "new.txt"
    new.write_text("win cash and what follows\nwin cash and so on")
    finetune_gpt2.main(["classify", "--model", str(out), "--predict", str(new)])
    captured = capsys.readouterr()
    assert "note: 2 of 2 given texts are cut off after 9 tokens" in captured.err
    first, second = (json.loads(line)["probabilities"] for line in captured.out.splitlines())
    assert first == pytest.approx(second, rel=1e-6)  # rows of a product may round differently
    with pytest.raises(UserError, match="--block-size is at most 32, the context of the model"):
        classify(tmp_path / "other", "--block-size", 33)


@pytest.mark.slow
def test_balance_learns_from_each_label_equally_often(
    classify: Main,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_data(data, 100, ham_each=9)
    seen: list[np.ndarray] = []
    loss = Classification.loss
    monkeypatch.setattr(
        Classification, "loss", lambda *args: seen.append(args[2].labels) or loss(*args)
    )
    for flags, spam in (([], 8), (["--balance"], 40)):
        seen.clear()
        classify(tmp_path / f"out{len(flags)}", "--epochs", 1, *flags)
        assert np.concatenate(seen).tolist().count(1) == spam
        assert ("warning: 72 texts have the label 'ham'" in capsys.readouterr().err) == (not flags)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["last", "head"])
def test_layers_that_do_not_learn_stay_as_they_were(
    classify: Main, base: Path, tmp_path: Path, which: str
) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 3, "--train-layers", which)
    before, after = weights(base), weights(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        name for name in before if which == "last" and (".h.1." in name or ".ln_f." in name)
    }
    moments = everything(out).keys() - after.keys()
    assert moments == {f"{kind}.{name}" for kind in "mv" for name in {*changed, "score.weight"}}


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_big_batch(classify: Main, tmp_path: Path) -> None:
    """Also in an epoch's last step, whose micro-batches do not have the same number of texts."""
    flags = ["--epochs", 1, "--log-interval", 1]
    big, parts = tmp_path / "big", tmp_path / "parts"
    classify(big, "--batch-size", 12, *flags)
    classify(parts, "--batch-size", 3, "--grad-accum-steps", 4, *flags)
    assert len(metrics(big)) == 6  # the last with 4 of the 64 texts: 3 and 1
    for ours, theirs in zip(metrics(parts), metrics(big), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)


# ------------------------------------------------------------------------------- runs that survive


def test_a_run_that_was_stopped_goes_on_exactly(classify: Main, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--dropout", 0.1, "--grad-accum-steps", 2, "--train-layers", "last", "--keep", 1]
    flags += ["--batch-size", 3, "--epochs", 2, "--save-interval", 13, "--log-interval", 1]
    assert classify(straight, *flags) == 0
    shutil.copytree(straight / "step-000013", resumed)  # as a run stopped there leaves it
    assert classify(resumed, resume=True) == 0
    assert_same(straight, resumed)
    losses = [[(r["step"], r["train_loss"]) for r in metrics(f)] for f in (straight, resumed)]
    assert losses[0][13:] == losses[1] and len(losses[0]) == 22
    assert metrics(straight)[-1]["val_loss"] == metrics(resumed)[-1]["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--lora-rank", 1]], ids=["whole", "LoRA"])
def test_a_run_does_not_go_on_with_other_labels(
    classify: Main, data: Path, tmp_path: Path, how: list[object]
) -> None:
    out, others = tmp_path / "out", tmp_path / "others.tsv"
    classify(out, "--epochs", 1, *how)
    others.write_text(data.read_text().replace("spam\t", "eggs\t"))
    flags = ["--data", others, "--max-steps", 9, "--allow-changes"]
    with pytest.raises(UserError, match=r"learned the labels 'ham', 'spam', and .* 'eggs', 'ham':"):
        classify(out, *flags, resume=True)
    assert metrics(out)[-1]["step"] == 8
    others.write_text(data.read_text() + "spam\tone more\n")
    assert classify(out, *flags, resume=True) == 0


@pytest.mark.slow
def test_a_complete_run_goes_on_with_more_epochs(
    classify: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    classify(out, "--epochs", 1)
    with pytest.raises(UserError, match="is complete at step 8; give a larger"):
        classify(out, resume=True)
    with pytest.raises(UserError, match=r"--epochs may grow, but 0\.5 are fewer steps than the 8"):
        classify(out, "--epochs", 0.5, resume=True)
    assert classify(out, "--epochs", 1.5, resume=True) == 0
    assert metrics(out)[-1]["step"] == 12
    with pytest.raises(UserError, match="has --train-layers all, not head: leave the flag out"):
        classify(out, "--epochs", 2, "--train-layers", "head", resume=True)


@pytest.mark.slow
def test_a_complete_run_without_scores_gets_them(
    classify: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, evaluate, scores = tmp_path / "out", Classification.evaluate, tmp_path / "out/scores.json"

    def stopping(*args: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Classification, "evaluate", stopping)
    assert classify(out, "--max-steps", 1) == 143 and not scores.exists()
    assert f"after step 1; continue with --resume --out {out}" in capsys.readouterr().err
    monkeypatch.undo()
    assert classify(out, resume=True) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("validation: accuracy")
    assert f"the run in {out} is complete but for its scores" in captured.err
    assert scores.exists() and (out / "confusion-test.png").exists() and len(metrics(out)) == 1
    for _ in range(2):  # now they are there; without best/, which resuming makes anew, too
        with pytest.raises(UserError, match="is complete at step"):
            classify(out, resume=True)
        shutil.rmtree(out / "best")


@pytest.mark.slow
def test_ctrl_c_ends_the_step_and_saves(
    classify: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, loss, losses = tmp_path / "out", Classification.loss, []

    def interrupting(*args: object) -> object:
        losses.append(None)
        if len(losses) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Classification, "loss", interrupting)
    assert classify(out) == 130
    captured = capsys.readouterr()
    assert f"continue with --resume --out {out}" in captured.err and captured.out == ""
    assert json.loads((out / "trainer_state.json").read_text())["step"] == 3
    monkeypatch.undo()
    assert classify(out, resume=True) == 0
    assert classify(tmp_path / "straight") == 0
    assert_same(out, tmp_path / "straight")


@pytest.mark.slow
def test_the_best_is_the_step_of_lowest_validation_loss(
    classify: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    rising = [0.01 * 1.17**step for step in range(40)]  # so that the loss falls, then rises
    monkeypatch.setattr("micrograd_gpt.optim.cosine_schedule", lambda step, *_: rising[step])
    classify(out, "--eval-interval", 5, "--max-steps", 40)
    measured = {r["step"]: r["val_loss"] for r in metrics(out) if "val_loss" in r}
    best = min(measured, key=measured.__getitem__)
    state = json.loads((out / "best" / "trainer_state.json").read_text())
    assert (state["step"], state["val_loss"]) == (best, measured[best]) and best < 40
    scores = json.loads((out / "scores.json").read_text())["validation"]
    rows = {r["step"]: r for r in metrics(out)}
    assert scores["accuracy"] == rows[best]["val_accuracy"] > rows[40]["val_accuracy"]


def test_a_run_is_resumed_on_data_that_were_moved(
    classify: Main, data: Path, tmp_path: Path
) -> None:
    out, moved = tmp_path / "out", data.with_name("moved.tsv")
    assert classify(out, "--max-steps", 1) == 0
    data.rename(moved)
    more = ["--max-steps", 2, "--data", moved]
    assert classify(out, *more, resume=True) == 0
    for other in ("--validation", "--test"):  # which are no longer taken from it
        with pytest.raises(UserError, match=f"has a part of --data as {other}, not {moved}: leave"):
            classify(out, "--max-steps", 3, other, moved, resume=True)


def test_a_model_is_the_same_by_another_name(
    classify: Main, finetune_gpt2: ModuleType, base: Path, tmp_path: Path
) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    assert classify(out, "--max-steps", 1) == 0
    link.symlink_to(base)
    more = ["classify", "--resume", "--out", str(out), "--model"]
    with pytest.raises(UserError, match=f"has --model {base}, not {tmp_path}: leave the flag out"):
        finetune_gpt2.main([*more, str(tmp_path)])
    with pytest.raises(UserError, match="is complete at step 1"):
        finetune_gpt2.main([*more, str(link)])


def test_other_data_is_not_resumed_on(classify: Main, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 2)
    before = data.read_text()
    data.write_text(before.replace("ham\t", "spam\t", 1))  # one label changes
    with pytest.raises(UserError, match="is no longer the data of the run in"):
        classify(out, "--max-steps", 3, resume=True)
    data.write_text(before)
    assert classify(out, "--max-steps", 3, resume=True) == 0


def test_a_run_of_another_kind_is_not_resumed(
    classify: Main, finetune_gpt2: ModuleType, train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 1)
    with pytest.raises(UserError, match=r"is one of finetune_gpt2\.py classify, which"):
        train_gpt2.main(["--resume", "--out", str(out)])
    state = json.loads((out / "trainer_state.json").read_text())
    for maker in ("instruct", None):
        state["settings"]["command"] = maker
        (out / "trainer_state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=rf"is one of finetune_gpt2\.py {maker}, which"):
            classify(out, resume=True)
    del state["settings"]["command"]
    (out / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"is one of train_gpt2\.py"):
        classify(out, resume=True)


def test_a_folder_that_is_taken(classify: Main, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 1)
    with pytest.raises(UserError, match="holds a run already: --resume it"):
        classify(out)
    assert classify(out, "--max-steps", 1, "--overwrite") == 0
    with pytest.raises(UserError, match="holds a model: --overwrite it"):
        classify(base)


@pytest.mark.parametrize("name", ["scores.json", "confusion-test.png", "metrics.jsonl"])
def test_a_user_s_file_is_not_replaced_by_the_scores(
    classify: Main, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is called like a file of a run"):
        classify(out)
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("flag", ["--data", "--validation", "--test"])
def test_a_run_does_not_remove_what_it_reads(
    finetune_gpt2: ModuleType, base: Path, data: Path, tmp_path: Path, flag: str
) -> None:
    best = tmp_path / "out" / "best"
    best.mkdir(parents=True)
    files = {"--data": data, flag: Path(shutil.copy(data, best))}
    flags = [word for pair in files.items() for word in map(str, pair)]
    with pytest.raises(UserError, match=f"out would remove {files[flag]}, which is needed"):
        finetune_gpt2.main(
            ["classify", "--model", str(base), *flags, "--out", str(best.parent), "--overwrite"]
        )
    assert files[flag].exists()


def test_a_plan_reads_the_data_and_writes_nothing(
    classify: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify(tmp_path / "out", "--plan", "--rate", 0.5) == 0
    printed = capsys.readouterr().out
    assert "1 × 8 × 18; 3,456 in 24 steps" in printed and "peak memory" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["spam.tsv"]


@pytest.mark.slow
def test_a_plan_of_a_folder_with_a_run(
    classify: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says that the run would be refused, and of one that is resumed what is left of it."""
    out, plan = tmp_path / "out", ["--plan", "--rate", 1]
    classify(out, "--max-steps", 2)
    capsys.readouterr()
    assert classify(out, *plan, "--max-steps", 5) == 0
    printed, said = capsys.readouterr()
    assert "in 5 steps\n" in printed
    assert f"note: this run would be refused: {out} holds a run already: --resume it" in said
    assert classify(out, *plan, "--max-steps", 5, "--overwrite") == 0
    assert "refused" not in capsys.readouterr().err
    assert classify(out, *plan, "--max-steps", 5, resume=True) == 0
    printed, said = capsys.readouterr()
    assert "in 3 steps left after step 2\n" in printed and "refused" not in said
    assert checkpoint.saved_step(out) == 2


def test_a_closed_stdout_loses_no_plan(
    finetune_gpt2: ModuleType, train_gpt2: ModuleType, base: Path, data: Path, text: Path
) -> None:
    tune = ["classify", "--model", str(base), "--data", str(data), "--plan", "--rate", "1"]
    train = ["--data", str(text), "--plan", "--rate", "1"]
    for main, flags in ((finetune_gpt2.main, tune), (train_gpt2.main, train)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", None)
            with pytest.raises(UserError, match="stdout is closed: send it to a file"):
                main(flags)


def test_a_plan_has_no_larger_batches_than_there_are_texts(
    classify: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = set()
    for size in (1000, 10**8):
        assert classify(tmp_path / "out", "--plan", "--rate", 1, "--batch-size", size) == 0
        lines = capsys.readouterr().out.splitlines()
        shown.add("\n".join(line for line in lines if not line.startswith("fits")))  # free memory
    assert len(shown) == 1


def test_a_plan_counts_what_learns(
    classify: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--plan", "--rate", 1]
    classify(tmp_path / "out", *flags)
    assert "learn" not in capsys.readouterr().out
    classify(tmp_path / "out", *flags, "--train-layers", "head")
    assert f"; {2 * 16} of them learn" in capsys.readouterr().out
    classify(tmp_path / "out", *flags, "--lora-rank", 3)
    learn = 2 * 3 * (16 + 3 * 16) + 2 * 16  # A and B in each of two blocks, and the head
    assert f"; {learn} of them learn" in capsys.readouterr().out


@pytest.mark.slow
def test_the_settings_of_a_run_can_be_given_again(classify: Main, tmp_path: Path) -> None:
    first, again, third = (tmp_path / name for name in ("first", "again", "third"))
    classify(first, "--max-steps", 2, "--beta2", 0.9)
    assert classify(again, "--config", first / "settings.toml") == 0
    rows = metrics(first), metrics(again)
    assert [r["train_loss"] for r in rows[0]] == [r["train_loss"] for r in rows[1]]
    assert "beta2 = 0.9" in (again / "settings.toml").read_text()
    classify(again, "--config", first / "settings.toml", "--overwrite", "--epochs", 1)
    assert metrics(again)[-1]["step"] == 8  # the flag wins over the file, which has steps too
    assert "max_steps" not in (again / "settings.toml").read_text()  # it follows from epochs
    with pytest.raises(
        UserError, match=r"third\.toml: there is no flag 'beta_2': did you mean beta2"
    ):
        (tmp_path / "third.toml").write_text("beta_2 = 0.9\n")
        classify(third, "--config", tmp_path / "third.toml")


def test_a_run_that_is_overwritten_leaves_no_settings_and_scores(
    classify: Main, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 1)
    assert (out / "settings.toml").exists() and (out / "scores.json").exists()
    checkpoint.remove_run(out)
    left = {file.name for file in out.iterdir()}
    assert not {"settings.toml", "scores.json", "confusion-test.png"} & left


# ------------------------------------------------------------------------------- types, and errors


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_types(classify: Main, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    assert classify(out, "--dtype", dtype, "--epochs", 4, "--recompute") == 0
    assert metrics(out)[-1]["val_loss"] < metrics(out)[0]["train_loss"]
    expected = "float64" if dtype == "float64" else "float32"
    assert {array.dtype.name for array in weights(out).values()} == {expected}


@pytest.mark.slow
def test_on_a_gpu_as_on_the_cpu(classify: Main, tmp_path: Path) -> None:
    flags = ["--max-steps", 3, "--dtype", "float64", "--train-layers", "last"]
    assert classify(tmp_path / "cpu", *flags) == 0
    with fake_cupy.installed(), at_most("fused"):
        assert classify(tmp_path / "gpu", *flags, "--device", "gpu") == 0
    rows = [metrics(tmp_path / name)[-1] for name in ("cpu", "gpu")]
    for name in ("train_loss", "val_loss", "val_accuracy", "grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-9)


def test_help_is_quick_and_complete() -> None:
    result = script("classify", "--help")
    assert result.returncode == 0 and "--train-layers {all,last,head}" in result.stdout
    assert "instruct" in script("--help").stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["label"], "invalid choice: 'label'"),
        (["classify"], "--data is missing"),
        (["classify", "--data", "none.tsv"], "none.tsv does not exist: give the path of a table"),
        (["classify", "--data", "x", "--epochs", "0"], "--epochs must be above 0, not 0"),
        (
            ["classify", "--data", "x", "--epochs", "2", "--max-steps", "9"],
            "--max-steps says how long to train, and so does --epochs: give one",
        ),
        (["classify", "--data", "x", "--train-layers", "few"], "invalid choice: 'few'"),
        (["classify", "--model", "{base}", "--predict", "none"], "none does not exist"),
        (["classify", "--predict", "{data}"], "--model is missing"),
        (
            ["classify", "--model", "{base}", "--predict", "{data}", "--data", "{data}"],
            "--data does nothing with --predict: leave one of them out",
        ),
        (["classify", "--model", "{base}"], "stdin holds no texts"),
        (
            ["classify", "--model", "{base}", "--epochs", "2"],
            "for which --epochs does nothing: give --data to learn",
        ),
        (
            ["classify", "--model", "x", "--predict", "{data}", "--text-field", "y"],
            "has no 'y', only",
        ),
        (
            ["classify", "--model", "{base}", "--predict", "{text}"],
            "is a language model, not a classifier",
        ),
        (["classify", "--model", "{base}", "--data", "{data}", "--test", "{text}"], "not a table"),
    ],
)
def test_mistakes_are_one_line(
    finetune_gpt2: ModuleType,
    base: Path,
    data: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", piped(b""))
    named = [flag.format(base=base, data=data, text=text) for flag in flags]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        finetune_gpt2.main(named)
    assert "\n" not in str(caught.value) and not (tmp_path / "tuned").exists()


def test_a_tokenizer_of_another_model_is_refused(
    classify: Main, data: Path, tmp_path: Path, finetune_gpt2: ModuleType
) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    GPT2(GPT2Config(1, 2, 16, 100, 32)).save_pretrained(small)
    ByteTokenizer().save(small)
    with pytest.raises(UserError, match="the tokenizer has 257 tokens and the model 100"):
        classify(out, model=small)
    classify(out, "--max-steps", 1)
    CharTokenizer.from_text("abc 0123456789").save(out)
    texts = tmp_path / "texts.txt"
    texts.write_text("abc\n")
    with pytest.raises(UserError, match="the tokenizer has 14 tokens and the model 257"):
        finetune_gpt2.main(["classify", "--model", str(out), "--predict", str(texts)])


def test_a_mistake_ends_with_status_2(base: Path, data: Path) -> None:
    result = script("classify", "--model", base, "--predict", data)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_generate_refuses_a_classifier(classify: Main, tmp_path: Path) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 1)
    command = [sys.executable, str(ROOT / "generate.py"), "--model", str(out), "--prompt", "a"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {out} is a classifier, which labels texts")
    assert result.stderr.count("\n") == 1


def test_an_unknown_label_in_the_test_file(classify: Main, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("label\ttext\nspam\tcall\neggs\tcall\n")
    with pytest.raises(UserError, match=r"other\.tsv, line 3: the label 'eggs' is unknown"):
        classify(tmp_path / "out", "--test", other)
    assert not (tmp_path / "out").exists()


def test_damaged_settings_are_one_line(classify: Main, tmp_path: Path) -> None:
    out = tmp_path / "out"
    classify(out, "--max-steps", 1)
    state = json.loads((out / checkpoint.STATE).read_text())
    for name, value in (("max_steps", None), ("train_layers", "some"), ("epochs", 0)):
        changed = {**state, "settings": {**state["settings"], name: value}}
        (out / checkpoint.STATE).write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"is damaged: its settings .*{name}"):
            classify(out, "--max-steps", 2, resume=True)
