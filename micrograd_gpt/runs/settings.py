"""What a training run is told: the flags, what holds where one is left out, and what may change.

`parse_flags` reads the command line, `resolve_settings` completes it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from micrograd_gpt.arrays.precision import PRECISIONS
from micrograd_gpt.gpt2 import OLDER_NAMES, SIZES, GPT2Config, size_name
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.checkpoint import load_config
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError

SHAPES: dict[str, dict[str, int]] = {"tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128}, **SIZES}

# What is used when a flag is left out, and why.
DEFAULTS: dict[str, Any] = {
    "data": "pydocs",  # English that every Python carries: nothing to download
    "encoding": "utf-8",
    "init_from": "scratch",
    "size": "tiny",  # learns to write words in two minutes on a laptop
    "out": "out",
    "seed": 1337,
    "device": "cpu",
    "dtype": "float32",
    "tf32": False,  # rounds to 11 bits, which a float32 run need not expect
    "dropout": 0.0,  # nothing to regularise while each token is seen a few times only
    "grad_accum_steps": 1,
    "weight_decay": 0.1,  # GPT-3's, table 2.1 and appendix B, as the next three
    "beta1": 0.9,
    "grad_clip": 1.0,
    "recompute": False,  # takes a quarter more time: only where memory is short
    "log_interval": 10,
    "eval_batches": 40,  # enough windows that the measured loss moves little with their choice
    "keep": 0,
    "on_save_error": "stop",  # a full disk seldom empties itself
    "tensorboard": False,
}
TINY: dict[str, Any] = {
    "tokenizer": "char",  # a small model has no use for 50,257 tokens
    "block_size": 64,
    "batch_size": 12,
    "max_steps": 4000,  # about two minutes on two cores
    "learning_rate": 3e-3,  # small models bear large steps
    "min_lr": 3e-4,
    "warmup_steps": 100,
    "beta2": 0.99,  # a small batch's gradient is noisy: average over more of them
    "eval_interval": 500,
    "sample_interval": 1000,
    "save_interval": 1000,
}
LARGE: dict[str, Any] = {
    "tokenizer": "gpt2",
    "block_size": 1024,
    "batch_size": 4,
    "max_steps": 10000,
    "learning_rate": 6e-4,  # GPT-3's for 125M
    "min_lr": 6e-5,  # a tenth of it (Hoffmann et al. 2022)
    "warmup_steps": 700,
    "beta2": 0.95,
    "eval_interval": 250,
    "sample_interval": 250,
    "save_interval": 250,
}
FINE_TUNING: dict[str, Any] = {
    "learning_rate": 3e-5,  # trained weights are near a good place: stay there
    "min_lr": 3e-6,
    "warmup_steps": 50,
    "max_steps": 1000,
}
NO_DATA: dict[str, Any] = {
    "data_fingerprint": None,  # of both streams of tokens, once they are there
    "training_tokens": None,  # what runs noted before there was that one
}
# What holds for one start of the script, and is not taken over by --resume.
ONCE: dict[str, Any] = {
    **dict.fromkeys(("resume", "overwrite", "allow_changes", "plan"), False),
    "rate": None,  # measured
    "devices": 1,
}
MAY_BE_0 = {"seed", "warmup_steps", "keep"}  # other whole numbers are at least 1
# These may change when a run is resumed: they do not change what it computes.
FREE = {
    *("max_steps", "out", "resume", "allow_changes", "plan", "rate", "devices", "recompute"),
    *("log_interval", "sample_interval", "save_interval", "keep", "on_save_error", "tensorboard"),
}
# These may not, not even with --allow-changes: they are the shape of what was saved.
SHAPE = {"size", "n_layer", "n_head", "n_embd", "block_size", "tokenizer", "init_from", "dtype"}


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, by name; what was left out is not in it."""
    parser = cli.ArgumentParser(
        prog="train_gpt2.py",
        description="Train a GPT-2 and watch it learn. Without flags: a small one, on Python's own "
        "manual, in about two minutes.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        help="pydocs, shakespeare, or a path: text, .jsonl, .parquet, a folder of texts "
        "or of token shards (pydocs)",
    )
    add("--encoding", help="of the text files (utf-8)")
    add("--tokenizer", choices=["char", "byte", "word", "gpt2"], help="(char for tiny, else gpt2)")
    add = parser.add_argument_group("model").add_argument
    sizes = ", ".join(["tiny", *SIZES, *OLDER_NAMES])
    add("--size", help=f"{sizes} (tiny: 4 layers, 4 heads, 128 wide)")
    add("--n-layer", type=cli.positive_int, help="transformer blocks")
    add("--n-head", type=cli.positive_int, help="attention heads")
    add("--n-embd", type=cli.positive_int, help="width of the residual stream")
    add("--block-size", type=cli.positive_int, help="context in tokens (64 for tiny, else 1024)")
    add("--dropout", type=float, help="probability of dropping an activation (0)")
    add("--init-from", help="scratch, a size (OpenAI's weights), or a checkpoint folder (scratch)")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="the run's folder (out)")
    add("--resume", action="store_true", help="continue the run in --out where it stopped")
    add("--overwrite", action="store_true", help="start anew where --out holds a run already")
    add(
        "--allow-changes",
        action="store_true",
        help="resume with other settings or data all the same",
    )
    add("--seed", type=cli.non_negative_int, help="of weights, data order and dropout (1337)")
    add("--device", help="cpu or gpu (cpu)")
    add(
        "--dtype",
        choices=PRECISIONS,
        help="number type; of bfloat16 and float16 only the matrix work is done in it (float32)",
    )
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="with --device gpu: float32 products on tensor cores, rounded to 11 bits (off)",
    )
    add("--max-steps", type=cli.positive_int, help="(4000 for tiny, else 10000; 1000 fine-tuning)")
    add("--batch-size", type=cli.positive_int, help="windows a micro-batch (12 for tiny, else 4)")
    add("--grad-accum-steps", type=cli.positive_int, help="micro-batches a step (1)")
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="compute activations again in the backward: less memory, a quarter more time",
    )
    add = parser.add_argument_group("optimizer").add_argument
    add("--learning-rate", type=float, help="the highest (3e-3 for tiny, else 6e-4; 3e-5)")
    add("--min-lr", type=float, help="the last (a tenth of it)")
    add("--warmup-steps", type=cli.non_negative_int, help="linear warm-up (100; 700; 50)")
    add("--weight-decay", type=float, help="of matrices only (0.1)")
    add("--beta1", type=float, help="decay rate of the first moment (0.9)")
    add("--beta2", type=float, help="decay rate of the second (0.99 for tiny, else 0.95)")
    add("--grad-clip", type=float, help="largest norm of the gradient (1.0)")
    add = parser.add_argument_group("watching").add_argument
    add("--log-interval", type=cli.positive_int, help="steps between metrics (10)")
    add("--eval-interval", type=cli.positive_int, help="between validations (500; 250)")
    add("--eval-batches", type=cli.positive_int, help="batches of a validation (40)")
    add("--sample-interval", type=cli.positive_int, help="between samples (1000; 250)")
    add("--save-interval", type=cli.positive_int, help="between checkpoints (1000; 250)")
    add("--keep", type=cli.non_negative_int, help="earlier checkpoints kept, as step-000100/ (0)")
    add("--on-save-error", choices=["stop", "continue"], help="when the disk is full, say (stop)")
    add("--tensorboard", action=argparse.BooleanOptionalAction, help="write event files too")
    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true", help="print what the run would take, and end")
    add("--rate", type=float, help="TFLOP/s that a device reaches (measured on this machine)")
    add("--devices", type=cli.positive_int, help="how many of them share a step (1)")
    return vars(parser.parse_args(argv))


def resolve_settings(flags: dict[str, Any]) -> argparse.Namespace:
    """Complete the flags with the defaults, or with the run that is resumed; UserError if wrong."""
    out = Path(flags.get("out", DEFAULTS["out"]))
    if flags.get("resume"):
        settings = {**NO_DATA, **DEFAULTS, **checkpoint.load_settings(out), **ONCE}
        check_kinds(settings, out)
        refuse_changes(settings, flags)
        settings |= flags | {"out": str(out)}
        check_ranges(settings)
        return argparse.Namespace(**settings)
    if not flags.get("overwrite") and not flags.get("plan"):
        if checkpoint.holds_run(out):
            raise UserError(f"{out} holds a run already: --resume, --overwrite, or another --out")
        if (out / checkpoint.MODEL).exists():
            raise UserError(f"{out} holds a model: --overwrite it, or give another --out")

    weights = flags.get("init_from", "scratch")
    if weights == "scratch":
        size = flags.get("size", DEFAULTS["size"])
        size = size if size == "tiny" else size_name(size)
        chosen = {**(TINY if size == "tiny" else LARGE), **SHAPES[size]}
        flags = {**flags, "size": size}
    else:
        for name in ("size", "n_layer", "n_head", "n_embd", "tokenizer"):
            if name in flags:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} makes no sense with --init-from, whose weights decide it")
        positions = positions_of(weights)
        if flags.get("block_size", 0) > positions:
            raise UserError(f"--block-size is at most {positions}, the positions of {weights}")
        chosen = {**LARGE, **FINE_TUNING, "block_size": positions}
    settings = {**NO_DATA, **DEFAULTS, **ONCE, **chosen, **flags}
    if "learning_rate" in flags and "min_lr" not in flags:
        settings["min_lr"] = settings["learning_rate"] / 10
    check_ranges(settings)
    return argparse.Namespace(**settings)


def check_kinds(settings: dict[str, Any], out: Path) -> None:
    """UserError where the settings of the run in `out` lack one, or hold something else there."""
    for name, example in {**DEFAULTS, **TINY}.items():
        value, kind = settings.get(name), type(example)
        fits = isinstance(value, (int, float) if kind is float else kind)
        if kind is int and isinstance(value, int):
            fits = value >= (0 if name in MAY_BE_0 else 1)
        if not fits:
            what = f"have {value!r} as {name}" if name in settings else f"lack {name}"
            raise UserError(f"{out / checkpoint.STATE} is damaged: its settings {what}")


def refuse_changes(settings: dict[str, Any], flags: dict[str, Any]) -> None:
    """UserError for a flag that would make the resumed run another one."""
    planned, wanted = settings["max_steps"], flags.get("max_steps", settings["max_steps"])
    if wanted < planned and not flags.get("allow_changes"):  # its learning rates would be others
        raise UserError(
            f"--max-steps may grow, from {planned}, and not shrink to {wanted}: leave the flag "
            "out to resume, or add --allow-changes"
        )
    for name in sorted(flags.keys() - FREE):
        allowed = flags.get("allow_changes") and name not in SHAPE
        if flags[name] != settings.get(name) and not allowed:
            flag, out = "--" + name.replace("_", "-"), flags.get("out", DEFAULTS["out"])
            choice = "" if name in SHAPE else "add --allow-changes, "
            raise UserError(
                f"the run in {out} has {flag} {settings.get(name)}, not {flags[name]}: leave the "
                f"flag out to resume, {choice}or start another run with --init-from {out}"
            )


def check_ranges(settings: dict[str, Any]) -> None:
    """UserError for a setting outside its range."""
    for name in ("learning_rate", "grad_clip", "rate"):
        if settings[name] is not None and not 0 < settings[name] < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {settings[name]}")
    for name in ("min_lr", "weight_decay"):
        if not 0 <= settings[name] < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {settings[name]}")
    for name in ("beta1", "beta2", "dropout"):
        if not 0 <= settings[name] < 1:
            raise UserError(f"--{name} must be in [0, 1), not {settings[name]}")


def is_size(weights: str) -> bool:
    """True for an --init-from that names one of OpenAI's models rather than a folder."""
    return weights in SIZES or weights in OLDER_NAMES


def positions_of(weights: str) -> int:
    """The longest context of the weights that --init-from names."""
    return GPT2Config().n_positions if is_size(weights) else load_config(weights).n_positions
