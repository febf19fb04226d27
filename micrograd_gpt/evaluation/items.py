"""Questions about a text, one JSON object a line: which ending is right, or what the last word is.

How an object is read follows from its fields, in the form of the task of that name in
lm-evaluation-harness:

    context, endings, label                      as they are
    activity_label, ctx_a, ctx_b, endings, label HellaSwag (Zellers et al. 2019, arXiv:1905.07830)
    goal, sol1, sol2, label                      PIQA (Bisk et al. 2020, arXiv:1911.11641)
    text                                         LAMBADA (Paperno et al. 2016, arXiv:1606.06031)

A label is the number of the right ending, from 0. One space stands between context and ending.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micrograd_gpt.evaluation.records import Row
from micrograd_gpt.evaluation.scoring import Request
from micrograd_gpt.support.cli import listed
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.json_objects import read_objects


@dataclass(frozen=True)
class Choice:
    """A context, its possible endings, and the number of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int
    place: str = field(default="", compare=False)  # where it stands, for messages


@dataclass(frozen=True)
class LastWord:
    """A text up to its last word, and that word."""

    context: str
    word: str
    place: str = field(default="", compare=False)


def read_choices(path: str | Path, encoding: str = "utf-8") -> list[Choice]:
    """The items of a file; UserError, with the place, for one that is none."""
    return [_choice(fields, place) for place, fields in read_objects(path, encoding)]


def read_last_words(path: str | Path, encoding: str = "utf-8") -> list[LastWord]:
    """The texts of a file; UserError, with the place, for one without a word to ask for."""
    return [_last_word(fields, place) for place, fields in read_objects(path, encoding)]


def text_field(fields: Row, name: str, place: str, default: str | None = None) -> Any:
    """The text of a field, or the default where it is missing or null; UserError for any other
    value.
    """
    text = fields.get(name)
    if text is None and default is not None:
        return default
    if name not in fields:
        raise UserError(
            f"{place}: there is no {name!r}, only {listed(fields) or 'an empty object'}"
        )
    if not isinstance(text, str):
        raise UserError(f"{place}: {name!r} is to be a text, not {json.dumps(text)[:40]}")
    return text


# -------------------------------------------------------------------------------- multiple choice


def _choice(fields: Row, place: str) -> Choice:
    def text(name: str) -> str:
        return text_field(fields, name, place)

    if {"goal", "sol1", "sol2"} <= fields.keys():
        context, endings = f"Question: {text('goal')}\nAnswer:", [text("sol1"), text("sol2")]
        if not all(endings):
            raise UserError(f"{place}: 'sol1' or 'sol2' is empty: write it, or remove the item")
    elif {"activity_label", "ctx_a", "ctx_b"} <= fields.keys():
        begun = f"{text('activity_label')}: {text('ctx_a')} {text('ctx_b').capitalize()}"
        context = without_headings(begun)
        endings = [without_headings(ending) for ending in _endings(fields, place)]
    elif "context" in fields:
        context, endings = text("context"), _endings(fields, place)
    else:
        raise UserError(
            f"{place}: an item has context, endings and label, or the fields of HellaSwag "
            "(activity_label, ctx_a, ctx_b, endings) or PIQA (goal, sol1, sol2); this one has "
            f"{', '.join(fields) or 'none'}"
        )
    return Choice(context, tuple(endings), _label(fields, len(endings), place), place)


def without_headings(text: str) -> str:
    """A text of HellaSwag without what was left of WikiHow's headings: [title], [step], …"""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _endings(fields: Row, place: str) -> list[str]:
    endings = fields.get("endings")
    if not isinstance(endings, list) or not all(e and isinstance(e, str) for e in endings):
        raise UserError(f"{place}: 'endings' is to be a list of texts, none of them empty")
    if len(endings) < 2:
        raise UserError(f"{place}: there is nothing to choose from: {len(endings)} endings")
    return endings


def _label(fields: Row, count: int, place: str) -> int:
    label = fields.get("label")
    if isinstance(label, str) and re.fullmatch(r"\s*\d+(\.0*)?\s*", label):
        label = float(label)
    if isinstance(label, float) and label.is_integer():  # as tables with gaps make numbers
        label = int(label)
    if type(label) is not int or not 0 <= label < count:
        given = "there is none" if label in (None, "") else f"this is {json.dumps(label)}"
        raise UserError(
            f"{place}: 'label' is to be the number of the right ending, 0 to {count - 1}: {given}"
        )
    return label


# ------------------------------------------------------------------------------------- last word


def _last_word(fields: Row, place: str) -> LastWord:
    # A line end after the text is no part of its last word
    context, _, word = text_field(fields, "text", place).rstrip().rpartition(" ")
    if not context.strip():
        raise UserError(
            f"{place}: the text is to end in a word to ask for, after a space and other words"
        )
    return LastWord(context, word, place)


# ------------------------------------------------------------------------------------ as token ids


def request_of(
    context: str, continuation: str, tokenizer: Tokenizer, allow_special: bool = False
) -> Request:
    """A context and its continuation as ids, exactly as lm-evaluation-harness makes them.

    Spaces at the end of the context belong to the continuation, as GPT-2's tokens begin with them.
    Both are encoded as one text, and as many tokens taken for the context's as it has alone.
    Without a context, the continuation follows what a text begins with (`start_of_text`). With
    `allow_special`, special tokens that are written in them are tokens.

    Raises UserError where nothing is left to score.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = tokenizer.encode(stripped, allow_special).tolist()
    after = tokenizer.encode(stripped + continuation, allow_special).tolist()[len(before) :]
    if not before and after:
        start = start_of_text(tokenizer)
        before, after = ([start], after) if after[0] != start else (after[:1], after[1:])
    if not after:
        raise UserError(f"there is no token of {continuation!r} to score after {stripped[-20:]!r}")
    return Request(before, after)


def start_of_text(tokenizer: Tokenizer) -> int:
    """The token that a text without a context follows: bos_token, end-of-text or a line end, the
    first of these that there is."""
    start = tokenizer.special_tokens.get("bos_token", tokenizer.end_of_text)
    return int(tokenizer.encode("\n")[-1]) if start is None else start
