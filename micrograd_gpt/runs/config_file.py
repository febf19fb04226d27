"""Flags from a TOML file, and the settings of a run as such a file.

    # quick.toml
    data = "my.txt"
    batch_size = 24          # or batch-size
    [optimizer]              # tables are for the reader only
    learning_rate = 1e-3

`train_gpt2.py --config quick.toml` and finetune_gpt2.py take these for flags; flags on the command
line come before them. Every run writes its settings.toml, which can be given to --config again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from micrograd_gpt.support.cli import did_you_mean, some_text
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading, write_text
from micrograd_gpt.weights.formats import RUN_FLAGS, RUN_FLAGS_BEGIN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add --config to a parser whose flags leave no value behind where they are not given."""
    parser.add_argument(
        "--config",
        type=some_text,
        metavar="FILE",
        help=f"take flags from a TOML file, such as the {RUN_FLAGS} of a run; flags on the command "
        "line come before it",
    )


def with_flags_of_file(
    given: dict[str, Any], table: Mapping[str, Any], decided: Collection[str] = ()
) -> dict[str, Any]:
    """The flags that were given, and those in the file that --config names if there is one, but for
    what is `decided` by a flag that was given, as --min-lr is by --learning-rate."""
    given = dict(given)
    decided = {*decided, "min_lr"} if "learning_rate" in given else decided
    file = given.pop("config", None)
    flags = {} if file is None else read_config_file(file, table)
    return {name: flags[name] for name in flags if name not in decided} | given


def read_config_file(path: str | Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The flags in a file, by name, as the command line would give them.

    Raises UserError, naming the file, where it is no TOML, and for a name that is no flag, one that
    stands there twice, and a value that the flag cannot have.
    """
    try:
        with reading(path), open(path, encoding="utf-8-sig", newline="") as file:  # with a mark too
            content = tomllib.loads(file.read())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}: correct it") from error
    flags: dict[str, Any] = {}
    for key, value in _entries(content):
        row = table.get(name := key.replace("-", "_"))
        if row is None:
            hint = did_you_mean(key, table, prefix="")
            raise UserError(f"{path}: there is no flag {key!r}{hint}; see --help")
        if name in flags:
            raise UserError(f"{path}: {key} stands there twice: remove one")
        # 1 is a number for a flag of fractions, and validation = 0.1 what --validation 0.1 is
        numbers = {float: (int,), str: (int, float)}.get(row.kind.type, ())
        flags[name] = row.kind.type(value) if type(value) in numbers else value
        if not row.kind.holds(flags[name]):
            kind = {int: "a whole number, ", float: "a number, "}.get(row.kind.type, "")
            quotes = ": leave out the quotes" if kind and isinstance(value, str) else ""
            raise UserError(
                f"{path}: {key} must be {kind}{row.kind.allowed}, not {value!r}{quotes}"
            )
    return flags


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file, without the tables that they stand in."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield key, value


def write_config_file(
    settings: argparse.Namespace, groups: Mapping[str, list[Any]], leave_out: tuple[str, ...]
) -> None:
    """Write the settings of a run into its folder, for --config; UserError if that fails.

    Those that hold for one start only, as --resume, are no part of it.
    """
    lines = [f"{RUN_FLAGS_BEGIN} (give another --out)"]
    for title, rows in groups.items():
        values = {r.name: getattr(settings, r.name) for r in rows if not r.is_once}
        known = {n: v for n, v in values.items() if v is not None and n not in leave_out}
        if known:
            lines += ["", f"[{title}]", *(f"{n} = {_toml(v)}" for n, v in known.items())]
    write_text(Path(settings.out, RUN_FLAGS), "\n".join(lines) + "\n")


def _toml(value: str | bool | int | float) -> str:
    """A value as TOML has it: its texts are JSON's, but for one character."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
