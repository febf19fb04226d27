"""The scripts in half precision: what is said, what is saved, and float16's loss scale."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from training import everything, in_this_process, script

from micrograd_gpt import optim
from micrograd_gpt.arrays.precision import emulation_note
from micrograd_gpt.runs import loss_scaler
from micrograd_gpt.runs.loss_scaler import LossScaler
from micrograd_gpt.support.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8"),
    *("--batch-size", "4", "--warmup-steps", "2", "--eval-batches", "2", "--log-interval", "1"),
    *("--grad-accum-steps", "2", "--max-steps", "12"),
]
Run = Callable[..., Path]


@pytest.fixture
def train(train_gpt2: ModuleType, text: Path, tmp_path: Path) -> Run:
    return in_this_process(train_gpt2, text, tmp_path, SMALL)


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("tokens_per_second", "elapsed_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def state(folder: Path) -> dict[str, float] | None:
    return json.loads((folder / "trainer_state.json").read_text()).get("loss_scaler")


def test_bfloat16_trains_beside_float32_files(
    train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, out = train("exact"), train("out", "--dtype", "bfloat16")
    notes = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    said = emulation_note("bfloat16", "cpu")  # None where the processor multiplies bfloat16
    assert notes == [note for note in (said,) if note]
    assert all(a.dtype == np.float32 for a in everything(out).values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert state(out) is None and not any("loss_scale" in row for row in rows(out))
    losses = [[row["train_loss"] for row in rows(folder)] for folder in (exact, out)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=1e-3)  # a few bfloat16 roundings, averaged over tokens
    generate = script("generate")
    flags = ["--model", str(out), "--prompt", "The", "--greedy", "--max-new-tokens", "5"]
    for dtype in ("bfloat16", "float16"):
        assert generate.main([*flags, "--dtype", dtype]) == 0
        said = capsys.readouterr()
        note = emulation_note(dtype, "cpu", decoding=True)
        assert said.out.startswith("The") and ("note:" in said.err) == bool(note)


def start_from(
    train_gpt2: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    growth_interval: int = 2000,
) -> None:
    """Let every float16 run begin with this loss scale, and double it this often."""
    make = LossScaler

    def scaler(enabled: bool) -> LossScaler:
        made = make(enabled=enabled)
        if enabled:
            made.scale, made.growth_interval = scale, growth_interval
        return made

    monkeypatch.setattr(loss_scaler, "LossScaler", scaler)


@pytest.mark.slow
def test_float16_scales_its_loss_and_resumes_bit_for_bit(
    train: Run,
    train_gpt2: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a scale that overflows at first and grows every third step, until it overflows again."""
    start_from(train_gpt2, monkeypatch, 2.0**30, growth_interval=3)
    straight = train("straight", "--dtype", "float16")
    changes = re.findall(r"step (\d+): the loss scale is now (\d+)", capsys.readouterr().err)
    scales = [2**30, *(int(scale) for _, scale in changes)]
    steps = [int(step) for step, _ in changes]
    assert any(a > b for a, b in itertools.pairwise(scales))  # it overflowed
    assert any(a < b for a, b in itertools.pairwise(scales))  # it recovered
    assert steps[0] == 0 and steps.count(0) > 1 and max(steps) > 5
    logged = rows(straight)
    assert [row["step"] for row in logged] == list(range(1, 13))  # tried again, none was lost
    assert logged[-1]["loss_scale"] == scales[-1] == state(straight)["scale"]
    assert logged[-1]["skipped_steps"] == sum(a > b for a, b in itertools.pairwise(scales))

    step = optim.AdamW.step

    def stop_after_7(optimizer: optim.AdamW) -> None:
        step(optimizer)
        if optimizer.steps == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(optim.AdamW, "step", stop_after_7)
    stopped = train("stopped", "--dtype", "float16")
    assert len(rows(stopped)) == 7 and state(stopped) != state(straight)
    monkeypatch.setattr(optim.AdamW, "step", step)
    train("stopped", resume=True)
    assert rows(stopped) == logged and state(stopped) == state(straight)
    for name, array in everything(straight).items():
        np.testing.assert_array_equal(everything(stopped)[name], array, err_msg=name)


@pytest.mark.slow
def test_the_scale_does_not_show_in_the_losses(train: Run, train_gpt2: ModuleType) -> None:
    """Powers of two change no digits: a step tried again gives what it would have given at once."""
    losses = []
    for name, scale in (("high", 2.0**30), ("low", 2.0**12)):
        with pytest.MonkeyPatch.context() as patch:
            start_from(train_gpt2, patch, scale)
            run = rows(train(name, "--dtype", "float16"))
        losses.append([[row["train_loss"], row["grad_norm"]] for row in run])
    np.testing.assert_allclose(*losses, rtol=1e-4)  # but for gradients that rounded to zero


def test_a_loss_scale_that_collapses_stops_the_run(
    train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "clip_grad_norm", lambda *_: float("nan"))
    message = (
        r"^step 0: the gradients overflow float16 even at a loss scale of 1: try --dtype bfloat16 "
        r"or a smaller --learning-rate; the last good checkpoint: there is none yet$"
    )
    with pytest.raises(UserError, match=message):
        train("out", "--dtype", "float16")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "values", [None, {}, {"scale": "large"}, {"scale": -1.0}, {"scale": 2.0, "more": 1}]
)
def test_a_damaged_loss_scale_is_named(train: Run, values: object) -> None:
    out = train("out", "--dtype", "float16", "--max-steps", "3")
    file = out / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"loss_scaler": values}))
    with pytest.raises(UserError, match=r"trainer_state.json is damaged: its loss_scaler is "):
        train("out", "--max-steps", "5", resume=True)
