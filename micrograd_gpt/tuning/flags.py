"""What fine-tuning is told: the flags of finetune_gpt2.py's commands, and what holds without them.

The rows are of the same table as train_gpt2.py's (runs/settings.py), many of them the same rows.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from micrograd_gpt.runs import checkpoint, config_file
from micrograd_gpt.runs.folders import check_free, check_inputs_stay, only_noted
from micrograd_gpt.runs.settings import (
    ABOVE_0,
    ASK,
    BELOW_1,
    COUNT,
    COUNT_OR_0,
    FREE,
    FROM_0,
    NEVER,
    ON_OFF,
    ONCE,
    SETTINGS,
    TEXT,
    Kind,
    Setting,
    check_in_use,
    check_kinds,
    check_rates,
    one_of,
    resumed_settings,
)
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import DEFAULT
from micrograd_gpt.tuning import lora

OPTIONAL_FILE = Kind(
    str, {"nargs": "?", "const": "-", "metavar": "FILE", "type": cli.some_text}, allowed="a file"
)


def _as_in_training(*names: str) -> list[Setting]:
    return [SETTINGS[name] for name in names]


# fmt: off
LABELLED_DATA = [
    Setting("data", TEXT, None, FREE,  # what is in it is compared
     "texts with labels: .tsv, .csv, .jsonl, .json or .parquet. A .tsv has no quotes; without a "
     "header it has two columns, and the one with fewer different values is the label"),
    Setting("validation", TEXT, None, FREE,
     "texts to validate on (a tenth of --data, of each label the same part)"),
    Setting("test", TEXT, None, FREE, "texts for the final scores only (as for --validation)"),
    Setting("text_field", TEXT, "text", ASK, "the column or key of the text"),
    Setting("label_field", TEXT, "label", ASK, "the column or key of the label"),
    Setting("encoding", TEXT, "utf-8", ASK, "of the files"),
    Setting("balance", ON_OFF, False, ASK,
     "learn from each label equally often: texts of rare ones more than once an epoch"),
    Setting("predict", OPTIONAL_FILE, None, ONCE,
     "label the texts of a file (.txt: one a line, blank lines do not count; else as for --data) "
     "or of a pipe with the classifier --model: one JSON object a line"),
]
CLASSIFIER = [
    Setting("train_layers", one_of("all", "last", "head"), "all", NEVER,
     "which layers learn; last: the final block and LayerNorm, and the head"),
]
INSTRUCTIONS = [
    Setting("data", TEXT, None, FREE,  # what is in it is compared
     "instructions and answers: a .json or .jsonl file of objects (a list, or one a line), each "
     "with instruction, output and perhaps input, or with messages (role: system, user or "
     "assistant; content)"),
    Setting("validation", TEXT, None, FREE,
     "more of them to validate on (of a tenth of the instructions in --data, or 1,000)"),
    Setting("encoding", TEXT, "utf-8", ASK, "of the files"),
    Setting("template", TEXT, None, NEVER,
     "a file with another prompt template than the one below (that of --model, if it has one)"),
    Setting("loss_on", one_of("answers", "all"), "answers", NEVER,
     "which tokens to learn: those of the answers, or of the prompts too"),
]
MODEL = [
    Setting("model", TEXT, "124M", NEVER,
     "trained weights to start from: a size, a checkpoint's folder or file, or a model on the Hub"),
    Setting("block_size", COUNT, None, NEVER, "the most tokens of a text (the model's context)"),
    Setting("dropout", BELOW_1, 0.1, ASK,  # few texts, each seen many times
     "probability of dropping an activation"),
    Setting("lora_rank", COUNT, None, NEVER,
     "LoRA: train only additions of this rank to some layers, and save them as an adapter"),
    Setting("lora_alpha", ABOVE_0, None, NEVER,
     "scale the additions by this, divided by the rank (twice the rank)"),
    Setting("lora_layers", TEXT, "c_attn", NEVER,
     "which layers have additions, separated by commas: attn.c_attn, attn.c_proj, mlp.c_fc, "
     "mlp.c_proj"),
]
RUN = [
    SETTINGS["out"]._replace(default="tuned"),
    *_as_in_training("resume", "overwrite", "allow_changes", "seed", "device", "dtype", "tf32"),
    Setting("epochs", ABOVE_0, 3.0, FREE, "how often to see each example"),
    Setting("max_steps", COUNT, None, FREE, "optimizer steps (those of --epochs)"),
    Setting("batch_size", COUNT, 8, ASK, "examples in a micro-batch"),
    *_as_in_training("grad_accum_steps", "recompute"),
]
OPTIMIZER = [
    Setting("learning_rate", ABOVE_0, 5e-5, ASK,  # of the order used for BERT and GPT (1810.04805)
     "the highest"),
    Setting("min_lr", FROM_0, 5e-6, ASK, "the last; a tenth of --learning-rate if that is given"),
    Setting("warmup_steps", COUNT_OR_0, None, ASK, "linear warm-up (a tenth of the steps)"),
    *_as_in_training("weight_decay", "beta1"),
    Setting("beta2", BELOW_1, 0.999, ASK,  # Adam's own: short texts make noisy gradients
     "decay rate of the second moment"),
    *_as_in_training("grad_clip"),
]
WATCHING = [
    *_as_in_training("log_interval"),
    Setting("eval_interval", COUNT, None, ASK, "steps between validations (an epoch)"),
    Setting("save_interval", COUNT, None, FREE, "steps between checkpoints (an epoch)"),
    *_as_in_training("keep", "on_save_error", "tensorboard", "watch"),
]
PLANNING = _as_in_training("plan", "rate")  # it runs in one process
# fmt: on

SHARED = {"run": RUN, "optimizer": OPTIMIZER, "watching": WATCHING, "planning": PLANNING}
GROUPS: dict[str, dict[str, list[Setting]]] = {
    "classify": {"data": LABELLED_DATA, "model": MODEL + CLASSIFIER, **SHARED},
    "instruct": {"data": INSTRUCTIONS, "model": MODEL, **SHARED},
}
FOR_PREDICTION = (
    *("predict", "model", "text_field", "encoding"),
    *("device", "dtype", "tf32", "batch_size"),
)
SUMMARIES = {
    "classify": "learn to label texts, or label them",
    "instruct": "learn to follow instructions",
}

EPILOGS = {
    "instruct": "The prompt template. A paragraph is left out where it has no place but {system}\n"
    "or {input}, and there is none; {output} is the answer, and end-of-text follows:\n\n"
    + textwrap.indent(DEFAULT, "    ")
}


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The command and the flags that were given, by name; what was left out is not in it."""
    parser = cli.ArgumentParser(
        prog="finetune_gpt2.py", description="Make a trained GPT-2 do a job."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, groups in GROUPS.items():
        command = commands.add_parser(
            name,
            help=SUMMARIES[name],
            description=f"{SUMMARIES[name].capitalize()}.",
            epilog=EPILOGS.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        for title, rows in groups.items():
            group = command.add_argument_group(title)
            for row in rows:
                row.add_to(group)
        config_file.add_flag(command)
    given = vars(parser.parse_args(argv))
    flags = config_file.with_flags_of_file(given, table(given["command"]))
    if "epochs" in given and "max_steps" in given:
        raise UserError("--max-steps says how long to train, and so does --epochs: give one")
    starts = not {"resume", "predict"} & flags.keys()
    if starts and "lora_layers" in given and "lora_rank" not in flags:
        raise UserError(lora.WITHOUT_RANK)
    if "epochs" in given:
        flags.pop("max_steps", None)  # of a run's settings.toml, which has both
    return flags


def table(command: str) -> dict[str, Setting]:
    """All settings of a command, by name."""
    return {row.name: row for rows in GROUPS[command].values() for row in rows}


def write_settings(settings: argparse.Namespace) -> None:
    """Write the run's settings.toml, which --config takes, perhaps for other data: without what
    follows from --epochs. UserError if that fails."""
    follows = steps_of_epochs(settings)
    leave_out = tuple(name for name in follows if getattr(settings, name, None) == follows[name])
    config_file.write_config_file(settings, GROUPS[settings.command], leave_out)


def resolve_settings(given: dict[str, Any]) -> argparse.Namespace:
    """Complete the flags with the defaults, or with the run that is resumed; UserError if wrong.

    What depends on the data is None until `schedule` fills it in.
    """
    command = given["command"]
    flags = {name: value for name, value in given.items() if name != "command"}
    rows = table(command)
    check_in_use(flags)
    _check_no_fraction(flags)
    out = Path(flags.get("out", rows["out"].default))
    if flags.get("resume"):
        settings = _resumed(out, flags, command)
    else:
        if "data" not in flags:
            raise UserError("--data is missing: give a file to learn from; see --help")
        read = ("data", "validation", "test", "template")
        files = [flags[name] for name in read if name in flags]
        if not flags.get("overwrite"):
            with only_noted(flags.get("plan", False)):
                check_free(out, files)
        with only_noted(flags.get("plan", False)):
            check_inputs_stay(out, flags.get("model", rows["model"].default), files)
        settings = {name: row.default for name, row in rows.items()}
        settings |= {"data_fingerprint": None, "base_weights": None, "planned_steps": 0, **flags}
        settings["out"] = str(out)
        if "learning_rate" in flags and "min_lr" not in flags:
            settings["min_lr"] = settings["learning_rate"] / 10
        check_rates(settings)
    check_kinds(settings, rows)
    complete = argparse.Namespace(command=command, **settings)
    lora.check_flags(complete)
    return complete


def _check_no_fraction(flags: dict[str, Any]) -> None:
    """UserError for a --validation or a --test as train_gpt2.py takes it, a part of the data."""
    for name in ("validation", "test"):
        value = flags.get(name)
        if value and re.fullmatch(r"[\d.]+", value) and not os.path.exists(value):
            raise UserError(
                f"--{name} is a file here, and {value} is none: leave it out to have a part of "
                "--data taken"
            )


def for_prediction(given: dict[str, Any]) -> argparse.Namespace:
    """The settings of `classify --predict`; UserError without --model, for one that is not of its
    kind, or that is for learning only."""
    rows = table(given["command"])
    cli.check_stdout()  # or the labels would be lost
    if "model" not in given:
        raise UserError("--model is missing: give the folder of a classifier")
    for name in given.keys() - {"command", *FOR_PREDICTION}:
        if "predict" in given:
            raise UserError(f"{rows[name].flag} does nothing with --predict: leave one of them out")
        raise UserError(
            f"without --data the texts of a pipe are labelled, for which {rows[name].flag} does "
            "nothing: give --data to learn, or leave it out"
        )
    settings = {name: row.default for name, row in rows.items()} | {"predict": "-"} | given
    check_kinds(settings, rows)
    return argparse.Namespace(**settings)


def _resumed(out: Path, flags: dict[str, Any], command: str) -> dict[str, Any]:
    saved = checkpoint.load_settings(out)
    if saved.get("command") != command:
        maker = f"finetune_gpt2.py {saved['command']}" if "command" in saved else "train_gpt2.py"
        raise UserError(f"the run in {out} is one of {maker}, which can continue it")
    if type(saved.get("max_steps")) is not int:
        raise UserError(f"{out / checkpoint.STATE} is damaged: its settings lack max_steps")
    # The base of an adapter may have been moved: its weights, which are compared, count
    moved = {"model": flags["model"]} if "model" in flags and saved.get("base_weights") else {}
    kept = {name: value for name, value in flags.items() if name not in moved}
    settings = resumed_settings(out, kept, table(command), "model") | moved
    if settings["lora_rank"] and not moved:
        settings["model"] = lora.base_found(out, settings["model"])
    settings["planned_steps"] = saved["max_steps"]
    settings["base_weights"] = saved.get("base_weights")
    if "epochs" in flags and "max_steps" not in flags:
        settings["max_steps"] = None  # as many as the new number of epochs has
    return settings


def schedule(settings: argparse.Namespace, steps_per_epoch: int) -> None:
    """Fill in what depends on how many steps an epoch has; UserError where a run would shrink."""
    s = settings
    s.steps_per_epoch = steps_per_epoch
    if s.max_steps is None:
        s.max_steps = steps_of_epochs(s)["max_steps"]
        if s.max_steps < s.planned_steps and not s.allow_changes:
            raise UserError(
                f"--epochs may grow, but {s.epochs:g} are fewer steps than the {s.planned_steps} "
                "planned: leave the flag out to resume, or add --allow-changes"
            )
    for name, steps in steps_of_epochs(s).items():
        if getattr(s, name, None) is None:
            setattr(s, name, steps)


def steps_of_epochs(settings: argparse.Namespace) -> dict[str, int]:
    """The settings in steps that follow from --epochs, or --max-steps, where they are not given."""
    s, all_steps = settings, max(1, math.ceil(settings.epochs * settings.steps_per_epoch))
    planned = s.max_steps or all_steps
    return {
        "max_steps": all_steps,
        "warmup_steps": planned // 10,
        "eval_interval": s.steps_per_epoch,
        "save_interval": s.steps_per_epoch,
        "sample_interval": planned,  # never: after the last step the results are shown
    }


def is_piped(given: dict[str, Any]) -> bool:
    """Whether texts to label come through a pipe: a model is given, and nothing to learn from."""
    if given["command"] != "classify" or "model" not in given or {"data", "resume"} & given.keys():
        return False
    return sys.stdin is not None and not sys.stdin.isatty()
