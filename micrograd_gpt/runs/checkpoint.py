"""A run's folder on disk: a Hugging Face folder, and what it takes to continue the run.

    config.json             the model's shape
    model.safetensors       its weights, under GPT-2's own names
    tokenizer.json          which tokenizer, and its vocabulary
    optimizer.safetensors   AdamW's moments            } only where
    trainer_state.json      the step and the settings  } a run can be resumed

    best/                   the same five, of the lowest validation loss so far
    step-000100/            the same five, of earlier steps, as many as were asked for

The five change together (`file_sets`): whenever the process is stopped, they are one step's. They
carry that step, so that a set which was mixed by hand is recognised and named.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.backend import to_device
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.optim import AdamW, LossScaler
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import (
    SAVED,
    finish_set,
    link_set,
    remove_folder,
    written_as_set,
)
from micrograd_gpt.support.files import read_json, reading, write_text
from micrograd_gpt.text.shards import Shards
from micrograd_gpt.text.shards import slices as blocks
from micrograd_gpt.text.tokenizers import TOKENIZER_FILE as FILE_NAME
from micrograd_gpt.text.tokenizers import Tokenizer
from micrograd_gpt.weights.tensor_files import TensorFile, write_safetensors

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"
SET = ("config.json", MODEL, FILE_NAME, OPTIMIZER, STATE)
BEST = "best"


def save_pretrained(
    model: GPT2,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write config.json, model.safetensors and, if given, the tokenizer into `folder`.

    `transformers.GPT2LMHeadModel.from_pretrained(folder)` loads it. `dtype` ("float16", "bfloat16")
    stores the weights in that type, rounded to nearest. Raises UserError when it cannot be written.
    """
    folder = Path(folder)
    arrays = {name: p.numpy() for name, p in model.named_parameters()}
    write_safetensors(folder / MODEL, arrays, {"format": "pt", **(metadata or {})}, dtype)
    config = model.config.to_dict()
    stored = dtype or str(arrays["transformer.wte.weight"].dtype)
    end_of_text = tokenizer.end_of_text if tokenizer else None
    config |= {"dtype": stored, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if tokenizer:
        tokenizer.save(folder)


def save_run(
    folder: str | Path,
    model: GPT2,
    tokenizer: Tokenizer,
    optimizer: AdamW,
    settings: dict[str, Any],
    val_loss: float | None = None,
    keep: int = 0,
    scaler: LossScaler | None = None,
) -> None:
    """Write everything `load_run` needs to continue exactly after `optimizer.steps` steps.

    The set before this one stays until this one is whole; then the `keep` latest before it stay as
    `step-000100/`. Where `val_loss`, the validation loss of these weights in nats per token, is the
    lowest so far, `best/` holds this set too. Raises UserError when it cannot be written: the
    folder then holds one whole set all the same.
    """
    folder = Path(folder)
    step = {"step": str(optimizer.steps)}
    state = {"step": optimizer.steps, "val_loss": val_loss, "settings": settings}
    if scaler:
        state["loss_scaler"] = dataclasses.asdict(scaler)
    with written_as_set(folder) as new:
        save_pretrained(model, new, tokenizer, metadata=step)
        moments = {name: to_device(m, "cpu") for name, m in _moments(model, optimizer).items()}
        write_safetensors(new / OPTIMIZER, moments, step)
        write_text(new / STATE, json.dumps(state, indent=2) + "\n")
        if keep and (folder / STATE).exists():
            before = _read_state(folder)["step"]
            if before < optimizer.steps:
                link_set(_files(folder), folder / f"step-{before:06d}")
    for older in earlier_sets(folder)[: -keep or None]:
        remove_folder(older)
    keep_best(folder)


def keep_best(folder: str | Path) -> None:
    """Make the set in `folder` the one in `best/` too if its validation loss is lower."""
    folder = Path(folder)
    loss = _read_state(folder).get("val_loss")
    if isinstance(loss, int | float) and math.isfinite(loss) and loss < best_loss(folder):
        link_set(_files(folder), folder / BEST)


def best_loss(folder: str | Path) -> float:
    """The validation loss of the set in `best/`; infinity where there is none yet."""
    best = Path(folder) / BEST
    if not holds_run(best):
        return math.inf
    loss = _read_state(best).get("val_loss")
    if not isinstance(loss, int | float):
        raise UserError(f"{best / STATE} is damaged: it lacks the val_loss; remove {best}")
    return loss


def earlier_sets(folder: str | Path) -> list[Path]:
    """The folders `step-…/` of a run that hold a set, the earliest first."""
    return [place for place in _earlier_places(Path(folder)) if holds_run(place)]


def holds_run(folder: str | Path) -> bool:
    """Whether there is a run in `folder`."""
    finish_set(folder)
    with reading(folder):
        return (Path(folder) / STATE).exists()


def remove_run(folder: str | Path) -> None:
    """Remove the run in `folder`: its set, its earlier ones and its best; UserError if it can't."""
    folder = Path(folder)
    for place in (folder, folder / BEST, *folder.glob("step-*")):
        finish_set(place)  # else one that a kill left undone would come back later
    try:
        for name in reversed(SET):  # first of all trainer_state.json, which makes it a run
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove the run in {folder}: {error.strerror}") from error
    for older in (folder / BEST, *earlier_sets(folder)):
        remove_folder(older)


def last_good(folder: str | Path, step: int) -> str:
    """Name the latest checkpoint before `step`, for who wants to go back to it.

    Never raises: it is asked for where something else went wrong already. A set that is damaged is
    passed over; one that can't be moved out of its .saved/ now will be by the next to read it.
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


def fingerprint(tokens: np.ndarray | Shards, whole_up_to: int = 50_000_000) -> str:
    """Tells two token streams (N,) apart: their length, and a checksum.

    It is that of all tokens where they are at most `whole_up_to`, else of 256 pieces of 4,096,
    evenly spaced: a change between those is not seen, unless it moves what follows.
    """
    if len(tokens) <= whole_up_to:
        parts: Iterable[np.ndarray] = blocks(tokens)
    else:
        starts = np.linspace(0, max(0, len(tokens) - 4096), 256).astype(np.int64)
        places = np.minimum(starts[:, None] + np.arange(4096), len(tokens) - 1)  # (256, 4096)
        parts = [tokens[places]]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part.astype("<u4").tobytes(), checksum)
    return f"{len(tokens)} tokens, CRC-32 {checksum:08x}"


def load_config(folder: str | Path) -> GPT2Config:
    """The model's shape in `folder`; UserError when there is no config.json, or not a GPT-2's."""
    finish_set(folder)
    values = read_json(Path(folder) / "config.json")
    if values is None:
        raise UserError(f"{folder} holds no model: there is no config.json")
    try:
        return GPT2Config.from_dict(values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def load_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of the run in `folder`; UserError when there is none to resume."""
    return _read_state(Path(folder))["settings"]


def load_run(
    folder: str | Path, model: GPT2, optimizer: AdamW, scaler: LossScaler | None = None
) -> None:
    """Fill `model`, `optimizer` and `scaler` with what `save_run` wrote.

    Raises UserError naming the file that is missing, damaged, of another model or another step.
    """
    folder = Path(folder)
    state = _read_state(folder)
    step = state["step"]
    if scaler:
        _fill_scaler(scaler, state.get("loss_scaler"), folder)
    weights = {name: p.data for name, p in model.named_parameters()}
    for name, arrays in ((MODEL, weights), (OPTIMIZER, _moments(model, optimizer))):
        file = TensorFile(folder / name)
        if file.metadata.get("step") != str(step):
            raise UserError(
                f"{folder / name} is of step {file.metadata.get('step')}, {STATE} of step {step}: "
                "the run was stopped while saving; start again from the weights with --init-from"
            )
        fill(arrays, file)
    optimizer.steps = step


def _fill_scaler(scaler: LossScaler, values: Any, folder: Path) -> None:
    try:
        dataclasses.replace(scaler, **values)  # TypeError unless the names are a scaler's
        if not all(math.isfinite(value) and value >= 0 for value in values.values()):
            raise ValueError(values)
    except (TypeError, ValueError):
        raise UserError(
            f"{folder / STATE} is damaged: its loss_scaler is {values!r}; start again from the "
            "weights with --init-from"
        ) from None
    vars(scaler).update(values)


def fill(arrays: dict[str, Any], file: TensorFile) -> None:
    """Read every array from `file`, in place; UserError unless names and shapes are the same."""
    missing, extra = arrays.keys() - file.shapes.keys(), file.shapes.keys() - arrays.keys()
    if missing or extra:
        what = f"lacks {min(missing)}" if missing else f"has {min(extra)}, which the model has not"
        raise UserError(f"{file.path} {what}: it is of another model")
    for name, array in arrays.items():
        if file.shapes[name] != array.shape:
            raise UserError(
                f"{file.path}: {name} has shape {file.shapes[name]}, the model's is {array.shape}"
            )
        if isinstance(array, np.ndarray):
            file.read_into(name, array)
        else:
            array.set(file.read(name).astype(array.dtype, copy=False))


def _moments(model: GPT2, optimizer: AdamW) -> dict[str, Any]:
    """AdamW's moments by name: m and v of parameter `name` are `m.name` and `v.name`."""
    names = [name for name, _ in model.named_parameters()]
    pairs = (("m", optimizer.m), ("v", optimizer.v))
    return {f"{k}.{n}": a for k, moments in pairs for n, a in zip(names, moments, strict=True)}


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in SET]


def _earlier_places(folder: Path) -> list[Path]:
    """The folders `step-…/`, the earliest first, with a set in them or without."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _read_state(folder: Path) -> dict[str, Any]:
    finish_set(folder)
    state = read_json(folder / STATE)
    if state is None:
        raise UserError(f"{folder} holds no run to resume: there is no {STATE}")
    return _checked(state, folder)


def _checked(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    if type(state.get("step")) is not int or not isinstance(state.get("settings"), dict):
        raise UserError(f"{folder / STATE} is damaged: it lacks the step or the settings")
    return state
