"""Perplexity: how well a model predicts a text that is longer than its context.

A window slides over the text in steps of `stride` tokens. Each token is scored once, by the first
window that it is in, with the tokens before it in that window as its context; the first token of
the text has none, and is not scored. This is what Transformers' guide "Perplexity of fixed-length
models" does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from micrograd_gpt.evaluation.estimates import perplexity, ratio_and_error
from micrograd_gpt.evaluation.records import Row
from micrograd_gpt.evaluation.running import ScoredTask
from micrograd_gpt.evaluation.scoring import Request, Score
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.corpus import encode_documents
from micrograd_gpt.text.documents import SUFFIXES
from micrograd_gpt.text.shard_files import MANIFEST, find_shards

BEGINNING = 4096  # bytes


class Window(NamedTuple):
    """A piece of a text, begin … end-1, of which the tokens from `scored` on are scored."""

    begin: int
    scored: int
    end: int


def sliding_windows(length: int, width: int, stride: int) -> list[Window]:
    """Windows of `width` tokens (the last may have fewer) on a text of `length` tokens.

    Raises UserError unless 1 <= stride < width: with longer steps, a window's first token would
    have no context.
    """
    if width < 2:
        raise UserError("a window has 2 tokens or more, one to score and its context: not 1")
    if not 1 <= stride < width:
        raise UserError(
            f"the stride is {stride} and a window has {width} tokens, of which the first has no "
            f"context to score it by: give a --stride from 1 to {width - 1}"
        )
    windows, scored = [], 1
    for begin in range(0, length, stride):
        end = min(begin + width, length)
        if scored < end:
            windows.append(Window(begin, scored, end))
        scored = end
    return windows


class PerplexityTask(ScoredTask):
    """The windows on a text, whose documents are joined as for training.

    Args:
        documents: the text as it is to be read.
        originals: the documents before they were detokenized, in which bytes and words are counted
            (as lm-evaluation-harness does), so that figures of different ways to read a text can be
            compared.
        width: tokens of a window.
        limit: how many windows to score, from the first; None: all.
        special_tokens: whether `<|endoftext|>` in a text is the token.

    Raises UserError for a text of fewer than two tokens, and what `sliding_windows` raises.
    """

    unit = "window"

    def __init__(
        self,
        documents: list[str],
        originals: list[str],
        tokenizer: Tokenizer,
        width: int,
        stride: int,
        limit: int | None = None,
        special_tokens: bool = False,
    ) -> None:
        self.ids = encode_documents(documents, tokenizer, special_tokens)  # (N,)
        if len(self.ids) < 2:
            raise UserError("the text has a single token, and the first is not scored: give more")
        self.windows = sliding_windows(len(self.ids), width, stride)[:limit]
        self.tokenizer = tokenizer
        is_whole = not tokenizer.count_unknown(self.ids)
        size = sum(len(text.encode("utf-8")) for text in originals)
        self.bytes_per_token = size / len(self.ids) if is_whole else None
        words = sum(len(text.split()) for text in originals)
        self.words_per_token = words / len(self.ids) if is_whole and words else None

    def __len__(self) -> int:
        return len(self.windows)

    def check(self, model: GPT2) -> None:
        self.tokenizer.tell_unknown(self.ids, "the text")

    def requests(self, item: int) -> list[Request]:
        begin, scored, end = self.windows[item]
        return [Request(self.ids[begin:scored].tolist(), self.ids[scored:end].tolist())]

    def row(self, item: int, scores: Sequence[Score]) -> Row:
        (score,) = scores
        return {
            "tokens": len(score.log_probs),
            "log_prob": score.log_prob,
            "likeliest": int(score.likeliest.sum()),
        }

    def report(self, rows: Sequence[Row]) -> Row:
        """The results: nats per token, and what follows from it.

        Per byte and per word they are worked out with the bytes and words that a token has on
        average in the whole text; they are None where the tokenizer does not know all of its words.
        A perplexity that no float can hold is None too.
        """
        counts = [row["tokens"] for row in rows]
        nats, error = ratio_and_error([-row["log_prob"] for row in rows], counts)
        accuracy, accuracy_error = ratio_and_error([row["likeliest"] for row in rows], counts)
        of_bytes, of_words = self.bytes_per_token, self.words_per_token
        return {
            "windows": len(rows),
            "tokens": sum(counts),
            "nats_per_token": nats,
            "nats_per_token_stderr": error,
            "perplexity": perplexity(nats),
            "word_perplexity": None if of_words is None else perplexity(nats / of_words),
            "bits_per_byte": None if of_bytes is None else nats / math.log(2) / of_bytes,
            "next_token_accuracy": accuracy,
            "next_token_accuracy_stderr": accuracy_error,
        }


def check_no_shards(source: str) -> None:
    """UserError for a source that has no text, but the tokens of one; a file of any name is a text
    if it has no null bytes, as shards have, or begins as find_shards says that a text does."""
    path = Path(source)
    if path.is_file():
        with reading(path), open(path, "rb") as file:
            has_text = b"\0" not in file.read(BEGINNING)
    else:
        files = (file for file in path.rglob("*") if file.name != MANIFEST)
        has_text = any(file.suffix.lower() in SUFFIXES for file in files)
    if not has_text and find_shards(source) is not None:
        raise UserError(
            f"{source} holds token shards, whose bytes and words cannot be counted: give the text "
            "that they were made from"
        )


def window_size(model: GPT2, asked: int | None) -> int:
    """The tokens of a window: the model's context, or fewer; UserError for more."""
    longest = model.config.n_positions
    if asked is not None and asked > longest:
        raise UserError(f"a window has at most {longest} tokens, the model's context, not {asked}")
    return asked or longest
