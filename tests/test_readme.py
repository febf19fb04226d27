"""The README: every snippet of Python runs as it stands there, every link leads to a file, and the
pictures are small."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt import Tensor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
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


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^):#]+)[^):]*\)", README)
    assert len(links) > 50
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", ["loss", "attention", "microscope"])
def test_a_picture_is_small(name: str) -> None:
    picture = ROOT / "docs" / "pictures" / f"{name}.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size < 300_000
