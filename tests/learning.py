"""Whether a model learns, for the tests of every architecture."""

from __future__ import annotations

import numpy as np
import pytest

from micrograd_gpt import optim
from micrograd_gpt.gpt2 import GPT2


def assert_learns(model: GPT2, ids: np.ndarray) -> None:
    """The loss on ids (batch, time) starts at chance and halves; every parameter has a gradient."""
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(40):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    chance = np.log(model.config.vocab_size)
    assert losses[0] == pytest.approx(chance, rel=0.05) and losses[-1] < 0.5 * losses[0]
