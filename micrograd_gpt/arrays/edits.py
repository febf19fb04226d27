"""Whether a definition is still the one that its stand-ins were tested against.

This project's readers change its code. Whoever edits `layers.gelu`, or swaps in another function in
a notebook, must get what they wrote, in training and in decoding. So `definitions.json` records a
fingerprint of the source of every definition that has a stand-in, and of all that it computes with:
GELU's constants, the arithmetic of Tensor, or, for the kernel that computes whole blocks of GPT-2,
the block and every layer in it. Where one of them has changed, nothing stands in for that
definition, and one line on stderr says so. Comments, docstrings and spacing may change freely.

`python tests/record_definitions.py` writes definitions.json. Run it once an edited definition and
its stand-ins agree again, which the tests say.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
import logging
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("definitions.json")
PACKAGE = __name__.split(".")[0]


class Guard:
    """Tells before each use whether a definition and all that it computes with are as recorded."""

    def __init__(self, function: Any) -> None:
        record = recorded()
        self.parts = {
            name: record["sources"][name] for name in record["uses"].get(name_of(function), ())
        }
        # What each part was when it was last found to be the recorded one: the namespace that holds
        # it, its name there, itself, its function, and that one's code, which autoreload replaces
        self.seen: list[tuple[dict[str, Any], str, Any, Any, Any]] | None = None

    def holds(self) -> bool:
        for namespace, attribute, value, function, code in self.seen or ():
            if namespace.get(attribute) is not value or function.__code__ is not code:
                self.seen = None
        return self.seen is not None or self._look_again()

    def _look_again(self) -> bool:
        seen = []
        for name, source in self.parts.items():
            namespace, attribute = owner_of(name)
            value = namespace.get(attribute)
            if fingerprint(value) != source:
                is_fused = name.endswith(".stand_ins.fused")
                say_once(f"functional.{name.split('.')[1]}" if is_fused else name)
                return False
            function = getattr(value, "definition", value)
            function = function if inspect.isfunction(function) else owner_of  # a constant has none
            seen.append((namespace, attribute, value, function, function.__code__))
        self.seen = seen
        return True


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    """`sources`: the fingerprint of each part; `uses`: the names of each definition's parts."""
    return json.loads(RECORD.read_text("utf-8"))


def name_of(function: Any) -> str:
    """A function's name within this package, as "layers.gelu" or "tensor.Tensor.exp"."""
    return f"{function.__module__}.{function.__qualname__}".removeprefix(f"{PACKAGE}.")


def owner_of(name: str) -> tuple[Any, str]:
    """The namespace of the module or class that holds a part, and the part's own name there.

    "layers.gelu.stand_ins.fused" is the function that stands in for layers.gelu at that level.
    """
    owner: Any = sys.modules[PACKAGE]
    *path, attribute = name.split(".")
    for step in path:
        owner = getattr(owner, step, None)
    return owner if isinstance(owner, dict) else getattr(owner, "__dict__", {}), attribute


def fingerprint(value: Any) -> str:
    """What identifies a constant, or the source of a function; "" where there is no source."""
    function = getattr(value, "definition", value)
    if not inspect.isfunction(function):
        return repr(value)
    return _of_source(function, function.__code__)


@functools.cache
def _of_source(function: Any, code: Any) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function))
        return hashlib.sha256(essence(source).encode()).hexdigest()[:16]
    except (OSError, TypeError, tokenize.TokenError, SyntaxError):  # written in a plain console
        return ""


def essence(source: str) -> str:
    """A function's source without its comments, docstrings and spacing."""
    kept, line = [], list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            is_docstring = len(line) == 1 and line[0].lstrip("rR").startswith(('"""', "'"))
            kept += [] if is_docstring else [*line, "\n"]
            line = []
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            kept.append("{" if token.type == tokenize.INDENT else "}")
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            line.append("".join(token.string.split()))
    return "".join(kept)


@functools.cache
def say_once(name: str) -> None:
    logging.getLogger(PACKAGE).warning(
        f"note: {name} has been edited: your version runs, and faster code for it stands aside"
    )
