"""What the three scripts have in common: flags, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TextIO

from micrograd_gpt.support.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a wrong flag reported like any other mistake: as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def positive_int(text: str) -> int:
    """A flag's whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below {2**31:,}, not {value}")
    return value


def non_negative_int(text: str) -> int:
    """A flag's whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {value}")
    return value


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script and exit with its status.

    A UserError becomes one line, "error: …", and status 2, and so does output that can't be
    written, on a full disk; Ctrl-C is 130. A reader that closes our output early, as `| head`
    does, has had what it wanted: that ends the script quietly. No other status of `main` depends
    on whether its output can be written.
    """
    _open_closed_streams()
    try:
        status = main()
        failed = _flush(sys.stdout)
        if failed and not status:
            raise failed
    except UserError as error:
        status = 2
        say(f"error: {error}")
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 0
    except OSError as error:
        if error.filename is not None:  # of a file; what fails in writing to one is a UserError
            raise
        status = 2
        say(f"error: cannot write output: {error.strerror or error}")
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    sys.exit(status)


def _open_closed_streams() -> None:
    """Python has no sys.stdout where the shell closed it (`>&-`), and what prints would fail."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def say(message: str) -> None:
    """Tell the user something, on stderr; where nobody reads it (a closed pipe), go on."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _flush(stream: TextIO) -> OSError | None:
    """Write what a stream holds back. Where that fails, discard it: or Python would try again at
    exit, and end with a status of its own.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
