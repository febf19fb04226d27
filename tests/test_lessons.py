"""The lessons: each has all its parts and its notebook, and the check finds what differs.

The cells themselves are run by `python lessons/make.py --check`, which needs the extra "lessons".
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from micrograd_gpt.support.errors import UserError

FOLDER = Path(__file__).parents[1] / "lessons"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))

spec = importlib.util.spec_from_file_location("lessons_make", FOLDER / "make.py")
assert spec and spec.loader
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

each_lesson = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def notebook_of(script: Path) -> dict[str, Any]:
    return json.loads(script.with_suffix(".ipynb").read_text("utf-8"))


def cells_of(script: str) -> list[str]:
    """The source of each cell of a script, with the comment signs of Markdown taken off."""
    cells = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, source = part.partition("\n")
        if "[markdown]" in kind:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        cells.append(source.strip())
    return cells


def small_notebook(output: str = "3\n", picture: str = "AAAA") -> dict[str, Any]:
    shown = {"image/png": picture, "text/plain": "<Figure size 600x320>"}
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": output},
        {"output_type": "display_data", "data": shown, "metadata": {}},
    ]
    cell = {"cell_type": "code", "source": "print(1 + 2)", "outputs": outputs, "metadata": {}}
    title = {"cell_type": "markdown", "source": "# Sums", "metadata": {}}
    return {"cells": [title, cell], "metadata": {}}


@each_lesson
def test_a_lesson_has_all_its_parts(script: Path) -> None:
    text = script.read_text("utf-8")
    for part in ("# # ", "**Afterwards you can**", "**The idea.**", "## Exercises", "## Solutions"):
        assert part in text
    before, solutions = text.split("# ## Solutions")
    assert "\nassert" in before or "    assert" in before
    exercises = before.split("# ## Exercises")[1]
    numbers = re.findall(r"^# (\d)\. ", exercises, re.MULTILINE)
    assert len(numbers) in (2, 3)
    assert re.findall(r"^# \*\*(\d)\.\*\*", solutions, re.MULTILINE) == numbers


@each_lesson
def test_its_notebook_has_the_same_text_and_a_picture(script: Path) -> None:
    notebook = notebook_of(script)
    sources = [make.joined(cell["source"]).strip() for cell in notebook["cells"]]
    assert sources == cells_of(script.read_text("utf-8"))
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["10", "11"])
def test_a_copy_runs_elsewhere_and_its_files_are_used_twice(number: str, tmp_path: Path) -> None:
    (script,) = (path for path in SCRIPTS if path.name.startswith(number))
    cells = re.split(r"^(?=# %%)", script.read_text("utf-8"), flags=re.MULTILINE)
    twice = [cell * (2 if re.search(r"folder|adapter\b|own /", cell) else 1) for cell in cells]
    copied = tmp_path / script.name
    copied.write_text("".join(twice), "utf-8")
    shutil.copy(FOLDER / "story.txt", tmp_path)
    told = {"MPLBACKEND": "Agg", "LESSON_MODEL": "", "PYTHONPATH": str(FOLDER.parent)}
    ran = subprocess.run(
        [sys.executable, copied], env=os.environ | told, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_lessons_lead_through_the_six_files_and_the_training_script() -> None:
    after: list[Path] = []
    for script in SCRIPTS:
        paragraphs = re.split(r"^#?$", script.read_text("utf-8"), flags=re.MULTILINE)
        for paragraph in (p for p in paragraphs if "**Read next" in p):
            after += [FOLDER / link for link in re.findall(r"\]\((\S+)\)", paragraph)]
    assert [path for path in after if not path.is_file()] == []
    six = ("tensor", "layers", "functional", "nn", "optim", "gpt2")
    files = [*(f"micrograd_gpt/{name}.py" for name in six), "train_gpt2.py"]
    read = {path.resolve() for path in after}
    assert [name for name in files if (FOLDER.parent / name).resolve() not in read] == []


def test_the_readme_has_every_lesson_in_order() -> None:
    links = re.findall(r"\]\((\d\d_\w+)\.ipynb\)", (FOLDER / "README.md").read_text("utf-8"))
    assert links == [script.stem for script in SCRIPTS]


def test_the_check_passes_over_pictures(tmp_path: Path) -> None:
    path = tmp_path / "01_sums.ipynb"
    path.write_text(json.dumps(small_notebook(picture="BBBB")), "utf-8")
    make.check(small_notebook(), path)


def test_the_check_passes_over_times_alone(tmp_path: Path) -> None:
    path, kept, made = (
        tmp_path / "01_sums.ipynb",
        small_notebook("3 ms\n"),
        small_notebook("4 ms\n"),
    )
    for notebook in (kept, made):
        notebook["cells"][1]["metadata"]["tags"] = ["times"]
    path.write_text(json.dumps(kept), "utf-8")
    make.check(made, path)
    made["cells"][1]["source"] = "print(1 - 2)"
    with pytest.raises(make.LessonError, match="the notebook differs"):
        make.check(made, path)


@pytest.mark.parametrize("change", ["output", "source", "a picture less", "a cell less"])
def test_the_check_finds_text_that_differs(tmp_path: Path, change: str) -> None:
    path = tmp_path / "01_sums.ipynb"
    path.write_text(json.dumps(small_notebook()), "utf-8")
    made = copy.deepcopy(small_notebook("4\n" if change == "output" else "3\n"))
    if change == "source":
        made["cells"][0]["source"] = "# Differences"
    elif change == "a picture less":
        made["cells"][1]["outputs"].pop()
    elif change == "a cell less":
        made["cells"].pop(0)
    with pytest.raises(make.LessonError, match="the notebook differs"):
        make.check(made, path)


def test_the_check_finds_a_missing_notebook(tmp_path: Path) -> None:
    with pytest.raises(make.LessonError, match=r"01_sums\.ipynb is missing"):
        make.check(small_notebook(), tmp_path / "01_sums.ipynb")


def test_a_cell_that_warns_is_an_error() -> None:
    notebook = small_notebook()
    notebook["cells"][1]["outputs"][0]["name"] = "stderr"
    with pytest.raises(make.LessonError, match="cell 1 wrote to stderr: 3"):
        make.tidied(notebook)


def test_a_lesson_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="no lesson's name begins with '99'"):
        make.find_lessons(["99"], FOLDER)


@pytest.mark.slow
def test_lessons_are_run_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("jupytext")
    lesson = tmp_path / "01_sums.py"
    lesson.write_text("# %% [markdown]\n# # Sums\n\n# %%\nprint(1 + 2)\n", "utf-8")
    assert make.main([], tmp_path) == 0
    assert make.text_of(notebook_of(lesson))[-1] == "    > 3"
    assert make.main(["--check"], tmp_path) == 0

    lesson.write_text("# %% [markdown]\n# # Sums\n\n# %%\nassert 1 + 2 == 4\n", "utf-8")
    assert make.main(["--check"], tmp_path) == 1
    assert "a cell failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_notebook_does_not_depend_on_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("jupytext")
    monkeypatch.setenv("LESSON_MODEL", "models/gpt2-124M")
    monkeypatch.setenv("MPLBACKEND", "agg")
    lesson = tmp_path / "01_where.py"
    lesson.write_text(
        "# %%\nimport os\nimport matplotlib.pyplot as plt\n\n"
        "print(repr(os.environ['LESSON_MODEL']))\nplt.plot([1, 2])\nplt.show()\n",
        "utf-8",
    )
    assert make.main([], tmp_path) == 0
    assert make.text_of(notebook_of(lesson))[-2:] == ["    > ''", "    > (a picture)"]
