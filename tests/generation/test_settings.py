"""What `Settings` refuses."""

from __future__ import annotations

from typing import Any

import pytest

from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.support.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": 2.0}, "min_p must be between"),
        ({"temperature": 1e-320}, "temperature must be 0 .greedy., or 1e-06 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 1e-06 and 1e.06"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty must be between"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be between"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, not 1.5"),
        ({"top_k": float("nan")}, "top_k must be a whole number, not nan"),
        ({"num_beams": 0}, "num_beams must be 1"),
        ({"num_samples": 0}, "num_samples must be 1"),
        ({"seed": -1}, "seed must be 0"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"top_p": [0.9]}, "top_p must be a number"),
        ({"early_stopping": "soon"}, "early_stopping must be"),
        ({"speculate": "tea-leaves"}, "speculate must be"),
        ({"num_beams": 2, "top_k": 4}, "beam search takes no"),
        ({"num_beams": 2, "temperature": 0.5}, "beam search takes no"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples is above num_beams"),
        ({"num_beams": 2, "speculate": "prompt-lookup"}, "cannot speculate"),
        ({"length_penalty": 2.0}, "length_penalty is for"),
        ({"early_stopping": True}, "early_stopping is for"),
    ],
)
def test_wrong_settings_are_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Settings(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "speculate", "end_of_text"])
def test_none_turns_a_setting_off(name: str) -> None:
    assert getattr(Settings(**{name: None}), name) is None
