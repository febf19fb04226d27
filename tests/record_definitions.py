"""Record the definitions that the stand-ins are tested against, in arrays/definitions.json.

    python tests/record_definitions.py

The stand-ins are compared with the definitions as they are now, and only where they agree is the
record kept.

What a definition computes with is read off its source: the functions and constants of this package
that it names, and the arithmetic of Tensor. For a stand-in that computes more than its definition
names, as the one for whole blocks of GPT-2 does, `bypasses` at its registration says what.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from micrograd_gpt import tensor  # noqa: E402
from micrograd_gpt.arrays.edits import (  # noqa: E402
    FUSED,
    MADE_OF,
    PACKAGE,
    fingerprinted,
    function_of,
    name_of,
)
from micrograd_gpt.tensor import Tensor  # noqa: E402

RECORD = ROOT / PACKAGE / "arrays" / "definitions.json"
COMPARISONS = (
    *("tests/test_layers.py", "tests/test_functional.py", "tests/kernels/test_kernels.py"),
    *("tests/kernels/test_token_step.py", "tests/test_nn_optim.py"),
)

# Tensor's operators, by the class of their node in a syntax tree
OPERATORS = {
    ast.Add: ("__add__", "__radd__"),
    ast.Sub: ("__sub__", "__rsub__"),
    ast.Mult: ("__mul__", "__rmul__"),
    ast.Div: ("__truediv__", "__rtruediv__"),
    ast.Pow: ("__pow__",),
    ast.MatMult: ("__matmul__", "__rmatmul__"),
    ast.USub: ("__neg__",),
}
# These build the tape and walk it, for stand-ins too: a change of them is followed anyway.
PLUMBING = (
    *(tensor.record, tensor.is_recorded, tensor.node_of, tensor.fit),
    *(tensor.tape_below, tensor.walk_back),
)
ON_ARRAYS = (f"{PACKAGE}.functional", f"{PACKAGE}.optim")  # these compute with tensors' arrays


def all_definitions() -> list[Any]:
    """Every definition of the package, once: functions of modules and methods of classes."""
    return [d for d, function in MADE_OF.items() if function.__module__.startswith(f"{PACKAGE}.")]


def parts(root: Any) -> dict[str, Any]:
    """What must not change for anything to stand in for the definition `root`, by name."""
    found: dict[str, Any] = {}
    todo = [(name_of(function_of(value)), value) for value in (root, *root.bypasses)]
    while todo:
        name, value = todo.pop()
        if name in found:
            continue
        found[name] = value
        function = function_of(value)
        if function is not None:
            todo += named_in(function)
        if root.bypasses and value is not root and value in MADE_OF and "fused" in value.stand_ins:
            todo.append((f"{name}{FUSED}", value.stand_ins["fused"]))
    return found


def named_in(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The functions and constants of this package that a function's source names."""
    takes_tensors = any("Tensor" in str(kind) for kind in function.__annotations__.values())
    on_tensors = takes_tensors and function.__module__ not in ON_ARRAYS
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))):
        match node:
            case ast.Name(id=name):
                yield from resolved(function.__module__, name, function.__globals__.get(name))
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if inspect.ismodule(
                module := function.__globals__.get(owner)
            ):
                if module.__name__.startswith(f"{PACKAGE}."):
                    yield from resolved(module.__name__, name, getattr(module, name))
            case ast.Attribute(attr=name) if on_tensors:
                yield from method(name)
            case ast.BinOp(op=operator) | ast.UnaryOp(op=operator) if on_tensors:
                for name in OPERATORS.get(type(operator), ()):
                    yield from method(name)
            case ast.Subscript() if on_tensors:
                yield from method("__getitem__")


def resolved(module: str, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a module knows under this name: a function of this package, or a constant."""
    here = f"{module}.".removeprefix(f"{PACKAGE}.") + name
    function = function_of(value)
    if function is not None:
        if function.__module__.startswith(f"{PACKAGE}.") and function not in PLUMBING:
            yield name_of(function), value
            yield here, value
    elif isinstance(value, int | float | str | tuple) and name.isupper():
        yield here, value


def method(name: str) -> Iterator[tuple[str, Any]]:
    value = vars(Tensor).get(name)
    if function_of(value) is not None:
        yield f"tensor.Tensor.{name}", value


def record() -> dict[str, Any]:
    """The content of definitions.json for the package as it is."""
    found = {name_of(d.definition): parts(d) for d in all_definitions() if d.stand_ins}
    together = {name: value for uses in found.values() for name, value in uses.items()}
    return {
        "sources": {name: fingerprinted(together[name])() for name in sorted(together)},
        "uses": {name: sorted(found[name]) for name in sorted(found)},
    }


def main() -> int:
    before, content = RECORD.read_bytes(), f"{json.dumps(record(), indent=1)}\n"
    RECORD.write_text(content, encoding="utf-8", newline="\n")
    compare = [sys.executable, "-m", "pytest", "-q", *COMPARISONS]
    if subprocess.run(compare, cwd=ROOT).returncode:
        RECORD.write_bytes(before)
        print("error: stand-ins and definitions differ, so nothing was recorded", file=sys.stderr)
        return 1
    print(f"recorded in {RECORD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
