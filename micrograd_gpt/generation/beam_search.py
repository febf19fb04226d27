"""Beam search: keep several continuations in play to find the one that is likeliest as a whole.

It finds the same beams, with the same scores, and ends at the same time as `_beam_search` in
Transformers' `generation/utils.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from micrograd_gpt.generation.context import Context, Continuation
from micrograd_gpt.generation.filters import NEVER, log_softmax, penalise
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError

LARGEST_POWER = 709.0  # exp of more is no float


@dataclass(kw_only=True)
class Beam(Continuation):
    """A continuation and its score: the sum of the log-probabilities of its new tokens after the
    penalties, and once it has ended that sum / length ** `length_penalty`, which `rank` orders
    where it is too small or too large for a float.
    """

    score: float
    rank: float = 0.0


def beam_search(
    model: GPT2,
    prompt: list[int],
    settings: Settings,
    hits_stop: Callable[[list[int]], bool] = lambda new_ids: False,
) -> list[Beam]:
    """The best `num_samples` of the `num_beams` continuations found, best first.

    Each step extends every beam by every token and keeps the `num_beams` best that have not ended;
    those that have ended are set aside. New tokens end a text if they reach end-of-text or
    `max_new_tokens`, or if `hits_stop` says so. The search ends with all beams in play where the
    penalties leave none of them a token.

    The search is over when `num_beams` have ended and none in play can be better, judged by its
    length now (`early_stopping` False) or by the length that suits it best ("never"); with True it
    is over as soon as they have ended.

    Raises UserError where fewer than `num_samples` are found.
    """
    started = time.perf_counter()
    width, penalty = settings.num_beams, settings.length_penalty
    longest = len(prompt) + settings.max_new_tokens
    context = Context(model, width, longest, settings.use_cache)
    beams, ended = [Beam(ids=prompt, n_prompt=len(prompt), score=0.0)], list[Beam]()
    for length in range(1, settings.max_new_tokens + 1):
        # Twice as many candidates as beams, since up to half of them may end with end-of-text
        parents, candidates = _extend(context, beams, 2 * width, settings)
        for beam in candidates:
            beam.seconds = time.perf_counter() - started
            if beam.ids[-1] == settings.end_of_text:
                beam.stopped = "end-of-text"
            elif hits_stop(beam.new_ids):
                beam.stopped = "stop"
            elif length == settings.max_new_tokens:
                beam.stopped = "length"
        # Only the best `width` may end; the others are there to go on in their place
        just_ended = [beam for beam in candidates[:width] if beam.stopped]
        if not candidates:
            just_ended = [replace(beam, stopped="no token left") for beam in beams]
        for beam in just_ended:
            beam.rank = rank(beam.score, len(beam.new_ids), penalty)
            beam.score = -math.exp(min(-beam.rank, LARGEST_POWER))
        ended = sorted(ended + just_ended, key=lambda beam: -beam.rank)[:width]
        alive = [row for row, beam in enumerate(candidates) if not beam.stopped][:width]
        if not alive:
            break
        beams = [candidates[row] for row in alive]
        context.keep([parents[row] for row in alive], shared=len(prompt))
        if len(ended) == width:
            reach = length
            if settings.early_stopping == "never" and penalty > 0:
                reach = settings.max_new_tokens
            out_of_reach = rank(beams[0].score, reach, penalty) <= ended[-1].rank
            if settings.early_stopping is True or out_of_reach:
                break
    if len(ended) < settings.num_samples:
        raise UserError(
            f"only {len(ended)} of {settings.num_samples} beams could be found: lower num_samples"
        )
    return ended[: settings.num_samples]


def rank(log_prob: float, length: int, penalty: float) -> float:
    """A number that orders texts as log_prob / length ** penalty does; none overflows.

    `log_prob` is 0 at most. With x = -log_prob the rank is log(length ** penalty / x).
    """
    return math.inf if log_prob == 0 else penalty * math.log(length) - math.log(-log_prob)


def _extend(
    context: Context, beams: list[Beam], count: int, settings: Settings
) -> tuple[list[int], list[Beam]]:
    """The `count` best continuations of all beams by one token, and which beam each came from."""
    texts = [beam.ids for beam in beams]
    log_probs = log_softmax(context.logits(texts)[:, 0].astype(np.float64))  # (B, V)
    scores = np.stack(
        [
            beam.score + penalise(row, beam.ids, settings)
            for beam, row in zip(beams, log_probs, strict=True)
        ]
    )
    count = min(count, scores.size)
    best = np.argpartition(scores, -count, axis=None)[-count:]
    best = best[np.argsort(-scores.ravel()[best], kind="stable")]
    parents, tokens = (indices.tolist() for indices in np.unravel_index(best, scores.shape))
    extended = [
        replace(
            beams[parent],
            ids=[*beams[parent].ids, token],
            log_probs=[*beams[parent].log_probs, float(log_probs[parent, token])],
            score=float(scores[parent, token]),
        )
        for parent, token in zip(parents, tokens, strict=True)
        if scores[parent, token] > NEVER
    ]
    return parents[: len(extended)], extended
