"""Whether a definition is still the one that its stand-ins were tested against.

This project's readers change its code. Whoever edits `layers.gelu`, or swaps in another function in
a notebook, must get what they wrote, in training and in decoding. So `definitions.json` records a
fingerprint of the source of every definition that has a stand-in, and of all that it computes with:
GELU's constants, the arithmetic of Tensor, or, for the kernel that computes whole blocks of GPT-2,
the block and every layer in it. Where one of them has changed, nothing stands in for that
definition, and one line on stderr says so. Comments, docstrings and spacing may change freely.

The sources are read when the package is imported. After that, a part has changed when its name
stands for another function, or for one with other code (IPython's autoreload).

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
import pkgutil
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

PACKAGE = __name__.split(".")[0]
OF_THE_MODEL = ("gpt2", "nn", "layers", "functional", "tensor")
FUSED = ".stand_ins.fused"  # "layers.gelu.stand_ins.fused": what stands in for layers.gelu there

# What arrays.stand_ins.definition made, and the function that each was made of. An attribute would
# not do: functools.wraps copies it to whatever somebody wraps around a definition. But IPython's
# autoreload makes an edited definition anew, and gives the old one its attributes: so of those that
# are here, `.definition` says which function it is now.
MADE_OF: dict[Any, Callable[..., Any]] = {}


class Guard:
    """Tells before each use whether a definition and all that it computes with are as recorded."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name, self.function = name_of(function), function
        self.parts = recorded()["uses"].get(self.name, ())
        # Each part and what it is reached through, when all were last found as recorded: a
        # namespace, a name in it, what stood there, its function, and that one's code
        self.seen: list[tuple[dict[str, Any], str, Any, Any, Any]] | None = None
        self.made = 0  # how many definitions had been made then

    def need_record(self, stand_in: Callable[..., Any]) -> None:
        """Stand-ins of this package stand in only for definitions that are recorded."""
        if stand_in.__module__.startswith(f"{PACKAGE}.") and not self.parts:
            self.parts = (self.name,)

    def was_edited(self) -> bool:
        """Whether the definition's own source is another than was recorded."""
        source = recorded()["sources"].get(self.name)
        return source is not None and fingerprinted(self.function)() not in (source, None)

    def holds(self) -> bool:
        if self.made != len(MADE_OF):
            self.seen = None
        for namespace, attribute, value, function, code in self.seen or ():
            if namespace.get(attribute) is not value or function.__code__ is not code:
                self.seen = None
        return self.seen is not None or self._look_again()

    def _look_again(self) -> bool:
        seen = {}
        for name in self.parts:
            if not is_as_recorded(name):
                say_once(shown(name))
                return False
            for namespace, attribute, value in steps_to(name):
                function = function_of(value) or name_of  # what is no function has no code
                place = id(namespace), attribute
                seen[place] = (namespace, attribute, value, function, function.__code__)
        self.seen, self.made = list(seen.values()), len(MADE_OF)
        return True


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    """`sources`: the fingerprint of each part; `uses`: the names of each definition's parts."""
    content = pkgutil.get_data(PACKAGE, "arrays/definitions.json")
    assert content is not None
    return json.loads(content)


def name_of(function: Callable[..., Any]) -> str:
    """A function's name within this package, as "layers.gelu" or "tensor.Tensor.exp". A function of
    another module, such as a reader's own layers.py, or one that was wrapped around ours and says
    that it is ours, has a name that none of ours can have: "layers:gelu"."""
    module, name = function.__module__, function.__qualname__
    place = getattr(sys.modules.get(module), "__dict__", None)
    is_ours = getattr(function, "__globals__", 0) is place and module.startswith(f"{PACKAGE}.")
    return f"{module.removeprefix(f'{PACKAGE}.')}.{name}" if is_ours else f"{module}:{name}"


def steps_to(name: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The way to a part: each namespace, a name in it, and what stands there now, None if nothing.

    The way to "tensor.Tensor.exp" leads through the class; modules themselves are left out.
    """
    owner: Any = sys.modules[PACKAGE]
    for attribute in name.split("."):
        namespace = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
        owner = namespace.get(attribute)
        if not inspect.ismodule(owner):
            yield namespace, attribute, owner


def function_of(value: Any) -> FunctionType | None:
    """The function that a part is: a definition's own, a property's getter; else None."""
    is_made = inspect.isfunction(value) and value in MADE_OF
    value = getattr(value, "definition", value) if is_made else value
    value = value.fget if isinstance(value, property) else value
    return value if isinstance(value, FunctionType) else None


# ------------------------------------------------------------------------- what the package was


_IMPORTED: dict[str, tuple[Any, Callable[[], str | None]]] = {}  # parts: meaning, fingerprint


def remember() -> None:
    """Keep what every part is now, when the package has just been imported."""
    for name in recorded()["sources"]:
        *_, (_, _, value) = steps_to(name)
        _IMPORTED[name] = meaning(value), fingerprinted(value)


def is_as_recorded(name: str) -> bool:
    """Whether a part was as recorded when it was imported, and is the same now."""
    if name not in _IMPORTED:  # a definition that nobody recorded
        return False
    *_, (_, _, value) = steps_to(name)
    imported, fingerprint = _IMPORTED[name]
    return meaning(value) == imported and fingerprint() in (recorded()["sources"][name], None)


def fingerprinted(value: Any) -> Callable[[], str | None]:
    """What will identify a constant, or a function by its source, when it is asked for; None where
    the package has no sources."""
    function = function_of(value)
    if function is None:
        return functools.partial(repr, value)
    lines_of(function.__module__)  # which are read now
    return functools.partial(_of_source, function.__module__, function.__code__.co_firstlineno)


@functools.cache
def _of_source(module: str, first: int) -> str | None:
    lines = lines_of(module)
    if lines is None:
        return None
    # A comment that begins left of the function would end it
    code = ["\n" if line.lstrip().startswith("#") else line for line in lines[first - 1 :]]
    source = textwrap.dedent("".join(inspect.getblock(code)))
    return hashlib.sha256(essence(source).encode()).hexdigest()[:16]


@functools.cache  # as they were when the package was imported
def lines_of(module: str) -> list[str] | None:
    """The lines of a module of this package, also of one in a zip; None: only compiled files."""
    path = module.removeprefix(f"{PACKAGE}.").replace(".", "/")
    try:
        content = pkgutil.get_data(PACKAGE, f"{path}.py")
    except OSError:
        return None
    return None if content is None else content.decode("utf-8").splitlines(keepends=True)


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


def meaning(value: Any) -> Any:
    """A constant, or what a function does, wherever its lines stand: its code, its defaults, and
    where it looks names up."""
    function = function_of(value)
    if function is None:
        return repr(value)
    code = _code_meaning(function.__code__, function.__doc__)
    return code, function.__defaults__, function.__kwdefaults__, id(function.__globals__)


def _code_meaning(code: CodeType, docstring: str | None = None) -> tuple[Any, ...]:
    constants = [
        _code_meaning(value) if isinstance(value, CodeType) else (type(value), value)
        for value in code.co_consts
        if value is None or value != docstring
    ]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code, tuple(constants), *names


def edited_parts() -> list[str]:
    """The names of what has been edited of the model: of gpt2.py, and what that computes with, but
    for the loss, which no text needs."""
    used = recorded()["uses"]["generation.context.next_logits"]
    named = [name for name in used if name.split(".")[0] in OF_THE_MODEL]
    edited = [name for name in named if not is_as_recorded(name)]
    # What another function replaced has no stand-ins: those were not edited
    return [shown(name) for name in edited if name.removesuffix(FUSED) not in {*edited} - {name}]


def shown(name: str) -> str:
    """A part's name as its file has it."""
    return f"functional.{name.split('.')[1]}" if name.endswith(FUSED) else name


@functools.cache
def say_once(name: str) -> None:
    logging.getLogger(PACKAGE).warning(
        f"note: {name} has been edited: your version runs, and faster code for it stands aside"
    )
