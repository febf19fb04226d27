"""From a prompt to its continuation: the decoding loop, and `model.generate`.

`decode` is the loop: read the texts, get the scores of the next token, filter them, choose,
append, again. Around it: `filters.py` has the settings and shapes the distribution, `context.py` is
the model with its KV cache, `speculation.py` guesses ahead, `beam_search.py` decodes another way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from micrograd_gpt.arrays.backend import to_device
from micrograd_gpt.generation import filters
from micrograd_gpt.generation.beam_search import beam_search
from micrograd_gpt.generation.context import Context, Continuation
from micrograd_gpt.generation.filters import Settings
from micrograd_gpt.generation.speculation import PromptLookup
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.tokenizers import StreamDecoder, Tokenizer

# ----------------------------------------------------------------------------- choosing one token


def next_token_distribution(logits: np.ndarray, text: list[int], settings: Settings) -> np.ndarray:
    """Probabilities of the token after `text`, given the model's logits (V,): float64 (V,)."""
    scores = filters.penalise(logits.astype(np.float64), text, settings)
    return filters.softmax(filters.warp(scores, settings))


def choose(
    logits: np.ndarray, text: list[int], settings: Settings, rng: np.random.Generator
) -> int | None:
    """The token that follows `text`: the likeliest at temperature 0, else a random one; None where
    the penalties rule out every token.
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

    Sample i of a prompt draws from the stream (seed, i), whatever else is in the batch: alone or
    among others it gets the same tokens. Copies of the same prompt in `prompts` count on, so that
    each draws from a different stream.
    """
    samples, count = list[Sample](), Counter[tuple[int, ...]]()
    for prompt in prompts:
        for _ in range(settings.num_samples):
            rng = np.random.default_rng((settings.seed, count[tuple(prompt)]))
            samples.append(Sample(ids=list(prompt), n_prompt=len(prompt), rng=rng))
            count[tuple(prompt)] += 1
    return samples


def decode(model: GPT2, samples: list[Sample], settings: Settings) -> Iterator[Sample]:
    """Continue all samples as one batch; yields a sample each time a token was added to it,
    or none was left for it.

    A sample whose `stopped` is set, here or by the caller, leaves the batch.
    """
    started = time.perf_counter()
    running = samples
    longest = max(len(sample.ids) for sample in samples) + settings.max_new_tokens
    context = Context(model, len(running), longest, settings.use_cache)
    while running:
        guesses = _guess(running, context, settings)  # B lists, empty if B > 1
        texts = [sample.ids + guess for sample, guess in zip(running, guesses, strict=True)]
        logits = context.logits(texts, count=1 + len(guesses[0]))  # (B, 1 + guesses, V)
        for sample, guess, places in zip(running, guesses, logits, strict=True):
            for scores, guessed in zip(places, [*guess, None], strict=True):
                token = choose(scores, sample.ids, settings, sample.rng)
                if token is None:
                    sample.stopped = "no token left"
                    yield sample
                    break
                sample.ids.append(token)
                sample.log_probs.append(float(filters.log_softmax(scores)[token]))
                sample.seconds = time.perf_counter() - started
                if token == settings.end_of_text:
                    sample.stopped = "end-of-text"
                elif len(sample.new_ids) == settings.max_new_tokens:
                    sample.stopped = "length"
                yield sample
                if sample.stopped or token != guessed:
                    break
        going_on = [row for row, sample in enumerate(running) if not sample.stopped]
        if len(going_on) < len(running):
            context.keep(going_on)
            running = [running[row] for row in going_on]


def _guess(running: list[Sample], context: Context, settings: Settings) -> list[list[int]]:
    """What each text may go on with; no tokens without speculation, or in a batch: see there."""
    if settings.speculate is None or len(running) > 1:
        return [[] for _ in running]
    (sample,) = running
    most = min(context.room(sample.ids), settings.max_new_tokens - len(sample.new_ids) - 1)
    return [sample.guesser.guess(sample.ids, most)]


# ---------------------------------------------------------------------------------- model.generate


def generate(
    model: GPT2,
    ids: Any,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    seed: int = 0,
    **more: Any,
) -> np.ndarray | list[np.ndarray]:
    """Continue token ids; hung on the model as `model.generate(ids, …)`.

    Args:
        ids: one prompt (T,), a batch (B, T), or a list of prompts of any lengths.
        temperature: 1, the default, draws from the model's own distribution; 0 is greedy.
        top_k, top_p, num_beams, seed, more: see `Settings` in filters.py for these and the others:
            min_p, repetition_penalty, no_repeat_ngram_size, length_penalty, early_stopping,
            num_samples, end_of_text, speculate, use_cache.

    Returns the prompts with what follows, int64: (T + n,) for one prompt; (B, T + n) for a batch,
    where rows that ended early are filled up with `end_of_text`; a list of arrays for a list. With
    `num_samples` there are that many rows, or arrays, for each prompt. Raises UserError for
    settings that `Settings` refuses, empty prompts, ids outside the vocabulary, a cache that does
    not fit into memory, fewer beams than `num_samples`, and rows that end early (no token was left)
    with no `end_of_text` to fill them up.
    """
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
    if settings.end_of_text is None and min(map(len, texts)) < longest:
        raise UserError(filters.NO_TOKEN_LEFT)
    end = settings.end_of_text or 0
    rows = np.array([text + [end] * (longest - len(text)) for text in texts])
    return rows[0] if array.ndim == 1 and settings.num_samples == 1 else rows


def _prompt(ids: Any, model: GPT2) -> list[int]:
    """One prompt as a list; UserError unless it is a row of ids of the model's vocabulary."""
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


# ------------------------------------------------------------------------------- text, as it comes


class TextStream:
    """The text of a continuation's new tokens, as far as it may be shown.

    Whole characters only, and nothing of a stop text, which may span tokens: characters that may be
    its beginning wait until it is clear that they are not. The prompt is not searched. `text` only
    ever grows at its end.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()) -> None:
        self.text = ""
        self._tokenizer, self._stop_texts = tokenizer, stop_texts
        self._decoder, self._read, self._waiting = StreamDecoder(tokenizer), 0, ""
        self._closed = False

    def follow(self, continuation: Continuation) -> None:
        """Add the text of the tokens that are new since the last time.

        Where a stop text is found the continuation is `stopped` and the text ends before it.
        """
        for token in continuation.ids[continuation.n_prompt + self._read :]:
            if self._closed:
                return
            self._read += 1
            if continuation.stopped != "end-of-text" or token != self._tokenizer.end_of_text:
                self._add(self._decoder.feed(token))
            if self._closed:
                continuation.stopped = "stop"
        if continuation.stopped and not self._closed:
            self.text += self._waiting
            self._closed = True

    def _add(self, characters: str) -> None:
        text, stops = self._waiting + characters, self._stop_texts
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            self.text += text[: min(found)]
            self._closed = True
            return
        begun = (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - max(begun, default=0)
        self.text += text[:shown]
        self._waiting = text[shown:]
