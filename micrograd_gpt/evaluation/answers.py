"""What a model writes after each of many prompts, several at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from micrograd_gpt.generation.output import TextStream
from micrograd_gpt.generation.sampling import Sample, decode
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.text.base_tokenizer import Tokenizer

PROMPTS_AT_ONCE = 8  # decoded as one batch, which reads the weights once for all of them


class Answer(NamedTuple):
    """The text that follows a prompt, and why it ended: "end-of-text", "length" or "stop"."""

    text: str
    stopped: str


def answers(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    settings: Settings,
    stop_texts: Sequence[str] = (),
    at_once: int = PROMPTS_AT_ONCE,
    streams: Sequence[int] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Continue prompts, each a list of token ids; yields the place of a prompt and its answer.

    Prompts of like length go together, the shortest first. An answer ends before the first of the
    `stop_texts` in it. A prompt draws from a stream of random numbers of its own, whatever goes
    with it: `streams` are their numbers, the places if left out. Raises what `decode` raises.
    """
    streams = range(len(prompts)) if streams is None else streams
    for places in of_like_length(prompts, at_once):
        samples = [
            Sample(
                ids=list(prompts[place]),
                n_prompt=len(prompts[place]),
                rng=np.random.default_rng((settings.seed, streams[place])),
            )
            for place in places
        ]
        texts = {id(sample): TextStream(tokenizer, stop_texts) for sample in samples}
        for sample in decode(model, samples, settings):
            texts[id(sample)].follow(sample)  # which ends it at a stop text
        for place, sample in zip(places, samples, strict=True):
            yield place, Answer(text_of(sample, tokenizer, stop_texts), sample.stopped or "length")


def of_like_length(prompts: Sequence[list[int]], at_once: int) -> list[list[int]]:
    """The places of the prompts, the shortest first, in batches."""
    shortest_first = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    return [shortest_first[i : i + at_once] for i in range(0, len(prompts), at_once)]


def text_of(sample: Sample, tokenizer: Tokenizer, stop_texts: Sequence[str]) -> str:
    """The text of a sample that has ended, without the stop text or end-of-text that ended it."""
    ids = sample.new_ids[:-1] if sample.stopped == "end-of-text" else sample.new_ids
    text = tokenizer.decode(ids)
    found = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]
