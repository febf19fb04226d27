"""Learning to label texts, as a task for the loop in finetune_gpt2.py; and labelling them.

B batch   T time (tokens)   N labels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from micrograd_gpt.arrays.devices import to_device
from micrograd_gpt.generation.context import check_finite, check_memory_to_read
from micrograd_gpt.nn import no_dropout
from micrograd_gpt.runs.fingerprint import fingerprint
from micrograd_gpt.support.cli import counted, say, say_once
from micrograd_gpt.support.errors import UserError, about
from micrograd_gpt.tensor import Tensor, no_grad
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.tuning.batches import by_length, padded
from micrograd_gpt.tuning.classifier import GPT2Classifier
from micrograd_gpt.tuning.labelled import Example, Parts, label_numbers
from micrograd_gpt.tuning.scores import Scores, score

Array = np.ndarray


@dataclass(frozen=True)
class TextBatch:
    """Texts padded on the right, their lengths in tokens, and the numbers of their labels."""

    ids: Array  # (B, T)
    lengths: Array  # (B,)
    labels: Array  # (B,)

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids, each with at least one token, and the numbers of their labels."""

    ids: list[Array]
    labels: Array  # (texts,)

    @property
    def lengths(self) -> Array:
        return np.array([len(ids) for ids in self.ids])


class Classification:
    """Texts with labels to learn from, `train`, to choose a checkpoint by, and for final scores.

    Texts of more than `longest` tokens are cut off there, which is said on stderr. Raises UserError
    for a text that the tokenizer cannot express.
    """

    unit = "text"

    def __init__(
        self,
        parts: Parts,
        tokenizer: Tokenizer,
        longest: int,
        batch_size: int,
        name: str,
        balance: bool = False,
    ) -> None:
        self.tokenizer, self.name, self.batch_size = tokenizer, name, batch_size
        self.label_names = parts.labels
        self.train, self.validation, self.test = (
            Encoded(encode(part, tokenizer, longest, what), label_numbers(part, parts.labels))
            for part, what in zip(parts[:3], ("training", "validation", "test"), strict=True)
        )
        tokenizer.tell_unknown(np.concatenate(self.train.ids), "the training texts")
        self.lengths = self.train.lengths
        self.kinds = self.train.labels if balance else None

    def amount(self) -> str:
        return f"{counted(len(self.lengths), 'text')} of {self.name}"

    def fingerprint(self) -> str:
        parts = (self.train, self.validation)
        streams = [[*part.ids, part.lengths, part.labels] for part in parts]
        return " and ".join(fingerprint(np.concatenate(stream)) for stream in streams)

    def batch(self, examples: Array) -> TextBatch:
        return text_batch(self.train, examples)

    def loss(self, model: GPT2Classifier, batch: TextBatch) -> Tensor:
        return model.loss(batch.ids, batch.lengths, batch.labels)

    def evaluate(self, model: GPT2Classifier) -> dict[str, float]:
        """Mean loss in nats per text, and accuracy, on the validation texts."""
        log_probs = label_log_probs(model, self.validation.ids, self.batch_size)
        labels = self.validation.labels
        right = log_probs.argmax(1) == labels
        loss = -log_probs[np.arange(len(labels)), labels].mean()
        return {"val_loss": float(loss), "val_accuracy": float(right.mean())}

    def scores(self, model: GPT2Classifier, part: Encoded) -> Scores:
        given = label_log_probs(model, part.ids, self.batch_size).argmax(1)
        return score(part.labels, given, self.label_names)


def encode(
    examples: Sequence[Example], tokenizer: Tokenizer, longest: int, what: str
) -> list[Array]:
    """The examples' texts as token ids, at most `longest` each; says how many were cut off."""
    encoded, cut = [], 0
    for example in examples:
        with about(example.place):
            ids = tokenizer.encode(example.text)
        if not len(ids):
            raise UserError(f"{example.place}: the text has no tokens: remove the example")
        cut += len(ids) > longest
        encoded.append(ids[:longest])
    if cut:
        texts = f"{cut:,} of {len(encoded):,} {what} texts"
        say(f"note: {texts} are cut off after {counted(longest, 'token')}")
    return encoded


def text_batch(texts: Encoded, numbers: Array) -> TextBatch:
    """The texts with these numbers as a batch."""
    chosen = [texts.ids[i] for i in numbers]
    return TextBatch(padded(chosen), np.array([*map(len, chosen)]), texts.labels[numbers])


def label_log_probs(model: GPT2Classifier, ids: Sequence[Array], batch_size: int) -> Array:
    """Log-probabilities of the labels for texts of token ids, (texts, N) float64, on the CPU."""
    lengths = np.array([*map(len, ids)])
    log_probs = np.empty((len(ids), len(model.labels)))
    with no_grad(), no_dropout(), tqdm(total=len(ids), unit="text", delay=1, disable=None) as bar:
        for numbers in by_length(lengths, batch_size):
            batch = padded([ids[i] for i in numbers])
            logits = to_device(model(batch, lengths[numbers]).data, "cpu").astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            log_probs[numbers] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            bar.update(len(numbers))
    return log_probs


def checked_log_probs(model: GPT2Classifier, ids: Sequence[Array], batch_size: int) -> Array:
    """`label_log_probs` of a model whose training is over. UserError, before anything is allocated,
    where this machine lacks the memory for a batch, and where logits are not finite numbers."""
    lengths = np.array([*map(len, ids)])
    batches = [lengths[numbers] for numbers in by_length(lengths, batch_size)]
    check_memory_to_read(model, max(len(batch) * int(batch.max()) for batch in batches))
    with np.errstate(over="ignore", invalid="ignore"):
        log_probs = label_log_probs(model, ids, batch_size)
    check_finite(np.isfinite(log_probs), model)
    return log_probs


def label_texts(
    model: GPT2Classifier, examples: Sequence[Example], tokenizer: Tokenizer, batch_size: int
) -> Iterator[dict[str, Any]]:
    """For each text its most likely label and the probabilities of all, as JSON objects."""
    for start in range(0, len(examples), 64 * batch_size):  # results come while more is computed
        some = examples[start : start + 64 * batch_size]
        ids = encode(some, tokenizer, model.longest, "given")
        if tokenizer.count_unknown(np.concatenate(ids)):
            say_once(
                "note: the given texts have words that the tokenizer does not know, all as one"
            )
        for example, row in zip(some, checked_log_probs(model, ids, batch_size), strict=True):
            probabilities = dict(zip(model.labels, np.exp(row).tolist(), strict=True))
            label = model.labels[int(row.argmax())]
            yield {"text": example.text, "label": label, "probabilities": probabilities}
