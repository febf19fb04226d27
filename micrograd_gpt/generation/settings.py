"""The settings of decoding. Each is declared once, here: its name, type, default, range and help.

`generate.py` makes its flags from these fields (see `flags.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from micrograd_gpt.support.cli import did_you_mean
from micrograd_gpt.support.errors import UserError

GPT2_END_OF_TEXT = 50256
SMALLEST, LARGEST = 1e-6, 1e6  # factors of the scores: further out these would overflow


class Range(NamedTuple):
    """The values that a setting may have: in words, and as a test.

    `words` is for a setting that is chosen from a few values: what a user types for each of them.
    """

    text: str
    holds: Callable[[Any], bool]
    words: Mapping[str, Any] = {}


AT_LEAST_0 = Range("0 or more", lambda value: value >= 0)
AT_LEAST_1 = Range("1 or more", lambda value: value >= 1)

# The groups in which --help shows the flags
HOW_MUCH = "how much"
WHICH_TOKEN = "which token comes next"
BEAMS = "beam search, in place of random choices"
SPEED = "speed"
GROUPS = (HOW_MUCH, WHICH_TOKEN, BEAMS, SPEED)


def setting(
    default: Any,
    group: str,
    help: str,
    range: Range | None = None,
    metavar: str | None = None,
    switch: tuple[str, Any] | None = None,
) -> Any:
    """A field of `Settings`. Where its type allows None, None means "off".

    Args:
        group, help, metavar: where and how --help shows the flag of this setting. Without a group
            it has no flag.
        switch: for a flag that takes no value, its name and what it sets the setting to. Any other
            flag has the setting's name and takes the value.
    """
    about = {"group": group, "help": help, "range": range, "metavar": metavar, "switch": switch}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to decode. Names and meanings are Transformers', except that `num_samples` is called
    num_return_sequences there, and `end_of_text` eos_token_id.

    Raises UserError for a value out of range, and for settings that contradict each other.
    """

    max_new_tokens: int = setting(20, HOW_MUCH, "the most tokens to add", AT_LEAST_1, "N")
    num_samples: int = setting(
        1,
        HOW_MUCH,
        "how many continuations, decoded as one batch; with --num-beams, how many of the beams "
        "found are shown",
        AT_LEAST_1,
        "N",
    )
    # The id of the token that ends a text; None: no token does
    end_of_text: int | None = setting(
        GPT2_END_OF_TEXT, HOW_MUCH, "go on after end-of-text", switch=("ignore_eos", None)
    )

    # How many ids the tokenizer has; None: as many as the model, whose vocabulary may be padded
    vocab_size: int | None = setting(None, "", "", AT_LEAST_1)

    seed: int = setting(
        0,
        WHICH_TOKEN,
        "where the random choices start; the same seed and flags give the same text",
        AT_LEAST_0,
        "N",
    )
    temperature: float = setting(
        1.0,
        WHICH_TOKEN,
        "below 1 keeps to likely tokens, above 1 takes chances; 0: always the likeliest token",
        Range(
            f"0 (greedy), or {SMALLEST:g} or more",
            lambda value: value == 0 or SMALLEST <= value < math.inf,
        ),
        "T",
    )
    top_k: int | None = setting(
        None,
        WHICH_TOKEN,
        "only the K likeliest tokens; 0: all",
        Range("0 (all tokens) or more", lambda value: value >= 0),
        "K",
    )
    top_p: float | None = setting(
        None,
        WHICH_TOKEN,
        "only the likeliest tokens that together have probability P; 1: all",
        Range("above 0, and 1 at most", lambda value: 0 < value <= 1),
        "P",
    )
    min_p: float | None = setting(
        None,
        WHICH_TOKEN,
        "only tokens at least P times as likely as the likeliest; 0: all",
        Range("between 0 and 1", lambda value: 0 <= value <= 1),
        "P",
    )
    repetition_penalty: float = setting(
        1.0,
        WHICH_TOKEN,
        "above 1 makes the tokens that the text already has less likely; 1: off",
        Range(f"between {SMALLEST:g} and {LARGEST:g}", lambda value: SMALLEST <= value <= LARGEST),
        "X",
    )
    no_repeat_ngram_size: int = setting(
        0,
        WHICH_TOKEN,
        "never repeat N tokens in a row; 0: off",
        Range("0 (off) or more", lambda value: value >= 0),
        "N",
    )

    num_beams: int = setting(1, BEAMS, "how many texts are in play; 1: off", AT_LEAST_1, "N")
    length_penalty: float = setting(
        1.0,
        BEAMS,
        "above 0 favours longer texts: a text's score is its log-probability / its length ** X",
        Range("a finite number", math.isfinite),
        "X",
    )
    early_stopping: bool | str = setting(
        False,
        BEAMS,
        "true: stop at --num-beams finished texts; false: when no better one is likely; never: "
        "only when no better one is possible",
        Range(
            "True, False or never",
            lambda value: value in (True, False, "never"),
            {"true": True, "false": False, "never": "never"},
        ),
    )

    speculate: str | None = setting(
        None,
        SPEED,
        "guess the next tokens from what the text has said before and check them in one pass: the "
        "same text, sooner if it repeats itself; only while one sample is running",
        Range(
            "prompt-lookup or None",
            lambda value: value == "prompt-lookup",
            {"prompt-lookup": "prompt-lookup"},
        ),
    )
    use_cache: bool = setting(
        True,
        SPEED,
        "read the whole text again for each token: slow, but saves 2 * n_layer * n_embd * "
        "positions * 4 bytes a sample",
        switch=("no_kv_cache", False),
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, allowed = getattr(self, setting.name), setting.metadata["range"]
            off = value is None and "None" in str(setting.type)
            if not off and "int" in str(setting.type) and not isinstance(value, Integral):
                raise UserError(f"{setting.name} must be a whole number, not {value!r}")
            if not off and "float" in str(setting.type) and not isinstance(value, Real):
                raise UserError(f"{setting.name} must be a number, not {value!r}")
            if allowed and not off and not allowed.holds(value):
                raise UserError(f"{setting.name} must be {allowed.text}, not {value}")
        beams = self.num_beams > 1
        cuts = self.top_k or self.top_p not in (None, 1) or self.min_p
        draws = self.temperature not in (0, 1) or cuts
        for conflict, problem in (
            (beams and draws, "beam search takes no temperature, top_k, top_p or min_p"),
            (beams and self.num_samples > self.num_beams, "num_samples is above num_beams"),
            (beams and self.speculate, "beam search cannot speculate"),
            (not beams and self.length_penalty != 1, "length_penalty is for num_beams above 1"),
            (not beams and self.early_stopping, "early_stopping is for num_beams above 1"),
        ):
            if conflict:
                raise UserError(f"{problem}: change one of them")


# What Transformers calls some settings, or has beside them, and what to give here
INSTEAD = {
    "do_sample": "temperature=0 takes the likeliest token, any other temperature a random one",
    "num_return_sequences": "num_samples is how many continuations there are",
    "eos_token_id": "end_of_text is the token that ends a text",
    "pad_token_id": "rows that end early are filled up with end_of_text",
    "max_length": "max_new_tokens counts the new tokens alone",
    "input_ids": "the ids come first, without a name",
    "attention_mask": "prompts of different lengths are a list of rows, without padding",
    "typical_p": "min_p and top_p cut off unlikely tokens",
}


def check_names(given: Mapping[str, Any]) -> None:
    """TypeError, which says what to give instead, for a name that no setting has."""
    names = {setting.name for setting in fields(Settings)}
    for name in given:
        if name not in names:
            instead = INSTEAD.get(name)
            hint = f": {instead}" if instead else did_you_mean(name, names, prefix="")
            raise TypeError(f"generate() has no setting {name!r}{hint}")
