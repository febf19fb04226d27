"""A run that is killed again and again ends with the weights of a run that never was.

`pytest tests/scripts/test_torture.py --kills 30` takes half a minute; the default is three kills.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.metrics import Metrics
from micrograd_gpt.weights.tensor_files import TensorFile

SCRIPT = Path(__file__).parents[2] / "train_gpt2.py"


def state(folder: Path) -> dict[str, object]:
    """Weights, moments, losses, and which step was the best."""
    arrays: dict[str, object] = {}
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        for part in (folder, folder / "best"):
            file = TensorFile(part / name)
            arrays |= {f"{part.name}: {n}": file.read(n).tobytes() for n in file.shapes}
    rows = [(r["step"], r["train_loss"], r.get("val_loss")) for r in Metrics(folder, 1).rows()]
    best = json.loads((folder / "best" / checkpoint.STATE).read_text())
    arrays = {name.replace(f"{folder.name}: ", ""): value for name, value in arrays.items()}
    return arrays | {"rows": rows, "best": (best["step"], best["val_loss"])}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_killed_at_random_moments(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kills = request.config.getoption("--kills")
    rng = random.Random(request.config.getoption("--kill-seed"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    flags = ["--data", text, "--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--block-size", 8]
    flags += ["--batch-size", 4, "--dropout", 0.1, "--grad-accum-steps", 2, "--keep", 2]
    flags += ["--max-steps", 12 * kills, "--eval-interval", 3, "--eval-batches", 2]
    flags += ["--log-interval", 1, "--save-interval", 2, "--sample-interval", 10_000]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *map(str, flags), "--out"]
    subprocess.run([*command, str(straight)], capture_output=True, check=True)

    def saving() -> dict[str, int]:
        """Where a set is being written, moved or removed, if one is; and which folder that is."""
        places = (".saving", ".saved", ".removing", "best/.saving", "best/.saved")
        found = {}
        for place in places:
            with suppress(FileNotFoundError):
                found[place] = (killed / place).stat().st_ino
        return found

    def logged() -> int:
        log = killed / "metrics.jsonl"
        return log.stat().st_size if log.exists() else 0

    moments = []
    for life in range(kills + 1):
        is_run = killed.exists() and checkpoint.holds_run(killed)
        start = [sys.executable, str(SCRIPT), "--resume", "--out"] if is_run else command
        before, left = logged(), saving()
        with subprocess.Popen(
            [*start, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            if life < kills:
                # A random moment of training, or, every other time, of a save.
                while process.poll() is None and (
                    saving() == left if life % 2 else logged() <= before
                ):
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.01 if life % 2 else 0.1))
                process.kill()
            _, errors = process.communicate(timeout=900)
        expected = (-signal.SIGKILL, 0) if life < kills else (0,)
        assert process.returncode in expected or "is complete at step" in errors, errors
        moments.append(" ".join(saving()) or "between saves")
    print(f"killed: {dict(Counter(moments[:-1]))}")
    ours, theirs = state(killed), state(straight)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value == theirs[name], name
    assert np.isfinite(theirs["best"][1])
