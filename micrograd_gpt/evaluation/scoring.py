"""The probabilities that a model gives to the tokens of a text: every evaluation rests on these.

A request is a context and what continues it. Requests about the same context form a group: what
their tokens have in common at the beginning is read once, into a KV cache that all of them share,
and only the rest of each is read on its own. Logits are computed where a token is scored, and
nowhere else.

    P tokens read in common   S tokens read on one's own   C channels   V vocabulary
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from micrograd_gpt.arrays.devices import to_device
from micrograd_gpt.arrays.memory import keep_freed_memory
from micrograd_gpt.arrays.precision import widened
from micrograd_gpt.generation.context import check_finite, check_memory_to_read
from micrograd_gpt.generation.kv_cache import KVCache, NoCacheFits
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.nn import no_dropout
from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Array, Tensor, no_grad
from micrograd_gpt.tuning.batches import padded

TOKENS_AT_ONCE = 2048  # enough to keep a processor busy; the cache of 124M then has 150 MB
ROWS_AT_ONCE = 128  # of logits: 26 MB for GPT-2's vocabulary


@dataclass(frozen=True)
class Request:
    """Token ids, and the ids that follow them and are to be scored; neither may be empty."""

    context: list[int]
    continuation: list[int]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise ValueError("a request has at least one token of context and one to score")


@dataclass(frozen=True)
class Score:
    """What a model thinks of a continuation of n tokens."""

    log_probs: np.ndarray  # (n,), float64: the natural logarithm of each token's probability
    likeliest: np.ndarray  # (n,), bool: whether the model would have chosen the token itself

    @property
    def log_prob(self) -> float:
        """The logarithm of the probability of the whole continuation."""
        return float(self.log_probs.sum())

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written the continuation."""
        return bool(self.likeliest.all())


class Group:
    """Requests that begin alike, as the tokens that the model has to read for them.

    A text longer than n_positions + 1 is cut on the left, as lm-evaluation-harness cuts it: the
    last token is scored, and not read. Raises UserError for a continuation longer than n_positions.
    """

    def __init__(self, index: int, requests: Sequence[Request], n_positions: int) -> None:
        self.index = index
        self.labels = [request.continuation for request in requests]
        check_lengths(requests, n_positions)
        texts = [request.context + request.continuation for request in requests]
        inputs = [text[-(n_positions + 1) : -1] for text in texts]
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*inputs, strict=False))
        self.shared = [tokens[0] for tokens in same]  # (P,)
        self.rest = [tokens[len(self.shared) :] for tokens in inputs]  # each (S,)


def check_lengths(requests: Sequence[Request], n_positions: int) -> None:
    """UserError for a continuation longer than n_positions."""
    longest = max(len(request.continuation) for request in requests)
    if longest > n_positions:
        raise UserError(
            f"a continuation of {longest} tokens is longer than the model's context of "
            f"{n_positions}: shorten it"
        )


class Rest(NamedTuple):
    """The tokens of a continuation that its group does not share: at least one."""

    place: int  # of the continuation among all of a batch
    row: int  # of its group
    tokens: list[int]


def score(
    model: GPT2, requests: Sequence[Sequence[Request]], tokens_at_once: int = TOKENS_AT_ONCE
) -> Iterator[tuple[int, list[Score]]]:
    """Score groups of requests, the longest first; yields the place of a group and its scores.

    About `tokens_at_once` tokens are read at a time. That and the sharing change scores by no more
    than rounding. Raises UserError for a continuation longer than the model's context, and where
    the logits are not finite.
    """
    for groups in in_batches(requests, model.config.n_positions, tokens_at_once):
        yield from score_batch(model, groups, tokens_at_once)


def in_batches(
    requests: Sequence[Sequence[Request]], n_positions: int, tokens_at_once: int
) -> Iterator[list[Group]]:
    """Groups of requests, the longest first, in batches of about as many tokens."""
    groups = [Group(i, group, n_positions) for i, group in enumerate(requests)]
    groups.sort(key=lambda group: len(group.shared), reverse=True)
    while groups:
        count, tokens = 0, 0
        # As many as fit, with what they share padded to the first one's length
        for group in groups:
            tokens += len(groups[0].shared) + sum(map(len, group.rest))
            if count and tokens > tokens_at_once:
                break
            count += 1
        yield groups[:count]
        del groups[:count]


def score_all(model: GPT2, requests: Sequence[Sequence[Request]]) -> list[list[Score]]:
    """`score`, in the order of the groups."""
    found = dict(score(model, requests))
    return [found[i] for i in range(len(requests))]


def score_batch(
    model: GPT2, groups: list[Group], tokens_at_once: int
) -> list[tuple[int, list[Score]]]:
    """Score groups that are read together: the place of each, and its scores.

    Raises UserError, before anything is allocated, where this machine lacks the memory for that.
    """
    lengths = [len(group.shared) for group in groups]
    own = [length + len(ids) for length, g in zip(lengths, groups, strict=True) for ids in g.rest]
    in_cache = min(sum(own), tokens_at_once) if any(any(group.rest) for group in groups) else 0
    check_memory_to_read(model, len(groups) * max(lengths), in_cache)
    keep_freed_memory()
    with no_grad(), no_dropout(), np.errstate(over="ignore", invalid="ignore"):
        try:
            states = _read(model, groups, tokens_at_once)  # a (n, C) for each continuation
        except NoCacheFits:
            say_once("note: no KV cache goes with this attention: beginnings are read repeatedly")
            states = _read(model, _apart(groups), tokens_at_once)
        labels = np.concatenate([ids for group in groups for ids in group.labels])
        log_probs, likeliest = token_scores(model, np.concatenate(states), labels)
    ends = np.cumsum([len(state) for state in states])[:-1]
    scores = map(Score, np.split(log_probs, ends), np.split(likeliest, ends))
    return [(group.index, [next(scores) for _ in group.labels]) for group in groups]


def _read(model: GPT2, groups: list[Group], tokens_at_once: int) -> list[Array]:
    """The hidden states from which the tokens of each continuation are predicted, each (n, C)."""
    lengths = np.array([len(group.shared) for group in groups])
    shared = padded([np.array(group.shared or [0]) for group in groups])  # (G, P)
    own = [(row, tokens) for row, group in enumerate(groups) for tokens in group.rest]
    unread = [Rest(place, row, tokens) for place, (row, tokens) in enumerate(own) if tokens]
    unread.sort(key=lambda rest: len(rest.tokens), reverse=True)

    cache = KVCache(model, *shared.shape) if unread else None
    common = model.hidden(shared, cache).data  # (G, P, C)
    states = [[common[row, : lengths[row]]] for row, _ in own]
    while unread and cache is not None:
        cache.lengths[:] = lengths  # without the padding
        part = unread[: _how_many(unread, lengths, model.config.n_positions, tokens_at_once)]
        tokens = padded([np.array(rest.tokens) for rest in part])  # (B, S)
        copies = _copies(model, cache, [rest.row for rest in part], tokens.shape[1])
        for rest, state in zip(part, model.hidden(tokens, copies).data, strict=True):
            states[rest.place].append(state[: len(rest.tokens)])  # (S, C)
        del unread[: len(part)]

    labels = (ids for group in groups for ids in group.labels)
    return [np.concatenate(parts)[-len(ids) :] for ids, parts in zip(labels, states, strict=True)]


def _apart(groups: list[Group]) -> list[Group]:
    """Each continuation as a group of its own, which shares nothing."""
    found = []
    for group in groups:
        for tokens, labels in zip(group.rest, group.labels, strict=True):
            found.append(one := copy.copy(group))
            one.shared, one.rest, one.labels = group.shared + tokens, [[]], [labels]
    return found


def _how_many(
    unread: list[Rest], lengths: np.ndarray, n_positions: int, tokens_at_once: int
) -> int:
    """How many of the unread, the longest of which comes first, fit into one batch: at least 1."""
    longest = 0  # tokens of a row: those of its group and, padded, its own
    for count, rest in enumerate(unread):
        longest = max(longest, int(lengths[rest.row]) + len(unread[0].tokens))
        if count and (longest > n_positions or (count + 1) * longest > tokens_at_once):
            return count
    return len(unread)


def _copies(model: GPT2, cache: KVCache, rows: list[int], more: int) -> KVCache:
    """A cache whose row i holds what row rows[i] of `cache` holds, with room for `more` tokens."""
    longest = int(cache.lengths[rows].max())
    copies = KVCache(model, len(rows), longest + more)
    source = cache.data[:, :, np.asarray(rows, like=cache.data), :, :longest]
    copies.data[:, :, :, :, :longest] = source
    copies.lengths[:] = cache.lengths[rows]
    return copies


def token_scores(model: GPT2, states: Array, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each label (N,), given the hidden state (N, C) before it: its log-probability, float64,
    and whether it is the likeliest token.

    Raises UserError where a logit is not a finite number.
    """
    labels = np.asarray(labels, like=states)
    log_probs, likeliest = [], []
    for start in range(0, len(labels), ROWS_AT_ONCE):
        label = labels[start : start + ROWS_AT_ONCE]
        logits = logits_of(model, states[start : start + ROWS_AT_ONCE])  # (rows, V)
        places = np.arange(len(label), like=label)
        best = logits.argmax(-1)
        logits -= logits[places, best][:, None]
        chosen = logits[places, label]
        total = np.exp(logits, out=logits).sum(-1)
        log_probs.append(chosen - np.log(total))
        likeliest.append(best == label)
    found = to_device(np.concatenate(log_probs), "cpu").astype(np.float64)
    check_finite(np.isfinite(found), model)
    return found, to_device(np.concatenate(likeliest), "cpu")


def logits_of(model: GPT2, states: Array) -> Array:
    """The logits (N, V) that the model's own `__call__` makes of hidden states (N, C), each alone.

    UserError for a class of one's own whose `__call__` does not begin with its `hidden`.
    """
    found = []

    def hidden(*_: object, **__: object) -> Tensor:
        found.append(Tensor(states[:, None]))
        return found[0]

    twin: Any = copy.copy(model)
    twin.hidden = hidden  # which does not read the ids again
    logits = twin(np.zeros((len(states), 1), int))
    if not found:
        raise UserError(
            f"{type(model).__name__}.__call__ does not call self.hidden, which an evaluation reads "
            "texts by: let it make its logits of self.hidden(ids, cache)"
        )
    return widened(logits.data)[:, 0]
