"""The plan's figures, against models that exist and a run that takes place."""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import optim
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2, MLP, GPT2Config
from micrograd_gpt.nn import Module
from micrograd_gpt.runs import plan
from micrograd_gpt.runs.plan import Plan, StepTime
from micrograd_gpt.runs.recompute import recompute_blocks
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.tuning.classifier import GPT2Classifier, set_layers
from micrograd_gpt.tuning.lora import what_learns
from micrograd_gpt.variants import VariantConfig, VariantGPT2
from micrograd_gpt.weights.config import SIZES

ROOT = Path(__file__).parents[2]
SMALL = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 11, "n_positions": 8}


def test_parameters() -> None:
    config = GPT2Config(**SMALL)
    plan, count = Plan(config, 1, 8), sum(p.size for p in GPT2(config).parameters())
    assert plan.n_parameters == plan.n_in_gpt2 == count
    assert "a GPT-2 of this shape" not in plan.report(10, plan.step_time(rate=1.0))


class Experts(Module):
    """A learner's edit: three MLPs in place of one."""

    def __init__(self, *of_mlp: Any) -> None:
        self.experts = [MLP(*of_mlp) for _ in range(3)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.experts[0](x) + self.experts[1](x) + self.experts[2](x)


def test_the_parameters_of_an_edited_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(**SMALL)
    in_gpt2 = Plan(config, 1, 8).n_parameters
    monkeypatch.setattr("micrograd_gpt.gpt2.MLP", Experts)
    plan, count = Plan(config, 1, 8), sum(p.size for p in GPT2(config).parameters())
    assert plan.n_parameters == count > 1.5 * in_gpt2
    assert plan.weights == 4 * count and plan.moments == 8 * count
    report = plan.report(10, plan.step_time(rate=1.0))
    assert f"{count:,} parameters" in report
    assert f"a GPT-2 of this shape has {in_gpt2:,}, and compute" in report


def test_parameters_that_no_machine_can_hold_are_counted_at_once() -> None:
    plan = Plan(GPT2Config(**SMALL | {"n_layer": 10**9}), 1, 8)
    assert plan.n_parameters == plan.n_in_gpt2 > 3 * 10**12
    wide = Plan(GPT2Config(**SMALL | {"n_embd": 10**9}), 1, 8)
    assert wide.n_parameters == wide.n_in_gpt2 > 10**19


def test_published_sizes() -> None:
    sizes = {name: Plan(GPT2Config(**SIZES[name]), 1, 1024).n_parameters for name in SIZES}
    assert sizes["124M"] == 124_439_808 and sizes["1558M"] == 1_557_611_200


class Counting(np.ndarray):
    """An array that counts the multiplications and additions of matrix products it takes part in.

    What is computed from it counts too.
    """

    flops = 0

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **more: Any
    ) -> Any:
        inputs = tuple(x.view(np.ndarray) if isinstance(x, Counting) else x for x in inputs)
        if out:
            more["out"] = tuple(np.asarray(array) for array in out)
        result = getattr(ufunc, method)(*inputs, **more)
        if ufunc is np.matmul:
            Counting.flops += 2 * inputs[0].shape[-1] * result.size
        return result.view(Counting) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("relative", [{}, {"n_inner": 400, "tie_word_embeddings": False}])
def test_a_step_s_work_is_that_of_its_matrix_products(
    recompute: bool, relative: dict[str, Any]
) -> None:
    shape = SMALL | {"n_embd": 64, "vocab_size": 200}
    model = VariantGPT2(VariantConfig(**shape, **relative))
    if recompute:
        recompute_blocks(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.view(Counting)
    plan = Plan(model.config, 2, 8, recompute=recompute)
    Counting.flops = 0
    ids = np.zeros((2, 8), int)
    with at_most("fused"):  # NumPy's products, which can be counted
        model.loss(ids, ids).backward()
    # The definitions multiply the masked half of attention too: 1% of so short a context's work.
    assert plan.flops_per_token * plan.tokens_per_step == pytest.approx(Counting.flops, rel=0.015)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", ["all", "last", "head"])
def test_a_classifier_s_work_is_that_of_the_layers_that_learn(which: str, recompute: bool) -> None:
    model = GPT2Classifier(GPT2(GPT2Config(**SMALL | {"n_embd": 64, "vocab_size": 200})), "ab")
    set_layers(model, which)
    learns = what_learns(model, argparse.Namespace(lora_rank=None, dropout=0.0))
    if recompute:
        recompute_blocks(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.view(Counting)
    plan = Plan(model.config, 2, 8, recompute=recompute, **learns)
    Counting.flops = 0
    with at_most("fused"):
        model.loss(np.zeros((2, 8), int), [8, 8], [0, 1]).backward()
    assert plan.flops_per_token * plan.tokens_per_step == pytest.approx(Counting.flops, rel=0.015)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_gradients_and_moments_are_those_of_a_real_step(dtype: str) -> None:
    model = GPT2(GPT2Config(**SMALL))
    hold_in(model, dtype)
    optimizer = optim.AdamW(model.parameters())
    ids = np.zeros((2, 8), int)
    model.loss(ids, ids).backward()
    optimizer.step()
    plan = Plan(model.config, 2, 8, dtype=dtype)
    assert plan.weights == sum(p.data.nbytes for p in model.parameters())
    assert plan.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert plan.moments == sum(moment.nbytes for moment in optimizer.m + optimizer.v)


def test_half_precision_saves_memory_for_activations_on_a_gpu() -> None:
    config = GPT2Config(**SIZES["124M"])
    exact, half = (Plan(config, 16, 1024, dtype=d, device="gpu") for d in ("float32", "bfloat16"))
    assert (exact.weights, exact.gradients) == (half.weights, half.gradients)
    assert 0.5 < half.activations / exact.activations < 0.6  # all but the residual stream
    assert half.peak < exact.peak


def test_the_report_agrees_with_itself() -> None:
    """The time is the work at the given rate, shared by the devices; micro-batches add up."""
    config = GPT2Config(**SIZES["124M"])
    plan = Plan(config, 4, 1024, grad_accum_steps=3, devices=2)
    text = plan.report(1000, plan.step_time(rate=10.0))
    found = re.search(r"([\d.]+) TFLOP a step", text), re.search(r"([\d.]+) s a step", text)
    work, seconds = (float(match[1]) for match in found if match)
    assert seconds == pytest.approx(work / 10 / 2, rel=0.01)
    assert "24,576 tokens" in text and "6 × 4 × 1024" in text
    assert "24,576,000 in 1,000 steps" in text
    assert "10 TFLOP/s given, 2 devices of their own" in text


@pytest.mark.parametrize(
    ("done", "step", "time"),
    [
        (0, "8,000 in 1,000 steps\n", "16.7 minutes in all, at"),
        (400, "4,800 in 600 steps left after step 400\n", "10.0 minutes left after step 400, at"),
        (1200, "0 in 0 steps left after step 1,200\n", "0 seconds left after step 1,200, at"),
    ],
)
def test_what_is_left_of_a_run_is_planned(done: int, step: str, time: str) -> None:
    report = Plan(GPT2Config(**SMALL), 1, 8).report(1000, StepTime(1.0, 0.0, "given"), done)
    assert step in report and time in report


def test_time_is_measured_where_no_rate_is_given() -> None:
    text = Plan(GPT2Config(**SMALL), 2, 8).report(max_steps=100)
    assert "measured here on one and two blocks" in text and " in all" in text
    assert "1,600 in 100 steps" in text


def test_a_model_too_large_to_be_timed_is_planned_by_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("micrograd_gpt.arrays.memory.available_memory", lambda: 10**9)
    shape = SMALL | {"n_layer": 1, "n_embd": 100_000, "n_head": 10}
    large = Plan(GPT2Config(**shape), 2, 8)
    with pytest.raises(UserError, match=r"^no memory for two blocks .*: give .* with --rate$"):
        large.report(max_steps=100)
    text = large.report(100, large.step_time(rate=10.0))
    assert "10 TFLOP/s given" in text and "(1 layer, 10 heads, " in text


def test_every_micro_batch_and_one_update_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second each time it is read, and so for each part of a step."""
    monkeypatch.setattr(plan, "perf_counter", itertools.count().__next__)
    time = Plan(GPT2Config(**SMALL), 2, 8, grad_accum_steps=5).step_time()
    assert (time.gradients, time.update) == (5, 1)


def test_a_long_context_is_measured_on_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same clock: its time grows with its FLOPs, of which attention's are its square."""
    monkeypatch.setattr(plan, "perf_counter", itertools.count().__next__)
    monkeypatch.setattr(plan, "TIMED_TOKENS", 4)
    part, whole = (Plan(GPT2Config(**SMALL), 2, length) for length in (4, 8))
    time, work = whole.step_time(), whole.flops_per_token / part.flops_per_token
    assert time.gradients == pytest.approx(2 * 2 * work) and time.update == 1 and work > 1
    assert "on one and two blocks of 4 tokens" in whole.report(10, time)
    assert "on one and two blocks," in part.report(10, part.step_time())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--recompute", "--batch-size", "16", "--dropout", "0.1"],
        ["--dtype", "bfloat16"],
        ["--dtype", "bfloat16", "--recompute", "--batch-size", "16"],
        ["--dtype", "float16"],
    ],
)
def test_memory_within_10_percent_of_a_real_run(tmp_path: Path, flags: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    command = ["train_gpt2.py", "--data", str(text), "--tokenizer", "byte"]
    command += ["--n-layer", "6", "--n-head", "4", "--n-embd", "256", "--block-size", "256"]
    command += ["--batch-size", "8", "--eval-batches", "1", "--max-steps", "2", *flags]
    planned, real = planned_and_real_peak(command, tmp_path / "out")
    assert planned == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("batch_size", "flags"),
    [
        ("16", []),
        ("32", ["--train-layers", "last"]),
        ("64", ["--train-layers", "head"]),
        ("32", ["--lora-rank", "4"]),
        ("16", ["--lora-rank", "4", "--lora-layers", "c_attn, c_proj, c_fc"]),
    ],
)
def test_memory_of_a_classifier_within_a_fifth_of_a_real_run(
    tmp_path: Path, batch_size: str, flags: list[str]
) -> None:
    model, data = tmp_path / "model", tmp_path / "texts.tsv"
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 512, "vocab_size": 257, "n_positions": 256}
    GPT2(GPT2Config(**shape)).save_pretrained(model, ByteTokenizer())
    data.write_text("".join(f"{'ab'[i % 2]}\t{'word ' * 50}{i}\n" for i in range(80)))
    command = ["finetune_gpt2.py", "classify", "--model", str(model), "--data", str(data)]
    command += ["--batch-size", batch_size, "--max-steps", "2", *flags]
    planned, real = planned_and_real_peak(command, tmp_path / "out")
    assert planned == pytest.approx(real, rel=0.2)


def planned_and_real_peak(command: list[str], out: Path) -> tuple[float, float]:
    """The MB that a script says its run would take, and those that it takes."""
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    plan = subprocess.run(
        [*command, "--plan", "--rate", "1"], capture_output=True, text=True, check=True
    )
    match = re.search(r"peak memory +([\d,]+) MB", plan.stdout)
    assert match
    # The peak of this program alone; what wait4() tells of a child begins with its parent's memory.
    run = (
        "import runpy, sys; sys.argv.pop(0)\ntry: runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run += "\nexcept SystemExit as end: assert not end.code"
    run += "\nprint(open('/proc/self/status').read())"
    command[1:1] = ["-c", run]
    real_run = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=True
    )
    found = re.search(r"VmHWM:\s+(\d+) kB", real_run.stdout)
    assert found
    return float(match[1].replace(",", "")), int(found[1]) * 1024 / 1e6


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"batch_size": 100_000_000, "block_size": 64}, "lower --batch-size"),
        ({"batch_size": 1, "block_size": 100_000_000}, "lower --batch-size"),
        ({"n_embd": 100_000}, "choose a smaller --size, --n-layer or --n-embd"),
        ({"vocab_size": 10**10}, "choose a smaller --size"),
    ],
)
def test_a_run_that_memory_cannot_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], advice: str
) -> None:
    monkeypatch.setattr("micrograd_gpt.arrays.memory.available_memory", lambda: 10**9)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 65} | sizes
    batch = {name: shape.pop(name, 8) for name in ("batch_size", "block_size")}
    with pytest.raises(UserError, match=f"^no memory for .*: {advice}") as caught:
        Plan(GPT2Config(**shape), **batch).check_room()
    assert "\n" not in str(caught.value)
    Plan(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=65), 8, 8).check_room()
    Plan(GPT2Config(**shape), **batch, device="gpu").check_room()  # which says it itself


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (None, "unknown: this machine does not say"),
        (1_000_000_000_000, r"yes: 1,000,000 MB are free on this machine$"),
        (3_000_000_000, r"no: 3,000 MB are free on this machine; lower --batch-size"),
        (1_000_000_000, r"no: 1,000 MB are free on this machine; choose a smaller model"),
    ],
)
def test_a_plan_says_whether_the_run_fits(
    free: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: free)
    sizes = Plan(GPT2Config(**SIZES["124M"]), 4, 1024)
    report = sizes.report(10, sizes.step_time(rate=1.0))
    (verdict,) = re.findall(r"^fits +(.*)$", report, re.MULTILINE)
    assert re.match(words, verdict)
