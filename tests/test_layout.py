"""The house's layout: imports inside the package point only downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import micrograd_gpt

PACKAGE = Path(micrograd_gpt.__file__).parent
# From the top down; a file may import only from files below its own line. Files on one line are
# parts of one floor, and may not import each other.
FLOORS = [
    ["train_settings"],
    ["cli", "metrics", "plan"],
    ["pretrained"],
    ["checkpoint"],
    ["sampling"],
    ["beam_search", "speculation"],
    ["context", "filters"],
    ["data"],
    ["prepare"],
    ["shards"],
    ["documents"],
    ["tokenizers"],
    ["gpt2"],
    ["optim"],
    ["nn"],
    ["functional"],
    ["tensor"],
    ["kernels"],
    ["kernels.compiled", "kernels.gpu"],
    ["kernels.decode_graph"],
    ["kernels.c_arguments", "kernels.matvec"],
    ["kernels.compiler", "kernels.cpu", "kernels.cublas", "kernels.gpu_arguments"],
    ["kernels.cuda_modules"],
    ["kernels.threads", "kernels.blocks"],
    ["precision"],
    ["backend"],
    ["tf_checkpoint"],
    ["tensor_files"],
    ["bfloat16"],
    ["download"],
    ["file_sets"],
    ["files"],
    ["errors"],
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(source: str) -> set[str]:
    """The package's modules that a source imports, wherever in it the import stands.

    `from micrograd_gpt import nn` is the module nn; `import micrograd_gpt` and `from micrograd_gpt
    import Tensor` are the package itself, here "", which stands on top of everything.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {p for p in parts if p.removeprefix("micrograd_gpt.") in LEVEL}
            found |= modules or {node.module or ""}
    inside = {name for name in found if name.split(".")[0] == "micrograd_gpt"}
    return {name.removeprefix("micrograd_gpt").removeprefix(".") for name in inside}


def upward_imports(name: str, source: str) -> list[str]:
    below = {other for other in LEVEL if LEVEL[other] > LEVEL[name]}
    return sorted(imported_modules(source) - below - {name})


SOURCES = {module_name(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_its_floor() -> None:
    assert set(SOURCES) - {""} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_downwards(name: str) -> None:
    assert upward_imports(name, SOURCES[name]) == []


@pytest.mark.parametrize(
    "line",
    [
        "from micrograd_gpt.gpt2 import GPT2",
        "from micrograd_gpt import gpt2",
        "import micrograd_gpt.gpt2",
        "def f():\n    from micrograd_gpt.gpt2 import GPT2",
    ],
)
def test_an_upward_import_is_found(line: str) -> None:
    assert upward_imports("nn", line) == ["gpt2"]


@pytest.mark.parametrize("line", ["from micrograd_gpt import Tensor", "import micrograd_gpt"])
def test_an_import_of_the_package_itself_is_found(line: str) -> None:
    assert upward_imports("backend", line) == [""]


def test_importing_the_package_is_light() -> None:
    """Nothing that takes long or needs a GPU or the network is imported before it is used."""
    heavy = {"cupy", "matplotlib", "huggingface_hub", "tiktoken", "torch", "transformers"}
    code = f"import sys, micrograd_gpt; print(*sorted(set(sys.modules) & {heavy!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_no_run_time_import_of_a_framework() -> None:
    scripts = [PACKAGE.parent / f for f in ("train_gpt2.py", "generate.py", "load_gpt2.py")]
    for source in [*SOURCES.values(), *(script.read_text("utf-8") for script in scripts)]:
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"torch", "tensorflow", "jax", "transformers", "pickle"}
