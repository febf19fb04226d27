"""Record the definitions that the stand-ins are tested against, in arrays/definitions.json.

    python tests/record_definitions.py

What a definition computes with is read off its source: the functions and constants of this package
that it names, and the arithmetic of Tensor. For a stand-in that computes more than its definition
names, as the one for whole blocks of GPT-2 does, `bypasses` at its registration says what.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import micrograd_gpt
from micrograd_gpt import tensor
from micrograd_gpt.arrays.edits import PACKAGE, RECORD, fingerprint, name_of
from micrograd_gpt.tensor import Tensor

# Tensor's operators, by the class of their node in a syntax tree
OPERATORS = {
    ast.Add: ("__add__", "__radd__"),
    ast.Sub: ("__sub__", "__rsub__"),
    ast.Mult: ("__mul__", "__rmul__"),
    ast.Div: ("__truediv__", "__rtruediv__"),
    ast.Pow: ("__pow__",),
    ast.MatMult: ("__matmul__", "__rmatmul__"),
    ast.USub: ("__neg__",),
    ast.Subscript: ("__getitem__",),
}


ON_ARRAYS = ("micrograd_gpt.functional", "micrograd_gpt.optim")  # compute with tensors' arrays


def all_definitions() -> list[Any]:
    """Every definition of the package, once: functions of modules and methods of classes."""
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{PACKAGE}.")]
    owners = modules + [c for m in modules for c in vars(m).values() if inspect.isclass(c)]
    found = [value for owner in owners for value in list(vars(owner).values())]
    return list({id(f): f for f in found if hasattr(f, "stand_ins")}.values())


def parts(root: Any) -> dict[str, Any]:
    """What must not change for anything to stand in for the definition `root`, by name."""
    found: dict[str, Any] = {}
    todo = [(name_of(root), root.definition)]
    todo += [(name_of(plain(function)), function) for function in root.bypasses]
    while todo:
        name, value = todo.pop()
        if name in found:
            continue
        found[name] = plain(value)
        if inspect.isfunction(plain(value)):
            todo += named_in(plain(value))
        if root.bypasses and "fused" in getattr(value, "stand_ins", {}):
            todo.append((f"{name}.stand_ins.fused", value.stand_ins["fused"]))
    return found


def plain(value: Any) -> Any:
    return getattr(value, "definition", value)


def named_in(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """The functions and constants of this package that a function's source names."""
    takes_tensors = any("Tensor" in str(kind) for kind in function.__annotations__.values())
    on_tensors = takes_tensors and function.__module__ not in ON_ARRAYS
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Name(id=name) if function.__module__ != tensor.__name__:
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
    """A function of ours under its own name, or a constant of the module that names it."""
    if inspect.isfunction(plain(value)):
        if plain(value).__module__.startswith(f"{PACKAGE}.") and not is_plumbing(plain(value)):
            yield name_of(plain(value)), value
    elif isinstance(value, int | float | str | tuple) and name.isupper():
        yield f"{module.removeprefix(f'{PACKAGE}.')}.{name}", value


def method(name: str) -> Iterator[tuple[str, Any]]:
    value = vars(Tensor).get(name)
    if inspect.isfunction(plain(value)) and not is_plumbing(plain(value)):
        yield f"tensor.Tensor.{name}", value


def is_plumbing(function: Any) -> bool:
    """Whether all stand-ins use this function too, so that a change of it is followed anyway."""
    in_tensor = function.__module__ == tensor.__name__
    operations = (tensor.where, tensor.concatenate, *vars(Tensor).values())
    is_operation = any(plain(operation) is function for operation in operations)
    return (in_tensor and not is_operation) or function.__module__.startswith(f"{PACKAGE}.arrays")


def record() -> dict[str, Any]:
    """The content of definitions.json for the package as it is."""
    found = {name_of(d): parts(d) for d in all_definitions() if d.stand_ins}
    together = {name: value for uses in found.values() for name, value in uses.items()}
    return {
        "sources": {name: fingerprint(together[name]) for name in sorted(together)},
        "uses": {name: sorted(found[name]) for name in sorted(found)},
    }


if __name__ == "__main__":
    assert micrograd_gpt.__file__
    RECORD.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
    print(f"recorded {len(record()['uses'])} definitions in {RECORD}")
