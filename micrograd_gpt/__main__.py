"""The scripts by one name, anywhere: `python -m micrograd_gpt train`, or `micrograd-gpt train`.

These are the very files train_gpt2.py, generate.py and so on. In a checkout they lie beside the
package; in a wheel, which puts no module called `generate` among everybody's, within it.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from micrograd_gpt.support import cli

PACKAGE = Path(__file__).parent
SCRIPTS = {
    "train": "train_gpt2.py",
    "generate": "generate.py",
    "load": "load_gpt2.py",
    "finetune": "finetune_gpt2.py",
    "evaluate": "evaluate_gpt2.py",
}


def find_script(name: str) -> Path | None:
    """The file of a script, where it is installed or in the checkout; None if there is none."""
    places = (PACKAGE / "scripts" / name, PACKAGE.parent / name)
    return next((place for place in places if place.is_file()), None)


def main() -> None:
    """Run the script that the first word of the command line names, with the words after it."""
    name, words = sys.argv[1:2], sys.argv[2:]
    script = find_script(SCRIPTS[name[0]]) if name and name[0] in SCRIPTS else None
    if script is None:
        cli.run(lambda: _no_script(sys.argv[1:2]))
    is_module = Path(sys.argv[0]).name == "__main__.py"
    cli.called_by = "python -m micrograd_gpt" if is_module else "micrograd-gpt"
    sys.argv = [str(script), *words]
    sys.path[0] = str(script.parent)  # as for `python train_gpt2.py`
    runpy.run_path(str(script), run_name="__main__")


def _no_script(argv: list[str]) -> int:
    """Describe the commands; UserError for a word that is none of them."""
    commands = {name: file for name, file in SCRIPTS.items() if find_script(file)}
    lines = "\n".join(f"  {name:9} {file}" for name, file in commands.items())
    parser = cli.ArgumentParser(
        prog="micrograd-gpt",
        usage="micrograd-gpt COMMAND …",
        description=f"Each command is a script, and takes its flags:\n\n{lines}\n\n"
        "micrograd-gpt COMMAND --help lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of these")
    parser.parse_args(argv or ["--help"])
    raise AssertionError("parse_args ends the process, or raises")


if __name__ == "__main__":
    main()
