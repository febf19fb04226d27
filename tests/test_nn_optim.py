"""Modules and the optimizer; test_gpt2.py compares ten of its steps with PyTorch's."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import pytest

from micrograd_gpt import Tensor, nn, optim
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.precision import HALF
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs.loss_scaler import LossScaler


class Net(nn.Module):
    def __init__(self) -> None:
        init = nn.normal(seed=1)
        self.first = nn.Linear(3, 4, init)
        self.blocks = [nn.LayerNorm(4), nn.Dropout(0.5, nn.Draws(2))]
        self.table = nn.Embedding(5, 3, init)

    def __call__(self, ids: np.ndarray) -> Tensor:
        x = self.first(self.table(ids))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(params=["definitions", "numpy", "c"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_most(request.param):
        yield request.param


def test_parameters_are_named_after_where_they_are() -> None:
    net = Net()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert shapes == {
        "first.weight": (3, 4),
        "first.bias": (4,),
        "blocks.0.weight": (4,),
        "blocks.0.bias": (4,),
        "table.weight": (5, 3),
    }
    assert [p.shape for p in net.parameters()] == list(shapes.values())


def test_a_shared_parameter_counts_once() -> None:
    net = Net()
    net.again = net.first
    net.head = nn.Embedding(5, 3, nn.normal(0))
    net.head.weight = net.table.weight
    assert len(net.parameters()) == 5
    assert len({id(p) for p in net.parameters()}) == 5


def test_a_parameter_that_stands_in_several_places_comes_once_under_its_first_name() -> None:
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    net.blocks[0].weight = net.first.weight
    tied = dict(net.named_parameters())
    assert list(tied) == [name for name in names if name != "blocks.0.weight"]
    assert len(net.parameters()) == len(names) - 1


def test_train_and_eval_reach_every_part() -> None:
    net = Net()
    ids = np.array([0, 1, 2])
    assert net.training and (net(ids).data == 0).any()
    assert net.eval() is net and not net.blocks[1].training
    assert (net(ids).data != 0).all()
    assert net.train().blocks[1].training


def test_parameters_are_moved_in_place() -> None:
    net = Net()
    parameter = net.first.weight
    parameter.grad = np.ones_like(parameter.data)
    move(net, "cpu")
    assert net.first.weight is parameter and parameter.grad is not None


def test_adamw_decays_matrices_only_and_skips_what_has_no_gradient(level: str) -> None:
    matrix, vector, idle = (nn.Parameter(np.ones(s, np.float32)) for s in ((2, 2), (2,), (2, 2)))
    optimizer = optim.AdamW([matrix, vector, idle], lr=0.5, weight_decay=0.1)
    matrix.grad, vector.grad = np.zeros((2, 2), np.float32), np.zeros(2, np.float32)
    optimizer.step()
    np.testing.assert_allclose(matrix.data, 0.95)  # 1 - lr * decay; the gradient is 0
    assert (vector.data == 1).all() and (idle.data == 1).all() and optimizer.steps == 1
    optimizer.zero_grad()
    assert matrix.grad is None and vector.grad is None
    optimizer.step()
    np.testing.assert_allclose(matrix.data, 0.95)


def test_the_first_step_of_adam_has_the_size_of_the_learning_rate(level: str) -> None:
    p = nn.Parameter(np.zeros((2, 2)))
    p.grad = np.array([[1e-3, -1e3], [5.0, -7.0]])
    optim.AdamW([p], lr=0.01, weight_decay=0).step()
    np.testing.assert_allclose(p.data, -0.01 * np.sign(p.grad), rtol=1e-4)


def test_clip_grad_norm(level: str) -> None:
    a, b, c = (nn.Parameter(np.zeros(2)) for _ in range(3))
    a.grad, b.grad = np.array([3.0, 0.0]), np.array([0.0, 4.0])
    assert optim.clip_grad_norm([a, b, c], 10.0) == 5
    np.testing.assert_array_equal(a.grad, [3, 0])
    assert optim.clip_grad_norm([a, b, c], 1.0) == 5
    np.testing.assert_allclose(np.hypot(a.grad, b.grad), [0.6, 0.8])
    assert optim.clip_grad_norm([c], 1.0) == 0
    for bad in (np.nan, np.inf):
        a.grad = np.array([bad, 1.0])
        assert not math.isfinite(optim.clip_grad_norm([a, b], 1.0, loss_scale=2.0))
        assert b.grad[1] == pytest.approx(0.8) and a.grad[1] == 1


def test_cosine_schedule() -> None:
    rates = [optim.cosine_schedule(step, 100, 10, 1.0, 0.1) for step in range(120)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1 and rates[55] == pytest.approx(0.55)
    assert rates[100:] == [pytest.approx(0.1)] * 20
    assert all(a > b for a, b in itertools.pairwise(rates[10:101]))
    assert optim.cosine_schedule(0, 1, 0, 1.0, 0.1) == 1


def test_clip_grad_norm_undoes_the_loss_scale_first(level: str) -> None:
    a, b = (nn.Parameter(np.zeros(2)) for _ in range(2))
    a.grad, b.grad = np.array([3.0, 0.0]) * 1024, np.array([0.0, 4.0]) * 1024
    assert optim.clip_grad_norm([a, b], 10.0, loss_scale=1024) == 5
    np.testing.assert_array_equal([a.grad, b.grad], [[3, 0], [0, 4]])
    a.grad, b.grad = a.grad * 1024, b.grad * 1024
    assert optim.clip_grad_norm([a, b], 1.0, loss_scale=1024) == 5
    np.testing.assert_allclose([a.grad, b.grad], [[0.6, 0], [0, 0.8]])


def test_loss_scale_halves_at_an_overflow_and_doubles_after_enough_good_steps() -> None:
    scaler = LossScaler(growth_interval=3)
    norms = [1.0, math.inf, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, math.inf, 2.0]
    taken = [scaler.update(norm) for norm in norms]
    assert taken == [math.isfinite(norm) for norm in norms]
    assert scaler == LossScaler(True, 16384.0, 3, good_steps=1, skipped_steps=3)


def test_a_loss_scale_that_collapses_says_so() -> None:
    scaler = LossScaler(scale=2.0)
    assert not scaler.update(math.nan) and scaler.scale == 1
    with pytest.raises(FloatingPointError, match="overflow float16 even at a loss scale of 1: try"):
        scaler.update(math.nan)


def test_a_loss_scaler_that_is_not_enabled_lets_every_step_pass() -> None:
    scaler = LossScaler(enabled=False)
    unread = object()  # on a GPU, reading the norm would mean waiting for it
    assert scaler.scale == 1 and scaler.update(unread) and scaler.update(math.nan)
    assert scaler.scale == 1 and scaler.skipped_steps == 0


@pytest.mark.parametrize("half", HALF)
def test_parameters_of_16_bits_are_not_trained(half: str) -> None:
    wide, narrow = nn.Parameter(np.ones(2, np.float32)), nn.Parameter(np.ones(2, np.float32))
    narrow.data = narrow.data.astype(half)
    with pytest.raises(ValueError, match=f"parameters of {half} cannot be trained"):
        optim.AdamW([wide, narrow])


def test_adamw_follows_its_formula(level: str) -> None:
    """Algorithm 2 of Loshchilov & Hutter, one number at a time."""
    rng = np.random.default_rng(0)
    p = nn.Parameter(rng.standard_normal((3, 2)))
    optimizer = optim.AdamW([p], lr=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    theta, m, v = p.data.copy(), np.zeros((3, 2)), np.zeros((3, 2))
    for t in range(1, 6):
        p.grad = rng.standard_normal((3, 2))
        for at in np.ndindex(3, 2):
            g = float(p.grad[at])
            theta[at] -= 0.02 * 0.3 * theta[at]
            m[at] = 0.8 * m[at] + 0.2 * g
            v[at] = 0.9 * v[at] + 0.1 * g * g
            m_hat, v_hat = m[at] / (1 - 0.8**t), v[at] / (1 - 0.9**t)
            theta[at] -= 0.02 * m_hat / (math.sqrt(v_hat) + 1e-3)
        optimizer.step()
        np.testing.assert_allclose(p.data, theta, rtol=1e-12)
    np.testing.assert_allclose([*optimizer.m, *optimizer.v], [m, v], rtol=1e-12)


def test_moments_of_float32_parameters_are_float32_and_updates_in_place(level: str) -> None:
    p = nn.Parameter(np.ones((2, 2), np.float32))
    data, optimizer = p.data, optim.AdamW([p])
    p.grad = np.ones((2, 2), np.float32)
    assert optim.clip_grad_norm([p], 1.0) == 2
    optimizer.step()
    assert p.data is data and data.dtype == p.grad.dtype == np.float32 and (data != 1).all()
    assert optimizer.m[0].dtype == optimizer.v[0].dtype == np.float32


def test_draws_are_named_after_their_seed_and_number() -> None:
    draws = nn.Draws(7)
    assert [draws.next_key() for _ in range(3)] == [(7, 1), (7, 2), (7, 3)]
    draws.reseed(7, 5)
    assert draws.next_key() == (7, 5, 1)
    draws.reseed(7)
    assert draws.next_key() == (7, 1)


def test_a_gradient_that_numpy_made_a_number_of_is_clipped(level: str) -> None:
    p = nn.Parameter(np.float32(1))
    (p * 30).backward()
    p.grad = p.grad / 2  # of an array without axes
    assert optim.clip_grad_norm([p], 1.0) == 15 and p.grad == 1


def test_clipping_at_infinity_only_measures(level: str) -> None:
    for max_norm, values in ((np.inf, [3.0, 4.0]), (1.0, [0.0, 0.0])):
        p = nn.Parameter(np.zeros(2, np.float32))
        p.grad = np.array(values, np.float32)
        assert optim.clip_grad_norm([p], max_norm) == np.hypot(*values)
        np.testing.assert_array_equal(p.grad, values)


def test_parameters_that_can_be_gone_through_only_once_are_clipped(level: str) -> None:
    p = nn.Parameter(np.zeros(2))
    p.grad = np.array([300.0, 400.0])
    assert optim.clip_grad_norm((q for q in [p]), 1.0) == pytest.approx(500)
    np.testing.assert_allclose(p.grad, [0.6, 0.8])


def test_moments_of_another_size_are_refused_before_anything_is_written(level: str) -> None:
    p = nn.Parameter(np.zeros(4, np.float32))
    optimizer = optim.AdamW([p])
    p.data, p.grad = np.zeros(5000, np.float32), np.ones(5000, np.float32)
    with pytest.raises(ValueError):
        optimizer.step()


def test_a_list_of_something_else_is_no_part_of_a_module() -> None:
    net = Net()
    net.sizes = [3, 4]
    assert [name for name, _ in net.named_parameters()] == [
        name for name, _ in Net().named_parameters()
    ]


def test_a_parameter_whose_first_gradient_comes_late_starts_afresh(level: str) -> None:
    """As when layers are unfrozen: its bias correction counts its own steps."""
    early, late, alone = (nn.Parameter(np.ones((2, 2), np.float32)) for _ in range(3))
    optimizer, other = optim.AdamW([early, late], lr=0.01), optim.AdamW([alone], lr=0.01)
    for step in range(30):
        early.grad = np.ones((2, 2), np.float32)
        if step >= 25:
            late.grad = alone.grad = np.full((2, 2), 0.5, np.float32)
            other.step()
        optimizer.step()
    np.testing.assert_array_equal(late.data, alone.data)
    assert optimizer.steps == 30 and optimizer.missed == [0, 25]


def read_only(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


MISFITS = {
    "a larger array": (lambda p: setattr(p, "data", np.ones((8, 3), np.float32)), r"\(8, 3\)"),
    "a smaller array": (lambda p: setattr(p, "data", np.ones((1, 3), np.float32)), r"\(1, 3\)"),
    "a longer gradient": (
        lambda p: setattr(p, "grad", np.ones((9, 3), np.float32)),
        r"has the shape \(4, 3\), but its gradient \(9, 3\)",
    ),
    "a new size": (
        lambda p: [setattr(p, name, np.ones((8, 3), np.float32)) for name in ("data", "grad")],
        r"has the shape \(8, 3\), but its moments \(4, 3\) .*: .*, make a new AdamW",
    ),
    "a gradient to broadcast": (lambda p: setattr(p, "grad", np.ones(3, np.float32)), r"\(3,\)"),
    "an immutable buffer": (lambda p: setattr(p, "data", read_only(p.data)), "read-only"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_adamw_names_the_parameter_that_does_not_fit_and_changes_none(
    misfit: str, level: str
) -> None:
    first, second = (nn.Parameter(np.ones((4, 3), np.float32)) for _ in range(2))
    optimizer = optim.AdamW([first, second])
    first.grad, second.grad = (np.ones((4, 3), np.float32) for _ in range(2))
    spoil, message = MISFITS[misfit]
    spoil(second)
    before = second.data.copy()
    with pytest.raises(ValueError, match=f"parameter 1.*{message}"):
        optimizer.step()
    assert (first.data == 1).all() and (second.data == before).all()
    assert optimizer.steps == 0 and not optimizer.m[0].any()


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_the_norm_of_huge_and_tiny_gradients_is_finite_and_right(size: float, level: str) -> None:
    p = nn.Parameter(np.zeros((3, 4), np.float32))
    p.grad = np.full((3, 4), size, np.float32)
    assert optim.clip_grad_norm([p], size) == pytest.approx(size * math.sqrt(12), rel=1e-5)
    np.testing.assert_allclose(p.grad, size / math.sqrt(12), rtol=1e-5)


def test_a_dropout_of_ones_own_that_asks_for_training_is_off_while_decoding() -> None:
    part = nn.Dropout(0.5, nn.Draws(1))
    assert part.training
    with nn.no_dropout():
        assert not part.training
    assert part.training and not part.eval().training and part.train().training


def test_steps_set_by_hand_count_for_every_parameter() -> None:
    p = nn.Parameter(np.zeros((2, 2), np.float32))
    optimizer = optim.AdamW([p], lr=0.1, weight_decay=0)
    optimizer.steps = 1000  # as a program of one's own resumes
    p.grad = np.ones((2, 2), np.float32)
    optimizer.step()
    expected = 0.1 * (0.1 / (1 - 0.9**1001)) / math.sqrt(0.05 / (1 - 0.95**1001))
    np.testing.assert_allclose(p.data, -expected, rtol=1e-5)


# ------------------------------------------------------------------ what a newcomer tries first


class Deep(nn.Module):
    """Layers and parameters in every container that Python offers for them."""

    def __init__(self) -> None:
        linear = partial(nn.Linear, 2, 2)
        self.listed, self.paired, self.named = [linear()], (linear(), linear()), {"a": linear()}
        self.nested = {"b": [(linear(),)]}
        self.scales = [nn.Parameter(np.ones(3, np.float32))]
        self.shared = self.paired[0]


def test_layers_are_found_in_lists_tuples_and_dicts() -> None:
    model = Deep()
    names = [name for name, _ in model.named_parameters() if not name.endswith(".bias")]
    layers = ("listed.0", "paired.0", "paired.1", "named.a", "nested.b.0.0")
    assert names == [*(f"{name}.weight" for name in layers), "scales.0"]
    assert len(model.parameters()) == 5 * 2 + 1
    assert not model.eval().paired[1].training and model.train().nested["b"][0][0].training


def test_an_optimizer_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters to train"):
        optim.AdamW([])


def test_layers_need_no_init() -> None:
    """Each draws weights of its own, as GPT-2 does."""
    a, b, table = nn.Linear(40, 50), nn.Linear(40, 50), nn.Embedding(40, 50)
    assert (a.weight.data != b.weight.data).mean() > 0.9
    for layer in (a, b, table):
        assert layer.weight.data.std() == pytest.approx(0.02, rel=0.1)
    assert a(Tensor(np.ones((3, 40), np.float32))).shape == (3, 50)


def test_a_model_prints_its_modules_and_parameter_counts() -> None:
    lines = repr(Deep()).splitlines()
    assert lines[0].split() == ["Deep", "33", "parameters"]
    assert lines[1].split() == ["listed.0:", "Linear", "6", "parameters"]
    assert [line.split()[0] for line in lines[2:6]] == [
        *("paired.0:", "paired.1:", "named.a:", "nested.b.0.0:")
    ]
    model = GPT2(GPT2Config(n_layer=2, n_head=1, n_embd=4, vocab_size=5, n_positions=8))
    text = str(model)
    count = sum(p.size for p in model.parameters())
    assert f"{count:,} parameters" in text.splitlines()[0]
    assert "    h.1: Block" in text and "        c_fc: Linear" in text


WEIGHT = nn.Parameter(np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "lr must be a finite number from 0, not -1"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": "0.1"}, "lr must be"),
        ({"betas": (1, 1)}, r"betas must be two numbers in \[0, 1\), not \(1, 1\)"),
        ({"betas": 0.9}, "betas must be"),
        ({"betas": (0.9,)}, "betas must be"),
        ({"betas": (math.nan, 0.9)}, "betas must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
    ],
)
def test_numbers_adamw_cannot_use(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW([WEIGHT], **settings)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([np.ones(3, np.float32)], "as model.parameters.. is, not a list of ndarray"),
        ({"weight": WEIGHT}.items(), "not a list of tuple"),
        ([{"params": [WEIGHT]}], "not a list of dict"),
        (nn.Linear(2, 2), "takes a list of tensors, as .* is, not a single Linear"),
        (None, "not a single NoneType"),
        ([WEIGHT, WEIGHT], "a parameter is there twice"),
        (WEIGHT, "not a single Parameter"),
        ([WEIGHT * 2], "parameter 0 is the result of 'mul', not a leaf"),
        ([Tensor(np.ones(3, np.int64))], "parameters of int64 cannot be trained"),
    ],
)
def test_what_adamw_cannot_train(parameters: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optim.AdamW(parameters)


def test_layers_take_arrays_and_say_what_else_they_do_not_take() -> None:
    x = np.ones((2, 3), np.float32)
    for layer in (nn.Linear(3, 4), nn.LayerNorm(3), nn.Dropout(0.5, nn.Draws(1)).eval()):
        assert (layer(x).data == layer(Tensor(x)).data).all()
        for other in ([[1.0, 2.0, 3.0]], 3, None, "abc"):
            with pytest.raises(TypeError, match="is no tensor or array"):
                layer(other)


@pytest.mark.parametrize(
    "name", ["n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "resid_pdrop"]
)
@pytest.mark.parametrize("value", [-1, "4", None, True, math.nan, 2.5])
def test_a_config_of_odd_numbers_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* not {value!r}"):
        GPT2Config(**{name: value})


def test_a_config_takes_numpys_numbers() -> None:
    config = GPT2Config(n_layer=np.int64(1), n_head=1, n_embd=4, attn_pdrop=np.float32(0.5))  # type: ignore[arg-type]
    assert GPT2(config).config.n_layer == 1
    for name in ("n_layer", "n_embd", "vocab_size"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not 0"):
            GPT2Config(**{name: 0})


def test_a_module_may_define_forward() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor, times: int = 2) -> Tensor:
            return x * times

    assert Doubled()(Tensor([1.0])).item() == 2 and Doubled()(Tensor([1.0]), times=3).item() == 3


def test_layers_take_numpys_numbers() -> None:
    assert nn.Linear(np.int64(2), np.int32(3)).weight.shape == (2, 3)
    assert nn.Embedding(np.int64(2), 0).weight.shape == (2, 0)
    assert nn.Dropout(np.float32(0.5))(Tensor(np.ones(100))).data.any()


def test_dropout_needs_no_draws() -> None:
    part = nn.Dropout(0.5)
    ones = Tensor(np.ones(100, np.float32))
    assert sorted(set(part(ones).data.tolist())) == [0, 2]
    assert (part(ones).data != part(ones).data).any()


def test_what_gradients_cannot_be_clipped_by(level: str) -> None:
    layer = nn.Linear(2, 2)
    layer(np.ones((1, 2), np.float32)).sum().backward()
    before = layer.weight.grad.copy()
    for norm in (-1.0, math.nan, None, "1"):
        with pytest.raises(ValueError, match=f"max_norm must be a number from 0, not {norm!r}"):
            optim.clip_grad_norm(layer.parameters(), norm)  # type: ignore[arg-type]
    pairs = [*layer.named_parameters()]
    for parameters in (layer, layer.weight, layer.named_parameters(), pairs, dict(pairs)):
        with pytest.raises(TypeError, match=r"takes a list of tensors, .* not a (single|list of)"):
            optim.clip_grad_norm(parameters, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a parameter is there twice"):
        optim.clip_grad_norm([layer.weight, layer.bias, layer.weight], 0.1)
    np.testing.assert_array_equal(layer.weight.grad, before)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -0.1), ("lr", math.nan), ("lr", None), ("betas", 0.9)]
)
def test_numbers_set_between_steps_are_looked_at_too(name: str, value: Any) -> None:
    p = nn.Parameter(np.ones((2, 2), np.float32))
    optimizer = optim.AdamW([p], lr=np.float32(0.1))  # type: ignore[arg-type]
    p.grad = np.ones((2, 2), np.float32)
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=f"AdamW: {name} must be .*, not {value!r}"):
        optimizer.step()
    assert (p.data == 1).all() and optimizer.steps == 0


def test_numbers_may_be_numpys_and_arrays_of_one(level: str) -> None:
    weights, norms = [], []
    for kind in (float, np.float32, np.float64, np.array):
        p = nn.Parameter(np.ones((2, 2), np.float32))
        optimizer = optim.AdamW([p], 0.5, (kind(0.5), kind(0.25)), eps=kind(0.125))  # type: ignore[arg-type]
        p.grad = np.full((2, 2), 2, np.float32)
        norms.append(optim.clip_grad_norm([p], kind(1.0)))  # type: ignore[arg-type]
        optimizer.lr, optimizer.weight_decay = kind(0.25), kind(0.5)  # type: ignore[assignment]
        optimizer.step()
        weights.append(p.data.tolist())
    assert norms == [4] * 4 and weights == [weights[0]] * 4
    with pytest.raises(ValueError, match="lr must be a finite number"):
        optim.AdamW([p], np.array([0.1]))  # type: ignore[arg-type]


def test_an_optimizer_has_room_for_what_a_schedule_keeps_in_it() -> None:
    optimizer = optim.AdamW([nn.Parameter(np.ones(2, np.float32))], lr=0.5)
    optimizer.initial_lr = 0.5  # type: ignore[attr-defined]
    steps, plain = [], optimizer.step
    optimizer.step = lambda: (steps.append(1), plain())  # type: ignore[method-assign,assignment]
    optimizer.step()
    assert weakref.ref(optimizer)() is optimizer and vars(optimizer)["initial_lr"] == 0.5
    assert steps == [1] and optimizer.steps == 1


def test_a_gradient_of_0_is_no_array(level: str) -> None:
    """backward() starts a gradient of 0 anew; of a parameter that took no part it stays."""
    used, unused = (nn.Parameter(np.ones(2, np.float32)) for _ in range(2))
    used.grad = unused.grad = 0
    (used * 2).sum().backward()
    message = "the gradient of parameter 1 is 0, not an array: to forget it, set None"
    with pytest.raises(TypeError, match=f"clip_grad_norm: {message}"):
        optim.clip_grad_norm([used, unused], 1.0)
    optimizer = optim.AdamW([used, unused], lr=0.1)
    with pytest.raises(TypeError, match=f"AdamW: {message}"):
        optimizer.step()
    unused.grad = None
    optimizer.step()
    assert (used.data < 1).all() and (unused.data == 1).all()


def test_an_input_that_a_module_keeps_is_no_parameter() -> None:
    """Its gradient may be wanted, for saliency say, but AdamW must not change it."""
    layer = nn.Linear(2, 2)
    layer.probe = Tensor(np.ones((1, 2)), requires_grad=True)  # type: ignore[attr-defined]
    layer.seen = layer(layer.probe)  # type: ignore[attr-defined]
    layer.seen.sum().backward()  # type: ignore[attr-defined]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.probe.grad.shape == (1, 2)  # type: ignore[attr-defined]


def test_a_module_that_keeps_its_last_result_is_copied() -> None:
    layer = nn.Linear(2, 2)
    layer.seen = layer(np.ones((1, 2), np.float32))  # type: ignore[attr-defined]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(twin.seen.data, layer.seen.data)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="the tape at 'copy of "):
            twin.seen.sum().backward()
        twin(np.ones((1, 2), np.float32)).sum().backward()
        assert twin.weight.grad.shape == (2, 2) and layer.weight.grad is None
    layer.seen.sum().backward()  # type: ignore[attr-defined]
    assert layer.weight.grad.shape == (2, 2)


def test_a_part_may_refer_to_what_it_is_in() -> None:
    model = Net()
    model.first.parent = model  # type: ignore[attr-defined]
    model.blocks[0].itself = model.blocks[0]  # type: ignore[attr-defined]
    plain = Net()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.modules()] == [n for n, _ in plain.modules()]
    assert "blocks.1: Dropout" in repr(model) and not model.eval().blocks[1].training


T = TypeVar("T")


class Doubled:
    def forward(self, x: Any) -> Any:
        return x * 2


@pytest.mark.parametrize(
    ("layer", "called"),
    [(nn.Linear, "Linear"), (GPT2, "GPT2"), (type("Own", (nn.Linear,), {}), "Linear")],
)
def test_a_forward_that_nobody_would_call_is_refused(layer: type, called: str) -> None:
    """A layer made of one of nn.py's or gpt2.py's is called by their __call__."""
    message = f"Mine has a forward, which nobody would call: {called} has a __call__, so name it"
    for bases, body in (((layer,), vars(Doubled)), ((Doubled, layer), {})):
        with pytest.raises(TypeError, match=message):
            type("Mine", bases, {name: body[name] for name in body if name == "forward"})


def test_a_class_of_ones_own_calls_forward_as_it_likes() -> None:
    class Base(nn.Module):
        def __call__(self, x: Any) -> Any:
            return self.forward(x) + x

    class Ten(Base):
        def forward(self, x: Any) -> Any:
            return x * 10

    class Twice(nn.Linear):
        def __call__(self, x: Any) -> Tensor:
            return self.forward(x)

        def forward(self, x: Any) -> Tensor:
            return super().__call__(x) * 2

    class Mixed(Doubled, nn.Module, Generic[T]): ...

    assert Ten()(3) == 33 and Mixed()(3) == Mixed[int]()(3) == 6
    x = np.ones((1, 2), np.float32)
    twice, plain = (layer(2, 2, nn.normal(0)) for layer in (Twice, nn.Linear))
    np.testing.assert_array_equal(twice(x).data, plain(x).data * 2)


def test_names_of_draws_are_whole_numbers() -> None:
    for seed in (None, "a", 1.5):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            nn.Draws(seed)  # type: ignore[arg-type]
    assert nn.Draws(np.int64(3), 4).next_key() == (3, 4, 1)


@pytest.mark.slow
def test_layers_made_without_an_init_do_not_share_their_numbers() -> None:
    code = (
        "from micrograd_gpt import nn, gpt2\n"
        "model = gpt2.GPT2(gpt2.GPT2Config(1, 1, 8, 4, 4))\n"
        "parts = nn.Embedding(20, 10), nn.Linear(10, 20), model.transformer.wte\n"
        "firsts = {float(part.weight.data[0, 0]) for part in parts}\n"
        "assert len(firsts) == 3, firsts\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
