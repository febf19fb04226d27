"""What all scripts have in common: flags, messages, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from micrograd_gpt.support.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a wrong flag reported like any other mistake: as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def some_text(text: str) -> str:
    """What a flag was given, which must not be empty: "" as a path would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def some_path(text: str) -> Path:
    """The path that a flag was given, which must not be empty."""
    return Path(some_text(text))


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


def write_utf8() -> None:
    """Have stdout take any text. In a notebook it does so already, and cannot be set."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script and exit with its status.

    A UserError becomes one line, "error: …", and status 2, and so does output that can't be
    written because the disk is full; Ctrl-C is 130. A reader that closes our output early, as
    `| head` does, has had what it wanted, so the script ends quietly. Any other status of `main`
    stays, whether or not its output can be written.
    """
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):  # the script is imported now
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
