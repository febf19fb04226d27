"""From a prompt to its continuation: the decoding loop, and `model.generate`.

`decode` is the loop: read the texts, get the scores of the next token, filter them, choose a token,
append it, and again. Around it, `settings.py` says how to decode, `filters.py` shapes the
distribution, `context.py` is the model with its KV cache, `speculation.py` guesses ahead, and
`beam_search.py` decodes in another way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import to_device
from micrograd_gpt.generation import filters
from micrograd_gpt.generation.beam_search import beam_search
from micrograd_gpt.generation.context import Context, Continuation, check_memory
from micrograd_gpt.generation.settings import Settings, check_names
from micrograd_gpt.generation.speculation import PromptLookup
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor

# ----------------------------------------------------------------------------- choosing one token


def next_token_distribution(logits: np.ndarray, text: list[int], settings: Settings) -> np.ndarray:
    """The probabilities of the token after `text`, float64 (V,), from the model's logits (V,)."""
    scores = filters.penalise(logits.astype(np.float64), text, settings)
    return filters.softmax(filters.warp(scores, settings))


def choose(
    logits: np.ndarray, text: list[int], settings: Settings, rng: np.random.Generator
) -> int | None:
    """The token that follows `text`, given the model's logits (V,): the likeliest at temperature 0,
    else a random one. None where the penalties rule out every token.
    """
    scores = filters.penalise(logits.astype(np.float64), text, settings)
    if scores.max() == filters.NEVER:
        return None
    if settings.temperature == 0:
        return int(scores.argmax())
    return filters.draw(filters.softmax(filters.warp(scores, settings)), rng.random())


# ---------------------------------------------------------------------------------------- decoding


@dataclass(kw_only=True)
class Sample(Continuation):
    """A continuation that is decoded token by token, with the random numbers it draws from."""

    rng: np.random.Generator
    guesser: PromptLookup = field(default_factory=PromptLookup)


def start_samples(prompts: Sequence[list[int]], settings: Settings) -> list[Sample]:
    """`num_samples` samples of each prompt, each with random numbers of its own.

    Sample i of a prompt draws from the stream (seed, i): the same random numbers alone as in any
    batch. (The logits are the same only up to rounding, since a batch adds up in another order; so
    once in a long while a token differs, and the text after it.) Copies of a prompt in `prompts`
    count on, so that each draws from another stream.
    """
    samples, count = list[Sample](), Counter[tuple[int, ...]]()
    for prompt in prompts:
        for _ in range(settings.num_samples):
            rng = np.random.default_rng((settings.seed, count[tuple(prompt)]))
            samples.append(Sample(ids=list(prompt), n_prompt=len(prompt), rng=rng))
            count[tuple(prompt)] += 1
    return samples


def decode(model: GPT2, samples: list[Sample], settings: Settings) -> Iterator[Sample]:
    """Continue all samples as one batch. Yields a sample each time it got a token, or none was
    left for it.

    A sample leaves the batch when its `stopped` is set, here or by the caller.
    """
    started = time.perf_counter()
    running = samples
    longest = max(len(sample.ids) for sample in samples) + settings.max_new_tokens
    context = Context(model, len(running), longest, settings.use_cache)
    while running:
        guesses = _guess(running, context, settings)  # B lists, empty if B > 1
        texts = [sample.ids + guess for sample, guess in zip(running, guesses, strict=True)]
        choices = _choices(context, texts, 1 + len(guesses[0]), running, settings)
        for sample, guess, places in zip(running, guesses, choices, strict=True):
            for (token, log_prob), guessed in zip(places, [*guess, None], strict=True):
                _add_token(sample, token, log_prob, settings, started)
                yield sample
                if sample.stopped or token != guessed:
                    break
        going_on = [row for row, sample in enumerate(running) if not sample.stopped]
        if len(going_on) < len(running):
            context.keep(going_on)
            running = [running[row] for row in going_on]


def _choices(
    context: Context, texts: list[list[int]], count: int, samples: list[Sample], settings: Settings
) -> Iterator[Iterator[tuple[int | None, float]]]:
    """For each text, the token chosen after each of its last `count` ones, and the model's
    log-probability of it. A sample must have got one before the next is asked for.
    """
    if _takes_the_likeliest(settings):
        found = context.likeliest(texts, count, settings.vocab_size)
        for tokens, log_probs in zip(*(part.tolist() for part in found), strict=True):
            yield zip(tokens, log_probs, strict=True)
        return
    for sample, places in zip(samples, context.logits(texts, count), strict=True):
        yield (_choice(scores, sample, settings) for scores in places)


def _takes_the_likeliest(settings: Settings) -> bool:
    """Whether each token is the likeliest, whatever the text so far."""
    penalises = settings.repetition_penalty != 1 or settings.no_repeat_ngram_size
    return settings.temperature == 0 and not penalises


def _choice(logits: np.ndarray, sample: Sample, settings: Settings) -> tuple[int | None, float]:
    token = choose(logits, sample.ids, settings, sample.rng)
    return token, 0.0 if token is None else filters.log_probability(logits, token)


def _add_token(
    sample: Sample, token: int | None, log_prob: float, settings: Settings, started: float
) -> None:
    """Append a sample's next token; sets `stopped` where the sample ends with it."""
    if token is None:
        sample.stopped = "no token left"
        return
    sample.ids.append(token)
    sample.log_probs.append(log_prob)
    sample.seconds = time.perf_counter() - started
    if token == settings.end_of_text:
        sample.stopped = "end-of-text"
    elif len(sample.ids) - sample.n_prompt == settings.max_new_tokens:
        sample.stopped = "length"


def _guess(running: list[Sample], context: Context, settings: Settings) -> list[list[int]]:
    """Guesses of the next tokens of each sample: none without speculation, and none in a batch
    (`speculation.py` says why)."""
    if settings.speculate is None or len(running) > 1:
        return [[] for _ in running]
    (sample,) = running
    most = min(context.room(sample.ids), settings.max_new_tokens - len(sample.new_ids) - 1)
    return [sample.guesser.guess(sample.ids, most)]


# ---------------------------------------------------------------------------------- model.generate


def generate(
    model: GPT2,
    ids: Any,
    max_new_tokens: int = Settings.max_new_tokens,
    temperature: float = Settings.temperature,
    top_k: int | None = Settings.top_k,
    top_p: float | None = Settings.top_p,
    num_beams: int = Settings.num_beams,
    seed: int = Settings.seed,
    **more: Any,
) -> np.ndarray | list[np.ndarray]:
    """Continue token ids: this is `model.generate(ids, …)`.

    Args:
        ids: one prompt (T,), a batch (B, T), or a list of prompts of any lengths.
        temperature: 1 draws from the model's own distribution; 0 is greedy.
        top_k, top_p, num_beams, seed, more: fields of `Settings` (`settings.py`), which also has
            min_p, repetition_penalty, no_repeat_ngram_size, length_penalty, early_stopping,
            num_samples, end_of_text, vocab_size, speculate and use_cache.

    Returns the prompts followed by their continuations, int64: (T + n,) for one prompt; (B, T + n)
    for a batch, where rows that ended early are filled up with `end_of_text`; a list of arrays for
    a list. With `num_samples`, each prompt has that many rows or arrays.

    Raises TypeError for a name that is no setting, and UserError for settings that `Settings`
    refuses, for empty prompts and ids outside the vocabulary, where the texts do not fit into
    memory, where fewer than `num_samples` beams are found, and for rows of a batch that end early
    because no token was left, where `end_of_text` is None or outside the vocabulary: there is
    nothing to fill them up with.
    """
    check_names(more)
    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        seed=seed,
        **more,
    )
    ids = ids.numpy() if isinstance(ids, Tensor) else ids
    is_list = isinstance(ids, list | tuple) and len(ids) > 0 and np.ndim(ids[0]) == 1
    array = np.zeros(0) if is_list else to_device(np.asarray(ids), "cpu")
    prompts = [_prompt(row, model) for row in (ids if is_list else np.atleast_2d(array))]
    if not prompts:
        raise UserError("there is no prompt: give at least one")
    rows = num_beams if num_beams > 1 else settings.num_samples * len(prompts)
    longest = max(map(len, prompts)) + max_new_tokens
    check_memory(model, rows, longest, settings.use_cache)
    if num_beams > 1:
        found = [beam_search(model, prompt, settings) for prompt in prompts]
        texts = [beam.ids for beams in found for beam in beams]
    else:
        samples = start_samples(prompts, settings)
        for _ in decode(model, samples, settings):
            pass
        texts = [sample.ids for sample in samples]
    if is_list:
        return [np.array(text) for text in texts]
    longest = max(map(len, texts))
    end = -1 if settings.end_of_text is None else settings.end_of_text
    if not 0 <= end < model.config.vocab_size and min(map(len, texts)) < longest:
        raise UserError(filters.NO_TOKEN_LEFT)
    filled = np.array([text + [end] * (longest - len(text)) for text in texts])
    return filled[0] if array.ndim == 1 and settings.num_samples == 1 else filled


def _prompt(ids: Any, model: GPT2) -> list[int]:
    """One prompt as a list. Raises UserError unless it is a row of ids of the vocabulary."""
    array, vocab_size = np.asarray(ids), model.config.vocab_size
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise UserError(
            "a prompt is a row of one or more token ids, integers; "
            f"this one is {array.dtype} of shape {array.shape}"
        )
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise UserError(f"token id {outside[0]} is outside the model's vocabulary of {vocab_size}")
    return [int(i) for i in array]
