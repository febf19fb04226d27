"""Conversations to learn from: instructions and answers, read from a file and split in two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micrograd_gpt.support.cli import listed, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.json_objects import read_objects

SPLIT_SEED = 0  # one split for all runs on the same data, whatever their --seed
PART, MOST = 0.1, 1000  # of the instructions, to validate on


class Turn(NamedTuple):
    """One instruction and its answer; the input and the system message may be empty. An answer that
    does not count is read, and not learned."""

    instruction: str
    output: str
    input: str = ""
    system: str = ""
    counts: bool = True


Conversation = Sequence[Turn]  # most files have conversations of one turn


def read_conversations(path: str | Path, encoding: str = "utf-8") -> list[Conversation]:
    """The conversations in a file: in .json a list of objects, in any other an object a line.

    An object has either `instruction`, `output` and perhaps `input`, or `messages`: objects with a
    `role` (system, which may come first; then user and assistant in turns) and a `content`. An
    answer of `weight` 0, as in OpenAI's files, does not count.

    Raises UserError, naming the file and the example, for anything else.
    """
    return [_conversation(fields, where) for where, fields in read_objects(path, encoding)]


def _conversation(value: dict[str, Any], where: str) -> Conversation:
    if "messages" in value:
        return turns_of(value["messages"], where)
    for name in ("instruction", "output"):
        if name not in value:
            found = ", ".join(value) or "none"
            needed = (
                "each example needs instruction and output, or messages of a role and a content"
            )
            raise UserError(f"{where} has no {name!r} (fields: {found}): {needed}")
    instruction, output, input = (
        _text(value, n, where) for n in ("instruction", "output", "input")
    )
    return [_turn(where, instruction, output, input)]


def turns_of(messages: Any, where: str) -> Conversation:
    """The turns that the messages of a conversation make up; UserError, naming the place `where`
    they stand, where they make up none."""
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
    pairs = zip(texts[first::2], texts[first + 1 :: 2], messages[first + 1 :: 2], strict=True)
    turns = [
        _turn(where, user, answer)._replace(counts=message.get("weight") != 0)
        for user, answer, message in pairs
    ]
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


def read_parts(
    data: str | Path, validation: str | Path | None, encoding: str = "utf-8"
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to learn from and to validate on: each from its file, or else some of `data`.

    What of them is not learned from is said on stderr, and what is validated on as well. Raises
    UserError for what `read_conversations` cannot take, and where there are too few.
    """
    conversations = _read_to_learn(data, encoding)
    if validation is not None:
        others = _read_to_learn(validation, encoding)
        learned = set(map(_asked, conversations))
        if again := sum(_asked(conversation) in learned for conversation in others):
            these = f"{again:,} of {len(others):,} examples to validate on"
            say(f"warning: {these} are learned from as well")
        return conversations, others
    parts = split(conversations)
    if not all(parts):
        raise UserError(
            f"{data} has no two different instructions, one to learn from and one to validate on: "
            "give more, or others with --validation"
        )
    return parts


def _read_to_learn(path: str | Path, encoding: str) -> list[Conversation]:
    """As `read_conversations`; says which fields of the examples are left out."""
    objects = list(read_objects(path, encoding))
    conversations = [_conversation(fields, where) for where, fields in objects]
    unused = set[str]()
    for _, fields in objects:
        used = {"messages"} if "messages" in fields else {"instruction", "input", "output"}
        unused |= _filled(fields) - used
        for message in fields.get("messages", ()):
            is_used = message.get("weight") in (0, 1)
            unused |= _filled(message) - {"role", "content", *["weight"] * is_used}
    if unused:
        say(f"note: {path}: {listed(sorted(unused))} left out: nothing is learned from such fields")
    return conversations


def _filled(fields: dict[str, Any]) -> set[str]:
    """The names of the fields that hold something, which may be 0 or false."""
    return {name for name, value in fields.items() if value not in (None, "", [], {})}


def _asked(conversation: Conversation) -> tuple[Turn, ...]:
    """A conversation without its answers."""
    return tuple(turn._replace(output="", counts=True) for turn in conversation)


def split(
    conversations: Sequence[Conversation],
) -> tuple[list[Conversation], list[Conversation]]:
    """Cut conversations up by chance, the same on every machine: most of them, and some.

    What begins with the same instruction, input and system message is in the same part.
    """
    alike: dict[Turn, list[int]] = {}
    for i, (first, *_) in enumerate(conversations):
        alike.setdefault(_asked([first])[0], []).append(i)
    groups = list(alike.values())
    wanted = min(max(1, round(PART * len(groups))), MOST, len(groups) - 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(groups))
    cut = {i for place in order[:wanted] for i in groups[place]}
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for i, conversation in enumerate(conversations):
        parts[i in cut].append(conversation)
    return parts
