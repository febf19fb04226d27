"""Settings as flags: none is left out, each says its default, and together they make `Settings`."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

import pytest

from micrograd_gpt.generation.flags import NAMES, SETTINGS, Choices, add_flags, as_typed, option
from micrograd_gpt.generation.settings import GROUPS, Settings
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError

DEFAULTS = {"temperature": (0.8, "a reason"), "top_k": (40, "another")}
VALUES = {  # what may be typed after each flag, and what that makes of the setting
    "max_new_tokens": ("7", 7),
    "num_samples": ("2", 2),
    "ignore_eos": (None, None),
    "seed": ("5", 5),
    "temperature": ("0.5", 0.5),
    "top_k": ("3", 3),
    "top_p": ("0.9", 0.9),
    "min_p": ("0.1", 0.1),
    "repetition_penalty": ("1.5", 1.5),
    "no_repeat_ngram_size": ("4", 4),
    "num_beams": ("1", 1),
    "length_penalty": ("1", 1.0),
    "early_stopping": ("false", False),
    "speculate": ("prompt-lookup", "prompt-lookup"),
    "no_kv_cache": (None, False),
}


def parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser()
    add_flags(parser, DEFAULTS)
    return parser


def parse(*argv: str) -> Choices:
    return Choices(vars(parser().parse_args(argv)), DEFAULTS)


def help_of(flag: str) -> str:
    """What --help says about a flag, on one line."""
    lines = parser().format_help().split("\noptions:")[1]
    (entry,) = re.findall(rf"^  {re.escape(flag)}\b(?!-).*(?:\n {{10,}}.*)*", lines, re.MULTILINE)
    return " ".join(entry.split())


# All but the one that the tokenizer decides
FOR_USERS = [field for field in dataclasses.fields(Settings) if field.name != "vocab_size"]


@pytest.mark.parametrize("setting", FOR_USERS, ids=lambda field: field.name)
def test_every_setting_has_a_flag_whose_help_says_its_default(
    setting: dataclasses.Field[Any],
) -> None:
    (flag,) = (flag for flag, sets in SETTINGS.items() if sets.name == setting.name)
    default, reason = DEFAULTS.get(setting.name, (setting.default, ""))
    if flag != setting.name:  # a switch, which is off unless it is given
        default = None
    ending = (
        f"(default: {as_typed(default)}, {reason})" if reason else f"(default: {as_typed(default)})"
    )
    assert help_of(option(flag)).endswith(ending)
    typed, value = VALUES[flag]
    argv = [option(flag)] if typed is None else [option(flag), typed]
    assert getattr(parse(*argv).settings(end_of_text=9), setting.name) == value


@pytest.mark.parametrize("flag", ["stop", "greedy"])
def test_the_flags_that_are_no_settings_say_their_default_too(flag: str) -> None:
    assert flag in NAMES and help_of(option(flag)).endswith("(default: off)")


def test_flags_are_shown_in_groups() -> None:
    text = parser().format_help()
    places = [text.index(f"\n{title}:\n") for title in GROUPS]
    assert places == sorted(places)
    shown = [text.rindex(f"  {flag}") for flag in ("--num-beams", "--early-stopping")]
    assert [places[2], *shown, places[3]] == sorted([*places[2:], *shown])


def test_without_flags_the_scripts_defaults_hold_and_the_librarys_for_the_rest() -> None:
    assert parse().settings(end_of_text=9) == Settings(temperature=0.8, top_k=40, end_of_text=9)
    assert parse().settings() == Settings(temperature=0.8, top_k=40, end_of_text=None)
    assert Choices({}).settings(end_of_text=9) == Settings(end_of_text=9)


def test_beam_search_takes_none_of_the_scripts_defaults_for_drawing() -> None:
    settings = parse("--num-beams", "3", "--early-stopping").settings()
    assert (settings.num_beams, settings.early_stopping, settings.top_k) == (3, True, None)
    never = parse("--num-beams", "3", "--early-stopping", "never", "--greedy").settings()
    assert (never.early_stopping, never.temperature) == ("never", 0)


def test_greedy_is_temperature_0() -> None:
    assert parse("--greedy").settings() == parse("--temperature", "0").settings()
    assert parse("--greedy", "--temperature", "0").settings().temperature == 0
    with pytest.raises(UserError, match="contradict each other"):
        parse("--greedy", "--temperature", "1").settings()


def test_a_typed_line_end_in_a_stop_text_is_one() -> None:
    typed = [r"\n", r"a\n\nb", r"\t", r"\\n", r"\end{x}", "\n"]
    wanted = ["\n", "a\n\nb", "\t", r"\n", r"\end{x}", "\n"]
    assert parse(*(word for text in typed for word in ("--stop", text))).stop_texts == wanted
    assert Choices({}).set("stop", r"Q:\n").stop_texts == ["Q:\n"]
    with pytest.raises(UserError, match="--stop: must not be empty"):
        Choices({}).set("stop", "")


def test_choices_change_one_flag_at_a_time() -> None:
    first = parse("--seed", "3", "--stop", "a", "--stop", "b")
    assert first.stop_texts == ["a", "b"]
    second = first.set("top_k", "5").set("no_kv_cache").set("stop", "c d").change("seed", 4)
    settings = second.settings()
    assert (settings.top_k, settings.use_cache, settings.seed) == (5, False, 4)
    assert second.stop_texts == ["c d"]
    assert second.unset("top_k").unset("seed").unset("greedy").settings().top_k == 40
    assert first.settings().top_k == 40 and first.stop_texts == ["a", "b"]
    with pytest.raises(UserError, match="must be a whole number, not 'many'"):
        first.set("top_k", "many")


def test_choices_are_listed_as_they_are_typed() -> None:
    text = str(
        parse("--num-beams", "2", "--early-stopping", "never", "--stop", "o j", "--top-p", "1")
    )
    for part in (
        "temperature 1.0",  # the default for drawing does not hold here
        "num-beams 2",
        "early-stopping never",
        "stop ['o j']",
        "top-p 1",
    ):
        assert part in text
    for name in ("greedy", "min-p", "ignore-eos", "no-kv-cache", "speculate"):
        assert name not in text
    assert "early-stopping false" in str(parse()) and "temperature 0.8" in str(parse())
    assert "temperature 0.0" in str(parse("--greedy")) and "greedy true" in str(parse("--greedy"))
