"""What a training run is told: all its flags in one table, and what holds where one is left out.

`parse_flags` reads the command line and `resolve_settings` completes it. They, `--help` and every
check read the table SETTINGS, so a flag is declared there and nowhere else.
"""

from __future__ import annotations

import argparse
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from micrograd_gpt.arrays.precision import PRECISIONS
from micrograd_gpt.runs import checkpoint, config_file
from micrograd_gpt.runs.folders import check_free, check_goes_on, check_inputs_stay, only_noted
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import are_one_file
from micrograd_gpt.text.corpus import VALIDATION
from micrograd_gpt.text.decoding import Form
from micrograd_gpt.text.documents import check_text_field
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE
from micrograd_gpt.text.tokenizers import NAMES
from micrograd_gpt.weights.config import OLDER_NAMES, SIZES, size_name
from micrograd_gpt.weights.formats import RUN_FLAGS, STATE, has_begun, is_adapter
from micrograd_gpt.weights.names import config_named

SHAPES: dict[str, dict[str, int]] = {"tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128}, **SIZES}

EVAL_WINDOWS = 12  # that --eval-batches counts as a batch

# ----------------------------------------------------------------------------- columns of the table


@dataclass(frozen=True)
class Kind:
    """What values a setting can have, and how argparse reads them."""

    type: type
    argument: dict[str, Any] = field(default_factory=dict)  # for argparse's add_argument
    fits: Callable[[Any], bool] = lambda value: True
    allowed: str = ""  # what fits, in words

    def holds(self, value: Any) -> bool:
        """Whether this is such a value; a whole number counts as a float, True not as a number."""
        types = (int, float) if self.type is float else (self.type,)
        return type(value) in types and self.fits(value)


def one_of(*choices: str) -> Kind:
    return Kind(str, {"choices": choices}, lambda value: value in choices, " or ".join(choices))


TEXT = Kind(
    str,
    {"type": cli.some_text},
    lambda text: text != "" and cli.is_utf8(text),
    "a text in UTF-8 that is not empty",
)
SWITCH = Kind(bool, {"action": "store_true"}, allowed="true or false")
ON_OFF = Kind(bool, {"action": argparse.BooleanOptionalAction}, allowed="true or false")
COUNT = Kind(int, {"type": cli.positive_int}, lambda n: n >= 1, "1 or more")
COUNT_OR_0 = Kind(int, {"type": cli.non_negative_int}, lambda n: n >= 0, "0 or more")
ABOVE_0 = Kind(float, {"type": float}, lambda x: 0 < x < math.inf, "above 0")
SPEED = Kind(float, {"type": float}, lambda x: 1e-12 <= x <= 1e12, "from 1e-12 to 1e12")
FROM_0 = Kind(float, {"type": float}, lambda x: 0 <= x < math.inf, "0 or more")
BELOW_1 = Kind(float, {"type": float}, lambda x: 0 <= x < 1, "in [0, 1)")


class By(NamedTuple):
    """A default that depends on what is trained."""

    tiny: Any  # --size tiny
    large: Any  # one of OpenAI's sizes
    tuned: Any = None  # the weights of --init-from; None: as for `large`


class Change(enum.Enum):
    """May a setting change when a run is resumed?"""

    FREE = enum.auto()  # yes: it does not change what the run computes
    ASK = enum.auto()  # with --allow-changes: it makes the run another one
    NEVER = enum.auto()  # no: it is the shape of what was saved
    ONCE = enum.auto()  # it holds for one start of the script and is not inherited


FREE, ASK, NEVER, ONCE = Change


class Setting(NamedTuple):
    """A row of the table. The flag of `batch_size` is --batch-size."""

    name: str
    kind: Kind
    default: Any
    change: Change
    help: str  # --help adds the default

    @property
    def is_once(self) -> bool:
        return self.change is Change.ONCE

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def add_to(self, parser: Any) -> None:
        """Add the flag to an argparse parser or to a group of one."""
        help = f"{self.help} {self.default_text}".strip()
        parser.add_argument(self.flag, help=help, **self.kind.argument)

    @property
    def default_text(self) -> str:
        """The default in the words of --help; empty where there is none to tell."""
        if self.default is None or self.kind is SWITCH:
            return ""
        if not isinstance(self.default, By):
            return f"({_text(self.default)})"
        tiny, large, tuned = map(_text, self.default)
        fine_tuning = "" if self.default.tuned is None else f"; {tuned} when fine-tuning"
        return f"({tiny} for tiny, else {large}{fine_tuning})"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------- the table

# fmt: off
TABLE: dict[str, list[tuple[Any, ...]]] = {
"data": [
    ("data", TEXT, "pydocs", FREE,  # English that every Python carries: nothing to download
     "pydocs, shakespeare, or a path: a text, records (.jsonl, .json, .csv, .tsv, .parquet), a "
     "folder of these, or token shards"),
    ("validation", TEXT, f"{VALIDATION:g}", FREE,
     "what to validate on: a path as for --data, or the fraction at the end of --data"),
    ("text_field", TEXT, "text", ASK, "the key or column of records that holds their text"),
    ("encoding", TEXT, "utf-8", ASK, "of the text files; the mark of UTF-8, 16 or 32 is noticed"),
    ("line_ends", one_of("auto", "lf", "keep"), "auto", ASK,
     r"lf: \r\n and \r become \n; keep: they stay; auto: lf for the tokenizers char, word, byte, "
     "else keep"),
    ("special_tokens", ON_OFF, False, ASK,  # so that no text can cut itself into documents
     "take <|endoftext|> in a text for the token, not for these 13 characters"),
    ("tokenizer", TEXT, By("char", "gpt2"), NEVER,  # a small model has no use for 50,257 tokens
     f"{', '.join(NAMES)}, or a folder with the files of a byte-level BPE; word knows the 10,000 "
     "most common words"),
],
"model": [
    ("size", TEXT, "tiny", NEVER,  # learns to write words in two minutes on a laptop
     f"{', '.join([*SHAPES, *OLDER_NAMES])}; tiny has "
     "{n_layer} layers, {n_head} heads and is {n_embd} wide".format(**SHAPES["tiny"])),
    ("n_layer", COUNT, None, NEVER, "transformer blocks (those of --size)"),
    ("n_head", COUNT, None, NEVER, "attention heads (those of --size)"),
    ("n_embd", COUNT, None, NEVER, "width of the residual stream (that of --size)"),
    ("block_size", COUNT, By(64, 1024), NEVER, "context in tokens, at most that of --init-from"),
    ("dropout", BELOW_1, 0.0, ASK,  # nothing to regularise if each token is seen a few times only
     "probability of dropping an activation"),
    ("init_from", TEXT, "scratch", NEVER,
     "scratch, a size (OpenAI's weights), a checkpoint's folder or file, or a model on the Hub: "
     "OWNER/NAME or OWNER/NAME@REVISION"),
],
"run": [
    ("out", TEXT, "out", FREE, "the run's folder"),
    ("resume", SWITCH, False, ONCE, "continue the run in --out where it stopped"),
    ("overwrite", SWITCH, False, ONCE, "start anew even if --out already holds a run"),
    ("allow_changes", SWITCH, False, ONCE, "resume even with other settings or data"),
    ("seed", COUNT_OR_0, 1337, ASK, "of weights, data order and dropout"),
    ("device", TEXT, "cpu", ASK, "cpu or gpu"),
    ("dtype", one_of(*PRECISIONS), "float32", NEVER,
     "number type; bfloat16 and float16 are used for the matrix work only"),
    ("tf32", ON_OFF, False, ASK,  # 11 bits are not what a float32 run expects
     "with --device gpu: float32 products on tensor cores, rounded to 11 bits"),
    ("max_steps", COUNT, By(4000, 10000, 1000), FREE,  # tiny: about two minutes on two cores
     "optimizer steps"),
    ("batch_size", COUNT, By(12, 4), ASK, "windows in a micro-batch"),
    ("grad_accum_steps", COUNT, 1, ASK, "micro-batches in a step"),
    ("reduce_dtype", one_of("float32", "bfloat16"), "float32", ASK,  # rounding is asked for
     "number type in which several ranks send each other gradients"),
    ("shard_optimizer", ON_OFF, False, FREE,  # Open MPI may end ranks before all moments are saved
     "each of several ranks holds AdamW's moments of its part of the parameters, and updates it"),
    ("recompute", ON_OFF, False, FREE,  # only where memory is short
     "compute activations again in the backward: less memory, a quarter more time"),
],
"optimizer": [  # weight_decay, beta1, large beta2 and grad_clip are GPT-3's: table 2.1, appendix B
    ("learning_rate", ABOVE_0, By(3e-3,  # small models bear large steps
                                  6e-4,  # GPT-3's for 125M
                                  3e-5),  # trained weights are near a good place: stay there
     ASK, "the highest"),
    ("min_lr", FROM_0, By(3e-4, 6e-5, 3e-6), ASK,  # a tenth of it (Hoffmann et al. 2022)
     "the last; a tenth of --learning-rate if that is given"),
    ("warmup_steps", COUNT_OR_0, By(100, 700, 50), ASK, "linear warm-up"),
    ("weight_decay", FROM_0, 0.1, ASK, "of matrices only"),
    ("beta1", BELOW_1, 0.9, ASK, "decay rate of the first moment"),
    ("beta2", BELOW_1, By(0.99, 0.95), ASK,  # a small batch's gradient is noisy: average over more
     "decay rate of the second moment"),
    ("grad_clip", FROM_0, 1.0, ASK, "largest norm of the gradient; 0: any"),
],
"watching": [
    ("log_interval", COUNT, 10, FREE, "steps between metrics"),
    ("eval_interval", COUNT, By(500, 250), ASK, "steps between validations"),
    ("eval_batches", COUNT, By(40, 4), ASK,  # 30,000 tokens or more: their choice hardly matters
     f"validate on {EVAL_WINDOWS} times as many windows, the same ones whatever --batch-size is"),
    ("sample_interval", COUNT, By(1000, 250), FREE, "steps between samples"),
    ("save_interval", COUNT, By(1000, 250), FREE, "steps between checkpoints"),
    ("keep", COUNT_OR_0, 0, FREE, "how many earlier checkpoints to keep, as step-000100/"),
    ("on_save_error", one_of("stop", "continue"), "stop", FREE,  # a full disk seldom empties itself
     "what to do when a checkpoint cannot be written, as on a full disk"),
    ("tensorboard", ON_OFF, False, FREE, "write event files too"),
    ("watch", ON_OFF, False, FREE, "draw watch.html in --out, a page that follows the run"),
],
"planning": [
    ("plan", SWITCH, False, ONCE, "print what the run would take, and end"),
    ("rate", SPEED, None, ONCE, "TFLOP/s that a device reaches (measured on this machine)"),
    ("devices", COUNT, 1, ONCE,
     "how many GPUs or machines of their own share a step, one rank each"),
    ("interconnect", SPEED, None, ONCE,
     "GB/s that each device sends to others and receives at the same time: plan that too"),
]}
# fmt: on
GROUPS = {title: [Setting(*row) for row in rows] for title, rows in TABLE.items()}
SETTINGS = {row.name: row for rows in GROUPS.values() for row in rows}
NEEDS = {"rate": "plan", "devices": "plan", "interconnect": "plan", "allow_changes": "resume"}
EARLIER = {"line_ends": "keep"}  # what runs did whose settings do not say it yet
OF_THE_WEIGHTS = ("size", "n_layer", "n_head", "n_embd", "tokenizer")  # --init-from decides these


# ------------------------------------------------------------------------- flags to settings


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, here or in a --config, by name; what was left out is not in it."""
    parser = cli.ArgumentParser(
        prog="train_gpt2.py",
        description="Train a GPT-2 and watch it learn. Without flags: a small one, on Python's own "
        "manual, in about two minutes.",
        argument_default=argparse.SUPPRESS,
    )
    for title, rows in GROUPS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            row.add_to(group)
    config_file.add_flag(parser)
    given = vars(parser.parse_args(argv))
    decided = OF_THE_WEIGHTS if "init_from" in given else SHAPES["tiny"] if "size" in given else ()
    return config_file.with_flags_of_file(given, SETTINGS, decided)


def write_settings(settings: argparse.Namespace) -> None:
    """Write the run's settings.toml, which --config takes; UserError if that fails."""
    from_weights = settings.init_from != "scratch"
    config_file.write_config_file(settings, GROUPS, OF_THE_WEIGHTS if from_weights else ())


def resolve_settings(flags: dict[str, Any]) -> argparse.Namespace:
    """Complete the flags with the defaults, or with the run that is resumed; UserError if wrong.

    Beside the table's settings there is `data_fingerprint`, None until the data has been read.
    """
    check_in_use(flags)
    out = Path(flags.get("out", SETTINGS["out"].default))
    if "size" in flags:
        flags = {**flags, "size": known_size(flags["size"])}
    settings = resumed_settings(out, flags) if flags.get("resume") else new_settings(out, flags)
    check_kinds(settings)
    return argparse.Namespace(**settings)


def check_in_use(flags: dict[str, Any]) -> None:
    """UserError for a flag that would do nothing, as another one is not given."""
    for name, needed in NEEDS.items():
        if name in flags and not flags.get(needed):
            flag, other = SETTINGS[name].flag, SETTINGS[needed].flag
            raise UserError(f"{flag} does nothing without {other}: give that too, or leave it out")


def check_kinds(settings: dict[str, Any], table: dict[str, Setting] = SETTINGS) -> None:
    """UserError if a setting is not of the kind that the table says."""
    for name, value in settings.items():
        row = table.get(name)
        if row and value is not None and not row.kind.holds(value):
            raise UserError(f"{row.flag} must be {row.kind.allowed}, not {value}")


def new_settings(out: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that starts; UserError where `out` is taken or flags contradict."""
    texts = [flags.get(name, SETTINGS[name].default) for name in ("data", "validation")]
    if not flags.get("overwrite"):
        with only_noted(flags.get("plan", False)):
            check_free(out, texts)
    weights = flags.get("init_from", "scratch")
    if weights == "scratch":
        size = flags.get("size", SETTINGS["size"].default)
        chosen = defaults("tiny" if size == "tiny" else "large") | SHAPES[size]
    else:
        check_undecided(flags)
        longest = config_named(weights).n_positions
        if flags.get("block_size", 0) > longest:
            raise UserError(f"--block-size is at most {longest}, the context of {weights}")
        chosen = defaults("tuned") | {"block_size": longest}
        if (Path(weights) / PROMPT_TEMPLATE).exists():
            cli.say(
                f"note: {weights} was tuned on instructions: this run learns plain text, and "
                "has no template for them (finetune_gpt2.py instruct keeps it)"
            )
    settings = {"data_fingerprint": None, **chosen, **flags, "out": str(out)}
    if "learning_rate" in flags and "min_lr" not in flags:
        settings["min_lr"] = settings["learning_rate"] / 10
    check_rates(settings)
    check_text_field(settings["text_field"], texts)
    if (name := flags.get("tokenizer")) in NAMES and Path(name).is_dir():
        cli.say(f"note: {name} is the tokenizer of that name; for the folder, write ./{name}")
    with only_noted(flags.get("plan", False)):
        start = None if weights == "scratch" else weights
        check_inputs_stay(out, start, texts, settings["tokenizer"])
    return settings


def check_undecided(flags: dict[str, Any]) -> None:
    """UserError for a flag about what the weights of --init-from have."""
    for name in OF_THE_WEIGHTS:
        if name in flags:
            flag = SETTINGS[name].flag
            raise UserError(f"{flag} makes no sense with --init-from, whose weights decide it")


def check_rates(settings: dict[str, Any]) -> None:
    """UserError where the learning rate would end above what is called the highest."""
    highest, last = settings["learning_rate"], settings["min_lr"]
    if last > highest >= 0:  # below 0 is refused with the others
        raise UserError(
            f"--min-lr {last:g} is above --learning-rate {highest:g}: lower it, or leave it out"
        )


def defaults(trained: str) -> dict[str, Any]:
    """What holds where no flag is given; what is `trained` is "tiny", "large" or "tuned"."""
    values = {name: row.default for name, row in SETTINGS.items()}
    for name, value in values.items():
        if isinstance(value, By):
            chosen = getattr(value, trained)
            values[name] = value.large if chosen is None else chosen
    return values


def resumed_settings(
    out: Path, flags: dict[str, Any], table: dict[str, Setting] = SETTINGS, anew: str = "init-from"
) -> dict[str, Any]:
    """The settings of the run in `out` with those flags that may change; UserError for others.

    `table` has the script's settings, and its flag `anew` starts another run from given weights.
    """
    if flags.get("overwrite"):
        raise UserError("--resume continues the run that --overwrite would remove: give only one")
    check_goes_on(out)
    settings = saved_settings(out, table)
    if settings.get("init_from", "scratch") != "scratch":
        check_undecided(flags)
    allowed, planned = flags.get("allow_changes"), settings["max_steps"]
    wanted = flags.get("max_steps", planned)
    if wanted < planned and not allowed:  # every step's learning rate would change
        raise UserError(
            f"--max-steps may grow, from {planned}, and not shrink to {wanted}: leave the flag "
            "out to resume, or add --allow-changes"
        )
    for name, value in flags.items():
        row = table[name]
        may_change = row.change in (FREE, ONCE) or (allowed and row.change is ASK)
        is_same = value == settings[name] or (
            row.kind is TEXT and are_one_file(value, settings[name] or "")
        )
        if not is_same and not may_change:
            choice = "add --allow-changes, " if row.change is ASK else ""
            before = settings[name]
            larger = name == "block_size" and (before is None or value > before)
            # By these weights; and an adapter is no --model of another
            decided = larger or name in OF_THE_WEIGHTS or row.flag == f"--{anew}" or is_adapter(out)
            start = "in another --out" if decided else f"with --{anew} {cli.quoted(out)}"
            begun = f"has {row.flag} {before}, not {value}"
            raise UserError(
                f"the run in {out} {f'began without {row.flag}' if before is None else begun}: "
                f"leave the flag out to resume, {choice}or start another run {start}"
            )
    note_edits(out, settings, flags, table)
    new_rate = flags.get("learning_rate", settings["learning_rate"])
    if new_rate != settings["learning_rate"]:
        settings["min_lr"] = new_rate / 10
    settings |= flags | {"out": str(out)}
    if {"learning_rate", "min_lr"} & flags.keys():
        check_rates(settings)
    return settings


def note_edits(
    out: Path, settings: dict[str, Any], flags: dict[str, Any], table: dict[str, Setting]
) -> None:
    """Say so where the settings.toml of a resumed run, which is not read, was edited."""
    if not has_begun(out):
        return
    path = out / RUN_FLAGS
    try:
        in_file = config_file.read_config_file(path, table)
    except UserError as error:
        cli.say(f"note: {error}; --resume does without it")
        return
    known = [(settings | {"out": in_file.get("out")}), flags]  # the folder may have been moved
    edited = [n for n, value in in_file.items() if value not in [k.get(n) for k in known]]
    if edited:
        cli.say(
            f"note: {path} says something else of {', '.join(edited)} than the run, by which "
            "--resume goes: give changes as flags"
        )


def saved_settings(out: Path, table: dict[str, Setting] = SETTINGS) -> dict[str, Any]:
    """The settings of the run in `out`; UserError where one is missing or impossible."""
    saved = checkpoint.load_settings(out)
    if table is SETTINGS and "command" in saved:
        maker = f"finetune_gpt2.py {saved['command']}"
        raise UserError(f"the run in {out} is one of {maker}, which can continue it")
    settings = {"data_fingerprint": saved.get("data_fingerprint")}
    for name, row in table.items():
        value = (
            row.default if row.change is ONCE else saved.get(name, EARLIER.get(name, row.default))
        )
        if isinstance(value, By) or not (row.kind.holds(value) or value is row.default is None):
            what = f"have {value!r} as {name}" if name in saved else f"lack {name}"
            raise UserError(f"{out / STATE} is damaged: its settings {what}")
        settings[name] = value
    return settings


def form_of(settings: argparse.Namespace) -> Form:
    """How the settings say that texts are to be read."""
    s = settings
    return Form(s.encoding, s.text_field, s.line_ends, s.special_tokens)


# ------------------------------------------------------------------------------------- sizes


def known_size(name: str) -> str:
    """The name in SHAPES of the --size that the user gave; UserError if there is none."""
    if name not in SHAPES and name not in OLDER_NAMES:
        raise UserError(f"unknown GPT-2 size {name!r}: --size is one of {', '.join(SHAPES)}")
    return name if name in SHAPES else size_name(name)
