"""Filling arrays from a file: both ways the same names and shapes, on any device, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.loading import fill
from micrograd_gpt.weights.reading import FLOATS
from micrograd_gpt.weights.tensor_files import TensorFile, write_safetensors

RNG = np.random.default_rng(0)
STORED = {name: RNG.standard_normal((3, 4)).astype("f4") for name in ("a", "b", "c")}


@pytest.fixture
def file(tmp_path: Path) -> TensorFile:
    write_safetensors(tmp_path / "x.safetensors", STORED)
    return TensorFile(tmp_path / "x.safetensors")


def empty(*names: str, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shapes.get(name, (3, 4)), "f4") for name in (*names, *shapes)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (empty("a", "b", "c", "d"), "lacks 'd'$"),
        (empty("a", "b", "c", "d", "e"), "lacks 'd' and 1 more$"),
        (empty("a", "b"), "has a tensor that the model does not have: 'c'$"),
        (empty(), "has a tensor that the model does not have: 'a' and 2 more$"),
        (empty("a", "c", b=(4, 3)), r"b has shape \(3, 4\), the model needs \(4, 3\)$"),
    ],
)
def test_names_and_shapes_must_be_the_same(
    file: TensorFile, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fill(arrays, file.entries, file.path)
    assert str(file.path) in str(caught.value) and "\n" not in str(caught.value)
    assert not any(array.any() for array in arrays.values())  # nothing was read before


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_dtype_and_order(file: TensorFile, order: Any, dtype: str) -> None:
    arrays = {name: np.zeros((3, 4), FLOATS[dtype], order) for name in STORED}
    fill(arrays, file.entries, file.path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, STORED[name].astype(FLOATS[dtype]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_on_a_gpu(file: TensorFile, order: Any, dtype: str) -> None:
    with fake_cupy.installed() as cupy:
        arrays = {n: cupy.asarray(np.zeros((3, 4), FLOATS[dtype], order)) for n in STORED}
        fill(arrays, file.entries, file.path)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array.get(), STORED[name].astype(FLOATS[dtype]))


def test_numbers_that_are_not_finite_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = {"nan": np.array([1, np.nan]), "large": np.array([1e300, 1]), "fine": np.zeros(2)}
    write_safetensors(tmp_path / "x.safetensors", stored)
    file = TensorFile(tmp_path / "x.safetensors")
    too_large = ", or numbers too large for float32"
    for dtype, named, more in (("f8", ["nan"], ""), ("f4", ["nan", "large"], too_large)):
        fill({name: np.zeros(2, dtype) for name in stored}, file.entries, file.path)
        assert capsys.readouterr().err.splitlines() == [
            f"warning: {file.path}: {name} holds NaN or infinity{more}" for name in named
        ]
