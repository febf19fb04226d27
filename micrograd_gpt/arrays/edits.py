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


class Part:
    """Something that a definition computes with: a function, a method or a constant."""

    def __init__(self, name: str, recorded: str) -> None:
        self.name, self.recorded = name, recorded
        self.owner: dict[str, Any] = {}  # the namespace that holds it,
        self.attribute = ""  # and its name there
        self.value: Any = self  # as it was when it was last found to be the recorded one,
        self.code: Any = None  # and its code, which IPython's autoreload replaces

    def is_unchanged(self) -> bool:
        value = self.owner.get(self.attribute)
        if value is self.value and getattr(value, "__code__", None) is self.code:
            return True  # quickly: this is asked before each use
        self.owner, self.attribute = owner_of(self.name)
        value = self.owner.get(self.attribute)
        if fingerprint(value) != self.recorded:
            say_once(self.name)
            return False
        self.value, self.code = value, getattr(value, "__code__", None)
        return True


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    """`sources`: the fingerprint of each part; `uses`: the names of each definition's parts."""
    return json.loads(RECORD.read_text("utf-8"))


def parts_of(function: Any) -> list[Part]:
    """What must not have changed for anything to stand in for this definition."""
    uses, sources = recorded()["uses"].get(name_of(function), ()), recorded()["sources"]
    return [Part(name, sources[name]) for name in uses]


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
        f"note: {name} is not as it was tested: it runs as it is now, and nothing faster stands in"
    )
