"""The interactive prompt: one text or instruction after another, and settings in between."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys

from micrograd_gpt.generation import flags
from micrograd_gpt.generation.flags import Choices
from micrograd_gpt.generation.output import Writer
from micrograd_gpt.support.cli import did_you_mean, say
from micrograd_gpt.support.errors import UserError

CONTINUE = "Type a text to have it continued, each line a text of its own"
# … by a model that was tuned on instructions
ANSWER = "Type an instruction to have it answered, each line without those before it"
HELP = """\
{}. Ctrl-C stops it, Ctrl-D (or /quit) leaves.
  /set temperature 0.7    change a setting (the flags of --help that shape the text)
  /unset temperature      back to its default
  /help                   this text, and the settings"""


def converse(writer: Writer, choices: Choices) -> int:
    """Continue texts, or answer instructions, as they are typed, until Ctrl-D; returns the exit
    status.
    """
    with contextlib.suppress(ImportError):  # on Windows the terminal itself has a history
        import readline  # noqa: F401 - input() then edits lines and remembers them
    what = ANSWER if writer.template else CONTINUE
    say(f"{what}; /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = ask("> ")
            if not line.startswith("/"):
                settings = choices.settings(writer.tokenizer.end_of_text)
                if writer.template:
                    writer.answer([line], "", settings, choices.stop_texts)
                else:
                    writer.write([line], settings, choices.stop_texts)
                choices = choices.change("seed", settings.seed + 1)  # another text each time
            elif line.strip() in ("/quit", "/exit"):
                return 0
            else:
                choices = command(line, choices, what)
        except EOFError:
            say("")
            return 0
        except KeyboardInterrupt:  # the line typed so far is dropped
            say("")
        except UserError as error:
            say(f"error: {error}")


def ask(question: str) -> str:
    """A line typed on the terminal; the question goes to stderr where stdout is not a terminal."""
    try:
        if sys.stdout.isatty():
            return input(question)
        print(question, end="", file=sys.stderr, flush=True)
        return input()
    except UnicodeDecodeError:
        raise UserError("that was not UTF-8 text") from None


def command(line: str, choices: Choices, what: str) -> Choices:
    """Do what a line that begins with "/" says; returns the choices that hold from now on. `what`
    /help says of other lines.

    Raises UserError for a command that does not exist or cannot be carried out.
    """
    try:
        name, *words = words_of(line)
    except ValueError as error:
        raise UserError(f"{line!r} cannot be read: {error}") from None
    if name == "/help":
        off = (name.replace("_", "-") for name in flags.NAMES if name not in choices.in_use())
        say(f"{HELP.format(what)}\nsettings: {choices}\noff: {', '.join(off)}")
        return choices
    if name not in ("/set", "/unset"):
        raise UserError(f"no such command: {line!r}; /help lists them")
    if not words:
        raise UserError(f"{name} needs a setting; /help lists them")
    if extra := words[2 if name == "/set" else 1 :]:
        raise UserError(f"{name} takes no {extra[0]!r}: put quotes around a value with spaces")
    flag = words[0].lstrip("-").replace("-", "_")
    if flag not in flags.NAMES:
        hint = did_you_mean(flags.option(flag), map(flags.option, flags.NAMES))
        raise UserError(f"no such setting: {words[0]!r}{hint or '; /help lists them'}")
    changed = choices.set(flag, *words[1:]) if name == "/set" else choices.unset(flag)
    settings = changed.settings()  # raises where they contradict each other
    decides = flag in ("greedy", "temperature", "num_beams")  # whether anything is drawn
    told = {**changed.given, "seed": None} if decides else {flag: changed.given.get(flag)}
    flags.tell_idle(told, settings)  # not of a seed that the last text moved on
    return changed


def words_of(line: str) -> list[str]:
    r"""The words of a line as in a shell, but a backslash stays where it is not before a quote or a
    space: a stop text may be \n.

    Raises ValueError for a quotation without an end.
    """
    kept = re.sub(r"\\\\|\\(?![\"' ])", lambda found: "\0" * len(found[0]), line)
    return [word.replace("\0", "\\") for word in shlex.split(kept)]
