"""Whoever edits a definition gets what they wrote: in the loss and in what is decoded."""

from __future__ import annotations

import ast
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record_definitions
from record_definitions import all_definitions

import micrograd_gpt
from micrograd_gpt import Tensor, functional, gpt2, layers, no_grad, tensor
from micrograd_gpt.arrays import edits, stand_ins
from micrograd_gpt.arrays.stand_ins import LEVELS, at_most
from micrograd_gpt.generation import kv_cache
from micrograd_gpt.generation.kv_cache import KVCache, Past
from micrograd_gpt.gpt2 import GPT2, MLP, Block, CausalSelfAttention, GPT2Config
from micrograd_gpt.nn import Embedding, LayerNorm, Linear

IDS = np.random.default_rng(0).integers(0, 13, (2, 8))
PACKAGE = Path(micrograd_gpt.__file__).parent


def make() -> GPT2:
    """A model whose loss and logits every layer has a large part in."""
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=13, n_positions=16), seed=1)
    rng = np.random.default_rng(2)
    for parameter in model.parameters():
        parameter.data += rng.standard_normal(parameter.shape).astype(np.float32) / 5
    return model.eval()


def results(model: GPT2) -> dict[str, Any]:
    """The loss, the logits without a cache, with one (a prompt, then token by token), the text."""
    with no_grad():
        cache, logits = KVCache(model, 2), model(IDS).data
        cached = [model(IDS[:, :5], cache), *(model(IDS[:, i : i + 1], cache) for i in range(5, 8))]
    text = model.generate(IDS[:, :4], max_new_tokens=5, temperature=0)
    return {
        "loss": model.loss(IDS, IDS).item(),
        "logits": logits.tolist(),
        "cached": np.concatenate([part.data for part in cached], axis=1).tolist(),
        "text": text.tolist(),
    }


def assert_one_model(of: dict[str, Any], oracle: dict[str, Any]) -> None:
    """The loss and the logits, cached and uncached, are those of `oracle`, and so is the text."""
    assert of["loss"] == pytest.approx(oracle["loss"], rel=1e-5)
    for name in ("logits", "cached"):
        np.testing.assert_allclose(of[name], oracle["logits"], rtol=1e-4, atol=1e-4)
    assert of["text"] == oracle["text"]


def difference(a: dict[str, Any], b: dict[str, Any], name: str) -> float:
    return float(np.abs(np.array(a[name]) - np.array(b[name])).max())


# ------------------------------------------------------------------- swapped in a running program


TOTAL = tensor.total


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return x / ((x * x).mean(-1, keepdims=True) + eps).sqrt() * weight + bias


def parallel_block(self: Block, x: Tensor, past: Any = None) -> Tensor:
    return x + self.attn(self.ln_1(x), past) + self.mlp(self.ln_2(x))


def halved(function: Any) -> Callable[..., Tensor]:
    original = getattr(function, "definition", function)
    return lambda *args: original(*args) * 0.5


def hooked(function: Any) -> Callable[..., Tensor]:
    """As timers and ablations are written: functools.wraps copies all attributes."""

    @functools.wraps(function)
    def hook(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs) * 0.5

    return hook


SWAPS: dict[str, tuple[Any, str, Any]] = {
    "a block with its input halved": (Block, "__call__", halved(Block.__call__)),
    "a parallel block": (Block, "__call__", parallel_block),
    "MLP": (MLP, "__call__", halved(MLP.__call__)),
    "attention's module": (CausalSelfAttention, "__call__", halved(CausalSelfAttention.__call__)),
    "LayerNorm": (LayerNorm, "__call__", lambda self, x: rms_norm(x, self.weight, self.bias)),
    "Linear": (Linear, "__call__", halved(Linear.__call__)),
    "ReLU for GELU": (layers, "gelu", Tensor.relu),
    "RMSNorm for LayerNorm": (layers, "layer_norm", rms_norm),
    "linear": (layers, "linear", halved(layers.linear)),
    "embedding": (layers, "embedding", halved(layers.embedding)),
    "softmax": (layers, "softmax", halved(layers.softmax)),
    "attention": (layers, "attention", halved(layers.attention)),
    "self_attention": (layers, "self_attention", halved(layers.self_attention)),
    "a constant": (layers, "GELU_CUBIC", 0.5),
    "an operation": (Tensor, "tanh", halved(Tensor.tanh)),
    "a sum": (tensor, "total", lambda *args, **named: TOTAL(*args, **named) * 0.9),
    "a hook on MLP": (MLP, "__call__", hooked(MLP.__call__)),
    "a hook on a block": (Block, "__call__", hooked(Block.__call__)),
    "a hook on gelu": (layers, "gelu", hooked(layers.gelu)),
    "a hook on linear": (layers, "linear", hooked(layers.linear)),
    "a hook on softmax": (layers, "softmax", hooked(layers.softmax)),
    "a hook on an operation": (Tensor, "tanh", hooked(Tensor.tanh)),
}


@pytest.fixture(scope="module")
def unchanged() -> dict[str, Any]:
    return results(make())


@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_is_followed_everywhere(
    name: str, unchanged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    owner, attribute, new = SWAPS[name]
    monkeypatch.setattr(owner, attribute, new)
    with at_most("definitions"):
        oracle = results(model)
    assert_one_model(oracle, oracle)  # cached as uncached
    for part in ("loss", "logits", "cached"):
        assert difference(oracle, unchanged, part) > 1e-3
    for level in LEVELS[1:]:
        with at_most(level):
            assert_one_model(results(model), oracle)
    monkeypatch.undo()
    assert results(model) == unchanged  # and back, with all its kernels


FUSED = {
    "gelu_forward": lambda x: np.maximum(x, 0),
    "layer_norm_forward": lambda x, weight, bias, eps: (
        x * weight,
        np.zeros((len(x), 1), x.dtype),
        np.ones((len(x), 1), x.dtype),
    ),
    "linear_forward": lambda x, weight, bias: x @ weight * 0.5,
    "attention_forward": lambda q, k, v, p, key: (
        v[:, :, -q.shape[2] :] + q,
        np.zeros(q.shape[:3], q.dtype),
    ),
    # which `functional` has from `layers`, under a name of its own
    "causal_mask": lambda t, s, like: np.eye(t, s, s - t) > 0,
}


@pytest.mark.parametrize("name", FUSED)
def test_a_swap_in_functional_is_followed_wherever_functional_is_used(
    name: str, unchanged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    monkeypatch.setattr(functional, name, FUSED[name])
    with at_most("fused"):
        oracle = results(model)
    assert_one_model(oracle, oracle)
    assert difference(oracle, unchanged, "logits") > 1e-3
    for level in ("numpy", "c"):
        with at_most(level):
            assert_one_model(results(model), oracle)


def test_a_class_swapped_after_the_first_token_is_followed(
    unchanged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Window(Past):
        """Sees the latest token only."""

        def attention(self, q: Tensor, k: Tensor, v: Tensor, *dropout: Any) -> Tensor:
            return v + q

    model = make()
    results(model)
    monkeypatch.setattr(kv_cache, "Past", Window)
    with at_most("definitions"):
        oracle = results(model)
    assert difference(oracle, unchanged, "cached") > 1e-3
    np.testing.assert_allclose(results(model)["cached"], oracle["cached"], rtol=1e-4, atol=1e-4)


def test_dropout_of_ones_own_is_followed_while_decoding() -> None:
    model = make()
    cache = KVCache(model, 2)
    model.transformer.h[1].attn.resid_dropout.draw = lambda: (0.5, (1, 2))  # type: ignore[method-assign]
    with no_grad(), at_most("definitions"):
        oracle = model(IDS[:, :3], KVCache(model, 2)).data
    with no_grad():
        np.testing.assert_allclose(model(IDS[:, :3], cache).data, oracle, rtol=1e-4, atol=1e-5)


def test_the_same_text_in_another_module_is_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLP.__call__ copied into a module whose `layers` is the reader's own."""
    namespace = vars(gpt2) | {"layers": type("layers", (), {"gelu": staticmethod(Tensor.relu)})}
    copied = type(MLP.__call__)(MLP.__call__.__code__, namespace)
    monkeypatch.setattr(MLP, "__call__", copied)
    model = make()
    with at_most("definitions"):
        oracle = results(model)
    assert_one_model(results(model), oracle)


def test_other_defaults_are_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = (Tensor(np.array(v, np.float32)) for v in ([[1.0, 3.0]], [1.0, 1.0], [0.0, 0.0]))
    assert abs(layers.layer_norm(x, w, b).data[0, 1] - 1) < 1e-3
    definition = layers.layer_norm.definition  # type: ignore[attr-defined]
    monkeypatch.setattr(definition, "__code__", definition.__code__.replace())
    monkeypatch.setattr(definition, "__defaults__", (8.0,))
    assert abs(layers.layer_norm(x, w, b).data[0, 1] - 1 / 3) < 1e-3


def test_a_definition_that_nobody_recorded_has_no_stand_ins_of_ours(
    tmp_path: Path, unchanged: dict[str, Any]
) -> None:
    """A function with another name, or in another file, under the name of a layer."""
    package = copy_of_the_package(tmp_path) / "micrograd_gpt"
    mine = "@definition\ndef relu(x: Tensor) -> Tensor:\n    return x.relu()\n\n\ngelu = relu\n\n\n"
    path, after = package / "layers.py", "@definition\ndef softmax("
    path.write_text(path.read_text("utf-8").replace(after, mine + after), "utf-8")
    found, said = results_of(tmp_path, ["definitions", "numpy", "c"])
    assert difference(found["definitions"], unchanged, "logits") > 1e-3
    for level in ("numpy", "c"):
        assert_one_model(found[level], found["definitions"])
    assert "note: layers.gelu has been edited" in said or "note: layers.relu has been" in said


def test_a_class_of_ones_own_is_used(
    unchanged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(MLP):
        def __call__(self, x: Tensor) -> Tensor:
            return self.c_proj(self.c_fc(x).relu())

    monkeypatch.setattr(gpt2, "MLP", Mine)
    model = make()
    with at_most("definitions"):
        oracle = results(model)
    assert difference(oracle, unchanged, "logits") > 1e-3
    assert_one_model(results(model), oracle)


def test_a_cache_of_ones_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sees the latest two tokens only."""

    class Forgetful(KVCache):
        def layer(self, i: int) -> Past:
            past = super().layer(i)
            past.keys[:, :, : max(0, self.length - 1)] = -100.0
            return past

    model, logits = make(), []
    for level in LEVELS:
        with at_most(level), no_grad():
            cache = Forgetful(model, 1)
            logits.append([model(IDS[:1, i : i + 1], cache).data for i in range(6)])
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- edited in the files

EDITS = [
    (
        "layers.py",
        "0.5 * x * (1 + (GELU_SCALE * (near + GELU_CUBIC * near**3)).tanh())",
        "x.relu()",
    ),
    (
        "layers.py",  # other parameters than those of what stands in
        "def gelu(x: Tensor) -> Tensor:",
        "def gelu(x: Tensor, slope: float = 2.0) -> Tensor:\n    x = x * slope",
    ),
    (
        "layers.py",  # without the decorator
        "@definition\ndef gelu(x: Tensor) -> Tensor:",
        "def gelu(x: Tensor) -> Tensor:\n    x = x * 2",
    ),
    ("gpt2.py", "        x = x + self.attn", "        x = x * 0.5 + self.attn"),
    ("functional.py", "centred * rstd * weight + bias, mean", "centred * rstd * weight, mean"),
    ("tensor.py", "        y = np.tanh(self.data)", "        y = np.tanh(self.data) / 2"),
    ("nn.py", "layer_norm(as_tensor(x), self.weight", "layer_norm(as_tensor(x) * x, self.weight"),
    ("generation/kv_cache.py", "k.data[rows]", "k.data[rows] * 1.0"),  # which changes no number
]

CHILD = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from micrograd_gpt.arrays.stand_ins import at_most
from test_edits import make, results
found = {}
for level in sys.argv[3:]:
    with at_most(level):
        found[level] = results(make())
print(json.dumps(found))
"""


def results_of(package: Path, levels: list[str]) -> tuple[dict[str, Any], str]:
    """The results of the package in this folder at each level, and what it said on stderr."""
    tests = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(package), str(tests), *levels],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tests.parent)},
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout), child.stderr


def copy_of_the_package(to: Path) -> Path:
    shutil.copytree(PACKAGE, to / "micrograd_gpt", ignore=shutil.ignore_patterns("__pycache__"))
    return to


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("file", "old", "new"), EDITS)
def test_an_edit_of_a_file_is_followed_everywhere(
    file: str, old: str, new: str, tmp_path: Path, unchanged: dict[str, Any]
) -> None:
    path = copy_of_the_package(tmp_path) / "micrograd_gpt" / file
    source = path.read_text("utf-8")
    assert source.count(old) == 1
    path.write_text(source.replace(old, new), "utf-8")
    oracle = "fused" if file == "functional.py" else "definitions"
    found, said = results_of(tmp_path, [oracle, "numpy", "c"])
    for level in ("numpy", "c"):
        assert_one_model(found[level], found[oracle])
    changes_nothing = file == "generation/kv_cache.py"
    assert (difference(found[oracle], unchanged, "logits") > 1e-3) != changes_nothing
    assert said.startswith("note: ") and said.count("\n") == said.count("note: ")
    assert "has been edited: your version runs" in said


def test_comments_and_spacing_may_change(tmp_path: Path, unchanged: dict[str, Any]) -> None:
    package = copy_of_the_package(tmp_path) / "micrograd_gpt"
    for path in package.glob("*.py"):
        tree, lines = ast.parse(path.read_text("utf-8")), path.read_text("utf-8").split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                at = node.body[0].lineno - 1
                lines[at] = lines[at].replace('"""', '"""Note. ', 1)
        note = "  # a note\n# a note"
        lines = [f"{line}{note}" if line.endswith(":") else line for line in lines]
        path.write_text("\n".join(["# a note", *lines]), "utf-8")
    found, said = results_of(tmp_path, ["c"])
    assert found["c"] == unchanged and said == ""


# --------------------------------------------------------------------------------- what is recorded


def test_the_record_is_that_of_the_package_as_it_is() -> None:
    """Red after an edit: see that the other tests pass, then record it as the error says."""
    recorded = json.loads(record_definitions.RECORD.read_text("utf-8"))
    assert recorded == record_definitions.record(), "run python tests/record_definitions.py"


def test_every_definition_is_recorded_and_unchanged() -> None:
    for definition in all_definitions():
        if definition.stand_ins:
            assert definition.guard.parts and definition.guard.holds()


def test_an_edit_stops_only_what_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "gelu", Tensor.relu)
    stopped = {d.__name__ for d in all_definitions() if d.stand_ins and not d.guard.holds()}
    assert stopped == {"gelu", "through_blocks", "next_logits"}
    monkeypatch.setattr(tensor.Tensor, "exp", lambda self: self)
    stopped = {d.__name__ for d in all_definitions() if d.stand_ins and not d.guard.holds()}
    assert {"attention", "self_attention", "cross_entropy"} <= stopped
    assert not stopped & {"linear", "layer_norm", "gelu_forward", "adamw_update"}


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        *((GPT2, "__call__"), (GPT2, "hidden"), (gpt2.Transformer, "__call__")),
        *((Embedding, "__call__"), (KVCache, "positions")),
    ],
)
def test_an_edit_around_the_blocks_stops_what_computes_whole_models(
    owner: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, halved(getattr(owner, method)))
    stopped = {d.__name__ for d in all_definitions() if d.stand_ins and not d.guard.holds()}
    assert stopped == {"next_logits"}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    edits.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "micrograd_gpt"):
        yield caplog
    edits.say_once.cache_clear()


def test_an_edit_is_said_once(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = Tensor(np.ones((2, 3), np.float32))
    layers.gelu(x)
    assert said.messages == []
    monkeypatch.setattr(layers, "GELU_CUBIC", 0.1)
    for _ in range(3):
        layers.gelu(x)
    (line,) = (message for message in said.messages if "layers." in message)
    assert "layers.GELU_CUBIC has been edited" in line


def test_new_code_under_an_old_name_is_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when IPython's autoreload puts the code of an edited function into the old one."""
    x = Tensor(np.ones((2, 3), np.float32))
    before = layers.gelu(x).data
    new = layers.gelu.definition.__code__.replace(co_name="gelu")  # type: ignore[attr-defined]
    assert layers.gelu.guard.holds()  # type: ignore[attr-defined]
    code = (lambda x: x.relu()).__code__
    monkeypatch.setattr(layers.gelu.definition, "__code__", code)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(layers.gelu(x).data, 1)
    monkeypatch.setattr(layers.gelu.definition, "__code__", new)  # type: ignore[attr-defined]
    np.testing.assert_allclose(layers.gelu(x).data, before, rtol=1e-6)


def test_a_definition_that_gets_the_attributes_of_a_new_one_is_an_edit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the autoreload of IPython 9 reloads an edited definition."""

    def gelu(x: Tensor) -> Tensor:
        return x.relu()

    gelu.__module__, gelu.__qualname__ = layers.__name__, "gelu"
    x = Tensor(np.ones((2, 3), np.float32))
    blocks = gpt2.through_blocks.guard  # type: ignore[attr-defined]
    assert blocks.holds()
    monkeypatch.setattr(layers.gelu, "__dict__", vars(made := stand_ins.definition(gelu)))
    np.testing.assert_array_equal(layers.gelu(x).data, 1)
    assert not blocks.holds()
    monkeypatch.undo()
    monkeypatch.delitem(edits.MADE_OF, made)
    assert blocks.holds()


def test_after_a_reload_the_same_runs_as_before() -> None:
    """Faster code for what was not edited, and an edit of that where there is one."""
    code = """if True:
        import importlib
        import numpy as np
        from micrograd_gpt import Tensor, functional, layers
        importlib.reload(layers)
        x = Tensor(np.ones((2, 3), np.float32))
        assert layers.gelu.guard.holds() and "fused" in layers.gelu.stand_ins
        functional.gelu_forward = lambda x: np.maximum(x, 0)
        assert (layers.gelu(x).data == 1).all()
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_reader_s_own_copy_of_a_file_runs_as_it_stands(tmp_path: Path) -> None:
    """Its functions have the names of the package's, and faster code stands in for those alone."""
    source = Path(layers.__file__).read_text()
    edited = source.replace("return 0.5 * x * (1 + (GELU", "return x * 7 + 0 * ((GELU")
    assert edited != source
    (tmp_path / "layers.py").write_text(edited)
    code = """if True:
        import functools
        from micrograd_gpt import Tensor, layers as ours
        from micrograd_gpt.arrays.stand_ins import definition, stands_in_for
        import layers
        @definition
        @functools.wraps(ours.gelu.definition)
        def wrapped(x):
            return x * 8
        x = Tensor([1.0])
        print(wrapped(x).item(), layers.gelu(x).item())
        stands_in_for(layers.gelu, "c")(lambda x: x * 9)
        print(layers.gelu(x).item(), round(ours.gelu(x).item(), 4))
    """
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == ["8.0", "7.0", "9.0", "0.8412"], result.stderr
