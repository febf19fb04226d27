"""A GPU for the tests of whole models: fake_cupy's arrays, with the kernels emulated on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cuda_emulator import Emulator
from gpu_machine import emulated_cupy


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def emulated_gpu(emulator: Emulator) -> Iterator[None]:
    with emulated_cupy(emulator):
        yield
