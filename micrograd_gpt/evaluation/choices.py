"""Which of several endings a model finds likeliest, and whether it knows a text's last word.

Accuracies equal those of lm-evaluation-harness on the same items: `acc`, `acc_norm` (an ending's
log-probability divided by its number of characters), and for last words `acc` (every token of the
word is the likeliest one) and `perplexity` (of a whole word).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from micrograd_gpt.evaluation.estimates import mean_and_error, perplexity
from micrograd_gpt.evaluation.items import Choice, LastWord, request_of
from micrograd_gpt.evaluation.records import Row
from micrograd_gpt.evaluation.running import ScoredTask
from micrograd_gpt.evaluation.scoring import Request, Score
from micrograd_gpt.support.errors import about
from micrograd_gpt.text.base_tokenizer import Tokenizer

DELIMITER = " "  # between a context and what continues it


class ChoiceTask(ScoredTask):
    """Multiple choice: the ending that has the highest log-probability is the model's answer."""

    def __init__(self, items: Sequence[Choice], tokenizer: Tokenizer) -> None:
        self.items, self.tokenizer = items, tokenizer

    def __len__(self) -> int:
        return len(self.items)

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
        lengths = [len(ending) for ending in choice.endings]
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


class LastWordTask(ScoredTask):
    """The last word of a text: right if greedy decoding would write it."""

    def __init__(self, items: Sequence[LastWord], tokenizer: Tokenizer) -> None:
        self.items, self.tokenizer = items, tokenizer

    def __len__(self) -> int:
        return len(self.items)

    def requests(self, item: int) -> list[Request]:
        text = self.items[item]
        with about(text.place):
            return [request_of(text.context, DELIMITER + text.word, self.tokenizer)]

    def row(self, item: int, scores: Sequence[Score]) -> Row:
        (score,) = scores
        word = self.items[item].word
        return {"word": word, "right": score.is_greedy, "log_prob": score.log_prob}

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
