"""What a folder holds already, before something else is written into it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from micrograd_gpt.runs.checkpoint import BEST, holds_run
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading
from micrograd_gpt.weights.formats import STATE, holds_model
from micrograd_gpt.weights.names import lies_in


def check_free(out: Path) -> None:
    """UserError if the folder holds a run or a model, which a new run would replace."""
    if holds_run(out):
        raise UserError(
            f"{out} holds a run already: --resume it, --overwrite it, or give another --out"
        )
    if holds_model(out):
        raise UserError(f"{out} holds a model: --overwrite it, or give another --out")


def check_start_stays(model: str, out: Path) -> None:
    """UserError if a new run in `out` would remove the model that it starts from: at once, and so
    for good if it fails before its first checkpoint, or is one of an adapter to that model."""
    with reading(out):
        places = [out, out / BEST, *out.glob("step-*")]
        is_there = any(lies_in(model, place) for place in places)
    if is_there:
        raise UserError(f"--out {out} would remove {model}, which is needed: give another --out")


def check_target(out: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """UserError if writing a model to the folder or file `out` would lose what is there.

    That is one of the `sources`, also by a link, a training run, or, unless `overwrite`, another
    model.
    """
    try:
        # Only files are written, so an OpenAI folder may lie inside of `out`.
        taken = [
            folder.resolve()
            for source in sources
            for folder in (
                [source] if source.is_dir() else [source.parent, source.resolve().parent]
            )
        ]
        is_taken, is_file = not out.is_file() and out.resolve() in taken, out.is_file()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    if is_taken:
        raise UserError(f"{out} is where the weights come from: choose another --out")
    if is_file and out.suffix == ".gguf" and not overwrite:
        raise UserError(f"{out} exists already: --overwrite it, or give another --export")
    if is_file:
        return
    if holds_run(out):
        raise UserError(f"{out} holds a training run ({STATE}): choose another --out")
    if holds_model(out) and not overwrite:
        raise UserError(f"{out} holds a model: --overwrite it, or give another --out")
