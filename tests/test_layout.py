"""The package's layout: what may import what, the reading order, and how long the six files are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import micrograd_gpt

PACKAGE = Path(micrograd_gpt.__file__).parent
ROOT = Path(__file__).parents[1]

SIX = ("tensor", "layers", "functional", "nn", "optim", "gpt2")
BELOW_THE_SIX = {"arrays.stand_ins", "arrays.habits"}  # all that they import at the top
ON_THE_SIX = ("variants", "graph", "checks")
SCRIPTS = sorted(ROOT.glob("*.py"))

# What each part may import besides itself; each of the six may import those before it.
BELOW = {
    "support": (),
    "arrays": ("support",),
    **{name: ("arrays", "support", *SIX[:i]) for i, name in enumerate(SIX)},
    **dict.fromkeys(ON_THE_SIX, ("arrays", "support", *SIX)),
    "text": ("arrays", "support", *SIX),
}
BELOW["weights"] = BELOW["generation"] = (*BELOW["text"], *ON_THE_SIX, "text")
BELOW["runs"] = (*BELOW["weights"], "weights", "generation")
BELOW["tuning"] = (*BELOW["runs"], "runs")
BELOW["evaluation"] = (*BELOW["weights"], "weights", "generation", "tuning")
BELOW["__main__"] = ("support",)
BELOW["kernels"] = ("arrays", "support", *SIX, "checks", "generation")  # whose KV cache they write


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_name(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = frozenset(SOURCES)


def imports(source: str, everywhere: bool = True) -> set[str]:
    """The modules that a source imports; unless `everywhere`, without those inside functions.

    `micrograd_gpt.nn` is named "nn", the package itself "", and anything else "other …".
    """
    found, tree = set(), ast.parse(source)
    inside_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not everywhere and id(node) in inside_functions:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            for alias in node.names:
                part = f"{node.module}.{alias.name}"
                is_module = part.removeprefix("micrograd_gpt.") in MODULES
                found.add(part if is_module else node.module or "")
    return {
        name.removeprefix("micrograd_gpt").removeprefix(".") if is_ours(name) else f"other {name}"
        for name in found
    }


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "micrograd_gpt"


def ours(source: str, everywhere: bool = True) -> set[str]:
    return {name for name in imports(source, everywhere) if not name.startswith("other ")}


def part_of(module: str) -> str:
    return module.split(".")[0]


def forbidden(module: str, source: str) -> list[str]:
    """The modules that this one imports but may not."""
    part = part_of(module)
    # In the six, a method may import what stands above them at the moment it is called.
    found = ours(source, everywhere=module not in SIX)
    return sorted(name for name in found if part_of(name) not in (part, *BELOW[part]))


# ----------------------------------------------------------------------------- what imports what


def test_every_file_has_its_place() -> None:
    assert {part_of(module) for module in MODULES} - {""} == set(BELOW)


@pytest.mark.parametrize("module", sorted(MODULES - {""}))
def test_imports_point_downwards(module: str) -> None:
    assert forbidden(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("support.files", "from micrograd_gpt.arrays import devices"),
        ("arrays.memory", "import micrograd_gpt.tensor"),
        ("layers", "from micrograd_gpt.functional import linear"),
        ("nn", "from micrograd_gpt.gpt2 import GPT2"),
        ("nn", "from micrograd_gpt import gpt2"),
        ("nn", "if True:\n    import micrograd_gpt.gpt2"),
        ("graph", "def f():\n    from micrograd_gpt.text.tokenizers import Tokenizer"),
        ("text.data", "from micrograd_gpt.weights import tensor_files"),
        ("weights.pretrained", "from micrograd_gpt.generation.kv_cache import KVCache"),
        ("generation.sampling", "from micrograd_gpt.weights import pretrained"),
        ("generation.sampling", "from micrograd_gpt.kernels.in_c import compiler"),
        ("runs.plan", "import micrograd_gpt.kernels"),
        ("runs.plan", "from micrograd_gpt.tuning import scores"),
        ("tensor", "from micrograd_gpt.kernels import in_c"),
        ("kernels.blocks", "from micrograd_gpt.text.tokenizers import Tokenizer"),
        ("support.files", "from micrograd_gpt import Tensor"),
        ("generation.context", "import micrograd_gpt"),
    ],
)
def test_an_upward_import_is_found(module: str, line: str) -> None:
    assert forbidden(module, line) != []


def test_a_method_of_the_six_may_import_what_stands_on_them() -> None:
    line = "    def f(self):\n        from micrograd_gpt.weights.pretrained import from_pretrained"
    assert forbidden("gpt2", f"class A:\n{line}") == []
    assert forbidden("generation.context", f"class A:\n{line}") != []


def test_only_the_package_itself_imports_kernels() -> None:
    assert "kernels" in ours(SOURCES[""])
    others = {m: s for m, s in SOURCES.items() if m and part_of(m) != "kernels"}
    for module, source in others.items():
        assert not [name for name in ours(source) if part_of(name) == "kernels"], module


@pytest.mark.parametrize("module", SIX)
def test_beside_the_six_stand_numpy_and_two_modules(module: str) -> None:
    allowed = {*BELOW_THE_SIX, *SIX[: SIX.index(module)]}
    assert ours(SOURCES[module], everywhere=False) <= allowed
    others = {n for n in imports(SOURCES[module]) if n.startswith("other ")}
    roots = {name.removeprefix("other ").split(".")[0] for name in others}
    assert roots <= {"numpy", *sys.stdlib_module_names}


def test_nothing_imports_itself_in_a_circle() -> None:
    """File by file, as Python imports them."""
    graph = {m: ours(s, everywhere=False) - {m} for m, s in SOURCES.items() if m}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_importing_the_package_is_light() -> None:
    """Nothing that takes long or needs a GPU or the network is imported before it is used."""
    heavy = {"cupy", "matplotlib", "huggingface_hub", "tiktoken", "torch", "transformers"}
    heavy |= {"safetensors", "tqdm", "hypothesis", "mpi4py", "pyarrow"}
    code = f"import sys, micrograd_gpt; print(*sorted(set(sys.modules) & {heavy!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_no_run_time_import_of_a_framework() -> None:
    frameworks = {"torch", "tensorflow", "jax", "transformers", "pickle"}
    for source in [*SOURCES.values(), *(script.read_text("utf-8") for script in SCRIPTS)]:
        roots = {name.removeprefix("other ").split(".")[0] for name in imports(source)}
        assert not roots & frameworks


# -------------------------------------------------------------------------- the reading order


def reading_order(readme: str) -> list[str]:
    """The modules that the README's section "Reading …" links to, in order."""
    section = re.search(r"^## Reading.*?(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, "the README has no section on reading the code"
    links = re.findall(r"\]\((micrograd_gpt/[\w/]+\.py)\)", section[0])
    return [".".join(Path(link).with_suffix("").parts[1:]) for link in links]


def not_yet_read(order: list[str], sources: dict[str, str]) -> dict[str, list[str]]:
    """For each module of the list, those that it imports and that do not come before it there."""
    found = {}
    for i, module in enumerate(order):
        needed = ours(sources[module], everywhere=False) - {module, *order[:i]}
        found[module] = sorted(n for n in needed if part_of(n) not in ("support", "arrays"))
    return {module: needed for module, needed in found.items() if needed}


def test_the_readme_s_reading_order_is_true() -> None:
    order = reading_order((ROOT / "README.md").read_text("utf-8"))
    assert len(order) == len(set(order)) and set(order) <= MODULES
    assert tuple(order[: len(SIX)]) == SIX
    assert not_yet_read(order, SOURCES) == {}


def test_a_file_that_is_read_too_early_is_found() -> None:
    readme = (
        "# A\n## Reading it\n| file | |\n"
        "| [`nn.py`](micrograd_gpt/nn.py), [`tensor.py`](micrograd_gpt/tensor.py) | modules |\n"
        "| [`train_gpt2.py`](train_gpt2.py) | |\n"
        "## More\n[`optim.py`](micrograd_gpt/optim.py)\n"
    )
    assert reading_order(readme) == ["nn", "tensor"]
    sources = {"nn": "from micrograd_gpt.tensor import Tensor", "tensor": "import numpy"}
    assert not_yet_read(["nn", "tensor"], sources) == {"nn": ["tensor"]}
    assert not_yet_read(["tensor", "nn"], sources) == {}


# ---------------------------------------------------------------------------- how long the idea is


def test_the_six_files_can_be_read_in_one_go() -> None:
    lines = {module: len(SOURCES[module].splitlines()) for module in SIX}
    assert sum(lines.values()) <= 1200, lines


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_read_in_one_sitting(script: Path) -> None:
    assert len(script.read_text("utf-8").splitlines()) <= 300


def test_no_function_of_the_six_is_longer_than_a_screen() -> None:
    long = {}
    for module in SIX:
        for node in ast.walk(ast.parse(SOURCES[module])):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 40:
                    long[f"{module}.{node.name}"] = length
    assert long == {}


def test_what_is_to_be_installed_is_in_quotes_that_every_shell_knows() -> None:
    """Windows' cmd knows no single ones."""
    files = [*ROOT.rglob("*.py"), *ROOT.rglob("*.md"), *ROOT.glob(".ci/*")]
    assert len(files) > 300
    single = "pip install (-e )?" + "'"
    assert [file for file in files if re.search(single, file.read_text("utf-8"))] == []
