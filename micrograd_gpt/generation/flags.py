"""The settings of decoding as flags, on the command line and at the interactive prompt.

Each flag is made from the setting that it sets (`settings.py`). Two flags are not settings:
--greedy is another way to say --temperature 0, and --stop names texts, while `Settings` knows only
tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from micrograd_gpt.generation.settings import GROUPS, HOW_MUCH, WHICH_TOKEN, Settings
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError

# A flag's name, as argparse spells it (--top-k is "top_k") -> the setting that it sets
SETTINGS = {(s.metadata["switch"] or (s.name,))[0]: s for s in fields(Settings)}
NAMES = (*SETTINGS, "stop", "greedy")

# A script's defaults where they differ from the library's: setting -> (default, why)
Defaults = Mapping[str, tuple[Any, str]]


def option(name: str) -> str:
    """How a flag is typed."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Add all the flags of decoding to a parser. One that is not given leaves no value there."""
    add_to = {title: parser.add_argument_group(title).add_argument for title in GROUPS}
    types = get_type_hints(Settings)
    for name, about in SETTINGS.items():
        how: dict[str, Any] = {"metavar": about.metadata["metavar"]}
        default, why = defaults.get(about.name, (about.default, ""))
        if about.metadata["switch"]:
            how, default = {"action": "store_true"}, None
        elif words := about.metadata["range"].words:
            how["choices"] = list(words)
            if "true" in words:  # the flag alone says so too
                how |= {"nargs": "?", "const": "true"}
        else:  # int or float, or None as well
            how["type"] = (*get_args(types[about.name]), types[about.name])[0]
        shown = f"{as_typed(default)}, {why}" if why else as_typed(default)
        how |= {
            "default": argparse.SUPPRESS,
            "help": f"{about.metadata['help']} (default: {shown})",
        }
        add_to[about.metadata["group"]](option(name), **how)
    add_to[HOW_MUCH](
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="end before this text; repeatable (default: off)",
    )
    add_to[WHICH_TOKEN](
        "--greedy",
        action="store_true",
        default=argparse.SUPPRESS,
        help="always the likeliest token, as --temperature 0 (default: off)",
    )


def as_typed(value: Any) -> str:
    """A setting's value as the user would type it."""
    if value is None:
        return "off"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


@dataclass(frozen=True)
class Choices:
    """The flags that a user chose, over the defaults of a script.

    `given` holds the flags that were given and their values, by their names; `defaults` is what
    `add_flags` was given.
    """

    given: Mapping[str, Any]
    defaults: Defaults = field(default_factory=dict)

    @property
    def stop_texts(self) -> list[str]:
        return self.given.get("stop", [])

    def settings(self, end_of_text: int | None = None) -> Settings:
        """What the choices and the defaults come to, with a tokenizer's end-of-text.

        Raises UserError for choices that are out of range or contradict each other.
        """
        chosen = {name: value for name, value in self.given.items() if name in SETTINGS}
        if "" in self.stop_texts:
            raise UserError("--stop needs a text that is not empty")
        if "greedy" in self.given:
            if chosen.get("temperature"):
                raise UserError("--greedy and --temperature contradict each other: leave out one")
            chosen["temperature"] = 0.0
        values = {name: default for name, (default, _) in self.defaults.items()}
        values["end_of_text"] = end_of_text
        if chosen.get("num_beams", 1) > 1:  # nothing is drawn: defaults for drawing do not apply
            values = {n: v for n, v in values.items() if n not in ("temperature", "top_k")}
        for name, value in chosen.items():
            about = SETTINGS[name].metadata
            if about["switch"]:
                values[SETTINGS[name].name] = about["switch"][1]
            else:
                values[name] = about["range"].words.get(value, value)
        return Settings(**values)

    def change(self, name: str, value: Any) -> Choices:
        """These choices with another value of one flag."""
        return replace(self, given={**self.given, name: value})

    def set(self, name: str, *words: str) -> Choices:
        """These choices with one flag as if it were given with these words, one or none.

        Raises UserError for words that the flag does not take.
        """
        parser = cli.ArgumentParser()
        add_flags(parser, self.defaults)
        parsed = parser.parse_args(["=".join([option(name), *words])])
        return self.change(name, getattr(parsed, name))

    def unset(self, name: str) -> Choices:
        """These choices without one flag."""
        return replace(self, given={key: v for key, v in self.given.items() if key != name})

    def __str__(self) -> str:
        """Every flag with the value that holds, but for those that are off."""
        values = {name: s.default for name, s in SETTINGS.items() if not s.metadata["switch"]}
        values |= {name: default for name, (default, _) in self.defaults.items()}
        in_use = {name: v for name, v in (values | dict(self.given)).items() if v is not None}
        return ", ".join(f"{name.replace('_', '-')} {as_typed(v)}" for name, v in in_use.items())
