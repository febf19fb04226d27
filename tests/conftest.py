"""What all tests share."""

from __future__ import annotations

import pytest

from micrograd_gpt.backend import library_for
from micrograd_gpt.errors import UserError


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long test_torture.py tortures."""
    parser.addoption("--kills", type=int, default=3, help="how often to kill the run (3)")
    parser.addoption("--kill-seed", type=int, default=0, help="of the random moments (0)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, with the reason, where there is no GPU to run them on."""
    try:
        library_for("gpu")
    except UserError as problem:
        reason = pytest.mark.skip(reason=f"no GPU here: {problem}")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)
