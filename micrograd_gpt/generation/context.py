"""What a model has read: the window through which it sees a text, and the KV cache behind it."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import to_device
from micrograd_gpt.arrays.memory import check_room, keep_freed_memory
from micrograd_gpt.arrays.precision import compute_dtype, widened
from micrograd_gpt.arrays.stand_ins import definition
from micrograd_gpt.generation.filters import likeliest
from micrograd_gpt.generation.kv_cache import KVCache, NoCacheFits, bytes_of_cache
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.nn import no_dropout
from micrograd_gpt.support.cli import counted, say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Array, no_grad

TOKENS_AT_ONCE = 2048  # of several prompts together: what a model computes for them takes memory
FLOATS = 12  # of n_embd numbers each that a forward pass keeps for a token, at most: measured
BYTES_OF_TEXT = 5000  # that Python takes for each text: its random numbers, decoder and lists


@definition
def next_logits(cache: KVCache, model: GPT2, ids: np.ndarray) -> Array:
    """The logits after the last of the tokens ids (B, T) that follow those in the cache: (B, 1, V),
    on the model's device. The cache then holds T tokens more in each row."""
    return model(ids, cache, last_only=True).data


def window_start(length: int, n_positions: int) -> int:
    """Where the window on a text of `length` tokens begins; it ends where the text ends.

    A text of up to `n_positions` tokens is seen whole. On a longer text the window moves in hops of
    a quarter of `n_positions`, and no further than it must: each move gives every token another
    position, so the cache has to be filled anew.
    """
    hop = max(1, n_positions // 4)
    too_many = max(0, length - n_positions)
    return -(-too_many // hop) * hop


@dataclass(kw_only=True)
class Continuation:
    """A prompt and what follows it so far.

    `stopped` is None while it goes on and then says why it ended: "end-of-text", "length"
    (`max_new_tokens` were added), "no token left" (each would repeat an n-gram), or what the caller
    set, such as "stop" or "interrupted".
    """

    ids: list[int]  # the prompt's tokens and the new ones
    n_prompt: int
    log_probs: list[float] = field(default_factory=list)  # the model's, of the new ones
    stopped: str | None = None
    seconds: float = 0.0  # from the start of decoding to the latest token

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.n_prompt :]


class Context:
    """Several texts that a model reads as they grow, each in a row of its KV cache.

    `logits` takes the texts as they are now. The part of a text that its row already holds is not
    read again, and what the row holds beyond it (guesses that were wrong) is forgotten. Without a
    cache, also where an attention of one's own does not go with one, the model reads each window
    from its start every time: slow, with the same logits. How many texts and tokens are read at
    once changes logits by no more than rounding.

    Args:
        rows: the most texts there will be.
        longest: the most tokens a text will have. The cache has room for that many, but for no more
            than `n_positions`.

    Raises UserError where there is no memory for the cache.
    """

    def __init__(self, model: GPT2, rows: int, longest: int, use_cache: bool = True) -> None:
        keep_freed_memory()  # a long prompt allocates the same large arrays in every block
        self.model, self.n_positions = model, model.config.n_positions
        capacity = min(longest, self.n_positions)
        try:
            self.cache = _allocate(model, rows, capacity) if use_cache else None
        except NoCacheFits:
            self._go_without_cache()
        self.starts = [0] * rows  # where the window of each row begins in its text

    def room(self, text: list[int]) -> int:
        """How many tokens can be added to `text` before its window moves."""
        return window_start(len(text), self.n_positions) + self.n_positions - len(text)

    def logits(self, texts: list[list[int]], count: int = 1) -> np.ndarray:
        """The logits after each of the last `count` tokens of each text: (B, count, V).

        No text may be empty, and all `count` tokens are seen through the window of the whole text.
        Raises UserError where the logits are not finite numbers.
        """
        logits = to_device(self._logits_on_device(texts, count), "cpu")
        check_finite(np.isfinite(logits), self.model)
        return logits

    def likeliest(
        self, texts: list[list[int]], count: int = 1, vocab_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens at the places of `logits`, and their log-probabilities: (B, count).

        Tokens are chosen among the first `vocab_size` ids. On a GPU no more than these two come
        back to Python. Raises UserError as `logits` does.
        """
        logits = self._logits_on_device(texts, count)
        tokens, log_probs, finite = to_device(likeliest(logits, vocab_size), "cpu")
        check_finite(finite, self.model)
        return tokens.astype(int), log_probs

    def _logits_on_device(self, texts: list[list[int]], count: int) -> Array:
        # In a context of its own, so that nothing stays switched off if Ctrl-C comes at any moment
        try:
            return widened(contextvars.copy_context().run(self._model_logits, texts, count))
        except NoCacheFits:
            self._go_without_cache()
            return self._logits_on_device(texts, count)

    def _go_without_cache(self) -> None:
        say_once("note: no KV cache goes with this attention: decoding is slower without one")
        self.cache = None

    def _model_logits(self, texts: list[list[int]], count: int) -> Array:
        with no_grad(), no_dropout(), np.errstate(over="ignore", invalid="ignore"):
            if self.cache is None:
                return np.stack([self._read(text, count) for text in texts])
            if len(texts) == 1 and count == 1:  # everything that is unread, in one go
                (unread,) = self._unread(texts, count)
                ids = np.array([[*unread, texts[0][-1]]])
                return next_logits(self.cache.rows(0, 1), self.model, ids)
            self._prepare(texts, count)
            last = np.array([text[len(text) - count :] for text in texts])  # (B, count)
            cache = self.cache.rows(0, len(texts))
            if count == 1:
                return next_logits(cache, self.model, last)
            return self.model(last, cache).data

    def keep(self, rows: list[int], shared: int = 0) -> None:
        """Let row i continue the text of row rows[i]; the first `shared` tokens agree in all."""
        starts = [self.starts[row] for row in rows]
        if self.cache is not None and rows:
            alike = starts == self.starts[: len(rows)]
            self.cache.copy_rows(rows, since=max(0, shared - starts[0]) if alike else 0)
        self.starts[: len(rows)] = starts

    def _read(self, text: list[int], count: int) -> Array:
        """Logits at the last `count` positions of one text, without the cache: (count, V)."""
        window = text[window_start(len(text), self.n_positions) :]
        return self.model(np.array([window]), last_only=count == 1).data[0, -count:]

    def _unread(self, texts: list[list[int]], count: int) -> list[list[int]]:
        """The tokens in each text's window that its row does not hold, without the last `count`.
        What the row holds beyond those, of other tokens or of another window, it forgets."""
        assert self.cache is not None
        lengths, starts, unread = self.cache.lengths[: len(texts)].tolist(), [], []
        for row, text in enumerate(texts):
            start, end = window_start(len(text), self.n_positions), len(text) - count
            lengths[row] = min(lengths[row], end - start) if start == self.starts[row] else 0
            starts.append(start)
            unread.append(text[start + lengths[row] : end])
        self.cache.lengths[: len(texts)], self.starts[: len(texts)] = lengths, starts
        return unread

    def _prepare(self, texts: list[list[int]], count: int) -> None:
        """Fill each row's cache with its text, from the start of the window, without the last
        `count` tokens. Neighbours of which equally many tokens are unread are read as one batch."""
        assert self.cache is not None
        unread = self._unread(texts, count)
        row = 0
        while row < len(texts):
            new, end = unread[row], row + 1
            if new and row and texts[row] == texts[row - 1]:  # several samples of one prompt
                while end < len(texts) and texts[end] == texts[row]:
                    end += 1
                self.cache.rows(row - 1, end).copy_rows([0] * (1 + end - row))
            elif new:
                most = min(len(texts), row + TOKENS_AT_ONCE // len(new))
                while end < most and len(unread[end]) == len(new) and texts[end] != texts[end - 1]:
                    end += 1
                self.model.hidden(np.array(unread[row:end]), self.cache.rows(row, end))
            row = end


def check_finite(finite: np.ndarray, model: Any) -> None:
    """UserError unless all of a model's logits are finite numbers."""
    if finite.all():
        return
    if compute_dtype(model.transformer.wte.weight) == np.float16:
        raise UserError(
            "the model's logits are not finite in float16, whose largest number is 65,504: try "
            "bfloat16 or float32"
        )
    raise UserError(
        "the model's logits are not finite: its weights are damaged, or its training diverged, or "
        "a layer that was edited gives NaN"
    )


def check_memory(
    model: GPT2,
    rows: int,
    longest: int,
    use_cache: bool = True,
    advice: str = "lower num_samples, num_beams or max_new_tokens",
) -> None:
    """UserError if this machine has no memory to decode as many texts at once, of up to `longest`
    tokens each; before anything is allocated."""
    c = model.config
    capacity = min(longest, c.n_positions)
    logits = 2 * 4 * c.vocab_size  # in float32, and what choosing a token makes of them
    python = rows * (BYTES_OF_TEXT + logits)
    cache = bytes_of_cache(model, rows, capacity) if use_cache else 0
    where = f"{counted(rows, 'text')} of {counted(capacity, 'token')}"
    on_cpu = model.transformer.wte.weight.device == "cpu"
    check_room(python + (cache if on_cpu else 0), f"{where} at once", advice)


def check_memory_to_read(model: Any, tokens: int, in_cache: int = 0) -> None:
    """UserError if this machine has no memory to read as many tokens at once, and to keep both
    them and `in_cache` tokens in KV caches if that is not 0.
    """
    if model.transformer.wte.weight.device != "cpu":  # which says itself that it is full
        return
    size = 4 * FLOATS * model.config.n_embd * tokens
    if in_cache:
        size += bytes_of_cache(model, 1, tokens + in_cache)
    check_room(size, f"{tokens + in_cache:,} tokens at once", "lower --batch-size")


def _allocate(model: GPT2, rows: int, capacity: int) -> KVCache:
    try:
        return KVCache(model, rows, capacity)
    except UserError:
        raise
    except (MemoryError, ValueError):  # ValueError: more than an array can have at all
        size = bytes_of_cache(model, rows, capacity) / 1e9
        raise UserError(
            f"no memory for a KV cache of {size:,.1f} GB: lower num_samples or num_beams"
        ) from None
