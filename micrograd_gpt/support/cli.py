"""What all scripts have in common: flags, messages, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from micrograd_gpt.support.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a wrong flag reported like any other mistake: as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def positive_int(text: str) -> int:
    """The whole number that a flag was given, which must be at least 1."""
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """The whole number that a flag was given, which must be at least 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
    if least > 0 and value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below {2**31:,}, not {value}")
    return value


def counted(count: int, what: str) -> str:
    """How many there are of something, as "1 line" or "2,000 lines"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def say(message: str, bar: Any = None) -> None:
    """Tell the user something that is not a result: on stderr, above the tqdm `bar` if given.

    No script fails because nobody reads its messages (Ctrl-C ends `| tee` too), nor because a
    signal handler speaks while another message is being written.
    """
    with suppress(OSError, RuntimeError):
        if bar is not None:
            bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script and exit with its status.

    A UserError becomes one line, "error: …", and status 2, and so does output that can't be
    written because the disk is full; Ctrl-C is 130. A reader that closes our output early, as
    `| head` does, has had what it wanted, so the script ends quietly. Any other status of `main`
    stays, whether or not its output can be written.
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
        if error.filename is not None:  # not our output: a bug, since bad files are UserErrors
            raise
        status = 2
        say(f"error: cannot write output: {error.strerror or error}")
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    sys.exit(status)


def _open_closed_streams() -> None:
    """Replace a stream that the shell closed (`>&-`), which Python sets to None."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _flush(stream: TextIO) -> OSError | None:
    """Write what a stream has buffered. If that fails, discard it: otherwise Python would try again
    at exit, and end with a status of its own.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
