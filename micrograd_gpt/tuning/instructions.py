"""Learning to follow instructions, as a task for the loop in finetune_gpt2.py.

An example is a conversation as tokens: for each turn the prompt, which the template makes of the
instruction, then the answer, and end-of-text. The loss is on the answers alone.

B batch   T time (tokens of the longest example, less the last)   N tokens that count   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.layers import IGNORE
from micrograd_gpt.nn import no_dropout
from micrograd_gpt.runs.checkpoint import BEST
from micrograd_gpt.runs.fingerprint import fingerprint
from micrograd_gpt.support.cli import command, counted, quoted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor, no_grad
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.tuning.batches import by_length, padded
from micrograd_gpt.tuning.conversations import Conversation, Turn
from micrograd_gpt.weights.saving import write_model

Array = np.ndarray
SHOWN = 3  # instructions, with the model's answers, when the run is complete


class Example(NamedTuple):
    """A conversation as tokens: `ids` int32, and which of them count for the loss, both (T + 1,).

    The model reads all but the last, and is to predict all but the first.
    """

    ids: Array
    counted: Array


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right, where causal attention lets no other token see the padding."""

    ids: Array  # (B, T)
    targets: Array  # (B, T), IGNORE where nothing counts
    tokens: int  # without the padding

    @property
    def count(self) -> int:
        return int((self.targets != IGNORE).sum())


def batch_of(examples: Sequence[Example]) -> Batch:
    """Some examples as a batch."""
    targets = [np.where(e.counted, e.ids, IGNORE)[1:] for e in examples]
    ids = [example.ids[:-1] for example in examples]
    return Batch(padded(ids), padded(targets, IGNORE), sum(map(len, ids)))


class Instructions:
    """Conversations to learn from, `train`, and to choose a checkpoint by, `validation`.

    Those of more than `longest` tokens are left out, and those in which an answer is empty, which
    is said on stderr. Raises UserError where none is left, for a text that the tokenizer cannot
    express or the template has no place for, and for a tokenizer without end-of-text.
    """

    unit = "token"
    kinds = None

    def __init__(
        self,
        train: Sequence[Conversation],
        validation: Sequence[Conversation],
        template: Template,
        tokenizer: Tokenizer,
        longest: int,
        batch_size: int,
        loss_on: str,
        name: str,
    ) -> None:
        end_of_text(tokenizer)  # said before a text is found that the tokenizer cannot express
        self.template, self.tokenizer, self.name = template, tokenizer, name
        self.batch_size, self.val_loss = batch_size, math.nan
        self.shown = [conversation[0] for conversation in validation[:SHOWN]]
        self.train, self.validation = (
            encode_all(part, template, tokenizer, longest, what, loss_on)
            for part, what in ((train, "training"), (validation, "validation"))
        )
        self.lengths = _lengths(self.train)

    def amount(self) -> str:
        learned = sum(int(example.counted[1:].sum()) for example in self.train)
        total = f"{int(self.lengths.sum()):,} tokens, of which {learned:,} count"
        return f"{counted(len(self.train), 'example')} of {self.name}, {total}"

    def fingerprint(self) -> str:
        parts = (self.train, self.validation)
        streams = [[x for example in part for x in example] for part in parts]
        return " and ".join(fingerprint(np.concatenate(stream)) for stream in streams)

    def batch(self, examples: Array) -> Batch:
        return batch_of([self.train[i] for i in examples])

    def loss(self, model: GPT2, batch: Batch) -> Tensor:
        return model.loss(batch.ids, batch.targets)

    def evaluate(self, model: GPT2) -> dict[str, float]:
        """The mean loss in nats over the tokens that count in all validation examples."""
        total = count = 0.0
        with no_grad(), no_dropout():
            for numbers in by_length(_lengths(self.validation), self.batch_size):
                batch = batch_of([self.validation[i] for i in numbers])
                total += model.loss(batch.ids, batch.targets).item() * batch.count
                count += batch.count
        self.val_loss = total / count
        return {"val_loss": self.val_loss}

    def report(self, model: GPT2, out: str) -> str:
        """What a complete run in the folder `out` ends with: some validation instructions with the
        model's answers, and the latest loss.
        """
        lines = []
        for turn in self.shown:
            lines.append(f"instruction: {turn.instruction}")
            lines += [f"input: {turn.input}"] if turn.input else []
            lines += [f"answer: {self.answer(model, turn)}", f"expected: {turn.output}", ""]
        perplexity = math.exp(min(self.val_loss, 700))  # the largest power that is a float
        lines += [
            f"validation loss {self.val_loss:.4f} nats per token, perplexity {perplexity:.2f}",
            f"saved in {out}/: the model and the run, metrics.jsonl, loss.png",
            f"{out}/{BEST} has the lowest validation loss",
            f'try: {command("generate.py")} --model {quoted(out)} --instruction "…"',
        ]
        return "\n".join(lines)

    def answer(self, model: GPT2, turn: Turn) -> str:
        """The model's likeliest answer to the instruction of a turn."""
        prompt = self.template.prompt(turn.instruction, turn.input, turn.system)
        ids, end = self.tokenizer.encode(prompt), end_of_text(self.tokenizer)
        size = self.tokenizer.vocab_size
        text = model.generate(
            ids, max_new_tokens=100, temperature=0, end_of_text=end, vocab_size=size
        )
        return self.tokenizer.decode([token for token in text[len(ids) :] if token != end])

    def write(
        self,
        model: GPT2,
        folder: str | Path,
        tokenizer: Tokenizer,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Write the model, its tokenizer and the template into a folder."""
        write_model(model, folder, tokenizer, metadata=metadata)
        save_template(self.template, folder)


def _lengths(examples: Sequence[Example]) -> Array:
    """How many tokens of each example a model reads."""
    return np.array([len(example.ids) - 1 for example in examples])


# --------------------------------------------------------------------------------- from text to ids


def encode(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, loss_on: str = "answers"
) -> Example:
    """A conversation as tokens, of which the answers' count, end-of-text among them.

    With `loss_on="all"` all tokens count.
    """
    ids, counted = list[Array](), list[Array]()
    for turn in conversation:
        prompt = tokenizer.encode(template.prompt(turn.instruction, turn.input, turn.system))
        answer = np.append(tokenizer.encode(turn.output), np.int32(end_of_text(tokenizer)))
        ids += [prompt, answer]
        counted += [np.full(len(prompt), loss_on == "all"), np.full(len(answer), turn.counts)]
    return Example(np.concatenate(ids), np.concatenate(counted))


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends an answer; UserError where the tokenizer has none."""
    if tokenizer.end_of_text is None:
        raise UserError(
            f"the {tokenizer.name} tokenizer has no end-of-text token, which ends an answer: tune "
            "a model with another tokenizer, such as gpt2 or byte"
        )
    return tokenizer.end_of_text


def encode_all(
    conversations: Sequence[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    longest: int,
    what: str,
    loss_on: str = "answers",
) -> list[Example]:
    """The conversations as tokens, without those that `Instructions` leaves out; says how many.

    A model reads at most `longest` tokens of each: all but the last. `what` they are for is part of
    what is said.
    """
    with_outputs = [c for c in conversations if all(turn.output for turn in c)]
    answered = [c for c in with_outputs if any(turn.counts for turn in c)]
    own = ", or give a --validation FILE of its own" if what == "validation" else ""
    if not answered:
        raise UserError(
            f"no {what} example has an output that counts: remove those without, or add others{own}"
        )
    bar = tqdm(answered, desc="tokenizing", unit="example", delay=1, disable=None)
    encoded = [encode(conversation, template, tokenizer, loss_on) for conversation in bar]
    ids = np.concatenate([example.ids for example in encoded])
    tokenizer.tell_unknown(ids, f"the {what} examples and their template")
    lengths = _lengths(encoded)
    if lengths.min() > longest:
        raise UserError(
            f"all {what} examples are too long: the shortest has {lengths.min():,} tokens where "
            f"{longest:,} fit; give shorter ones, or a model of more context (and leave out a "
            f"--block-size below it){own}"
        )
    for count, why in (
        (len(conversations) - len(with_outputs), "have an empty output"),
        (len(with_outputs) - len(answered), "have only answers of weight 0"),
        (int((lengths > longest).sum()), f"are longer than {counted(longest, 'token')}"),
    ):
        if count:
            say(f"note: {count:,} of {len(conversations):,} {what} examples {why}: left out")
    return [example for example in encoded if len(example.ids) - 1 <= longest]
