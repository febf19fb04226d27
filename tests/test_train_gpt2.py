"""The training script, from its flags to what it leaves in the folder."""

from __future__ import annotations

import importlib.util
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

from micrograd_gpt import checkpoint, files, optim, train_settings
from micrograd_gpt.errors import UserError
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.tensor_files import TensorFile

SCRIPT = Path(__file__).parents[1] / "train_gpt2.py"
SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8"),
    *("--batch-size", "4", "--warmup-steps", "2", "--eval-batches", "2", "--log-interval", "1"),
    *("--sample-interval", "1000"),
]


@pytest.fixture(scope="module")
def train_gpt2() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt2", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def restore_signals() -> object:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    file = TensorFile(folder / "model.safetensors")
    return {name: file.read(name) for name in file.shapes}


def test_a_run_from_start_to_end(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--learning-rate", 1e-2]
    result = run(*flags, "--max-steps", 30, "--eval-interval", 10)
    assert result.returncode == 0, result.stderr
    assert "sample:" in result.stdout and "perplexity" in result.stdout
    assert f"saved in {out}/" in result.stdout and "--prompt" in result.stdout
    assert "step    10" in result.stderr and "sample" not in result.stderr
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert {row["step"] for row in rows if "val_loss" in row} == {10, 20, 30}
    assert rows[-1]["val_loss"] < rows[0]["train_loss"] - 0.3
    expected = {"step", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert expected | {"elapsed_seconds"} <= rows[0].keys()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = {f.name for f in out.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "optimizer.safetensors"),
        *("trainer_state.json", "metrics.jsonl", "loss.png", "best"),
    }
    # A second run does not overwrite it unless told to.
    again = run("--data", text, "--out", out, *SMALL)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    anew = run(*flags, "--max-steps", 2, "--overwrite")
    assert anew.returncode == 0 and [row["step"] for row in metrics(out)] == [1, 2]


def test_resumed_equals_never_stopped(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *SMALL, "--dropout", 0.1, "--grad-accum-steps", 2, "--seed", 5]
    flags += ["--max-steps", 12]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(*flags, "--out", straight).returncode == 0

    # Stopped by SIGTERM somewhere on the way, then resumed.
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *map(str, flags), "--out", str(stopped)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while (
        len(
            (stopped / "metrics.jsonl").read_bytes()
            if stopped.is_dir() and (stopped / "metrics.jsonl").exists()
            else b""
        )
        == 0
    ):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    if process.returncode == 143:
        assert "continue with --resume" in stderr
        step = json.loads((stopped / "trainer_state.json").read_text())["step"]
        assert 1 <= step < 12
        resumed = run("--resume", "--out", stopped)
        assert resumed.returncode == 0, resumed.stderr
        assert f"from step {step}" in resumed.stderr
    else:  # it was done before the signal came
        assert process.returncode == 0

    for name, array in weights(straight).items():
        np.testing.assert_array_equal(array, weights(stopped)[name], err_msg=name)
    losses = [[(r["step"], r["train_loss"]) for r in metrics(f)] for f in (straight, stopped)]
    assert losses[0] == losses[1]


def test_the_same_seed_gives_the_same_losses(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *SMALL, "--max-steps", 5, "--dropout", 0.2]
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*flags, "--seed", seed, "--out", tmp_path / name)
        losses.append([row["train_loss"] for row in metrics(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]


def test_resume_refuses_what_would_change_the_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 3)
    before = weights(out)
    for flags, message in (
        (["--learning-rate", "0.5"], "has --learning-rate 0.003, not 0.5"),
        (["--batch-size", "3"], "has --batch-size 4, not 3"),
        ([], "is complete at step 3"),
    ):
        result = run("--resume", "--out", out, *flags)
        assert result.returncode == 2 and message in result.stderr
        assert result.stderr.count("\n") == 1
    longer = run("--resume", "--out", out, "--max-steps", 5, "--batch-size", 4)
    assert longer.returncode == 0, longer.stderr
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5]
    assert any((weights(out)[name] != before[name]).any() for name in before)


def test_fine_tuning_starts_from_the_weights_it_is_given(text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run("--data", text, "--out", first, *SMALL, "--max-steps", 30)
    result = run(
        *("--data", text, "--init-from", first, "--out", second, "--max-steps", 2),
        *("--batch-size", 4, "--eval-batches", 2, "--log-interval", 1, "--dropout", 0.1),
    )
    assert result.returncode == 0, result.stderr
    assert metrics(second)[0]["train_loss"] < metrics(first)[5]["train_loss"]
    config = json.loads((second / "config.json").read_text())
    assert config["resid_pdrop"] == config["attn_pdrop"] == config["embd_pdrop"] == 0.1
    result = run("--data", text, "--init-from", first, "--out", tmp_path / "x", "--n-layer", 2)
    assert result.returncode == 2 and "--n-layer makes no sense with --init-from" in result.stderr
    result = run("--data", text, "--init-from", first, "--out", tmp_path / "x", "--block-size", 9)
    assert result.returncode == 2 and "--block-size is at most 8" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.txt"], "missing.txt"),
        (["--tokenizer", "bpe"], "invalid choice: 'bpe'"),
        (["--size", "2B"], "unknown GPT-2 size '2B'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--batch-size", "0"], "must be 1 or more, not 0"),
        (["--batch-size", "many"], "invalid"),
        (["--n-head", "3"], "must be a multiple of n_head"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--dropout", "1"], "--dropout must be in [0, 1)"),
        (["--block-size", "1000000"], "smaller --block-size"),
        (["--init-from", "nowhere"], "nowhere holds no model"),
        (["--resume"], "holds no run to resume"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    flags: list[str], message: str, tmp_path: Path, text: Path
) -> None:
    os.chdir(tmp_path)
    data = [] if "--data" in flags else ["--data", str(text)]
    result = run(*data, *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert [f.name for f in tmp_path.iterdir()] == ["text.txt"]


def test_a_loss_that_is_not_finite_stops_the_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        *("--data", text, "--out", out, *SMALL, "--max-steps", 60, "--learning-rate", 1e30),
        *("--warmup-steps", 0, "--grad-clip", 1e30),
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: step ") and "smaller --learning-rate" in last
    assert "of seed 1337" in last and "the last good checkpoint: there is none yet" in last


def test_a_gradient_that_is_not_finite_names_the_last_good_checkpoint(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, 1.0, 1.0, float("inf")])
    monkeypatch.setattr(optim, "clip_grad_norm", lambda *_: next(norms))
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--save-interval", 1, "--keep", 3, "--seed", 5]
    message = (
        rf"^step 3: the loss is \d.*, the gradient norm inf, in batch 6-7 of seed 5; "
        rf"the last good checkpoint: {out}/step-000002, of step 2; try "
    )
    with pytest.raises(UserError, match=message):
        train_gpt2.main([*map(str, flags), "--grad-accum-steps", "2"])
    assert json.loads((out / "trainer_state.json").read_text())["step"] == 3


def test_gradient_accumulation_equals_the_large_batch() -> None:
    """Four micro-batches of 2, each loss divided by 4, against one batch of 8: within rounding."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=11, n_positions=8)
    ids = np.random.default_rng(0).integers(0, 11, (2, 8, 8))
    whole, parts = GPT2(config), GPT2(config)
    whole.loss(*ids).backward()
    for rows in np.split(np.arange(8), 4):
        (parts.loss(*ids[:, rows]) * (1 / 4)).backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        size = np.abs(a.grad).max()
        np.testing.assert_allclose(a.grad, b.grad, rtol=0, atol=3e-6 * size, err_msg=name)
    norms = [optim.clip_grad_norm(m.parameters(), 1.0) for m in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_help_names_every_setting(train_gpt2: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train_gpt2.parse_flags(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = {*train_settings.FREE, *train_settings.SHAPE, "rate", "devices"}
    known = {*train_settings.DEFAULTS, *train_settings.TINY, *train_settings.LARGE, *flags}
    assert all("--" + name.replace("_", "-") in text for name in known)


def test_defaults_by_size(train_gpt2: ModuleType) -> None:
    tiny = train_gpt2.resolve_settings({})
    assert (tiny.n_layer, tiny.n_head, tiny.n_embd, tiny.tokenizer) == (4, 4, 128, "char")
    large = train_gpt2.resolve_settings({"size": "345M", "learning_rate": 1e-4})
    assert (large.n_layer, large.n_embd, large.block_size) == (24, 1024, 1024)
    assert large.tokenizer == "gpt2" and large.min_lr == 1e-5 and large.size == "355M"
    with pytest.raises(UserError, match="--tokenizer makes no sense with --init-from"):
        train_gpt2.resolve_settings({"init_from": "124M", "tokenizer": "char"})


# -------------------------------------------------------------------- runs that are not lost


def everything(folder: Path) -> dict[str, np.ndarray]:
    """Weights and moments."""
    moments = TensorFile(folder / "optimizer.safetensors")
    return weights(folder) | {name: moments.read(name) for name in moments.shapes}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = everything(a), everything(b)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


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


def test_the_best_is_the_step_of_lowest_validation_loss(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--eval-interval", 2, "--max-steps", 12]
    run(*flags, "--learning-rate", 0.01, "--min-lr", 3)  # it rises, and with it the loss
    measured = {r["step"]: r["val_loss"] for r in metrics(out) if "val_loss" in r}
    best = min(measured, key=measured.__getitem__)
    state = json.loads((out / "best" / "trainer_state.json").read_text())
    assert (state["step"], state["val_loss"]) == (best, measured[best]) and best < 12
    assert json.loads((out / "trainer_state.json").read_text())["step"] == 12


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
    assert train_gpt2.main([*flags, "--out", str(straight)]) == 0
    assert_same(out, straight)
    assert not list(out.glob(".*"))


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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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
    assert (out / "loss.png").exists() and len(losses) == 3 + 2
    with pytest.raises(KeyboardInterrupt):  # a second one stops at once
        signal.raise_signal(number)


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


def test_metrics_are_added_to_and_mended(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 4)
    before = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(before + b'{"step": 5, "train_lo')
    assert run("--resume", "--out", out, "--max-steps", 6).returncode == 0
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]


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


def test_a_plan_writes_nothing(text: Path, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    result = run("--data", text, *SMALL, "--plan", "--rate", 0.5, "--devices", 2)
    assert result.returncode == 0, result.stderr
    assert "peak memory" in result.stdout and "0.5 TFLOP/s given, 2 devices" in result.stdout
    result = run("--size", "124M", "--plan", "--rate", "nan")
    assert result.returncode == 2 and "--rate must be above 0, not nan" in result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["text.txt"]


def test_recomputed_runs_are_the_same_runs(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    flags = ["--data", text, *SMALL, "--dropout", 0.1, "--max-steps", 4]
    for name in ("plain", "recompute"):
        flags += ["--recompute"] * (name == "recompute")
        assert train_gpt2.main([*map(str, flags), "--out", str(tmp_path / name)]) == 0
    assert_same(tmp_path / "plain", tmp_path / "recompute")


def test_event_files(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--max-steps", 2]
    result = run(*flags, "--tensorboard")
    assert result.returncode == 0, result.stderr
    (events,) = (out / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"train_loss", b"val_loss", b"learning_rate"))
