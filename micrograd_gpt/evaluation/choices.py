"""Which of several endings a model finds likeliest, and whether it knows a text's last word.

Accuracies equal those of lm-evaluation-harness on the same items: `acc`, `acc_norm` (an ending's
log-probability divided by its number of characters), and for last words `acc` (every token of the
word is the likeliest one) and `perplexity` (of a whole word).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from micrograd_gpt.evaluation.estimates import mean_and_error, perplexity
from micrograd_gpt.evaluation.items import Choice, LastWord, request_of
from micrograd_gpt.evaluation.records import Row
from micrograd_gpt.evaluation.running import ScoredTask
from micrograd_gpt.evaluation.scoring import Request, Score, check_lengths
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import about
from micrograd_gpt.text.base_tokenizer import Tokenizer

Item = TypeVar("Item", Choice, LastWord)
DELIMITER = " "  # between a context and what continues it


class ItemTask(ScoredTask, Generic[Item]):
    """Items of a file, each of which has a place there."""

    def __init__(self, items: Sequence[Item], tokenizer: Tokenizer) -> None:
        self.items: Sequence[Item] = items
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.items)

    def check(self, model: GPT2) -> None:
        from tqdm import tqdm

        longest, too_long, unknown = model.config.n_positions, 0, 0
        bar = tqdm(self.items, desc="checking", unit=self.unit, delay=1, disable=None)
        for number, item in enumerate(bar):
            requests = self.requests(number)
            with about(item.place):
                check_lengths(requests, longest)
            texts = [request.context + request.continuation for request in requests]
            too_long += any(len(ids) > longest + 1 for ids in texts)
            unknown += any(map(self.tokenizer.count_unknown, texts))
        self.tell(self.unit, too_long, longest, unknown)


class ChoiceTask(ItemTask[Choice]):
    """Multiple choice: the ending that has the highest log-probability is the model's answer."""

    def requests(self, item: int) -> list[Request]:
        choice = self.items[item]
        with about(choice.place):
            return [
                request_of(choice.context, DELIMITER + ending, self.tokenizer)
                for ending in choice.endings
            ]

    def row(self, item: int, scores: Sequence[Score]) -> Row:
        choice = self.items[item]
        log_probs = [score.log_prob for score in scores]
        # HellaSwag's endings may have been headings and nothing else
        lengths = [max(1, len(ending)) for ending in choice.endings]
        return {
            "label": choice.label,
            "answer": int(np.argmax(log_probs)),
            "answer_by_length": int(np.argmax(np.divide(log_probs, lengths))),
            "log_probs": log_probs,
        }

    def report(self, rows: Sequence[Row]) -> Row:
        accuracy, error = mean_and_error([row["answer"] == row["label"] for row in rows])
        by_length, error_by_length = mean_and_error(
            [row["answer_by_length"] == row["label"] for row in rows]
        )
        return {
            "items": len(rows),
            "accuracy": accuracy,
            "accuracy_stderr": error,
            "accuracy_by_length": by_length,
            "accuracy_by_length_stderr": error_by_length,
            "accuracy_by_chance": float(np.mean([1 / len(row["log_probs"]) for row in rows])),
        }


class LastWordTask(ItemTask[LastWord]):
    """The last word of a text: right if greedy decoding would write it."""

    def requests(self, item: int) -> list[Request]:
        text = self.items[item]
        with about(text.place):
            return [request_of(text.context, DELIMITER + text.word, self.tokenizer)]

    def row(self, item: int, scores: Sequence[Score]) -> Row:
        (score,) = scores
        word = self.items[item].word
        is_known = not self.tokenizer.count_unknown(self.tokenizer.encode(word))
        return {"word": word, "right": score.is_greedy and is_known, "log_prob": score.log_prob}

    def report(self, rows: Sequence[Row]) -> Row:
        accuracy, error = mean_and_error([row["right"] for row in rows])
        nats, nats_error = mean_and_error([-row["log_prob"] for row in rows])
        return {
            "items": len(rows),
            "accuracy": accuracy,
            "accuracy_stderr": error,
            "perplexity": perplexity(nats),
            "nats_per_word": nats,
            "nats_per_word_stderr": nats_error,
        }
