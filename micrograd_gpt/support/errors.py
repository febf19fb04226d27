"""Mistakes of the user, as opposed to those of the program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can put right: a wrong setting, a damaged file, a missing device.

    The message is one line that says what is wrong and what to do. The scripts print it after
    "error: " and exit with status 2; any other exception is a bug and keeps its traceback.
    """


@contextmanager
def about(source: object) -> Iterator[None]:
    """A UserError that is raised in this block names its source, such as a file."""
    try:
        yield
    except UserError as error:
        if str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error
