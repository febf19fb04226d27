"""Training runs for the tests: the script, flags for a tiny model, and the files of a run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from micrograd_gpt.weights.tensor_files import TensorFile

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_gpt2.py"
SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8"),
    *("--batch-size", "4", "--warmup-steps", "2", "--eval-batches", "1", "--log-interval", "1"),
    *("--sample-interval", "1000"),
]


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def script(name: str) -> ModuleType:
    """One of the scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_this_process(
    train_gpt2: ModuleType, text: Path, folder: Path, settings: Sequence[str]
) -> Callable[..., Path]:
    """Returns train(out, *flags, resume=False), which trains here and returns the run's folder."""

    def train(out: str, *flags: str, resume: bool = False) -> Path:
        start = ["--resume"] if resume else ["--data", str(text), *settings]
        train_gpt2.main([*start, "--out", str(folder / out), *flags])
        return folder / out

    return train


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    file = TensorFile(folder / "model.safetensors")
    return {name: file.read(name) for name in file.shapes}


def everything(folder: Path) -> dict[str, np.ndarray]:
    """A run's weights and the optimizer's moments, by name."""
    moments = TensorFile(folder / "optimizer.safetensors")
    return weights(folder) | {name: moments.read(name) for name in moments.shapes}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = everything(a), everything(b)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
