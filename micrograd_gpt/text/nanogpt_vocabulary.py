"""The vocabulary that nanoGPT's data/shakespeare_char/prepare.py leaves beside its shards.

meta.pkl is a pickle of {"vocab_size": 65, "itos": {0: "\\n", …}, "stoi": {"\\n": 0, …}}. A pickle
is a program, so it is not run here: pickletools names its instructions, and only those that
make dicts, texts and numbers are followed. Source of their meanings: pickletools.py.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading

META = "meta.pkl"
LARGEST = 1 << 26  # bytes; a vocabulary of all of Unicode's characters is a third of this
VALUES = (
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BININT", "BININT1", "BININT2", "INT", "LONG1"),
)
NO_EFFECT = ("PROTO", "FRAME")


def nanogpt_vocabulary(folder: Path) -> list[str] | None:
    """The characters of a nanoGPT folder's meta.pkl in the order of their ids; None without one.

    Raises UserError if the file cannot be read, or is not such a vocabulary.
    """
    path = folder / META
    with reading(path):
        if not path.exists():
            return None
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is too large to be a vocabulary of characters")
        data = path.read_bytes()
    try:
        entries = _value_of(data)["itos"]
        characters = [entries[i] for i in range(len(entries))]
        if not characters or not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise ValueError("its itos is not of characters")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a vocabulary as nanoGPT's prepare.py for characters writes it "
            f"({error!r}): train on the text itself; beside a model, put its tokenizer.json"
        ) from error
    return characters


def _value_of(data: bytes) -> Any:
    """The dict of texts and numbers that a pickle describes; ValueError for one of other things."""
    stack: list[Any] = []
    memo: list[Any] = []
    marks: list[int] = []
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in VALUES:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS"):
            start = marks.pop() if name == "SETITEMS" else len(stack) - 2
            stack[start - 1].update(zip(stack[start::2], stack[start + 1 :: 2], strict=True))
            del stack[start:]
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo.append(stack[-1])  # pickles number them in this order
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STOP":
            return stack.pop()
        elif name not in NO_EFFECT:
            raise ValueError(f"its pickle asks for {name}, and is not run")
    raise ValueError("its pickle has no end")
