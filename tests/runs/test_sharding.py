"""AdamW divided among ranks, as one rank sees it; tests/test_ranks.py has several of them."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt import optim
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.ranks import Cut, Ranks
from micrograd_gpt.runs.sharding import Optimizer, ShardedAdamW, clip_grad_norm
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.tokenizers import CharTokenizer

SHAPES = [(6, 4), (7,), (), (4, 3)]


class Middle(Ranks):
    """The second of three ranks: it has the middle of each array, and the others send nothing."""

    rank, size = 1, 3

    def __init__(self, first: float = 0.0, last: float = 0.0) -> None:
        self.first, self.last = first, last  # the others' numbers

    def cut(self, sizes: Sequence[int]) -> Iterator[Cut]:
        return ((i, [0, size // 3, 2 * size // 3, size]) for i, size in enumerate(sizes))

    def join(self, values: Sequence[Any]) -> Sequence[Any]:
        return [self.first, *values, self.last]


def middle(array: np.ndarray, order: str = "C") -> np.ndarray:
    return array.ravel(order)[array.size // 3 : 2 * array.size // 3]


def parameters(order: str = "C") -> list[Tensor]:
    rng = np.random.default_rng(0)
    made = []
    for shape in SHAPES:
        data = np.array(rng.normal(size=shape), np.float32, order=order)
        made.append(Tensor(data, requires_grad=True))
    return made


def give_gradients(tensors: Sequence[Tensor], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for tensor in tensors:
        order = "C" if tensor.data.flags.c_contiguous else "F"  # as add_up leaves them
        tensor.grad = np.array(rng.normal(size=tensor.shape), np.float32, order=order)


@pytest.mark.parametrize("order", ["C", "F"])
def test_one_rank_takes_the_steps_of_adamw(order: str) -> None:
    ours, theirs = parameters(order), parameters(order)
    sharded = ShardedAdamW(Ranks(), ours, weight_decay=0.5)
    adamw = optim.AdamW(theirs, weight_decay=0.5)
    for step in range(3):
        norms = []
        optimizer: Optimizer
        for optimizer in (sharded, adamw):
            give_gradients(optimizer.parameters, step)
            optimizer.lr = 0.1 / (step + 1)
            norms.append(clip_grad_norm(optimizer, 1.0, loss_scale=3.0))
            optimizer.step()
            optimizer.zero_grad()
        assert norms[0] == norms[1] > 1 and sharded.steps == step + 1
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        assert a.grad is None
    for a, b in zip((*sharded.m, *sharded.v), (*adamw.m, *adamw.v), strict=True):
        np.testing.assert_array_equal(a.get(), b)


def test_a_parameter_without_a_gradient_is_left_alone_and_its_first_step_comes_later() -> None:
    """As AdamW has it, also after a checkpoint said how many steps it missed."""
    ours, theirs = parameters(), parameters()
    sharded, adamw = ShardedAdamW(Ranks(), ours), optim.AdamW(theirs)
    sharded.missed[0] = adamw.missed[0] = 1
    sharded.steps = adamw.steps = 1
    for step in range(3):
        norms = []
        optimizer: Optimizer
        for optimizer in (sharded, adamw):
            give_gradients(optimizer.parameters, step)
            if step < 2:
                optimizer.parameters[3].grad = None
            norms.append(clip_grad_norm(optimizer, 1.0))
            optimizer.step()
            optimizer.zero_grad()
        assert norms[0] == norms[1]
    assert sharded.missed == adamw.missed == [1, 0, 0, 2]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize("data", [np.zeros((4, 4))[:, ::2], np.zeros((2, 3, 4)).swapaxes(0, 1)])
def test_a_parameter_that_is_not_in_one_piece_is_refused(data: np.ndarray) -> None:
    """Its numbers would be updated in a copy."""
    with pytest.raises(ValueError, match=r"of shape \(.* has gaps in memory, or lies there"):
        ShardedAdamW(Ranks(), [Tensor(data, requires_grad=True)])
    tensor = Tensor(np.zeros((4, 2)), requires_grad=True)
    sharded = ShardedAdamW(Ranks(), [tensor])
    tensor.data, tensor.grad = data, np.ones_like(data)
    with pytest.raises(ValueError, match="has gaps in memory"):
        sharded.step()


def test_what_adamw_refuses_is_refused() -> None:
    one, other = (Tensor(np.zeros((4, 2)), requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="a parameter is there twice"):
        ShardedAdamW(Ranks(), [one, one])
    with pytest.raises(ValueError, match="is the result of"):
        ShardedAdamW(Ranks(), [one * 2])
    sharded = ShardedAdamW(Ranks(), [one, other])
    one.grad, other.grad = np.ones((4, 2)), np.ones((2, 4))
    with pytest.raises(ValueError, match=r"parameter 1 has the shape \(4, 2\), its grad"):
        sharded.step()
    assert sharded.steps == 0 and not one.data.any()


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_rank_updates_its_part_alone(order: str) -> None:
    ours, theirs, before = parameters(order), parameters(order), parameters(order)
    for optimizer in (ShardedAdamW(Middle(), ours), optim.AdamW(theirs)):
        give_gradients(optimizer.parameters, 0)
        optimizer.step()
    for a, b, untouched in zip(ours, theirs, before, strict=True):
        np.testing.assert_array_equal(middle(a.data, order), middle(b.data, order))
        assert (a.data != untouched.data).sum() == middle(a.data).size


def test_a_rank_holds_the_moments_of_its_part_alone() -> None:
    whole = [Tensor(np.zeros((300, 1000), np.float32), requires_grad=True)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    optimizer = ShardedAdamW(Middle(), whole)
    held, peak = (size - before for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert optimizer.m[0].shape == (300, 1000)
    assert (
        0.95 < held / (2 * whole[0].data.nbytes / 3) < peak / (2 * whole[0].data.nbytes / 3) < 1.05
    )


def test_the_norm_is_that_of_all_parts() -> None:
    tensors = parameters()
    optimizer = ShardedAdamW(Middle(first=30.0, last=40.0), tensors)
    give_gradients(tensors, 0)
    ours = [middle(t.grad).copy() for t in tensors]
    norm = math.sqrt(2500 + sum((part.astype(np.float64) ** 2).sum() for part in ours))
    assert clip_grad_norm(optimizer, 5.0, loss_scale=2.0) == pytest.approx(norm / 2, rel=1e-12)
    for tensor, part in zip(tensors, ours, strict=True):
        np.testing.assert_allclose(middle(tensor.grad), part * 5 / norm, rtol=1e-6)


@pytest.mark.parametrize(("size", "max_norm"), [(1, 1000.0), (0, 1000.0), (0, math.inf)])
def test_gradients_below_the_largest_norm_are_left_alone(size: int, max_norm: float) -> None:
    tensors = parameters()
    optimizer = ShardedAdamW(Middle(first=3.0), tensors)
    give_gradients(tensors, 0)
    for tensor in tensors:
        tensor.grad *= size
    before = [t.grad.copy() for t in tensors]
    clip_grad_norm(optimizer, max_norm)
    for tensor, grad in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.grad, grad)


@pytest.mark.parametrize("theirs", [math.nan, math.inf])
def test_gradients_of_another_rank_that_are_not_finite(theirs: float) -> None:
    """This rank's stay what they are, and it learns that the step cannot be taken."""
    tensors = parameters()
    optimizer = ShardedAdamW(Middle(last=theirs), tensors)
    give_gradients(tensors, 0)
    before = [t.grad.copy() for t in tensors]
    assert not math.isfinite(clip_grad_norm(optimizer, 1.0))
    for tensor, grad in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.grad, grad)


def test_a_checkpoint_is_the_same_with_and_without(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text("the quick")
    models = [make_model(vocab_size=tokenizer.vocab_size) for _ in range(2)]
    sharded = ShardedAdamW(Ranks(), models[0].parameters())
    adamw = optim.AdamW(models[1].parameters())
    for name, model, optimizer in zip(("a", "b"), models, (sharded, adamw), strict=True):
        give_gradients(model.parameters(), 0)
        optimizer.step()
        checkpoint.save_run(tmp_path / name, model, tokenizer, optimizer, {})
    for file in (checkpoint.OPTIMIZER, checkpoint.MODEL):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = make_model(seed=5, vocab_size=tokenizer.vocab_size)
    again = ShardedAdamW(Ranks(), other.parameters())
    checkpoint.load_run(tmp_path / "b", other, again)
    for a, b in zip((*again.m, *again.v), (*adamw.m, *adamw.v), strict=True):
        np.testing.assert_array_equal(a.get(), b)
    assert again.steps == 1
