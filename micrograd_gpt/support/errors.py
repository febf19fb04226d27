"""What the user got wrong, as opposed to what the program got wrong."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked for: a wrong setting, a damaged file, a missing device.

    The message is one line that says what is wrong and what to do. The scripts print it after
    "error: " and exit with status 2; any other exception is a bug and keeps its traceback.
    """
