"""A safetensors file of any Module's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_cupy
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from micrograd_gpt import Tensor, nn
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.int8 import hold_in_int8
from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.parameters import load_parameters, save_parameters


class Net(nn.Module):
    """Layers in Fortran order, in lists, a scalar, and other dtypes."""

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        init = nn.normal(seed)
        self.a, self.layers = nn.Linear(4, width, init), [nn.Linear(width, 2, init)]
        self.scale = nn.Parameter(np.float32(seed))
        self.wide = nn.Parameter(np.full((2, 3), seed + 1 / 3))
        self.narrow = nn.Parameter(np.full((3, 2), seed + 0.1, ml_dtypes.bfloat16))
        self.shown = nn.Parameter(np.broadcast_to(np.float32(seed), (2, 2)))  # is read-only

    def forward(self, x: Any) -> Tensor:
        return self.layers[0](self.a(x).relu()) * self.scale


def state(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in net.named_parameters()}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() and {"a.weight", "layers.0.bias", "scale"} <= a.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    net, again, path = Net(3), Net(4), tmp_path / "new" / "net.safetensors"
    save_parameters(net, path)
    load_parameters(again, path)
    assert_equal(state(again), state(net))
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(again(x).numpy(), net(x).numpy())
    assert_equal(safetensors.numpy.load_file(path), state(net))  # as others read it
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_arrays_that_a_parameter_was_made_of_stay_as_they_are(tmp_path: Path) -> None:
    mine = np.zeros(3, np.float32)
    net = nn.LayerNorm(3)
    save_parameters(net, tmp_path / "net.safetensors")
    net.weight = nn.Parameter(mine)
    load_parameters(net, str(tmp_path / "net.safetensors"))
    assert net.weight.numpy().tolist() == [1, 1, 1] and mine.tolist() == [0, 0, 0]
    (net(np.ones((2, 3), np.float32)).sum()).backward()
    assert net.weight.grad is not None


def test_from_one_device_to_the_other(tmp_path: Path) -> None:
    net, path = Net(3), tmp_path / "net.safetensors"
    with fake_cupy.installed():
        for saved_on, loaded_on in (("cpu", "gpu"), ("gpu", "cpu")):
            again = Net(4)
            move(net, saved_on)
            move(again, loaded_on)
            save_parameters(net, path)
            load_parameters(again, path)
            assert again.a.weight.device == loaded_on
            move(again, "cpu")
            move(net, "cpu")
            assert_equal(state(again), state(net))


class Other(Net):
    def __init__(self, **changes: Any) -> None:
        super().__init__(7)
        for name, value in changes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Other(extra=nn.LayerNorm(3)), "lacks 'extra.bias' and 1 more$"),
        (Other(a=None), "has a tensor that the model does not have: 'a.bias' and 1 more$"),
        (Net(7, width=9), r": a\.weight has shape \(4, 8\), the model needs \(4, 9\)$"),
        (
            Other(scale=nn.Parameter(np.float64(1))),
            ": scale holds float32, the model needs float64$",
        ),
    ],
)
def test_another_module_is_named_and_stays_as_it_is(
    other: nn.Module, message: str, tmp_path: Path
) -> None:
    save_parameters(Net(3), path := tmp_path / "net.safetensors")
    before = state(other)
    with pytest.raises(UserError, match=message) as caught:
        load_parameters(other, path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    after = state(other)
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_none_of_it(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as caught:
        load_parameters(Net(), path)
    assert "\n" not in str(caught.value)


def test_a_module_without_parameters_is_not_saved(tmp_path: Path) -> None:
    """As one with a plain Tensor, or layers in a set, seems to have some."""
    net = nn.Dropout(0.5)
    net.weight = Tensor([1.0])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Dropout has no parameters to save"):
        save_parameters(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_module_in_int8_is_not_saved_without_its_scales(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    hold_in_int8("weight", net.weight)
    with pytest.raises(UserError, match="a model in int8 cannot be saved: load it in float32"):
        save_parameters(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_two_parameters_of_one_name_are_not_saved_as_one(tmp_path: Path) -> None:
    net = nn.Module()
    net.parts = {"a.b": nn.Linear(2, 2), "a": {"b": nn.Linear(2, 2)}}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"two parameters are called parts\.a\.b\.weight"):
        save_parameters(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_no_parameter_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say_once.cache_clear()
    net = Net()
    net.layers[0].bias = Tensor([1.0, 2.0])  # type: ignore[assignment]
    for _ in range(2):
        save_parameters(net, tmp_path / "net.safetensors")
    said = capsys.readouterr().err
    assert said.startswith("note: 'layers.0.bias': a plain Tensor is not saved; to keep it, make")
    assert said.count("\n") == 1
    load_parameters(net, tmp_path / "net.safetensors")


def test_what_was_there_before_stays_where_it_cannot_be_written(tmp_path: Path) -> None:
    save_parameters(Net(3), path := tmp_path / "net.safetensors")
    before, bad = path.read_bytes(), Net(3)
    bad.scale.data = np.array(1.0, np.float128 if hasattr(np, "float128") else np.complex64)
    with pytest.raises(UserError, match=r"scale is .*, which safetensors cannot store"):
        save_parameters(bad, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
