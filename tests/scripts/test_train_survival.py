"""Runs that are not lost: stopped, killed, resumed, on a full disk, with damaged files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from faults import fill_disk
from training import SCRIPT, SMALL, assert_same, metrics, run

import micrograd_gpt.runs.metrics
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.metrics import Metrics
from micrograd_gpt.runs.signals import StopSignals, signals_as_before
from micrograd_gpt.support import files
from micrograd_gpt.support.errors import UserError


@pytest.mark.slow
def test_200_steps_equal_100_and_100(train_gpt2: ModuleType, text: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--data", text, *SMALL, "--dropout", 0.1, "--grad-accum-steps", 2, "--keep", 1]
    flags += ["--max-steps", 200, "--save-interval", 100, "--out", straight]
    assert train_gpt2.main([*map(str, flags)]) == 0
    shutil.copytree(straight / "step-000100", resumed)  # as a run stopped there leaves it
    assert train_gpt2.main(["--resume", "--out", str(resumed)]) == 0
    assert_same(straight, resumed)
    losses = [[(r["step"], r["train_loss"]) for r in metrics(f)] for f in (straight, resumed)]
    assert losses[0][100:] == losses[1] and len(losses[0]) == 200
    last = [metrics(f)[-1] for f in (straight, resumed)]
    assert last[0]["val_loss"] == last[1]["val_loss"]
    assert last[0]["val_bits_per_byte"] == pytest.approx(last[0]["val_loss"] / np.log(2))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="this system does not tell a child's memory")
def test_resuming_takes_no_more_memory_than_starting(text: Path, tmp_path: Path) -> None:
    shape = ["--n-layer", 2, "--n-head", 4, "--n-embd", 512, "--block-size", 16]
    start = ["--data", text, *SMALL, *shape, "--max-steps", 2, "--out", tmp_path / "out"]
    peaks = []
    for flags in (start, ["--resume", "--max-steps", 4, "--out", tmp_path / "out"]):
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.05 * peaks[0]  # a copy of the weights alone would be 14%


@pytest.mark.slow
def test_the_best_is_the_step_of_lowest_validation_loss(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--eval-interval", 2, "--max-steps", 12]
    run(*flags, "--learning-rate", 3, "--warmup-steps", 300)  # it rises, and with it the loss
    measured = {r["step"]: r["val_loss"] for r in metrics(out) if "val_loss" in r}
    best = min(measured, key=measured.__getitem__)
    state = json.loads((out / "best" / "trainer_state.json").read_text())
    assert (state["step"], state["val_loss"]) == (best, measured[best]) and best < 12
    assert json.loads((out / "trainer_state.json").read_text())["step"] == 12


@pytest.mark.slow
def test_the_best_on_another_validation_text_is_replaced(text: Path, tmp_path: Path) -> None:
    out, easy = tmp_path / "out", tmp_path / "easy.txt"
    easy.write_text("e" * 500)
    run("--data", text, "--out", out, *SMALL, "--max-steps", 6, "--validation", easy)
    assert json.loads((out / "best" / "trainer_state.json").read_text())["step"] == 6
    more = ["--resume", "--out", out, "--max-steps", 12, "--eval-interval", 6, "--allow-changes"]
    result = run(*more, "--validation", text)
    assert f"note: {out}/best was chosen by other validation text, or" in result.stderr
    assert json.loads((out / "best" / "trainer_state.json").read_text())["step"] == 12
    assert metrics(out)[-1]["val_loss"] > metrics(out)[5]["val_loss"]
    again = run("--resume", "--out", out, "--max-steps", 13)
    assert again.returncode == 0 and "was chosen" not in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_full_disk_loses_no_checkpoint(
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    choice: str,
) -> None:
    """Step 4 meets with a full disk; there is room again for step 6."""
    out = tmp_path / "out"
    save_run, saved = checkpoint.save_run, []

    def save_on_a_full_disk(*args: object) -> None:
        with monkeypatch.context() as patch:
            if len(saved) == 1:
                fill_disk(patch, files, 1000)
            saved.append(None)
            save_run(*args)

    monkeypatch.setattr(checkpoint, "save_run", save_on_a_full_disk)
    flags = ["--data", text, "--out", out, *SMALL, "--max-steps", 7, "--save-interval", 2]
    flags = [*map(str, flags), "--on-save-error", choice]
    problem = "No space left on device"
    if choice == "continue":
        assert train_gpt2.main(flags) == 0
        stderr = capsys.readouterr().err
        assert (
            f"{problem}; what was there before is unchanged; the last checkpoint: {out}" in stderr
        )
        assert "of step 2; the run goes on" in stderr and len(saved) == 4
    else:
        with pytest.raises(UserError, match=f"{problem}.*; the last checkpoint: {out}, of step 2$"):
            train_gpt2.main(flags)
        monkeypatch.undo()
        assert train_gpt2.main(["--resume", "--out", str(out)]) == 0
        assert f"from step 2; writing to {out}" in capsys.readouterr().err
    straight = tmp_path / "straight"
    monkeypatch.undo()
    assert train_gpt2.main([word if word != str(out) else str(straight) for word in flags]) == 0
    assert_same(out, straight)
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_a_write_that_the_system_refuses(text: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--data", text, "--out", out, *SMALL, "--max-steps", "1"]
    result = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: cannot write ")
    assert not (out / "model.safetensors").exists()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (getattr(signal, "SIGUSR1", signal.SIGTERM), 128 + getattr(signal, "SIGUSR1", 15)),
    ],
)
def test_a_signal_ends_the_step_and_saves(
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    number: int,
    status: int,
) -> None:
    """One that comes in an evaluation lets that end, too: the step has its validation loss."""
    out, evaluate = tmp_path / "out", train_gpt2.evaluate
    loss, losses = GPT2.loss, []
    monkeypatch.setattr(GPT2, "loss", lambda *args: losses.append(None) or loss(*args))

    def interrupted(*args: object) -> object:
        signal.raise_signal(number)
        return evaluate(*args)

    monkeypatch.setattr(train_gpt2, "evaluate", interrupted)
    flags = ["--data", text, "--out", out, *SMALL, "--eval-interval", 3]
    assert train_gpt2.main([*map(str, flags)]) == status
    assert f"continue with --resume --out {out}" in capsys.readouterr().err
    assert json.loads((out / "trainer_state.json").read_text())["step"] == 3
    assert metrics(out)[-1]["val_loss"] == checkpoint.best_loss(out) < 10
    assert (out / "loss.png").exists() and len(losses) == 3 + 3
    with signals_as_before(), pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        signals = StopSignals()
        signal.raise_signal(number)
        assert signals.requested == number
        signal.raise_signal(number)  # a second one stops at once
    assert getattr(stopped.value, "code", 130) == status  # cli.run makes an interrupt 130


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_a_lost_terminal_ends_the_step_and_saves(
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out, evaluate = tmp_path / "my run", train_gpt2.evaluate

    def interrupted(*args: object) -> object:
        signal.raise_signal(signal.SIGHUP)  # from the shell
        signal.raise_signal(signal.SIGHUP)  # and from the system
        return evaluate(*args)

    monkeypatch.setattr(train_gpt2, "evaluate", interrupted)
    flags = ["--data", text, "--out", out, *SMALL, "--eval-interval", 3]
    with signals_as_before():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
        assert train_gpt2.main([*map(str, flags)]) == 128 + signal.SIGHUP
    assert json.loads((out / "trainer_state.json").read_text())["step"] == 3
    assert f"continue with --resume --out '{out}'\n" in capsys.readouterr().err


def test_a_second_signal_ends_an_evaluation_at_once(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, loss, losses = tmp_path / "out", GPT2.loss, []

    def interrupting(*args: object) -> object:
        losses.append(None)
        if len(losses) > 4:  # of four steps; then the validation's batches
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(GPT2, "loss", interrupting)
    flags = ["--data", text, "--out", out, *SMALL, "--eval-interval", 4, "--save-interval", 2]
    with pytest.raises(KeyboardInterrupt):
        train_gpt2.main([*map(str, flags)])
    assert (
        len(losses) == 4 + 2 and json.loads((out / "trainer_state.json").read_text())["step"] == 2
    )


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_leaves_a_complete_run(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, straight, evaluate = tmp_path / "out", tmp_path / "straight", train_gpt2.evaluate

    def interrupted(*args: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    flags = ["--data", text, *SMALL, "--max-steps", 3]
    assert train_gpt2.main([*map(str, flags), "--out", str(straight)]) == 0
    monkeypatch.setattr(train_gpt2, "evaluate", interrupted)
    assert train_gpt2.main([*map(str, flags), "--out", str(out)]) == 143
    assert metrics(out)[-1]["val_loss"] == metrics(straight)[-1]["val_loss"]
    assert_same(out, straight)
    assert_same(out / "best", straight / "best")


@pytest.mark.slow
def test_metrics_are_added_to_and_mended(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 4)
    before = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(before + b'{"step": 5, "train_lo')
    assert run("--resume", "--out", out, "--max-steps", 6).returncode == 0
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_other_data_is_not_resumed_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 2)
    text.write_text(text.read_text().replace("fox", "dog", 1))
    flags = ["--resume", "--out", out, "--max-steps", 3]
    result = run(*flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "is no longer the data of the run in" in result.stderr
    assert run(*flags, "--allow-changes", "--learning-rate", 1e-4).returncode == 0
    result = run(*flags, "--max-steps", 4, "--allow-changes", "--n-embd", 32)
    assert result.returncode == 2 and "has --n-embd 16, not 32" in result.stderr


@pytest.mark.slow
def test_a_folder_with_a_model_is_not_written_over(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 2)
    (out / "trainer_state.json").unlink()
    result = run("--data", text, "--out", out, *SMALL)
    assert result.returncode == 2 and f"{out} holds a model" in result.stderr


def test_a_place_that_cannot_be_written(text: Path) -> None:
    result = run("--data", text, "--out", text / "out", *SMALL)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: cannot write {text}")


def test_a_plan_writes_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("--data", text, *SMALL, "--plan", "--rate", 0.5, "--devices", 2)
    assert result.returncode == 0, result.stderr
    assert "peak memory" in result.stdout and "0.5 TFLOP/s given, 2 devices" in result.stdout
    result = run("--size", "124M", "--plan", "--rate", "nan")
    assert result.returncode == 2 and "--rate must be from 1e-12 to 1e12, not nan" in result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_a_plan_of_a_folder_with_a_run(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says that the run would be refused, and of one that is resumed what is left of it."""
    out = tmp_path / "out"
    folder, plan = ["--out", str(out)], ["--plan", "--rate", "1", "--max-steps", "5"]
    start = ["--data", str(text), *SMALL, *folder]
    train_gpt2.main([*start, "--max-steps", "2"])
    capsys.readouterr()
    assert train_gpt2.main([*start, *plan]) == 0
    printed, said = capsys.readouterr()
    assert "in 5 steps\n" in printed
    assert f"note: this run would be refused: {out} holds a run already: --resume it" in said
    assert train_gpt2.main(["--resume", *folder, *plan, "--interconnect", "1"]) == 0
    printed, said = capsys.readouterr()
    assert "in 3 steps left after step 2\n" in printed and "refused" not in said
    assert checkpoint.saved_step(out) == 2
    needed = ["--data", str(text), "--init-from", str(out), *folder, *plan, "--overwrite"]
    assert train_gpt2.main(needed) == 0
    assert f"refused: --out {out} would remove {out}, which" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokenizer", "flags", "words"),
    [
        ("char", ["--block-size", "5000"], "fewer than the 5,001 that --block-size 5000 needs"),
        ("word", ["--validation", "0.0001"], ", another --validation fraction"),
        ("char", ["--validation", "other.txt"], "or, to learn from text, give --tokenizer byte"),
        ("char", ["--validation", "gone.txt"], "'gone.txt' does not exist"),
    ],
)
def test_a_plan_of_a_text_that_is_read_is_refused_as_its_run_is(
    tokenizer: str,
    flags: list[str],
    words: str,
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("日本語" * 100, "utf-8")
    command = ["--data", str(text), *map(str, SMALL), "--tokenizer", tokenizer, *flags]
    said = set()
    for more in ([], ["--plan", "--rate", "1"]):
        with pytest.raises(UserError) as caught:
            train_gpt2.main([*command, *more])
        said.add(str(caught.value))
    (message,) = said
    assert words in message


@pytest.mark.slow
def test_recomputed_runs_are_the_same_runs(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    flags = ["--data", text, *SMALL, "--dropout", 0.1, "--max-steps", 4]
    for name in ("plain", "recompute"):
        flags += ["--recompute"] * (name == "recompute")
        assert train_gpt2.main([*map(str, flags), "--out", str(tmp_path / name)]) == 0
    assert_same(tmp_path / "plain", tmp_path / "recompute")


@pytest.mark.slow
def test_event_files(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--max-steps", 2]
    result = run(*flags, "--tensorboard")
    assert result.returncode == 0, result.stderr
    (events,) = (out / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"train_loss", b"val_loss", b"learning_rate"))
    (out / "tensorboard" / "notes.txt").touch()
    assert run(*flags, "--overwrite").returncode == 0
    assert [path.name for path in (out / "tensorboard").iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------- data that became other data


@pytest.mark.slow
def test_a_changed_learning_rate_ends_at_a_tenth_of_it(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """As where a run starts: the former --min-lr is far above it."""
    out = ["--out", str(tmp_path / "out")]
    train_gpt2.main(["--data", str(text), *out, *SMALL, "--max-steps", "2"])
    changed = ["--resume", *out, "--max-steps", "4", "--allow-changes", "--learning-rate"]
    with pytest.raises(UserError, match=r"--min-lr 0\.001 is above --learning-rate 1e-06"):
        train_gpt2.main([*changed, "1e-6", "--min-lr", "1e-3"])
    assert train_gpt2.main([*changed, "1e-6"]) == 0
    rates = [row["learning_rate"] for row in metrics(tmp_path / "out")]
    assert rates[1] > 1e-4 and 1e-6 >= rates[2] > rates[3] > 1e-7
    assert train_gpt2.main(["--resume", *out, "--max-steps", "5", "--learning-rate", "1e-6"]) == 0
    assert metrics(tmp_path / "out")[4]["learning_rate"] < 1e-6


def test_a_new_character_is_said_to_be_other_data(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--out", str(out), *SMALL]
    train_gpt2.main(["--data", str(text), *flags, "--max-steps", "1"])
    text.write_text("é" + text.read_text())
    match = f"^the data is no longer that of the run in {out}: {text}: the character 'é'"
    with pytest.raises(UserError, match=match):
        train_gpt2.main(["--resume", "--out", str(out), "--max-steps", "2"])


@pytest.mark.slow
def test_a_changed_validation_text_is_noticed(text: Path, tmp_path: Path) -> None:
    """One character in the middle, which samples of the tokens would have missed."""
    out, long = tmp_path / "out", text.read_text() * 2000  # 3.6 million characters
    text.write_text(long)
    run("--data", text, "--out", out, *SMALL, "--max-steps", 1)
    flags = ["--resume", "--out", out, "--max-steps", 2]
    for place in (1_800_001, len(long) - 101):  # of the training text, of the validation text
        text.write_text(long[:place] + "q" + long[place + 1 :])
        result = run(*flags)
        assert result.returncode == 2 and "is no longer the data of the run" in result.stderr
    text.write_text(long)
    assert run(*flags).returncode == 0


def test_a_run_that_version_0_1_0_wrote_goes_on(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """Its settings had one key more, and no n_layer, n_head and n_embd where weights decided."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    flags = [*map(str, ["--data", text, *SMALL, "--save-interval", 2, "--keep", 1])]
    flags += ["--max-steps", "4", "--out", str(straight)]
    assert train_gpt2.main(flags) == 0
    shutil.copytree(straight / "step-000002", out)
    path = out / "trainer_state.json"
    state = json.loads(path.read_text())
    state["settings"] |= {"training_tokens": None}
    for name in ("n_layer", "n_head", "n_embd"):
        del state["settings"][name]
    path.write_text(json.dumps(state))
    assert train_gpt2.main(["--resume", "--out", str(out)]) == 0
    assert_same(straight, out)


# ------------------------------------------------------------------------ damage, and full disks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": []}, "it lacks the step or the settings"),
        ({"settings": {}}, "its settings lack tokenizer"),
        ({"settings": None}, "it lacks the step or the settings"),
        ({"step": "1"}, "it lacks the step or the settings"),
        ({"batch_size": "many"}, "its settings have 'many' as batch_size"),
        ({"log_interval": 0}, "its settings have 0 as log_interval"),
        ({"learning_rate": None}, "its settings have None as learning_rate"),
        ({"learning_rate": -1}, "its settings have -1 as learning_rate"),
        ({"dropout": True}, "its settings have True as dropout"),
    ],
)
def test_damaged_settings_are_one_line(
    text: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 1)
    path = out / "trainer_state.json"
    state = json.loads(path.read_text())
    part = state if change.keys() <= state.keys() else state["settings"]
    part |= change
    path.write_text(json.dumps(state))
    for flags in (["--resume"], ["--resume", "--plan"]):
        result = run(*flags, "--out", out, "--max-steps", 2)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"error: {path} is damaged") and message in result.stderr


@pytest.mark.slow
def test_a_damaged_best_is_one_line(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 1)
    path = out / "best" / "trainer_state.json"
    state = json.loads(path.read_text())
    for loss in ({}, {"val_loss": None}, {"val_loss": "low"}):
        path.unlink()  # it is a second name of out/trainer_state.json
        path.write_text(json.dumps({name: state[name] for name in ("step", "settings")} | loss))
        result = run("--resume", "--out", out, "--max-steps", 2)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert f"{path} is damaged: it lacks the val_loss; remove {path.parent}" in result.stderr


@pytest.mark.slow
def test_damaged_metrics_do_not_stop_a_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 3, "--eval-interval", 1)
    path = out / "metrics.jsonl"
    damaged = path.read_bytes().replace(b"train_loss", b"train_los", 1) + b"\xff{]\n"
    path.write_bytes(damaged)
    result = run("--resume", "--out", out, "--max-steps", 5)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning") == 1
    assert f"{path}: 2 damaged lines will be ignored, the first is line 1" in result.stderr
    assert path.read_bytes().startswith(damaged) and path.read_bytes().count(b"\n") == 6


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_curve_that_cannot_be_drawn_is_a_warning(
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    choice: str,
) -> None:
    out = tmp_path / "out"
    (out / "loss.png").mkdir(parents=True)
    flags = ["--data", text, "--out", out, *SMALL, "--max-steps", 2, "--on-save-error", choice]
    assert train_gpt2.main([*map(str, flags)]) == 0
    errors = capsys.readouterr().err
    assert f"warning: cannot write {out}/loss.png" in errors and checkpoint.best_loss(out) < 10


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_metrics_that_cannot_be_added_to(
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    choice: str,
) -> None:
    """The row of step 3 meets with a full disk. Nothing of what was computed is lost."""
    out, straight, append = tmp_path / "out", tmp_path / "straight", Metrics.append
    flags = ["--data", text, *SMALL, "--max-steps", 5, "--on-save-error", choice]
    assert train_gpt2.main([*map(str, flags), "--out", str(straight)]) == 0

    def on_a_full_disk(log: Metrics, row: dict[str, float]) -> None:
        with monkeypatch.context() as patch:
            if row["step"] == 3:
                fill_disk(patch, micrograd_gpt.runs.metrics, 10)
            append(log, row)

    monkeypatch.setattr(Metrics, "append", on_a_full_disk)
    arguments = [*map(str, flags), "--out", str(out)]
    if choice == "continue":
        assert train_gpt2.main(arguments) == 0
        assert "No space left on device" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=r"No space left .*; the run is saved after step 3$"):
            train_gpt2.main(arguments)
        assert json.loads((out / "trainer_state.json").read_text())["step"] == 3
        assert train_gpt2.main(["--resume", "--out", str(out)]) == 0
    assert [row["step"] for row in metrics(out)] == [1, 2, 4, 5]
    assert_same(out, straight)


@pytest.mark.slow
def test_a_best_that_cannot_be_finished_does_not_stop_a_run_that_is_to_go_on(
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """From step 4 on nothing can be moved out of best/.saved/; at step 6 it can be again."""
    out, replace = tmp_path / "out", os.replace
    state = out / "trainer_state.json"

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent.name == "best" and json.loads(state.read_text())["step"] in (4, 5):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    flags = ["--data", text, "--out", out, *SMALL, "--max-steps", 6, "--save-interval", 1]
    flags += ["--eval-interval", 1, "--learning-rate", 0.01, "--on-save-error", "continue"]
    assert train_gpt2.main([*map(str, flags)]) == 0
    errors = capsys.readouterr().err
    assert errors.count(f"warning: cannot write to {out}/best: Input/output error") == 2
    losses = {row["val_loss"]: row["step"] for row in metrics(out)}
    best = json.loads((out / "best" / "trainer_state.json").read_text())
    assert best["step"] == losses[min(losses)] > 3


@pytest.mark.slow
def test_what_stops_before_it_starts_keeps_the_run_that_was_to_be_overwritten(
    text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX")
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--max-steps", 2]
    run(*flags)
    (out / "tensorboard").write_text("a file in the way")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = run(*flags, "--overwrite", "--tensorboard")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_resumed_run_may_grow_but_not_shrink(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """The learning rate of every step follows from --max-steps."""
    out = tmp_path / "out"
    start = ["--data", text, "--out", out, *SMALL, "--max-steps", 6, "--save-interval", 3]
    assert train_gpt2.main([*map(str, start), "--keep", "1"]) == 0
    earlier = str(shutil.copytree(out / "step-000003", tmp_path / "earlier"))
    with pytest.raises(UserError, match="--max-steps may grow, from 6, and not shrink to 4"):
        train_gpt2.main(["--resume", "--out", earlier, "--max-steps", "4"])
    changed = ["--resume", "--out", earlier, "--max-steps", "4", "--allow-changes"]
    assert train_gpt2.main(changed) == 0


@pytest.mark.slow
def test_dropout_may_be_changed_where_changes_are_allowed(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    ends = []
    for name, flags in (("same", ["--dropout", "0.1"]), ("changed", ["--dropout", "0.6"])):
        out = str(tmp_path / name)
        start = ["--data", str(text), "--out", out, *SMALL, "--dropout", "0.1"]
        assert train_gpt2.main([*start, "--max-steps", "2"]) == 0
        more = ["--resume", "--out", out, "--max-steps", "4", "--allow-changes", *flags]
        assert train_gpt2.main(more) == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        ends.append((metrics(tmp_path / name)[-1]["train_loss"], config["attn_pdrop"]))
    assert ends[0][0] != ends[1][0] and [end[1] for end in ends] == [0.1, 0.6]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--batch-size", 10**20], ["--n-embd", 10**7, "--n-head", 1]])
def test_what_no_machine_can_hold_is_one_line(
    text: Path, tmp_path: Path, flags: list[object]
) -> None:
    """More than can be allocated at all: nothing is touched, and no memory is in danger."""
    result = run("--data", text, "--out", tmp_path / "out", *SMALL, *flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_run_with_another_tokenizer_is_not_said_to_have_other_data(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """--allow-changes, which is advised for other data, would not help."""
    out, other = tmp_path / "out", tmp_path / "other"
    for folder, tokenizer in ((out, "char"), (other, "byte")):
        flags = [*SMALL, "--tokenizer", tokenizer, "--max-steps", "1"]
        train_gpt2.main(["--data", str(text), "--out", str(folder), *flags])
    shutil.copy(other / "tokenizer.json", out)
    with pytest.raises(
        UserError, match=r"^the tokenizer has 257 tokens and the model \d+: put the"
    ):
        train_gpt2.main(["--resume", "--out", str(out), "--max-steps", "2"])


@pytest.mark.slow
def test_a_run_goes_on_where_its_folder_is_part_of_its_data(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(text, data / "text.txt")
    for out in (data / "out", data):  # the second has both runs and the text in it
        flags = ["--data", str(data), "--out", str(out), *SMALL, "--max-steps", "1"]
        assert train_gpt2.main(flags) == 0
    for out in (data / "out", data):
        assert train_gpt2.main(["--resume", "--out", str(out), "--max-steps", "2"]) == 0


def test_settings_that_were_edited_are_not_ignored_in_silence(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "out", str(tmp_path / "moved")
    flags = ["--data", str(text), *SMALL, "--max-steps", "1", "--out", str(out)]
    assert train_gpt2.main(flags) == 0
    out.rename(moved)
    capsys.readouterr()
    assert train_gpt2.main(["--resume", "--out", moved, "--max-steps", "2"]) == 0
    assert "note" not in capsys.readouterr().err
    file = tmp_path / "moved" / "settings.toml"
    for old, new, said in (
        ("seed = 1337", "seed = 7", f"note: {file} says something else of seed than the run"),
        ("seed = 1337", "sead = 7", f"note: {file}: there is no flag 'sead'"),
    ):
        file.write_text(file.read_text().replace(old, new))
        with pytest.raises(UserError, match="is complete at step 2"):
            train_gpt2.main(["--resume", "--out", moved])
        assert said in capsys.readouterr().err
        file.write_text(file.read_text().replace(new, old))
