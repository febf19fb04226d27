"""Pictures by matplotlib, of which no failure ends what they show."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError


@contextmanager
def drawing(path: str | Path) -> Iterator[None]:
    """Within this block matplotlib draws this file; where it fails, stderr says so, once.

    It may be broken itself, or told by the user's matplotlibrc to use what is not installed. A file
    that cannot be written is an error as ever.
    """
    is_first = "matplotlib" not in sys.modules
    # Where a notebook's window is missing here, matplotlib could not be imported
    window = os.environ.pop("MPLBACKEND", None) if is_first else None
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever matplotlib and what it imports raise
        problem = " ".join(str(error).split()) or type(error).__name__
        say_once(f"warning: {path} is not drawn: {problem:.300}")
    finally:
        if window is not None:
            os.environ["MPLBACKEND"] = window
            if matplotlib := sys.modules.get("matplotlib"):  # a notebook's own pictures need it
                with suppress(ValueError):
                    matplotlib.rcParams["backend"] = window


def say_what_is_not_drawn(texts: Iterable[str], path: str | Path) -> None:
    """A note on stderr where matplotlib's font lacks letters of these texts, of a picture."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    letters = set[int]()
    for family in FontProperties().get_family():
        with suppress(ValueError):  # it is not installed: the next one is used
            found = findfont(FontProperties(family=[family]), fallback_to_default=False)
            letters |= get_font(found).get_charmap().keys()
    if letters and any(ord(letter) not in letters for text in texts for letter in text):
        say_once(
            f"note: {path} has boxes for letters that matplotlib's font lacks: name one that has "
            "them in a matplotlibrc (font.family: DejaVu Sans, …)"
        )
