"""What all scripts have in common: flags, messages, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import difflib
import functools
import io
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.version import VERSION

# What other programs call our flags: nanoGPT, minGPT, llm.c, OpenAI's scripts, Transformers
ALIASES = {
    "lr": "learning-rate",
    "max-lr": "learning-rate",
    "min-learning-rate": "min-lr",
    "warmup-iters": "warmup-steps",
    "max-iters": "max-steps",
    "num-iterations": "max-steps",
    "steps": "max-steps",
    "iters": "max-steps",
    "num-epochs": "epochs",
    "num-train-epochs": "epochs",
    "eval-iters": "eval-batches",
    "eval-steps": "eval-interval",
    "eval-every": "eval-interval",
    "logging-steps": "log-interval",
    "log-every": "log-interval",
    "save-steps": "save-interval",
    "save-every": "save-interval",
    "gradient-accumulation-steps": "grad-accum-steps",
    "per-device-train-batch-size": "batch-size",
    "bs": "batch-size",
    "max-grad-norm": "grad-clip",
    "adam-beta1": "beta1",
    "adam-beta2": "beta2",
    "wd": "weight-decay",
    "layers": "n-layer",
    "heads": "n-head",
    "hidden-size": "n-embd",
    "d-model": "n-embd",
    "n-ctx": "block-size",
    "n-positions": "block-size",
    "context-length": "block-size",
    "seq-len": "block-size",
    "max-length": "block-size max-new-tokens",
    "dataset": "data",
    "input": "data prompt",
    "train-file": "data",
    "validation-file": "validation",
    "output-dir": "out",
    "out-dir": "out",
    "output": "out",
    "from": "init-from model",
    "checkpoint": "model init-from",
    "ckpt": "model init-from",
    "model-name": "model size",
    "model-type": "size",
    "start": "prompt",
    "nsamples": "num-samples",
    "num-return-sequences": "num-samples",
    "length": "max-new-tokens",
    "max-tokens": "max-new-tokens",
    "beams": "num-beams",
    "k": "top-k",
    "p": "top-p",
    "bf16": "dtype",
    "fp16": "dtype",
    "cuda": "device",
    "gpu": "device",
}


# The command before a script's name, as __main__.py knows it. Only a wheel has its scripts within.
called_by = "micrograd-gpt" if (Path(__file__).parents[1] / "scripts").is_dir() else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with the habits of our scripts.

    A wrong flag is reported like any other mistake, as a UserError, with the flag that was probably
    meant. Flags may be typed with underscores. --version says the version.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", int, whole_number)  # "invalid int value" says little to most
        self.register("type", float, number)
        self.register("action", None, StoreOnce)
        self.given: dict[str, Any] = {}  # what was given to each flag of one value
        self.words: list[str] = []  # all that was given
        self.add_argument(
            "--version",
            action="version",
            version=f"micrograd-gpt {VERSION}",
            help="say the version, and end",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if isinstance(args, str):
            raise TypeError(f"main takes a list of words, not {args!r:.40}: add .split() to it")
        words = sys.argv[1:] if args is None else list(map(str, args))  # a notebook has 3, and Path
        self.given = {}
        for word in words:
            self._refuse_alias(word.partition("=")[0])
        self.words = [self._with_dashes(word) for word in words]
        return super().parse_known_args(self.words, namespace)

    def _with_dashes(self, word: str) -> str:
        """--batch_size=4 as --batch-size=4, if that is a flag."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if dashed in self.flags() else word

    def _refuse_alias(self, word: str) -> None:
        """Ask for the flag that is meant by another program's flag, which argparse would take for
        the beginning of one of ours: --length is --max-new-tokens, not --length-penalty."""
        known = {flag for flag in self.flags() if flag.startswith("--")}
        is_beginning = word not in known and any(flag.startswith(word) for flag in known)
        if is_beginning and word[2:] in ALIASES and (hint := did_you_mean(word, known)):
            self.error(f"unrecognized arguments: {word}{hint}")

    def flags(self) -> set[str]:
        """All flags, also those of commands."""
        found = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update(*(parser.flags() for parser in action.choices.values()))
        return found

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            unknown = next((word for word in extra if word.startswith("--")), "").partition("=")[0]
            known = {flag for flag in self.flags() if flag.startswith("--")}
            is_meant = not unknown or unknown in known  # a flag of another command
            hint = "" if is_meant else did_you_mean(unknown, known)
            if all(map(os.path.exists, extra)):  # as of --data *.txt
                hint = ": no flag goes with it; of several files, give their folder, or all in one"
            self.error(f"unrecognized arguments: {' '.join(extra)}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        after_a_flag = self.words and self.words[0].startswith("-")
        if message.startswith("argument COMMAND: invalid choice") and after_a_flag:
            message += ": it comes first, before the flags"
        if message.endswith("expected one argument"):  # "argument --stop: expected one argument"
            flag = message.split()[1].removesuffix(":")
            if any(word == flag and next.startswith("-") for word, next in pairwise(self.words)):
                message += f" (one that begins with a dash is given as {flag}=-…)"
        raise UserError(f"{message}; see --help")


class StoreOnce(argparse.Action):
    """The action of a flag that takes one value. Of two numbers the last counts, as it does in most
    programs; of two texts or paths, which might both be meant, neither does."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None
    ) -> None:
        before = parser.given.setdefault(self.dest, value)
        if flag and before != value and isinstance(value, str | Path) and not self.choices:
            parser.error(f"{flag} was given twice, with {before} and with {value}: give one")
        setattr(namespace, self.dest, value)


def some_text(text: str) -> str:
    """What a flag was given, which must not be empty: "" as a path would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; Python has other bytes of a path as half characters.

    Such a path can be opened, and cannot be noted in a file of settings.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def some_path(text: str) -> Path:
    """The path that a flag was given, which must not be empty."""
    return Path(some_text(text))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "--") -> str:
    """What to add to a message about a name that is not known: the one that was probably meant."""
    plain = name.removeprefix(prefix).replace("_", "-").lower()
    names = {flag.removeprefix(prefix).replace("_", "-"): flag for flag in sorted(known)}
    meant = [names[alias] for alias in ALIASES.get(plain, "").split() if alias in names]
    near = [names[found] for found in difflib.get_close_matches(plain, names, 1, 0.75)]
    found = meant if plain in ALIASES else near
    return f": did you mean {found[0]}?" if found else ""


def number(text: str) -> float:
    """The number that a flag was given."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def whole_number(text: str) -> int:
    """The whole number that a flag was given."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def positive_int(text: str) -> int:
    """The whole number that a flag was given, which must be at least 1."""
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """The whole number that a flag was given, which must be at least 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    value = whole_number(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
    if least > 0 and value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below {2**31:,}, not {value}")
    return value


def counted(count: int, what: str) -> str:
    """How many there are of something, as "1 line" or "2,000 lines"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def quoted(path: str | Path) -> str:
    """A path as it can be typed on a command line: in quotes where it has spaces or the like."""
    words = [str(path)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command(script: str) -> str:
    """What to type for a script, such as "generate.py", as this one was called: by its file, or by
    the command of that name."""
    if not called_by:
        return f"python {script}"
    return f"{called_by} {script.removesuffix('.py').removesuffix('_gpt2')}"


def listed(names: Iterable[str]) -> str:
    """Names that a stranger chose, as a message shows them: there can be any, and any number."""
    return ", ".join(map(ascii, names))[:200]


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


@functools.cache
def say_once(message: str) -> None:
    """Tell the user what would be the same each time, as at each checkpoint of a run."""
    say(message)


def check_stdout() -> None:
    """UserError where the shell closed stdout (`>&-`), for which `run` has put os.devnull."""
    replaced = sys.__stdout__ is None and getattr(sys.stdout, "name", None) == os.devnull
    if replaced or sys.stdout is None:
        raise UserError("stdout is closed: send it to a file, a pipe or a terminal")


def write_utf8() -> None:
    """Have stdout take any text. In a notebook it does so already, and cannot be set."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script and exit with its status.

    A UserError becomes one line, "error: …", and status 2, and so do a file that may not be used
    and output that can't be written because the disk is full; Ctrl-C is 130. A reader that closes
    our output early, as `| head` does, has had what it wanted, so the script ends quietly. Any
    other status of `main` stays, whether or not its output can be written. NumPy does not warn of
    overflows, whose result the script tells, nor matplotlib of letters that its font lacks.
    """
    _open_closed_streams()
    if not any("error" in option for option in sys.warnoptions):
        warnings.filterwarnings("ignore", "(invalid value|overflow) encountered", RuntimeWarning)
        warnings.filterwarnings("ignore", "Glyph .* missing|constrained_layout not", UserWarning)
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
        is_forbidden = isinstance(error, PermissionError)
        is_about_a_file = error.filename is not None or isinstance(error, io.UnsupportedOperation)
        if is_about_a_file and not is_forbidden:  # a bug: bad files are UserErrors
            raise
        status = 2
        if error.errno is None:  # a library's, as where it cannot fetch something
            say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        else:
            what = f"use {error.filename}" if error.filename else "write output"
            say(f"error: cannot {what}: {error.strerror or error}")
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
