"""A run's folder on disk: a Hugging Face folder, and what it takes to continue the run.

    config.json             the model's shape
    model.safetensors       its weights, under GPT-2's own names
    tokenizer.json          which tokenizer, and its vocabulary
    optimizer.safetensors   AdamW's moments            } only where
    trainer_state.json      the step and the settings  } a run can be resumed

Every file is whole or not there. The files of a run carry the step they belong to, so that a set
which an interruption left mixed is recognised and named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.backend import to_device
from micrograd_gpt.errors import UserError
from micrograd_gpt.files import read_json, write_text
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.optim import AdamW
from micrograd_gpt.tensor_files import TensorFile, write_safetensors
from micrograd_gpt.tokenizers import Tokenizer

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"


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
    arrays = {name: to_device(p.data, "cpu") for name, p in model.named_parameters()}
    write_safetensors(folder / MODEL, arrays, {"format": "pt", **(metadata or {})}, dtype)
    config = model.config.to_dict()
    stored = dtype or str(model.transformer.wte.weight.dtype)
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
) -> None:
    """Write everything `load_run` needs to continue exactly after `optimizer.steps` steps."""
    folder = Path(folder)
    step = {"step": str(optimizer.steps)}
    save_pretrained(model, folder, tokenizer, metadata=step)
    write_safetensors(folder / OPTIMIZER, _moments(model, optimizer), step)
    state = {"step": optimizer.steps, "settings": settings}
    write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def load_config(folder: str | Path) -> GPT2Config:
    """The model's shape in `folder`; UserError when there is no config.json, or not a GPT-2's."""
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


def load_run(folder: str | Path, model: GPT2, optimizer: AdamW) -> None:
    """Fill `model` and `optimizer` with what `save_run` wrote.

    Raises UserError naming the file that is missing, damaged, of another model or another step.
    """
    folder = Path(folder)
    step = _read_state(folder)["step"]
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


def _read_state(folder: Path) -> dict[str, Any]:
    state = read_json(folder / STATE)
    if state is None:
        raise UserError(f"{folder} holds no run to resume: there is no {STATE}")
    return state
