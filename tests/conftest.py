"""Options, fixtures and skips that all tests share."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from training import script

from micrograd_gpt.arrays.devices import library_for
from micrograd_gpt.runs.signals import STOPPING
from micrograd_gpt.support.errors import UserError

# A busy machine makes no test fail
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often test_torture.py kills its run, and when."""
    parser.addoption("--kills", type=int, default=3, help="how often to kill the run (3)")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of the random moments (0)")


def pytest_configure(config: pytest.Config) -> None:
    """Heed Ctrl-C, here and in the processes that tests start, however pytest was started: a shell
    has programs in the background ignore it, and they pass that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow_cases(items)
    skip_without_a_gpu(items)


def mark_slow_cases(items: list[pytest.Item]) -> None:
    """Of a test marked slow_after(n), all cases but the first n are slow; a GPU is quick."""
    cases = Counter[tuple[Path, str]]()
    for item in items:
        if (marker := item.get_closest_marker("slow_after")) and not item.get_closest_marker("gpu"):
            test = item.path, item.name.split("[")[0]
            cases[test] += 1
            if cases[test] > marker.args[0]:
                item.add_marker(pytest.mark.slow)


def skip_without_a_gpu(items: list[pytest.Item]) -> None:
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
    handlers = {s: signal.getsignal(s) for s in STOPPING}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
