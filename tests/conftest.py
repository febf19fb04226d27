"""Options, fixtures and skips that all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from training import script

from micrograd_gpt.arrays.devices import library_for
from micrograd_gpt.support.errors import UserError


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often test_torture.py kills its run, and when."""
    parser.addoption("--kills", type=int, default=3, help="how often to kill the run (3)")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of the random moments (0)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, with the reason, where there is no GPU to run them on."""
    try:
        library_for("gpu")
    except UserError as problem:
        reason = pytest.mark.skip(reason=f"no GPU here: {problem}")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(reason)


@pytest.fixture(scope="session")
def train_gpt2() -> ModuleType:
    """The training script as a module."""
    return script("train_gpt2")


@pytest.fixture(scope="session")
def finetune_gpt2() -> ModuleType:
    """The fine-tuning script as a module."""
    return script("finetune_gpt2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of some 2,000 characters to train on."""
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def restore_signals() -> Iterator[None]:
    """Restore the signal handlers that training replaces."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
