"""Pictures by matplotlib, of which no failure ends what they show."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError

_ONE_AT_A_TIME = threading.Lock()  # warnings are caught for all threads alike


@contextmanager
def drawing(path: str | Path) -> Iterator[None]:
    """Within this block matplotlib draws this file; where it fails, stderr says so, once, and
    where its font lacks characters.

    It may be broken itself, or told by the user's matplotlibrc to use what is not installed. A file
    that cannot be written is an error as ever.
    """
    window = os.environ.pop("MPLBACKEND", None)  # such as a notebook's, which is missing here
    try:
        with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", ".* missing from", UserWarning)
            yield
        if any("missing from" in str(warning.message) for warning in caught):
            say_once(
                f"note: {path} has boxes for characters that matplotlib's font lacks: name a font "
                "that has them in a matplotlibrc (font.family: DejaVu Sans, …)"
            )
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever matplotlib and what it imports raise
        problem = " ".join(str(error).split()) or type(error).__name__
        say_once(f"warning: {path} is not drawn: {problem:.300}")
    finally:
        if window is not None:
            os.environ["MPLBACKEND"] = window
