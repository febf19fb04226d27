"""The windows of a run's batches: every one once an epoch, in an order made of (seed, step)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.windows import Windows


def epoch_starts(windows: Windows, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of an epoch start, in the order they come in (tokens must be 0, 1, ...)."""
    ids, _ = windows.batch(seed, epoch, len(windows))
    return ids[:, 0]


@given(
    block_size=st.integers(1, 9),
    stride=st.none() | st.integers(1, 12),
    extra=st.integers(0, 400),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 10**9),
)
def test_an_epoch_is_every_window_once(
    block_size: int, stride: int | None, extra: int, seed: int, epoch: int
) -> None:
    tokens = np.arange(block_size + 1 + extra, dtype=np.uint16)
    windows = Windows(tokens, block_size, stride)
    stride = stride or block_size
    starts = np.sort(epoch_starts(windows, seed, epoch))
    offset = starts[0]
    assert 0 <= offset < stride
    np.testing.assert_array_equal(starts, offset + stride * np.arange(len(windows)))
    assert starts[-1] + block_size + 1 <= len(tokens)
    # No more windows would fit at every offset.
    assert len(windows) == 1 or len(tokens) < (len(windows) + 2) * stride + block_size


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 1024, 65_537])
def test_the_shuffle_is_one_to_one(size: int) -> None:
    windows = Windows(np.arange(size + 1, dtype=np.uint32), block_size=1)
    assert len(windows) == size
    assert sorted(epoch_starts(windows, 3, 4)) == list(range(size))


@pytest.mark.parametrize("constant", [0, 2**32, 2**64 - 1])
@pytest.mark.parametrize("size", [5, 1000])
def test_the_shuffle_is_one_to_one_whatever_the_hash(
    size: int, constant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("micrograd_gpt.text.windows._mix", lambda x: np.full_like(x, constant))
    windows = Windows(np.arange(size + 1), block_size=1)
    assert sorted(epoch_starts(windows, 0, 0)) == list(range(size))


def test_the_shuffle_shuffles() -> None:
    """Every window comes at every place about equally often, over seeds and over epochs."""
    windows = Windows(np.arange(21), block_size=1)
    by_seed = [epoch_starts(windows, seed, 0) for seed in range(4000)]
    by_epoch = [epoch_starts(windows, 0, epoch) for epoch in range(4000)]
    for orders in (by_seed, by_epoch):
        counts = np.zeros((20, 20))
        for order in orders:
            counts[np.arange(20), order] += 1
        # 200 each are expected. Chance alone: a standard deviation of 14, so 5 of them.
        assert abs(counts - 200).max() < 70
    assert len({tuple(order) for order in by_seed + by_epoch}) == 7999  # (0, 0) is in both


@pytest.mark.parametrize(("size", "orders"), [(1, 1), (2, 2), (3, 6), (4, 24), (5, 120)])
def test_every_order_of_a_few_windows_comes(size: int, orders: int) -> None:
    windows = Windows(np.arange(size + 1), block_size=1)
    assert len({tuple(epoch_starts(windows, 0, epoch)) for epoch in range(2000)}) == orders


def test_neighbours_are_parted() -> None:
    order = epoch_starts(Windows(np.arange(5001), block_size=1), 0, 0)
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.06  # 4 standard deviations
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06


def test_targets_are_the_inputs_shifted() -> None:
    tokens = np.random.default_rng(0).integers(0, 65_536, 1000).astype(np.uint16)
    windows = Windows(tokens, block_size=8, stride=3)
    ids, targets = windows.batch(seed=1, step=2, batch_size=5)
    assert ids.shape == targets.shape == (5, 8)
    assert ids.dtype == targets.dtype == np.int64
    assert ids.flags.c_contiguous and targets.flags.c_contiguous
    np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    text = tokens.astype("<u2").tobytes()
    for row, target in zip(ids, targets, strict=True):
        assert np.append(row, target[-1]).astype("<u2").tobytes() in text


def test_batches_are_a_function_of_seed_and_step() -> None:
    tokens = np.arange(700, dtype=np.uint16)
    one, other = Windows(tokens, 8), Windows(tokens, 8)
    batches = [one.batch(7, step, 12)[0] for step in range(30)]  # 3.6 epochs
    for step in reversed(range(30)):  # asked for in another order, of another object
        np.testing.assert_array_equal(other.batch(7, step, 12)[0], batches[step])
    # The rows follow one another, whatever the batch size.
    np.testing.assert_array_equal(np.concatenate(batches)[:350], one.batch(7, 0, 350)[0])
    assert not np.array_equal(one.batch(8, 0, 12)[0], batches[0])


def test_epochs_move_the_windows() -> None:
    windows = Windows(np.arange(400), block_size=8)
    offsets = {int(epoch_starts(windows, 0, epoch).min()) for epoch in range(200)}
    assert offsets == set(range(8))


def test_a_stream_of_one_window() -> None:
    ids, targets = Windows(np.arange(5), block_size=4).batch(0, 3, 2)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2 and targets.tolist() == [[1, 2, 3, 4]] * 2
    with pytest.raises(UserError, match="4 tokens are too few for --block-size 4, which needs 5"):
        Windows(np.arange(4), block_size=4)
    for block_size, stride in ((0, None), (4, 0)):
        with pytest.raises(UserError, match="must be 1 or more"):
            Windows(np.arange(9), block_size, stride)


def test_a_memory_mapped_stream(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r")
    ids, targets = Windows(mapped, 8).batch(0, 0, 4)
    assert type(ids) is type(targets) is np.ndarray
    np.testing.assert_array_equal(ids, Windows(tokens, 8).batch(0, 0, 4)[0])


def test_evenly_spaced_windows_are_fixed() -> None:
    windows = Windows(np.arange(801), block_size=8)  # 100 less 1, for the offset
    assert len(windows) == 99

    def starts(count: int, batch_size: int) -> list[list[int]]:
        batches = list(windows.evenly_spaced(count, batch_size))
        for ids, targets in batches:
            assert ids.dtype == np.int64 and ids.shape[1] == 8
            np.testing.assert_array_equal(ids + 1, targets)
        return [ids[:, 0].tolist() for ids, _ in batches]

    assert starts(6, 3) == [[0, 128, 264], [392, 528, 656]]  # windows 0, 16, 33, 49, 66, 82
    assert starts(6, 4) == [[0, 128, 264, 392], [528, 656]]  # the same, whatever the batch is
    everything = starts(100, 40)
    assert [len(batch) for batch in everything] == [40, 40, 19]
    assert [start for batch in everything for start in batch] == list(range(0, 99 * 8, 8))
    assert starts(0, 3) == []


@pytest.mark.parametrize(
    "tokens", [np.arange(100) + 0.5, np.arange(100).reshape(10, 10), "hello world, a text", None]
)
def test_tokens_are_a_row_of_integers(tokens: Any) -> None:
    with pytest.raises(TypeError, match=r"tokens must be integers of shape \(N,\), not"):
        Windows(tokens, 8)
    assert len(Windows(list(range(100)), 8)) == len(Windows(np.arange(100), 8))  # type: ignore[arg-type]
