"""What a folder holds already, before something else is written into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from micrograd_gpt.runs.checkpoint import BEST, SCORES, earlier_sets, holds_run
from micrograd_gpt.runs.metrics import CURVES, METRICS
from micrograd_gpt.runs.watch import PAGE, SAMPLES
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading
from micrograd_gpt.text.documents import text_files
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from micrograd_gpt.text.tokenizer_files import TOKENIZER_FILES
from micrograd_gpt.weights.config import ADAPTED_CONFIG, CONFIG
from micrograd_gpt.weights.formats import RUN_FLAGS, STATE, has_begun, holds_model
from micrograd_gpt.weights.names import lies_in

# What is written beside the weights, with a model and with a run
OF_A_MODEL = (CONFIG, ADAPTED_CONFIG, TOKENIZER, TOKENIZER_CONFIG, PROMPT_TEMPLATE)
OF_A_RUN = (*OF_A_MODEL, RUN_FLAGS, METRICS, CURVES, PAGE, SAMPLES, *SCORES)


@contextmanager
def only_noted(planned: bool) -> Iterator[None]:
    """A UserError in this block is a note where a run is `planned`, perhaps for another folder."""
    try:
        yield
    except UserError as error:
        if not planned:
            raise
        say(f"note: this run would be refused: {error}")


def check_free(out: Path, sources: Iterable[str] = ()) -> None:
    """UserError if the folder holds what a new run, which reads these sources, would replace.

    That is a run, a model, or what is left of a run; and in a folder without any of these, a file
    of the user's that is called like one of a run's.
    """
    _check_apart(out)
    if holds_run(out):
        raise UserError(
            f"{out} holds a run already: --resume it, --overwrite it, or give another --out"
        )
    if holds_model(out):
        raise UserError(f"{out} holds a model: --overwrite it, or give another --out")
    for place in (out / BEST, *earlier_sets(out)):
        if holds_run(place):
            raise UserError(f"{place} is left of a run: --overwrite it, or give another --out")
    if not has_begun(out):
        check_inputs_stay(out, None, sources)  # of which --overwrite would be no help
        _check_names(out, OF_A_RUN, "a run")


def check_inputs_stay(
    out: Path, model: str | None, sources: Iterable[str], tokenizer: str | None = None
) -> None:
    """UserError if a new run in `out` would remove the model that it starts from (None: a new one),
    the folder of its tokenizer, or a file of these sources: at once, and so for good if it fails
    before its first checkpoint. The tokenizer of `out` itself stays until then. UserError too if
    the folder is one where another run keeps its checkpoints."""
    _check_apart(out)
    needed: list[str | Path] = []
    with reading(out):
        sets = [out / BEST, *earlier_sets(out)]
        if model and any(lies_in(model, place) for place in (out, *sets)):
            needed.append(model)
        if tokenizer and any(lies_in(tokenizer, place) for place in sets):
            needed.append(tokenizer)
        for file in (file for source in sources for file in text_files(source)):
            place = file.resolve()
            is_replaced = place.parent == out.resolve() and place.name in OF_A_RUN
            if is_replaced or any(older.resolve() in place.parents for older in sets):
                needed.append(file)
    if needed:
        raise UserError(
            f"--out {out} would remove {needed[0]}, which is needed: give another --out"
        )


def check_goes_on(out: Path) -> None:
    """UserError if `out` is the best or an earlier checkpoint of a run, which would replace it."""
    place = out.resolve()
    run = place.parent
    if place in (run / BEST, *earlier_sets(run)) and holds_run(place) and holds_run(run):
        raise UserError(
            f"{out} is a checkpoint of the run in {run}, which may replace it: --resume that, or "
            "copy the checkpoint to another folder and --resume the copy"
        )


def check_target(out: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """UserError if writing a model to the folder or file `out` would lose what is there.

    That is one of the `sources`, also by a link, a training run, or, unless `overwrite`, another
    model, what a run has begun, or a file of the user's that is called like one of a model's.
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
    _check_apart(out)
    if holds_run(out):
        raise UserError(f"{out} holds a training run ({STATE}): choose another --out")
    if has_begun(out) and not overwrite:
        raise UserError(
            f"{out} is where a training run has begun: --overwrite it, or give another --out"
        )
    if holds_model(out) and not overwrite:
        raise UserError(f"{out} holds a model: --overwrite it, or give another --out")
    if not overwrite:
        _check_names(out, (*OF_A_MODEL, *TOKENIZER_FILES), "a model")


def _check_apart(out: Path) -> None:
    """UserError where a run keeps, or will keep, its checkpoints."""
    place = out.resolve()
    if re.fullmatch(rf"{BEST}|step-\d+", place.name) and holds_run(place.parent):
        raise UserError(
            f"{out} is where the run in {place.parent} keeps a checkpoint: give another --out"
        )


def _check_names(out: Path, names: Iterable[str], owner: str) -> None:
    """UserError if the folder has a file that is called like one of this owner's."""
    for path in (out / name for name in names):
        if path.is_file():
            raise UserError(
                f"{path} is called like a file of {owner}, which would replace it: --overwrite it, "
                "move it, or give another --out"
            )
