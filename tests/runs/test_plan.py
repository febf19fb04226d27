"""The plan's figures, against models that exist and a run that takes place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from micrograd_gpt.gpt2 import GPT2, SIZES, GPT2Config
from micrograd_gpt.runs.plan import Plan

SCRIPT = Path(__file__).parents[2] / "train_gpt2.py"
SMALL = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 11, "n_positions": 8}


@pytest.mark.parametrize(
    "variant", [{}, {"norm_position": "post"}, {"position_embedding": "sinusoidal"}]
)
def test_parameters(variant: dict[str, str]) -> None:
    config = GPT2Config(**SMALL, **variant)
    assert Plan(config, 1, 8).n_parameters == GPT2(config).n_parameters


def test_published_sizes() -> None:
    sizes = {name: Plan(GPT2Config(**SIZES[name]), 1, 1024).n_parameters for name in SIZES}
    assert sizes["124M"] == 124_439_808 and sizes["1558M"] == 1_557_611_200


def test_a_step_s_work() -> None:
    plan = Plan(GPT2Config(**SMALL), batch_size=2, block_size=8, grad_accum_steps=3)
    assert plan.tokens_per_step == 48
    weights = 3 * 12 * 16**2 + 11 * 16
    attention = 3 * 16 * 8 // 2
    assert plan.flops_per_token == 6 * weights + 14 * attention
    again = Plan(GPT2Config(**SMALL), 2, 8, 3, recompute=True)
    assert again.flops_per_token == plan.flops_per_token + 2 * 3 * 12 * 16**2 + 4 * attention
    seconds = plan.seconds_per_step(rate=2.0, devices=4)
    assert seconds == pytest.approx(48 * plan.flops_per_token / 8e12)
    assert plan.moments == 2 * plan.gradients == 2 * plan.weights == 8 * plan.n_parameters
    assert again.activations < plan.activations / 4 and again.peak < plan.peak


def test_half_precision_halves_the_branches_on_a_gpu_and_nothing_on_a_cpu() -> None:
    config = GPT2Config(**SIZES["124M"])
    exact, cpu, gpu = (
        Plan(config, 16, 1024, dtype=dtype, device=device)
        for dtype, device in (("float32", "cpu"), ("bfloat16", "cpu"), ("bfloat16", "gpu"))
    )
    assert exact.weights == cpu.weights == gpu.weights and exact.moments == gpu.moments
    matrices = 12 * 12 * 768**2
    assert cpu.activations == exact.activations + 4 * matrices  # and their rounded copies
    row = 16 * 1024 * 768
    branches = 12 * 14 * row + row  # of 16 rows a block and 2 at the end
    assert gpu.activations == exact.activations - 2 * branches + 2 * matrices


def test_time_is_measured_where_no_rate_is_given() -> None:
    text = Plan(GPT2Config(**SMALL), 2, 8).report(max_steps=100)
    assert "measured here on one and two blocks" in text and " in all" in text
    assert "1,600 in 100 steps" in text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--recompute", "--batch-size", "16", "--dropout", "0.1"],
        ["--dtype", "bfloat16"],
        ["--dtype", "bfloat16", "--recompute", "--batch-size", "16"],
    ],
)
def test_memory_within_15_percent_of_a_real_run(tmp_path: Path, flags: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    command = [sys.executable, str(SCRIPT), "--data", str(text), "--tokenizer", "byte"]
    command += ["--n-layer", "6", "--n-head", "4", "--n-embd", "256", "--block-size", "256"]
    command += ["--batch-size", "8", "--eval-batches", "1", "--max-steps", "2", *flags]
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
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    found = re.search(r"VmHWM:\s+(\d+) kB", real_run.stdout)
    assert found
    real = int(found[1]) * 1024 / 1e6
    assert float(match[1].replace(",", "")) == pytest.approx(real, rel=0.15)
