"""Data to classify that every Python carries: which chapter of its manual is a paragraph from?

    python benchmarks/topics.py --out topics.tsv

Writes a .tsv of `label` and `text`, a line for each paragraph of eight chapters of the language
manual (`pydoc_data.topics`). Headings, short lines and paragraphs that two chapters share are left
out. docs/fine_tuning.md shows what a classifier makes of it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import write_text

SHORTEST = 40  # characters; what is shorter says nothing of where it is from
CHAPTERS = {  # names of topics by chapter
    "compound statements": ("compound",),
    "containers": ("typesseq", "typesmapping"),
    "debugger": ("debugger",),
    "format strings": ("formatstrings",),
    "simple statements": (
        *("assert", "assignment", "augassign", "break", "continue", "del", "global", "import"),
        *("nonlocal", "pass", "raise", "return", "yield"),
    ),
    "special methods": ("specialnames",),
    "string methods": ("string-methods",),
    "type hierarchy": ("types",),
}


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("topics.tsv"), help="the file to write")
    out = parser.parse_args(argv).out
    found = paragraphs(manual())
    write_text(out, "label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in found))
    counts = Counter(label for label, _ in found)
    for label, count in counts.most_common():
        print(f"{count:5d}  {label}")
    print(f"{len(found):5d}  paragraphs in {out}")
    return 0


def manual() -> dict[str, str]:
    """The topics of Python's manual, by name; UserError where a Python came without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python came without its manual (pydoc_data)") from error
    return topics


def paragraphs(topics: dict[str, str]) -> list[tuple[str, str]]:
    """The paragraphs of all chapters, each once, as (chapter, text on one line)."""
    chapter_of: dict[str, str] = {}
    shared = set()
    for chapter, names in CHAPTERS.items():
        for name in names:
            for block in topics.get(name, "").split("\n\n"):
                text = " ".join(block.split())
                if len(text) >= SHORTEST and chapter_of.setdefault(text, chapter) != chapter:
                    shared.add(text)
    return [(chapter, text) for text, chapter in chapter_of.items() if text not in shared]


if __name__ == "__main__":
    cli.run(main)
