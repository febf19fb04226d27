"""The recorder beside the loop: what it lets through, what it saves, how it counts time."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from micrograd_gpt import optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs import recorder as module
from micrograd_gpt.runs.loss_scaler import LossScaler
from micrograd_gpt.runs.recorder import Recorder
from micrograd_gpt.runs.settings import resolve_settings
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.corpus import Corpus
from micrograd_gpt.text.tokenizers import CharTokenizer

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=3, n_positions=4)


def recorder(folder: Path, **flags: object) -> Recorder:
    """A recorder of a run on a GPU, which it looks at only where something is due."""
    settings = resolve_settings({"out": str(folder), "device": "gpu", "block_size": 4, **flags})
    model = GPT2(CONFIG)
    ids = np.zeros(20, np.uint16)
    corpus = Corpus(ids, ids, CharTokenizer.from_text("abc"), "three letters")
    optimizer = optim.AdamW(model.parameters())
    scaler = LossScaler(enabled=settings.dtype == "float16")
    made = Recorder(settings, corpus, model, optimizer, scaler)
    made.start()
    return made


def take_step(run: Recorder, loss: float = 1.0, norm: float = 0.5) -> bool:
    taken = run.accepts(run.optimizer.steps, [loss / 2, loss / 2], norm)
    if taken:
        run.optimizer.step()
    return taken


def state(folder: Path) -> dict[str, object]:
    return json.loads((folder / "trainer_state.json").read_text())


def test_what_is_due_after_a_step(tmp_path: Path) -> None:
    flags = {"log_interval": 2, "eval_interval": 3, "sample_interval": 4, "save_interval": 5}
    run = recorder(tmp_path, max_steps=10, **flags)
    due = [run.due_after(step) for step in range(10)]
    steps = {name: [i for i, d in enumerate(due, 1) if getattr(d, name)] for name in due[0]._fields}
    assert steps == {
        "log": [2, 3, 4, 6, 8, 9, 10],  # a validation is logged too
        "evaluation": [3, 6, 9, 10],
        "sample": [4, 8],
        "save": [5],  # the last step is saved when the run finishes
    }


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_was_not_looked_at_is_not_saved_if_it_is_not_finite(
    tmp_path: Path, values: tuple[float, float]
) -> None:
    run = recorder(tmp_path, grad_accum_steps=2, seed=7)
    assert take_step(run) and take_step(run, *values) and take_step(run)
    with pytest.raises(UserError, match=r"^step 1: .* in batch 2-3 of seed 7; .* none yet; try a"):
        run.finish()
    assert not (tmp_path / "trainer_state.json").exists()


def test_a_step_that_is_due_for_something_is_looked_at_before_it_is_taken(tmp_path: Path) -> None:
    run = recorder(tmp_path, log_interval=2)
    assert take_step(run)
    with pytest.raises(UserError, match=r"^step 1: the loss is nan"):
        take_step(run, math.nan)
    assert run.optimizer.steps == 1


def test_a_validation_loss_belongs_to_its_step_alone(tmp_path: Path) -> None:
    run = recorder(tmp_path, log_interval=1, eval_interval=1, save_interval=2)
    take_step(run)
    run.log(run.measure() | {"val_loss": 2.0})
    run.save_if_due()  # the lowest so far
    assert (state(tmp_path)["step"], state(tmp_path)["val_loss"]) == (1, 2.0)
    take_step(run)
    run.save_if_due()
    assert (state(tmp_path)["step"], state(tmp_path)["val_loss"]) == (2, None)
    assert state(tmp_path / "best")["step"] == 1
    take_step(run)
    run.log(run.measure() | {"val_loss": 3.0})
    run.save_if_due()  # neither due nor better
    assert state(tmp_path)["step"] == 2
    assert run.finish() == 0 and state(tmp_path)["step"] == 3


def test_an_overflow_of_float16_is_tried_again(tmp_path: Path) -> None:
    run = recorder(tmp_path, dtype="float16", log_interval=1)
    assert not take_step(run, norm=math.inf) and run.optimizer.steps == 0
    assert take_step(run)
    row = run.measure()
    assert (row["step"], row["loss_scale"], row["skipped_steps"]) == (1, 32768.0, 1)


def test_evaluation_does_not_count_as_training_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clock for all: each look at it is a second later, and an evaluation takes 100 of them."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    run = recorder(tmp_path, log_interval=1, batch_size=3)  # 3 x 4 tokens a step
    for _ in range(2):
        take_step(run)
        row = run.measure()
        for _ in range(100):
            next(ticks)
        run.log(row)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens_per_second"] for row in rows] == [12.0, 12.0]
    assert rows[1]["elapsed_seconds"] == 103.0


def test_tokens_are_those_that_the_steps_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    run = recorder(tmp_path)
    for tokens in (3, 5, None):  # None: a full batch of 12 × 4
        assert run.accepts(run.optimizer.steps, [1.0], 1.0, tokens)
        run.optimizer.step()
    row = run.measure()
    assert row["tokens_per_second"] == pytest.approx(
        (3 + 5 + 48) / row["elapsed_seconds"], rel=0.01
    )
    run.log(row)
    assert run.measure()["tokens_per_second"] == 0


def test_a_resumed_run_that_is_complete_says_so(tmp_path: Path) -> None:
    run = recorder(tmp_path, max_steps=1)
    take_step(run)
    run.finish()
    settings = argparse.Namespace(**vars(run.settings) | {"resume": True})
    with pytest.raises(UserError, match=r"is complete at step 1; give a larger --max-steps"):
        Recorder(settings, run.data, run.model, run.optimizer, run.scaler)


def test_what_a_killed_run_was_drawing_is_removed_at_the_next_start(tmp_path: Path) -> None:
    drawing, users = tmp_path / f".loss.png.{'0' * 16}.tmp", tmp_path / ".notes.tmp"
    drawing.touch()
    users.touch()
    recorder(tmp_path)
    assert users.exists() and not drawing.exists()


def test_a_log_file_gets_a_sign_of_life_every_half_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    run = recorder(tmp_path, max_steps=500, log_interval=1000)
    capsys.readouterr()
    for _ in range(100):
        clock[0] += 7
        take_step(run, loss=2.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20  # the first step that is half a minute after the last line
    assert lines[0] == "step     5 of 500   train loss 2.000"
    run.say("anything")
    clock[0] += 29
    take_step(run)
    assert capsys.readouterr().err == "anything\n"


def test_the_bar_has_a_loss_from_the_first_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorder(tmp_path, log_interval=1000)
    said: list[str] = []
    monkeypatch.setattr(run, "_on_cpu", True)
    monkeypatch.setattr(
        run,
        "_bar",
        SimpleNamespace(disable=False, update=lambda: None, set_postfix_str=said.append),
    )
    take_step(run, loss=2.0)
    assert said == ["loss 2.000"]
    run.measure()
    take_step(run, loss=3.0)
    assert len(said) == 2 and said[1].startswith("loss 2.000, ")  # of what was measured
