"""Texts that were cut into words with spaces in between, as the texts they were made from.

WikiText (Merity et al. 2016, arXiv:1609.07843) has spaces around punctuation, which GPT-2 has
hardly ever seen. Radford et al. 2019, section 3.1, take them out before the model reads a text. The
rules, and their order, are those of lm-evaluation-harness's task `wikitext`, but for its last:
spaces are all that changes here.
"""

from __future__ import annotations

import re

# What each finds, and what takes its place
WIKITEXT = (
    (r"s '", "s'"),  # the friends ' house
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000, well @-@ known, 2 @.@ 5
    *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),  # one after another: " ? , " has two
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),  # headings
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" 's", "'s"),
)


def wikitext(text: str) -> str:
    """A text of WikiText without the spaces that were put into it."""
    for found, instead in WIKITEXT:
        text = re.sub(found, instead, text)
    return text


DETOKENIZERS = {"wikitext": wikitext}
