"""The settings of decoding as flags, on the command line and at the interactive prompt.

Each flag is made from the setting that it sets (`settings.py`). Two flags are not settings:
--greedy is another way to say --temperature 0, and --stop names texts, while `Settings` knows only
tokens.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from micrograd_gpt.generation.settings import GROUPS, HOW_MUCH, WHICH_TOKEN, Settings
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError

LANGUAGE_MODEL = (
    "a checkpoint's folder or file, a size (124M, 355M, 774M, 1558M), or a model on the Hugging "
    "Face Hub: OWNER/NAME or OWNER/NAME@REVISION "
    "(default: the folder out if it holds a checkpoint, else 124M)"
)
CUTS = ("top_k", "top_p", "min_p")  # settings that leave fewer tokens to draw from
ESCAPES = {r"\n": "\n", r"\t": "\t", "\\\\": "\\"}  # in a stop text

# A script's defaults where they differ from the library's: setting -> (default, why)
Defaults = Mapping[str, tuple[Any, str]]


def flag_of(setting: Field[Any]) -> str:
    """The name of the flag that sets a setting, as argparse spells it: "top_k" is --top-k."""
    switch = setting.metadata["switch"]
    return switch[0] if switch else setting.name


SETTINGS = {flag_of(setting): setting for setting in fields(Settings) if setting.metadata["group"]}
NAMES = (*SETTINGS, "stop", "greedy")  # of all flags


def option(name: str) -> str:
    """How a flag is typed."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Add all flags of decoding to a parser. A flag that is not given leaves no value behind."""
    add_to = {title: parser.add_argument_group(title).add_argument for title in GROUPS}
    for name, setting in SETTINGS.items():
        about = setting.metadata
        default, why = defaults.get(setting.name, (setting.default, ""))
        shown = "off" if about["switch"] else as_typed(default)
        shown = f"{shown}, {why}" if why else shown
        add_to[about["group"]](
            option(name),
            default=argparse.SUPPRESS,
            help=f"{about['help']} (default: {shown})",
            **_what_follows(setting),
        )
    add_stop_flag(add_to[HOW_MUCH])
    add_to[WHICH_TOKEN](
        "--greedy",
        action="store_true",
        default=argparse.SUPPRESS,
        help="always the likeliest token, as --temperature 0 (default: off)",
    )


def add_model_flags(parser: argparse.ArgumentParser, which: str = LANGUAGE_MODEL) -> None:
    """Add the flags that say which model it is, and how it computes; `which` is --model's help."""
    parser.add_argument("--model", type=cli.some_text, metavar="M", help=which)
    parser.add_argument(
        "--device",
        choices=["cpu", "gpu", "cuda"],
        default="cpu",
        help="where to compute (default: cpu)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16", "float16", "int8"],
        default="float32",
        help="type of the weights: bfloat16 takes half the memory, int8 (for language models on "
        "the CPU) a quarter; to generate a token takes about half and a third of the time "
        "(default: float32)",
    )


def add_stop_flag(add_argument: Callable[..., Any]) -> None:
    """Add --stop, with the `add_argument` of a parser or of a group of one."""
    add_argument(
        "--stop",
        action="append",
        type=stop_text,
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help=r"end before this text, where \n is the end of a line, \t a tab and \\ a backslash; "
        "repeatable (default: off)",
    )


def tell_idle(given: Mapping[str, Any], settings: Settings) -> None:
    """Say on stderr which flags that were given do nothing where nothing is drawn."""
    idle = [option(name) for name in CUTS if given.get(name) is not None]
    if given.get("seed"):  # 0 is the default
        idle.append("--seed")
    if idle and (settings.temperature == 0 or settings.num_beams > 1):
        where = "in beam search" if settings.num_beams > 1 else "at temperature 0"
        cli.say(f"note: {' and '.join(idle)}: no effect {where}, where nothing is drawn")


def stop_text(text: str) -> str:
    r"""A text as most mean it who type it in a shell, which leaves \n as two characters."""
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], cli.some_text(text))


def _what_follows(setting: Field[Any]) -> dict[str, Any]:
    """What argparse reads after the flag of a setting: nothing, one of a few words, or a number."""
    if setting.metadata["switch"]:
        return {"action": "store_true"}
    words = setting.metadata["range"].words
    if "true" in words:  # which the flag alone says too
        return {"choices": list(words), "nargs": "?", "const": "true"}
    if words:
        return {"choices": list(words)}
    kind = get_type_hints(Settings)[setting.name]  # such as int, or int | None
    return {"type": (get_args(kind) or (kind,))[0], "metavar": setting.metadata["metavar"]}


def as_typed(value: Any) -> str:
    """A setting's value as the user would type it."""
    if value is None:
        return "off"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


@dataclass(frozen=True)
class Choices:
    """The flags that a user gave, over the defaults of a script.

    `given` maps the names of these flags to their values; `defaults` is as for `add_flags`.
    """

    given: Mapping[str, Any]
    defaults: Defaults = field(default_factory=dict)

    @property
    def stop_texts(self) -> list[str]:
        return self.given.get("stop", [])

    def settings(self, end_of_text: int | None = None) -> Settings:
        """The settings that the choices and the defaults add up to. `end_of_text` is the id that
        the tokenizer has for it.

        Raises UserError for choices that are out of range or contradict each other.
        """
        chosen = {name: value for name, value in self.given.items() if name in SETTINGS}
        if "greedy" in self.given:
            if chosen.get("temperature"):
                raise UserError("--greedy and --temperature contradict each other: leave out one")
            chosen["temperature"] = 0.0
        values = {name: default for name, (default, _) in self.defaults.items()}
        values["end_of_text"] = end_of_text
        if chosen.get("num_beams", 1) > 1:  # draws nothing, so defaults for drawing do not apply
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
        """These choices and one more flag, with the word typed after it if there is one.

        Raises UserError for a word that the flag does not take.
        """
        parser = cli.ArgumentParser()
        add_flags(parser, self.defaults)
        parsed = parser.parse_args(["=".join([option(name), *words])])
        return self.change(name, getattr(parsed, name))

    def unset(self, name: str) -> Choices:
        """These choices without one flag."""
        return replace(self, given={key: v for key, v in self.given.items() if key != name})

    def __str__(self) -> str:
        in_use = self.in_use()
        return ", ".join(f"{name.replace('_', '-')} {as_typed(v)}" for name, v in in_use.items())

    def in_use(self) -> dict[str, Any]:
        """Every flag that is not off, with the value that it has beside the others: with --greedy
        the temperature is 0.
        """
        settings = self.settings()
        in_use = {
            name: value
            for name, setting in SETTINGS.items()
            if not setting.metadata["switch"] and (value := getattr(settings, name)) is not None
        }
        return in_use | {name: value for name, value in self.given.items() if name not in in_use}
