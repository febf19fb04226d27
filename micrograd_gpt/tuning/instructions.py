"""Instructions and their answers: from a file to batches, and the loss on the answers alone.

    conversation   turns, each an instruction and its answer; most files have one turn each
    example        a conversation as tokens, and which of them count for the loss

Shapes: N tokens of an example, B examples of a batch, T tokens of its longest one less the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.layers import IGNORE
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.template import Template
from micrograd_gpt.variants import VariantGPT2

LOSS_ON = ("answers", "all")  # which tokens are learned
POOL = 50  # batches whose examples are sorted by length together


class Turn(NamedTuple):
    """One instruction and its answer; the input and the system message may be empty."""

    instruction: str
    output: str
    input: str = ""
    system: str = ""


Conversation = Sequence[Turn]


# ------------------------------------------------------------------------------------ from a file


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations in a file: a JSON list, or in a .jsonl file an object on each line.

    An object has either `instruction`, `output` and perhaps `input`, or `messages`: objects with a
    `role` (system, which may come first; then user and assistant in turns) and a `content`.

    Raises UserError, naming the file and the example, for anything else.
    """
    conversations = [_conversation(value, where) for where, value in _values(Path(path))]
    if not conversations:
        raise UserError(f"{path} has no examples: give instructions with their outputs")
    return conversations


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values in a file, each with where it stands, for messages."""
    try:
        with reading(path):
            text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")
        return
    values = _parsed(text, str(path)) if text.strip() else []
    if not isinstance(values, list):
        raise UserError(
            f"{path} holds no list of examples: give a JSON list, or a .jsonl file with one "
            "example on each line"
        )
    yield from ((f"{path}, example {number}", value) for number, value in enumerate(values, 1))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: this cannot be read as JSON ({error}); correct it") from None


def _conversation(value: Any, where: str) -> Conversation:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object with an instruction and an output")
    if "messages" in value:
        return _turns(value["messages"], where)
    for name in ("instruction", "output"):
        if name not in value:
            found = ", ".join(value) or "none"
            raise UserError(f"{where} has no {name!r} (fields: {found}): each example needs one")
    instruction, output, input = (
        _text(value, n, where) for n in ("instruction", "output", "input")
    )
    return [_turn(where, instruction, output, input)]


def _turns(messages: Any, where: str) -> Conversation:
    """The turns that the messages of a conversation make up."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f"{where}: messages are a list of objects with a role and a content")
    roles = [message.get("role") for message in messages]
    texts = [_text(message, "content", where) for message in messages]
    for role in roles:
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}: unknown role {role!r}: it is system, user or assistant")
    first = 1 if roles[:1] == ["system"] else 0
    if not roles[first:] or roles[first:] != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            f"{where}: the roles are {', '.join(roles) or 'none'}; after a system message, if any, "
            "user and assistant take turns, and the last word is the assistant's"
        )
    pairs = zip(texts[first::2], texts[first + 1 :: 2], strict=True)
    turns = [_turn(where, user, answer) for user, answer in pairs]
    return [turns[0]._replace(system=texts[0]), *turns[1:]] if first else turns


def _turn(where: str, instruction: str, output: str, input: str = "") -> Turn:
    if not instruction:
        raise UserError(f"{where}: the instruction is empty")
    return Turn(instruction, output, input)


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    """The text of a field; an empty one where it is null or not there."""
    text = fields.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name!r} is {json.dumps(text)[:40]}, and must be a text")
    return text


# --------------------------------------------------------------------------------- from text to ids


class Example(NamedTuple):
    """A conversation as tokens: `ids` (N,) int32, and which of them count, `counted` (N,) bool."""

    ids: np.ndarray
    counted: np.ndarray


def encode(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, loss_on: str = "answers"
) -> Example:
    """A conversation as tokens: for each turn the prompt, the answer, and end-of-text.

    An answer's tokens count, end-of-text among them; with `loss_on="all"` all tokens do.
    """
    ids, counted = list[np.ndarray](), list[np.ndarray]()
    for turn in conversation:
        prompt = tokenizer.encode(template.prompt(turn.instruction, turn.input, turn.system))
        answer = np.append(tokenizer.encode(turn.output), np.int32(end_of_text(tokenizer)))
        ids += [prompt, answer]
        counted += [np.full(len(prompt), loss_on == "all"), np.ones(len(answer), bool)]
    return Example(np.concatenate(ids), np.concatenate(counted))


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends an answer; UserError where the tokenizer has none."""
    if tokenizer.end_of_text is None:
        raise UserError(
            f"the {tokenizer.name} tokenizer has no end-of-text token, which ends an answer: tune "
            "a model with another tokenizer, such as gpt2 or byte"
        )
    return tokenizer.end_of_text


class Encoded(NamedTuple):
    """What `encode_all` makes of a file, and how many conversations it left out, and why."""

    examples: list[Example]
    too_long: int
    unanswered: int


def encode_all(
    conversations: Sequence[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    block_size: int,
    loss_on: str = "answers",
) -> Encoded:
    """All conversations as tokens, without those that are longer than `block_size` tokens (beside
    the last end-of-text, which is only predicted), and without those that have an empty answer.

    Raises UserError where none is left, and for a text that cannot be encoded.
    """
    from tqdm import tqdm

    end_of_text(tokenizer)  # raises where there is none
    answered = [c for c in conversations if all(turn.output for turn in c)]
    if not answered:
        raise UserError("no example has an output: there is nothing to learn from")
    progress = tqdm(answered, desc="tokenizing", unit="example", delay=1, disable=None)
    encoded = [encode(conversation, template, tokenizer, loss_on) for conversation in progress]
    fitting = [example for example in encoded if len(example.ids) - 1 <= block_size]
    if not fitting:
        shortest = min(len(example.ids) for example in encoded) - 1
        raise UserError(
            f"all examples are longer than --block-size {block_size}: the shortest has {shortest} "
            "tokens, so give a larger --block-size, a model with a longer context, or shorter texts"
        )
    return Encoded(fitting, len(encoded) - len(fitting), len(conversations) - len(answered))


# -------------------------------------------------------------------------------------- to batches


class Batches:
    """Examples in batches of like length, so that little is padding.

    The examples of an epoch are shuffled, sorted by length within pools of POOL batches, cut into
    batches, and the batches shuffled. All that is a function of (seed, epoch), and so a batch one
    of (seed, number): a run is resumed by asking for its next batch. An epoch's last batch may be
    smaller. Padding is on the right, where causal attention lets no other token see it.
    """

    def __init__(self, examples: Sequence[Example], padding: int = 0) -> None:
        self.examples, self.padding = examples, padding
        self._lengths = np.array([len(example.ids) for example in examples])
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.examples)

    def per_epoch(self, batch_size: int) -> int:
        """How many batches an epoch has."""
        return -(-len(self) // batch_size)

    def batch(self, seed: int, number: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number`, counted from 0 through all epochs: inputs and targets, int64 (B, T)."""
        epoch, place = divmod(number, self.per_epoch(batch_size))
        return self._padded(self._epoch(seed, epoch, batch_size)[place])

    def in_order(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every example once, from the shortest to the longest, in batches as of `batch`."""
        order = np.argsort(self._lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self._padded(order[start : start + batch_size])

    def _shuffled(self, seed: int, epoch: int, batch_size: int) -> list[np.ndarray]:
        """The numbers of the examples of each batch of an epoch."""
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))
        size = POOL * batch_size
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        by_length = [pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools]
        order = np.concatenate(by_length)
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _padded(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (B, T) of these examples; a target that does not count is IGNORE."""
        shape = len(numbers), int(self._lengths[numbers].max()) - 1
        ids = np.full(shape, self.padding, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        for row, number in enumerate(numbers):
            example = self.examples[number]
            length = len(example.ids) - 1
            ids[row, :length] = example.ids[:-1]
            targets[row, :length] = np.where(example.counted[1:], example.ids[1:], IGNORE)
        return ids, targets


# ------------------------------------------------------------------------------------------- loss


def answer_loss(model: GPT2, ids: np.ndarray, targets: np.ndarray) -> Tensor:
    """Mean cross-entropy, in nats, of targets (B, T) given ids (B, T), over those not IGNORE.

    It is `model.loss`, without logits for the places that do not count: only the hidden states of
    the others go on to the head.
    """
    hidden = model.hidden(ids)  # (B, T, C)
    places = np.nonzero(targets != IGNORE)  # (N,) rows, (N,) columns
    head = model.head if isinstance(model, VariantGPT2) else model.transformer.wte.weight  # (V, C)
    return layers.linear_cross_entropy(hidden[places], head, targets[places])
