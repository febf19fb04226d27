"""A model's folder, written as Transformers reads it: config.json, model.safetensors, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array, to_device
from micrograd_gpt.arrays.int8 import INT8
from micrograd_gpt.checks import check_described
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import without, written_as_set
from micrograd_gpt.support.files import reading, write_text, written_whole
from micrograd_gpt.text.tokenizer_files import TOKENIZER_FILES
from micrograd_gpt.text.tokenizers import Tokenizer
from micrograd_gpt.weights.config import ADAPTED_CONFIG, CONFIG, config_json
from micrograd_gpt.weights.formats import ADAPTER_CONFIG, ADAPTER_MODEL, MODEL, weight_files
from micrograd_gpt.weights.tensor_files import write_safetensors


def save_pretrained(
    model: GPT2,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write config.json, model.safetensors and, if given, the tokenizer into `folder`, as a set.

    `transformers.GPT2LMHeadModel.from_pretrained(folder)` loads it. Of a model with an adapter only
    the adapter is written, and `peft.PeftModel.from_pretrained(base, folder)` loads it. `dtype`
    ("float16", "bfloat16") stores the weights in that type, rounded to nearest; `metadata` is added
    to the safetensors file's own. Raises UserError if the files can't be written, and leaves what
    was there before, for a whole model in int8, for the folder of an adapter's own base, and for an
    empty name, which would be the current folder; ValueError for a model that its config does not
    describe.
    """
    if not str(folder):
        raise UserError("the name of the folder is empty: give one to save the model in")
    if (adapter := getattr(model, "adapter", None)) is not None:
        adapter.check_place(Path(folder))
    with written_as_set(folder) as new:
        write_model(model, new, tokenizer, dtype, metadata)


def write_model(
    model: Any,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    metadata: dict[str, str] | None = None,
    also_in_config: dict[str, Any] | None = None,
) -> None:
    """The files of `save_pretrained`, one after the other, for a set that has more files.

    `model` may be any module with a GPT2Config whose parameters have the checkpoint's names;
    `also_in_config` is added to config.json, or replaces what is there.
    """
    folder = Path(folder)
    check_described(model)
    file, arrays = stored_arrays(model)
    held = str(model.transformer.wte.weight.dtype)
    if held == INT8 and file == MODEL:
        raise UserError("a model in int8 cannot be saved: load it in float32, or in bfloat16")
    on_cpu = {name: to_device(array, "cpu") for name, array in arrays.items()}
    write_safetensors(folder / file, on_cpu, {"format": "pt", **(metadata or {})}, dtype)
    stored = dtype or ("float32" if held == INT8 else held)  # an adapter beside int8 is float32
    config = config_json(model.config, stored, tokenizer.special_tokens if tokenizer else None)
    config |= also_in_config or {}
    adapter = (ADAPTER_MODEL, ADAPTED_CONFIG, ADAPTER_CONFIG)
    if file == MODEL:
        _write_json(folder / CONFIG, config)
    else:
        _write_json(folder / ADAPTED_CONFIG, config)
        _write_json(folder / ADAPTER_CONFIG, model.adapter.config(model))
    before = weight_files(folder.parent)  # of what was saved here
    for other in {*before, *(adapter if file == MODEL else (CONFIG,))} - {file}:
        without(folder / other)
    if tokenizer:
        tokenizer.save(folder)


def copy_tokenizer(source: str | Path | None, folder: str | Path) -> None:
    """Within the block of `written_as_set`: have the set end with the files of the tokenizer that
    is written in `folder`, or else with those in `source` as they are, and no others.

    So a tokenizer that cannot be used here is not taken for GPT-2's where the model was copied to.
    """
    for name in TOKENIZER_FILES:
        if source and Path(source, name).is_file():
            with reading(Path(source, name)):
                content = Path(source, name).read_bytes()
            with written_whole(Path(folder, name)) as file:
                file.write(content)
        elif not Path(folder, name).exists():
            without(Path(folder, name))


def stored_arrays(model: Any) -> tuple[str, dict[str, Array]]:
    """The file that keeps what a model has learned, and by their names in it the arrays.

    They are its parameters, or for one with an adapter (tuning/lora.py) the adapter's.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        return ADAPTER_MODEL, adapter.arrays(model)
    return MODEL, {name: p.data for name, p in model.named_parameters()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # A rank or another setting may be a number of NumPy's
    write_text(path, json.dumps(content, indent=2, default=np.generic.item) + "\n")
