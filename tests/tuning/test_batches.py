"""Examples of many lengths to batches: every example its turn, the same order after a restart."""

from __future__ import annotations

import numpy as np

from micrograd_gpt.tuning.batches import Order, micro_batches, padded

LENGTHS = np.random.default_rng(0).integers(1, 500, 103)


def test_an_epoch_has_every_example_once() -> None:
    order = Order(LENGTHS, per_step=8, seed=1)
    assert order.steps_per_epoch == 13
    epochs = [[order.step(13 * epoch + i) for i in range(13)] for epoch in range(3)]
    for steps in epochs:
        assert sorted(np.concatenate(steps)) == list(range(103))
        assert sorted(map(len, steps)) == [7] + [8] * 12
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))


def test_a_step_depends_on_the_seed_and_its_number_alone() -> None:
    straight = Order(LENGTHS, 8, seed=1)
    steps = [straight.step(step) for step in range(30)]
    for step in (29, 3, 14):
        np.testing.assert_array_equal(Order(LENGTHS, 8, seed=1).step(step), steps[step])
    assert not np.array_equal(Order(LENGTHS, 8, seed=2).step(3), steps[3])


def test_a_step_has_examples_of_like_length() -> None:
    order = Order(LENGTHS, 8, seed=1)
    steps = [LENGTHS[order.step(i)] for i in range(order.steps_per_epoch)]
    padding = sum((step.max() - step).sum() for step in steps)
    shuffled = np.random.default_rng(1).permutation(LENGTHS)
    parts = [shuffled[i : i + 8] for i in range(0, 103, 8)]
    assert padding < sum((part.max() - part).sum() for part in parts) / 4
    longest = [step.max() for step in steps]
    assert longest != sorted(longest)  # or each epoch would end with the longest texts


def test_balanced_epochs_have_as_many_of_each_kind() -> None:
    kinds = np.array([0] * 90 + [2] * 10 + [5] * 3)
    order = Order(LENGTHS, 4, seed=1, kinds=kinds)
    seen: list[np.ndarray] = []
    for epoch in range(3):
        steps = [order.step(epoch * order.steps_per_epoch + i) for i in range(27)]
        assert any(len(set(kinds[step])) == 3 for step in steps)  # not one kind after another
        seen.append(np.concatenate(steps))
        counts = np.bincount(kinds[seen[-1]], minlength=6)
        assert counts.tolist() == [35, 0, 35, 0, 0, 35]
        rare = np.bincount(seen[-1], minlength=103)[100:]
        assert rare.max() - rare.min() <= 1
    frequent = np.concatenate(seen)
    frequent = frequent[frequent < 90]
    assert set(frequent) == set(range(90))  # 105 turns of 90: all have had theirs


def test_micro_batches_and_padding() -> None:
    parts = micro_batches(np.arange(7), 3)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    rows = padded([np.array([5]), np.array([1, 2, 3], np.int32)], fill=9)
    assert rows.dtype == np.int64 and rows.tolist() == [[5, 9, 9], [1, 2, 3]]
