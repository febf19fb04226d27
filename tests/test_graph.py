"""The tape as a drawing."""

from __future__ import annotations

import numpy as np
import pytest

from micrograd_gpt import Tensor, draw_graph, nn
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2, GPT2Config


def test_draw_graph_draws_scalars_and_says_when_it_is_too_late() -> None:
    x = Tensor(2.0, requires_grad=True)
    loss = x * x
    assert draw_graph(loss).count("n0 -> n1") == 2 and "leaf" in draw_graph(x)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"freed the tape .* draw it before backward\(\)"):
        draw_graph(loss)


def test_draw_graph_names_operations_shapes_and_dtypes() -> None:
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    w = Tensor(np.ones((3, 1), np.float32), requires_grad=True)
    dot = draw_graph(((x @ w).tanh() + (x @ w)).sum())
    assert dot.startswith("digraph") and dot.rstrip().endswith("}")
    for label in ("matmul", "tanh", "add", "sum", r"(2, 1) float32", r"leaf\n(2, 3) float32"):
        assert label in dot
    assert dot.count("leaf") == 2 and dot.count("->") == 2 * 2 + 1 + 2 + 1


def test_a_drawing_tells_the_precision() -> None:
    x = Tensor([1.0], requires_grad=True, dtype="bfloat16")
    assert draw_graph(x * x).count("bfloat16") == 2


def test_what_is_off_the_tape_is_a_leaf() -> None:
    dot = draw_graph(Tensor([1.0]) * 2)
    assert dot.count("leaf") == 1 and "->" not in dot


def test_drawing_leaves_the_tape_as_it_is() -> None:
    x = Tensor(2.0, requires_grad=True)
    loss = (x * x).tanh()
    assert draw_graph(loss) == draw_graph(loss)
    loss.backward()
    assert x.grad is not None


def test_a_model_drawn_at_two_levels() -> None:
    """A fused layer is one box; from `layers.py` alone, it is a box for each operation."""
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=4))
    ids = np.array([[1, 2, 3]])
    with at_most("fused"):
        fused = draw_graph(model.loss(ids, ids))
    with at_most("definitions"):
        composed = draw_graph(model.loss(ids, ids))
    for label in ("layer_norm", "attention", "gelu", "linear_cross_entropy"):
        assert label in fused and label not in composed
    assert fused.count("leaf") == composed.count("leaf") == len(model.parameters())
    assert composed.count("matmul") > fused.count("linear")


def test_a_drawing_names_parameters_and_shows_values_and_gradients() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.data = np.array([0.5, -2.0], np.float32)
    x = Tensor([[1.0, 2.0, 3.0]])
    layer(x).sum().backward()
    dot = draw_graph(layer(x).sum(), layer, values=True)
    assert r'label="bias\n(2,) float32\n0.5, -2\ngrad 1, 1"' in dot
    assert r'label="weight\n(3, 2) float32\n' in dot and r"\ngrad 1, 1, 2, 2, 3, 3" in dot
    large = Tensor(np.full(100, -3, np.float32), requires_grad=True)
    assert r"leaf\n(100,) float32\nmean size 3" in draw_graph(large * 2, values=True)
    assert "grad" not in draw_graph(large * 2, values=True) and "mean" not in draw_graph(large * 2)


def test_a_drawing_escapes_what_graphviz_would_read() -> None:
    net = nn.Module()
    net.parts = {'a "b" \\c': nn.Linear(1, 1)}  # type: ignore[attr-defined]
    (layer,) = net.parts.values()  # type: ignore[attr-defined]
    dot = draw_graph(layer(Tensor([1.0])), net)
    assert r'label="parts.a \"b\" \\c.bias\n(1,) float32"' in dot


def test_draw_graph_refuses_what_has_no_tape() -> None:
    for other in (3, None, np.ones(3), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"tape of a tensor, not of a {type(other).__name__}"):
            draw_graph(other)  # type: ignore[arg-type]
