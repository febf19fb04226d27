"""A run's folder on disk: a Hugging Face folder, and what it takes to continue the run.

    config.json             the model's shape
    model.safetensors       its weights, under GPT-2's own names
    tokenizer.json          which tokenizer, and its vocabulary
    tokenizer_config.json   which of its tokens ends a text
    prompt_template.txt     how to ask, only of a model that was tuned on instructions
    optimizer.safetensors   AdamW's moments            } only if the
    trainer_state.json      the step and the settings  } run can be resumed

Of a model with LoRA the first two are an adapter instead (weights/adapters.py), with a
model_config.json.

    best/                   the same six, from the step with the lowest validation loss so far
    step-000100/            the same six, from an earlier step; --keep says how many of these

The six change together (`file_sets`): whenever the process is stopped, all are from one step. Each
names its step, so a set that was mixed by hand is recognised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.checks import DROPOUTS
from micrograd_gpt.nn import Module, Parameter
from micrograd_gpt.runs.loss_scaler import LossScaler
from micrograd_gpt.runs.sharding import Optimizer
from micrograd_gpt.support.cli import listed, quoted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import (
    SAVED,
    finish_set,
    link_set,
    remove_folder,
    written_as_set,
)
from micrograd_gpt.support.files import BEST as BEST
from micrograd_gpt.support.files import (
    are_one_file,
    other_checkpoint,
    read_json,
    reading,
    write_text,
)
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from micrograd_gpt.text.tokenizer_files import model_tokenizer
from micrograd_gpt.weights.config import (
    ADAPTED_CONFIG,
    CONFIG,
    GENERATION,
    architecture,
    own_classes,
    read_config,
)
from micrograd_gpt.weights.formats import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    MODEL,
    RUN_FLAGS,
    STATE,
    is_adapter,
)
from micrograd_gpt.weights.loading import fill
from micrograd_gpt.weights.saving import storable, stored_arrays, write_model
from micrograd_gpt.weights.tensor_files import FETCH, TensorFile, write_safetensors

OPTIMIZER = "optimizer.safetensors"
SET = (CONFIG, MODEL, TOKENIZER, TOKENIZER_CONFIG, OPTIMIZER, STATE)
ADAPTER = (ADAPTED_CONFIG, ADAPTER_CONFIG, ADAPTER_MODEL)  # instead of the first two
ALSO = (PROMPT_TEMPLATE,)  # which only some runs have
MAY_LACK = (TOKENIZER_CONFIG, *ALSO)  # the first in runs of earlier versions
SCORES = ("scores.json", "confusion-validation.png", "confusion-test.png")  # of a classifier
# All that a run writes; trainer_state.json, which makes a folder one, goes first
OF_SETS = (*reversed(SET), *ADAPTER, *ALSO, *SCORES, RUN_FLAGS)
SCALER = ("scale", "growth_interval", "good_steps", "skipped_steps")  # of a LossScaler


def save_run(
    folder: str | Path,
    model: Module,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    settings: dict[str, Any],
    val_loss: float | None = None,
    keep: int = 0,
    scaler: LossScaler | None = None,
    write: Callable[..., None] = write_model,
) -> None:
    """Write everything that `load_run` needs to continue exactly after `optimizer.steps` steps.

    The previous set stays until this one is complete; the latest `keep` of the earlier sets stay as
    `step-000100/`. If `val_loss`, the validation loss of these weights in nats per token, is the
    lowest so far, `best/` holds this set too. Raises UserError when it cannot be written; the
    folder still holds one complete set then. `write` writes the model's own files. Moments that lie
    with several ranks are fetched one tensor at a time.
    """
    folder = Path(folder)
    step = {"step": str(optimizer.steps)}
    state = {"step": optimizer.steps, "val_loss": val_loss, "settings": settings}
    state["config"] = _lasting_config(model)
    if missed := _missed(model, optimizer):
        state["missed_steps"] = missed
    if scaler and scaler.enabled:
        state["loss_scaler"] = {name: getattr(scaler, name) for name in SCALER}
    with written_as_set(folder) as new:
        write(model, new, tokenizer, metadata=step)
        write_safetensors(new / OPTIMIZER, _moments(model, optimizer), step)
        write_text(new / STATE, json.dumps(state, indent=2) + "\n")
        if keep and (folder / STATE).exists():
            before = _read_state(folder)["step"]
            if before < optimizer.steps:
                link_set(_files(folder), folder / f"step-{before:06d}")
    for older in earlier_sets(folder)[: -keep or None]:
        remove_set(older)
    keep_best(folder)


def load_run(
    folder: str | Path, model: Module, optimizer: Optimizer, scaler: LossScaler | None = None
) -> None:
    """Fill `model`, `optimizer` and `scaler` with what `save_run` wrote.

    Raises UserError naming the file that is missing, damaged, or from another model or step.
    """
    folder = Path(folder)
    state = _read_state(folder)
    step = state["step"]
    if scaler and scaler.enabled:
        _fill_scaler(scaler, state.get("loss_scaler"), folder)
    own = own_classes(read_json(folder / CONFIG) or {})
    if own and architecture(type(model)) not in own:
        kind = type(model).__name__
        say(f"note: {folder} was saved by a class {listed(own)}, and goes on as a {kind}")
    for name, arrays in (stored_arrays(model), (OPTIMIZER, _moments(model, optimizer))):
        try:
            file = TensorFile(folder / name)
        except UserError as error:
            if isinstance(error.__cause__, PermissionError):  # nothing is damaged
                raise
            what = str(error).removesuffix(f": {other_checkpoint(folder / name) or FETCH}")
            otherwise = "start again: this run kept no other checkpoint"
            if name == OPTIMIZER:
                otherwise = f"start again from the weights with --init-from {quoted(folder)}"
            raise UserError(f"{what}: {_way_back(folder, name, otherwise)}") from error
        found = file.metadata.get("step")
        if found != str(step):
            raise UserError(
                f"{folder / name} is from {f'step {found}' if found else 'no step of a run'}, "
                f"{STATE} from step {step}: they were saved apart; "
                + _way_back(folder, name, "start another run from the weights")
            )
        entries: Mapping[str, Any] = file.entries
        if name == OPTIMIZER:
            arrays, entries = _kept_by_both(arrays, entries, folder)
        fill(arrays, entries, file.path)
    _check_config(model, state.get("config", {}), folder)  # {}: saved by an earlier version
    for parameter in model.parameters():
        parameter.data = parameter.data  # filled in place: a tape made before no longer holds
    optimizer.steps = step
    missed = state.get("missed_steps", {})
    optimizer.missed = [missed.get(name, 0) for name, _ in _learning(model, optimizer)]


def _lasting_config(model: Any) -> dict[str, Any]:
    """A model's config but for dropout, which is a setting of the run."""
    config = storable(asdict(model.config))
    return {key: value for key, value in config.items() if key not in DROPOUTS}


def _check_config(model: Any, saved: dict[str, Any], folder: Path) -> None:
    """UserError where config.json has come to describe another model, though the weights fit."""
    for key, now in _lasting_config(model).items():
        before = saved.get(key, now)
        if now != before:
            raise UserError(
                f"the run in {folder} was saved with {key} {before!r}, and its {CONFIG} now says "
                f"{now!r}: put that back, or start another run from the weights"
            )


def load_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of the run in `folder`; UserError when there is none to resume."""
    return _read_state(Path(folder))["settings"]


def saved_step(folder: str | Path) -> int:
    """After how many steps the run in `folder` was saved; 0 if there is none."""
    return _read_state(Path(folder))["step"] if holds_run(folder) else 0


# ------------------------------------------------------------- which sets a folder holds


def holds_run(folder: str | Path) -> bool:
    """Whether there is a run in `folder`."""
    finish_set(folder)
    with reading(folder):
        return (Path(folder) / STATE).exists()


def lacks_scores(folder: Path, settings: Any) -> bool:
    """Whether a classifier's run that has taken all its steps was stopped before it scored its best
    checkpoint. With --allow-changes that checkpoint may be another's."""
    if getattr(settings, "command", None) != "classify" or settings.allow_changes:
        return False
    return holds_run(folder / BEST) and not (folder / SCORES[0]).exists()


def own_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of the run in `folder`; UserError if it cannot be the one of its model."""
    return model_tokenizer(folder, read_config(folder).vocab_size)


def remove_run(folder: str | Path) -> None:
    """Remove the run in `folder`: its sets and its settings.toml; UserError if it can't.

    Its tokenizer stays until the next run's takes its place, which may have been made from it.
    """
    folder = Path(folder)
    for place in (folder, folder / BEST, *folder.glob("step-*")):
        finish_set(place)  # or a set that a kill left unfinished would come back later
    kept = (TOKENIZER, TOKENIZER_CONFIG)
    _unlink(folder, [name for name in (*OF_SETS, GENERATION) if name not in kept])
    for older in (folder / BEST, *earlier_sets(folder)):
        remove_set(older)


def remove_set(folder: Path) -> None:
    """Remove best/ or step-…/ of a run; UserError if it can't. What a user has put there stays."""
    with reading(folder):
        others = folder.is_dir() and [
            path for path in folder.iterdir() if path.name not in OF_SETS and path.name[0] != "."
        ]
    if others and not folder.is_symlink():
        _unlink(folder, OF_SETS)
    else:
        remove_folder(folder)


def _unlink(folder: Path, names: Iterable[str]) -> None:
    try:
        for name in names:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove the run in {folder}: {error.strerror}") from error


def keep_best(folder: str | Path) -> None:
    """Make the set in `folder` the one in `best/` too if its validation loss is lower."""
    folder = Path(folder)
    state = _read_state(folder)
    loss, best = state.get("val_loss"), best_loss(folder, state["settings"])
    if isinstance(loss, int | float) and math.isfinite(loss) and loss < best:
        link_set(_files(folder), folder / BEST)


def best_loss(folder: str | Path, settings: Mapping[str, Any] | None = None) -> float:
    """The validation loss of the set in `best/`; infinity if there is none yet, or if it was
    measured on another text than a run with these settings measures on."""
    best = Path(folder) / BEST
    if not holds_run(best):
        return math.inf
    state = _read_state(best)
    loss = state.get("val_loss")
    if not isinstance(loss, int | float):
        raise UserError(f"{best / STATE} is damaged: it lacks the val_loss; remove {best}")
    is_other = settings is not None and _measured_on(settings) != _measured_on(state["settings"])
    return math.inf if is_other else loss


def _measured_on(settings: Mapping[str, Any]) -> tuple[str, Any]:
    """The fingerprint of a run's validation text, and how much of it is read."""
    _, _, validation = str(settings.get("data_fingerprint")).rpartition(" and ")
    return validation, settings.get("eval_batches")


def earlier_sets(folder: str | Path) -> list[Path]:
    """The folders `step-…/` of a run that hold a set, the earliest first."""
    return [place for place in _earlier_places(Path(folder)) if holds_run(place)]


def last_good(folder: str | Path, step: int) -> str:
    """The latest checkpoint before `step`, in words, for a user who wants to go back to it.

    Never raises, because it is asked for when something has gone wrong already. A damaged set is
    ignored; one that cannot be moved out of its .saved/ now will be by the next reader.
    """
    folder = Path(folder)
    steps = {}
    for place in (*_earlier_places(folder), folder / BEST, folder):
        with suppress(UserError):
            finish_set(place)
        with suppress(UserError):
            state = read_json(place / SAVED / STATE) or read_json(place / STATE)
            if state is not None:
                steps[_checked(state, place)["step"]] = place
    good = max((s for s in steps if s < step), default=None)
    return "there is none yet" if good is None else f"{steps[good]}, of step {good}"


def _way_back(folder: Path, name: str, otherwise: str) -> str:
    """What a user can do where the file of this name is damaged in the run in `folder`; `otherwise`
    where the run has no checkpoint with another one.
    """
    places = [place for place in (*_earlier_places(folder), folder / BEST) if holds_run(place)]
    others = [place for place in places if not are_one_file(place / name, folder / name)]
    if others:
        latest = max(others, key=lambda place: _read_state(place)["step"])
        return f"copy the files of {latest}, of step {_read_state(latest)['step']}, into {folder}"
    return otherwise


# ------------------------------------------------------------------------ parts of a set


def _fill_scaler(scaler: LossScaler, values: Any, folder: Path) -> None:
    numbers = list(values.values()) if isinstance(values, dict) else []
    good = all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in numbers)
    if not good or not isinstance(values, dict) or values.keys() != set(SCALER):
        raise UserError(
            f"{folder / STATE} is damaged: its loss_scaler is {values!r}; start another run "
            "from the weights"
        )
    for name, value in values.items():
        setattr(scaler, name, value)


def _learning(model: Module, optimizer: Optimizer) -> list[tuple[str, Parameter]]:
    """The parameters that the optimizer has, in its order, which is the model's."""
    known = set(map(id, optimizer.parameters))
    return [(name, p) for name, p in model.named_parameters() if id(p) in known]


def _missed(model: Module, optimizer: Optimizer) -> dict[str, int]:
    """How many steps did not move each parameter that some did not, as before unfreezing it."""
    missed = zip(_learning(model, optimizer), optimizer.missed, strict=True)
    return {name: count for (name, _), count in missed if count}


def _moments(model: Module, optimizer: Optimizer) -> dict[str, Any]:
    """AdamW's moments by name: m and v of parameter `name` are `m.name` and `v.name`. An edited
    optimizer may have other lists of an array for each parameter."""
    names = [name for name, _ in _learning(model, optimizer)]
    lists = {kind: value for kind, value in vars(optimizer).items() if isinstance(value, list)}
    return {
        f"{kind}.{name}": array
        for kind, arrays in lists.items()
        if len(arrays) == len(names) and all(map(_is_array, arrays))
        for name, array in zip(names, arrays, strict=True)
    }


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and not isinstance(value, Tensor | np.generic)


def _kept_by_both(
    arrays: dict[str, Any], saved: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The moments that the optimizer and its file have, and those in the file, of the kinds that
    both have; a note on stderr where the optimizer was edited, so that one has more."""

    def kind_of(name: str) -> str:
        return name.partition(".")[0]

    ours, theirs = set(map(kind_of, arrays)), set(map(kind_of, saved))
    both = ours & theirs or ours
    if other := sorted((ours | theirs) - both):
        say(
            f"note: {listed(other)} is not in both {folder / OPTIMIZER} and this optimizer: it "
            "begins anew, or is left out"
        )
    return (
        {name: array for name, array in arrays.items() if kind_of(name) in both},
        {name: entry for name, entry in saved.items() if kind_of(name) in both},
    )


def _files(folder: Path) -> list[Path]:
    """The files of the set in `folder`."""
    model_and_rest = (*ADAPTER, *SET[2:]) if is_adapter(folder) else SET
    files = [folder / name for name in (*model_and_rest, *ALSO)]
    return [file for file in files if file.name not in MAY_LACK or file.exists()]


def _earlier_places(folder: Path) -> list[Path]:
    """The folders `step-…/`, the earliest first, with a set in them or without."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _read_state(folder: Path) -> dict[str, Any]:
    finish_set(folder)
    state = read_json(folder / STATE)
    if state is None:
        otherwise = "start one without --resume, or give another --out"
        raise UserError(
            f"{folder} holds no run to resume, as it has no {STATE}: "
            f"{_way_back(folder, STATE, otherwise)}"
        )
    return _checked(state, folder)


def _checked(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    if type(state.get("step")) is not int or not isinstance(state.get("settings"), dict):
        raise UserError(
            f"{folder / STATE} is damaged, or another program's: it lacks the step or the settings"
        )
    if not isinstance(state.get("config", {}), dict):
        raise UserError(f"{folder / STATE} is damaged: its config is not that of a model")
    missed = state.get("missed_steps", {})
    if not isinstance(missed, dict) or not all(type(n) is int and n >= 0 for n in missed.values()):
        raise UserError(f"{folder / STATE} is damaged: its missed_steps are not numbers")
    return state
