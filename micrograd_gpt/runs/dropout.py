"""Changing the dropout of a model that already exists."""

from __future__ import annotations

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.nn import Dropout


def set_dropout(model: GPT2, p: float) -> None:
    """Drop embeddings, attention weights and residual branches with probability p, in [0, 1).

    Sets the model's config too. A layer that an edited model has besides keeps a probability that
    is neither 0 nor one of the config's. All draw from the model's random numbers, which a run
    names by its steps, so that it can go on.
    """
    c = model.config
    before = {0.0, c.embd_pdrop, c.attn_pdrop, c.resid_pdrop}
    c.embd_pdrop = c.attn_pdrop = c.resid_pdrop = p
    for _, part in model.modules():
        if isinstance(part, Dropout):
            part.draws = model.draws
            part.p = p if part.p in before else part.p
