"""From a model's logits to the probabilities of the next token: one small function per setting.

Every filter takes the scores of the next token, a float array (V,), and returns new ones, where
-inf means "never". They are applied in Transformers' order:

    penalties, which look at the text so far   repetition penalty, no-repeat n-gram, padding
    the shape of the distribution              temperature, top-k, top-p, min-p

Each follows the class of that name in Transformers' `generation/logits_process.py`, ties included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from micrograd_gpt.arrays.stand_ins import definition
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.tensor import Array

NEVER = -np.inf
NO_TOKEN_LEFT = "every token would repeat an n-gram: raise no_repeat_ngram_size, or set it to 0"


def penalise(scores: np.ndarray, text: Sequence[int], settings: Settings) -> np.ndarray:
    """Apply the penalties to the scores (V,) of the token after `text`."""
    if settings.repetition_penalty != 1:
        scores = repetition_penalty(scores, text, settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        scores = no_repeat_ngram(scores, text, settings.no_repeat_ngram_size)
    if settings.vocab_size is not None and settings.vocab_size < len(scores):
        scores = padding(scores, settings.vocab_size)
    return scores


def warp(scores: np.ndarray, settings: Settings) -> np.ndarray:
    """Apply temperature, top-k, top-p and min-p to scores (V,); the temperature must not be 0."""
    if settings.temperature != 1:
        scores = temperature(scores, settings.temperature)
    if settings.top_k:
        scores = top_k(scores, settings.top_k)
    if settings.top_p is not None:
        scores = top_p(scores, settings.top_p)
    if settings.min_p is not None:
        scores = min_p(scores, settings.min_p)
    return scores


# ----------------------------------------------------------------------------------- the filters


def repetition_penalty(scores: np.ndarray, text: Sequence[int], penalty: float) -> np.ndarray:
    """Make every token of `text` less likely: divide scores above 0 by `penalty`, and multiply
    those below 0 by it. A penalty of 1 changes nothing. Keskar et al. 2019 (CTRL,
    arXiv:1909.05858), section 4.1.
    """
    used = np.unique(np.asarray(text, int))
    penalised = scores.copy()
    penalised[used] = np.where(scores[used] < 0, scores[used] * penalty, scores[used] / penalty)
    return penalised


def no_repeat_ngram(scores: np.ndarray, text: Sequence[int], n: int) -> np.ndarray:
    """Rule out every token that would complete an n-gram that `text` already contains (Paulus et
    al. 2017, arXiv:1705.04304, section 2.5)."""
    if len(text) < n:
        return scores
    ngrams = np.lib.stride_tricks.sliding_window_view(np.asarray(text, int), n)  # (T - n + 1, n)
    last_tokens = ngrams[-1, 1:]  # (n - 1,)
    begun_alike = (ngrams[:, :-1] == last_tokens).all(axis=1)
    allowed = scores.copy()
    allowed[ngrams[begun_alike, -1]] = NEVER
    return allowed


def padding(scores: np.ndarray, vocab_size: int) -> np.ndarray:
    """Rule out the ids from `vocab_size` on, which stand for no token of the tokenizer."""
    return np.where(np.arange(len(scores)) < vocab_size, scores, NEVER)


def temperature(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Sharpen the distribution (a temperature below 1) or flatten it (above 1)."""
    return scores / temperature


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Keep the k best tokens, and any that tie with the last of them (Fan et al. 2018,
    arXiv:1805.04833)."""
    k = min(k, len(scores))
    kth_best = np.partition(scores, -k)[-k]
    return np.where(scores < kth_best, NEVER, scores)


def top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keep the smallest set of best tokens whose probabilities add up to p (Holtzman et al. 2019,
    nucleus sampling, arXiv:1904.09751). The best token always stays, and p = 1 keeps all. Where
    tokens at the edge are equally likely, those with higher ids stay (Transformers leaves that
    open).
    """
    if p >= 1:
        return scores
    probabilities = softmax(scores)
    # All tokens this rare together have less than 1 - p: they go, and need not be sorted first
    rare = probabilities < (1 - p) / len(scores)
    others = np.flatnonzero(~rare)
    worst_first = others[np.argsort(scores[others], kind="stable")]
    cumulative = probabilities[rare].sum() + np.cumsum(probabilities[worst_first])
    kept = np.where(rare, NEVER, scores)
    kept[worst_first[:-1][cumulative[:-1] <= 1 - p]] = NEVER
    return kept


def min_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keep the tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    probabilities = softmax(scores)
    return np.where(probabilities < p * probabilities.max(), NEVER, scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Scores (…, V) -> probabilities, of the same shape and dtype."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Scores (…, V) -> natural logarithms of the probabilities."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_probability(scores: np.ndarray, token: int) -> float:
    """The natural logarithm of the probability of one token, given scores (V,)."""
    largest = scores.max()
    return float(scores[token] - largest - np.log(np.exp(scores - largest).sum()))


@definition
def likeliest(scores: Array, vocab_size: int | None = None) -> Array:
    """The likeliest tokens, given scores (…, V) on any device: float64 (3, …), to be read at once.

    For each place: its id, the lowest where several are equally likely, among the first
    `vocab_size`; the logarithm of its probability among all V; and whether all V scores are finite,
    1 or 0, without which the others mean nothing.
    """
    allowed = scores[..., :vocab_size]
    with np.errstate(invalid="ignore"):
        shifted = scores - scores.max(axis=-1, keepdims=True)
        totals = np.log(np.exp(shifted).sum(axis=-1))
        log_probs = shifted[..., :vocab_size].max(axis=-1) - totals
    parts = allowed.argmax(axis=-1), log_probs, np.isfinite(scores).all(axis=-1)
    return np.stack([part.astype(np.float64) for part in parts])


def draw(probabilities: np.ndarray, uniform: float) -> int:
    """The token that a uniform random number in [0, 1) picks: the one at which the cumulative
    probability passes it. A token of probability 0 is never picked. Probabilities (V,) need not
    add up to exactly 1.
    """
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
