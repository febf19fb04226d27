"""Looking inside: a tape as a drawing, the gradients in between, and a model as an outline."""

from __future__ import annotations

import weakref
from typing import Any

from micrograd_gpt.arrays.habits import Habits
from micrograd_gpt.nn import Module
from micrograd_gpt.tensor import LEAF, Array, Node, Tensor, node_of, tape_below


def draw_graph(result: Tensor, model: Module | None = None, values: bool = False) -> str:
    """The tape below `result` as Graphviz DOT text: operation names, shapes and dtypes.

    `dot -Tsvg` turns the text into a picture. With a `model`, its parameters are drawn with their
    names. With `values`, leaves are drawn with their numbers and, where they have some already,
    their gradients' (of a large one only the mean size). backward() frees the tape: draw before it,
    afterwards this raises RuntimeError. TypeError for what is no tensor.
    """
    if not isinstance(result, Habits):
        raise TypeError(f"draw_graph draws the tape of a tensor, not of a {type(result).__name__}")
    root = node_of(result) or Node(LEAF, result, (), lambda grad: ())
    titles = {id(p): name for name, p in model.named_parameters()} if model else {}
    try:
        tape = tape_below(root)
    except RuntimeError as error:
        raise RuntimeError(f"{error}, and draw it before backward()") from error
    names: dict[Any, str] = {}
    lines = ["digraph tape {", "  rankdir=LR;"]
    for node in tape:
        key = node.backward if node.name == LEAF else node  # a leaf has a node for each use
        is_new = key not in names
        names[node] = names[key] = name = names.get(key, f"n{len(set(names.values()))}")
        if is_new:
            leaf = getattr(node.backward, "__self__", None) if node.name == LEAF else None
            shape = "ellipse" if node.name == LEAF else "box"
            title = titles.get(id(leaf), node.name).replace("\\", r"\\").replace('"', r"\"")
            title += f"\\n{node.shape} {node.dtype}"
            if values and leaf is not None:
                title += f"\\n{_numbers(leaf.data)}"
                title += "" if leaf.grad is None else f"\\ngrad {_numbers(leaf.grad)}"
            lines.append(f'  {name} [shape={shape}, label="{title}"];')
            lines += [f"  {names[parent]} -> {name};" for parent in node.parents if parent]
    return "\n".join([*lines, "}"])


def _numbers(array: Array) -> str:
    """The numbers of a small array; the mean size of those of a larger one."""
    if array.size > 6:
        return f"mean size {float(abs(array).mean()):.3g}"
    return ", ".join(f"{float(x):.4g}" for x in array.ravel())


def outline(model: Module) -> str:
    """A module and all below it, a line each: its name, its class, and how many numbers are in its
    parameters and in those below it.."""
    titles, counts, above = [], [], [""]
    for name, part in model.modules():
        while not f"{name}.".startswith(above[-1]):
            above.pop()
        short = name.removeprefix(above[-1])  # such as h.0, which is in a list
        kind = type(part).__name__
        titles.append("  " * (len(above) - 1) + f"{short}: {kind}" if name else kind)
        count = sum(p.size for p in part.parameters())
        counts.append(f"{count:,} parameters" if count else "")
        above.append(f"{name}." if name else "")
    width = max(map(len, titles))
    lines = [f"{title:{width}}  {count}" for title, count in zip(titles, counts, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def retain_grad(result: Tensor) -> Tensor:
    """Let backward() also fill the `.grad` of this intermediate result, and return the result.

    Its gradient is kept only while the tensor itself is alive. A cast (`astype`) has no gradient of
    its own: what arrives there is that of the tensor that was cast.
    """
    node, this = node_of(result), weakref.ref(result)
    if node is None or node.name == LEAF or node.backward is None:
        return result
    backward = node.backward

    def keep(grad: Array) -> Any:
        if (tensor := this()) is not None:
            tensor._accumulate(grad.copy())
        return backward(grad)

    node.backward = keep
    return result
