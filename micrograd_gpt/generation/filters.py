"""From a model's logits to the probabilities a token is drawn with: one small function a setting.

Every filter takes the scores of the next token, a float array (V,), and returns new ones, where
-inf means "never". Transformers applies them in this order, and so do we:

    penalties, which look at the text so far   repetition penalty, no-repeat n-gram
    the shape of the distribution              temperature, top-k, top-p, min-p

Each follows the class of that name in Transformers' `generation/logits_process.py`, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from micrograd_gpt.support.errors import UserError

NEVER = -np.inf
GPT2_END_OF_TEXT = 50256
SMALLEST, LARGEST = 1e-6, 1e6  # factors of the scores: further out these would overflow
NO_TOKEN_LEFT = "every token would repeat an n-gram: raise no_repeat_ngram_size, or set it to 0"


@dataclass(frozen=True)
class Settings:
    """How to decode. The names are Transformers', and so are their meanings.

    Raises UserError for a value out of range, and for settings that contradict each other.
    """

    max_new_tokens: int = 20
    temperature: float = 1.0  # 0: greedy, always the likeliest token; 1: as the model has it
    top_k: int | None = None  # None or 0: all tokens
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # 0: n-grams may repeat
    num_beams: int = 1  # more than 1: beam search
    length_penalty: float = 1.0  # a beam's score is its log-probability / its length ** this
    early_stopping: bool | str = False  # True, False or "never": see beam_search.py
    num_samples: int = 1  # continuations of each prompt ("num_return_sequences")
    seed: int = 0
    end_of_text: int | None = GPT2_END_OF_TEXT  # the token that ends a text; None: nothing does
    speculate: str | None = None  # "prompt-lookup", of one sample: see speculation.py
    use_cache: bool = True

    def __post_init__(self) -> None:
        for name, fits, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            (
                "temperature",
                self.temperature == 0 or SMALLEST <= self.temperature < math.inf,
                f"0 (greedy), or {SMALLEST:g} or more",
            ),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, and 1 at most"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                SMALLEST <= self.repetition_penalty <= LARGEST,
                f"between {SMALLEST:g} and {LARGEST:g}",
            ),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            (
                "early_stopping",
                self.early_stopping in (True, False, "never"),
                "True, False, never",
            ),
            ("num_samples", self.num_samples >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("speculate", self.speculate in (None, "prompt-lookup"), "prompt-lookup or None"),
        ):
            if not fits:
                raise UserError(f"{name} must be {what}, not {getattr(self, name)}")
        beams = self.num_beams > 1
        cuts = self.top_k or self.top_p not in (None, 1) or self.min_p
        draws = self.temperature not in (0, 1) or cuts
        for conflict, problem in (
            (beams and draws, "beam search takes no temperature, top_k, top_p or min_p"),
            (beams and self.num_samples > self.num_beams, "num_samples is above num_beams"),
            (beams and self.speculate, "beam search cannot speculate"),
            (not beams and self.length_penalty != 1, "length_penalty is for num_beams above 1"),
            (not beams and self.early_stopping, "early_stopping is for num_beams above 1"),
        ):
            if conflict:
                raise UserError(f"{problem}: change one of them")


def penalise(scores: np.ndarray, text: Sequence[int], settings: Settings) -> np.ndarray:
    """Scores (V,) of the token after `text`, after the penalties."""
    if settings.repetition_penalty != 1:
        scores = repetition_penalty(scores, text, settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        scores = no_repeat_ngram(scores, text, settings.no_repeat_ngram_size)
    return scores


def warp(scores: np.ndarray, settings: Settings) -> np.ndarray:
    """Scores (V,) after temperature, top-k, top-p and min-p; the temperature must not be 0."""
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
    """Make every token of `text` less likely: scores above 0 are divided by `penalty`, those below
    multiplied by it. Keskar et al. 2019 (CTRL, arXiv:1909.05858), section 4.1; 1 changes nothing.
    """
    used = np.unique(np.asarray(text, int))
    penalised = scores.copy()
    penalised[used] = np.where(scores[used] < 0, scores[used] * penalty, scores[used] / penalty)
    return penalised


def no_repeat_ngram(scores: np.ndarray, text: Sequence[int], n: int) -> np.ndarray:
    """Rule out every token that would end an n-gram that `text` already holds (Paulus et al. 2017,
    arXiv:1705.04304, section 2.5)."""
    if len(text) < n:
        return scores
    ngrams = np.lib.stride_tricks.sliding_window_view(np.asarray(text, int), n)  # (T - n + 1, n)
    last_tokens = ngrams[-1, 1:]  # (n - 1,)
    begun_alike = (ngrams[:, :-1] == last_tokens).all(axis=1)
    allowed = scores.copy()
    allowed[ngrams[begun_alike, -1]] = NEVER
    return allowed


def temperature(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Below 1 sharpens the distribution, above 1 flattens it."""
    return scores / temperature


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Keep the k best tokens, and those as good as the last of them (Fan et al. 2018)."""
    k = min(k, len(scores))
    kth_best = np.partition(scores, -k)[-k]
    return np.where(scores < kth_best, NEVER, scores)


def top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keep the fewest best tokens that together have probability p (Holtzman et al. 2019, nucleus
    sampling, arXiv:1904.09751). The best token always stays; p = 1 keeps all. Of tokens equally
    likely at the edge the ones with higher ids stay (Transformers leaves that open).
    """
    if p >= 1:
        return scores
    probabilities = softmax(scores)
    # Tokens so rare add up to less than 1 - p: all of them go, and need not be sorted first.
    rare = probabilities < (1 - p) / len(scores)
    others = np.flatnonzero(~rare)
    worst_first = others[np.argsort(scores[others], kind="stable")]
    cumulative = probabilities[rare].sum() + np.cumsum(probabilities[worst_first])
    kept = np.where(rare, NEVER, scores)
    kept[worst_first[:-1][cumulative[:-1] <= 1 - p]] = NEVER
    return kept


def min_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keep the tokens at least p times as likely as the likeliest (Nguyen et al. 2024,
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


def draw(probabilities: np.ndarray, uniform: float) -> int:
    """The token that a uniform random number in [0, 1) picks: where the cumulative probability
    passes it. A token of probability 0 is never picked; they need not add up to exactly 1.
    """
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
