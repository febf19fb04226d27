"""A training run for the tests: the script, a model of a few parameters, what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from micrograd_gpt.tensor_files import TensorFile

SCRIPT = Path(__file__).parents[1] / "train_gpt2.py"
SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8"),
    *("--batch-size", "4", "--warmup-steps", "2", "--eval-batches", "2", "--log-interval", "1"),
    *("--sample-interval", "1000"),
]


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    file = TensorFile(folder / "model.safetensors")
    return {name: file.read(name) for name in file.shapes}


def everything(folder: Path) -> dict[str, np.ndarray]:
    """Weights and moments."""
    moments = TensorFile(folder / "optimizer.safetensors")
    return weights(folder) | {name: moments.read(name) for name in moments.shapes}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = everything(a), everything(b)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
