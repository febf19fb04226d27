"""What the three scripts have in common: flags, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from micrograd_gpt.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a wrong flag reported like any other mistake: as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def positive_int(text: str) -> int:
    """A flag's whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
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
    does, has had what it wanted: that ends the script quietly.
    """
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        _discard_output()
        status = 0
    except OSError as error:
        if error.filename is not None:  # of a file; what fails in writing to one is a UserError
            raise
        _discard_output()
        print(f"error: cannot write output: {error.strerror or error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
