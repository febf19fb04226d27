"""Every snippet of Python in the README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt import Tensor

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(snippet, names)
    for x in names.values():
        if isinstance(x, Tensor) and x.grad is not None:
            assert np.abs(x.grad).min() > 0.01  # a gradient that is worth looking at


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 1 and "backward()" in SNIPPETS[0]
