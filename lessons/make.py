"""Make the lessons' notebooks, with outputs and pictures, from their scripts, or check them.

    python lessons/make.py                          run every lesson, write its notebook beside it
    python lessons/make.py --check                  run every lesson, compare with its notebook
    python lessons/make.py 05 --pictures pictures   one lesson; its pictures as files too

A lesson is a Python script in cells: `# %%` begins code, `# %% [markdown]` begins text. The check
compares text and what cells print, not pictures, which no two versions of Matplotlib draw alike,
nor what a cell under `# %% tags=["times"]` prints: no machine is equally fast twice.
Needs the extra: pip install -e ".[lessons]". Exit status 1: a cell failed, or a notebook differs.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, write_text, written_whole

FOLDER = Path(__file__).parent
LONGEST = 300  # seconds that one cell may take
# The notebooks are to be the same on every machine: lesson 10 uses OpenAI's weights where they
# are, and servers' MPLBACKEND=agg would leave the pictures out
ANYWHERE = {"LESSON_MODEL": "", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
COLORS = re.compile(r"\x1b\[[\d;]*m")  # what terminals take for colours, in tracebacks

Notebook = dict[str, Any]  # what is in an .ipynb file: nbformat 4, as JSON


class LessonError(Exception):
    """A lesson that is not as it should be; the message says where."""


def main(argv: list[str] | None = None, folder: Path = FOLDER) -> int:
    arguments = make_parser().parse_args(argv)
    failed = 0
    for script in find_lessons(arguments.lessons, folder):
        start = time.perf_counter()
        try:
            notebook = run_lesson(script)
            if arguments.check:
                check(notebook, script.with_suffix(".ipynb"))
            else:
                text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
                write_text(script.with_suffix(".ipynb"), text)
        except LessonError as problem:
            failed += 1
            print(f"{script.name}: {problem}")
            continue
        if arguments.pictures:
            save_pictures(notebook, arguments.pictures, script.stem)
        what = "as its notebook says" if arguments.check else "made"
        print(f"{script.name}: {what}, in {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


def make_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lessons", nargs="*", help="how their names begin, as 05 (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures, as PNG files")
    return parser


def find_lessons(beginnings: list[str], folder: Path) -> list[Path]:
    """The scripts whose names begin like that, in order; all without beginnings.

    Raises UserError for a beginning that no lesson has.
    """
    scripts = sorted(folder.glob("[0-9][0-9]_*.py"))
    for beginning in beginnings:
        if not any(script.name.startswith(beginning) for script in scripts):
            names = ", ".join(script.stem for script in scripts)
            raise UserError(f"no lesson's name begins with {beginning!r}: there are {names}")
    return [s for s in scripts if not beginnings or s.name.startswith(tuple(beginnings))]


def run_lesson(script: Path) -> Notebook:
    """Run a script's cells and return the notebook with what they put out.

    Raises LessonError where a cell fails or warns, and UserError where the extra is missing.
    """
    try:
        import jupytext
        import nbclient
        import nbformat
    except ImportError as error:
        raise UserError(f'{error.name} is missing: pip install -e ".[lessons]"') from None
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    client = nbclient.NotebookClient(
        notebook,
        timeout=LONGEST,
        resources={"metadata": {"path": str(script.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    try:
        client.execute(env=os.environ | ANYWHERE)
    except nbclient.exceptions.CellExecutionError as error:
        raise LessonError(f"a cell failed\n{COLORS.sub('', str(error))}") from None
    except nbclient.exceptions.CellTimeoutError:
        raise LessonError(f"a cell took more than {LONGEST} s") from None
    return tidied(json.loads(nbformat.writes(notebook, version=4)))


def tidied(notebook: Notebook) -> Notebook:
    """The notebook without what differs from run to run; LessonError if a cell warned."""
    notebook["metadata"].pop("language_info", None)
    for i, cell in enumerate(notebook["cells"]):
        tags = cell["metadata"].get("tags")
        cell["id"], cell["metadata"] = f"cell-{i}", {"tags": tags} if tags else {}
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise LessonError(f"cell {i} wrote to stderr: {joined(output['text'])}")
            if "metadata" in output:
                output["metadata"] = {}
    return notebook


def joined(text: str | list[str]) -> str:
    """A text of a notebook's file, which keeps it whole or as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def text_of(notebook: Notebook) -> list[str]:
    """Everything but pictures and times, line by line."""
    lines = []
    for cell in notebook["cells"]:
        lines += [f"# %% {cell['cell_type']}", *joined(cell["source"]).splitlines()]
        has_times = "times" in cell["metadata"].get("tags", ())
        for output in () if has_times else cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            is_picture = "image/png" in data
            shown = "(a picture)" if is_picture else joined(data.get("text/plain", ""))
            lines += [f"    > {line}" for line in shown.splitlines()]
    return lines


def check(made: Notebook, path: Path) -> None:
    """Raise LessonError, with the lines that differ, unless the file has the same text."""
    kept = read_json(path)
    if kept is None:
        raise LessonError(f"{path.name} is missing: python lessons/make.py {path.stem}")
    pair = difflib.unified_diff(
        text_of(kept), text_of(made), path.name, "made anew", lineterm="", n=2
    )
    if lines := list(pair):
        advice = f"python lessons/make.py {path.stem} makes the notebook anew"
        raise LessonError("\n".join(["the notebook differs", *lines, advice]))


def save_pictures(notebook: Notebook, folder: Path, name: str) -> None:
    """Write the pictures as `name`-1.png, `name`-2.png, … into a folder."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", ())]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    for i, picture in enumerate(pictures, 1):
        with written_whole(folder / f"{name}-{i}.png") as file:
            file.write(base64.b64decode(joined(picture)))


if __name__ == "__main__":
    cli.run(main)
