"""Generation in ten lines: the core of what sampling.py does."""

from __future__ import annotations

from typing import Any

import numpy as np

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.nn import no_dropout
from micrograd_gpt.tensor import no_grad


def sample(model: GPT2, ids: Any, n: int, temperature: float = 1.0, seed: int = 0) -> np.ndarray:
    """Continue integer ids (B, T), an array or lists, by n tokens each -> (B, T + n); temperature 0
    is greedy.

    The model reads the whole window again for each token; the KV cache of `model.generate` avoids
    that.
    """
    ids, rng = np.atleast_2d(ids), np.random.default_rng(seed)
    for _ in range(n):
        with no_grad(), no_dropout():
            logits = model(ids[:, -model.config.n_positions :], last_only=True)
        scores = logits.numpy()[:, 0].astype(np.float64)  # (B, V)
        if temperature:  # Gumbel's trick: the largest sum is a draw from the softmax
            scores = scores / temperature + rng.gumbel(size=scores.shape)
        ids = np.concatenate([ids, scores.argmax(-1)[:, None]], axis=1)
    return ids
