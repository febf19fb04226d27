"""Averages over items, with the standard error that comes of having seen only some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: the deviation with n - 1 in the denominator, over √n.

    The error of a single value is None. lm-evaluation-harness has the same (`mean_stderr`).
    """
    return ratio_and_error(values, [1] * len(values))


def ratio_and_error(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """The average of what was measured in clusters: all sums by all counts, and its standard error.

    Tokens of one window have errors in common, so the windows are what is independent: the error is
    that of a ratio estimator (Cochran 1977, "Sampling Techniques", chapter 6).
    """
    total, n = np.asarray(counts, float), len(counts)
    mean = float(np.sum(sums) / total.sum())
    if n < 2:
        return mean, None
    residuals = np.asarray(sums, float) - mean * total
    return mean, math.sqrt(float((residuals**2).sum()) * n / (n - 1)) / float(total.sum())


def perplexity(nats: float) -> float | None:
    """exp(nats); None where that is more than a float can be, as for words of many tokens."""
    return math.exp(nats) if nats < 709 else None
