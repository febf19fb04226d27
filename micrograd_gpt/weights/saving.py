"""A model's folder, written as Transformers reads it: config.json, model.safetensors, tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array, to_device
from micrograd_gpt.arrays.int8 import INT8
from micrograd_gpt.checks import check_described
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import without, written_as_set
from micrograd_gpt.support.files import reading, write_text, written_whole
from micrograd_gpt.text.tokenizer_files import TOKENIZER_FILES
from micrograd_gpt.text.tokenizers import Tokenizer
from micrograd_gpt.variants import VariantGPT2
from micrograd_gpt.weights.config import (
    ADAPTED_CONFIG,
    CONFIG,
    config_class,
    config_for,
    config_json,
    has_head,
    read_config,
)
from micrograd_gpt.weights.formats import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    MODEL,
    implied_by,
    weight_files,
)
from micrograd_gpt.weights.loading import check_kept, stored_parameters
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
    empty name, which would be the current folder; ValueError for a GPT2 that its config no longer
    describes, for a config that `from_pretrained` would not give back, and for a layer whose weight
    is no Parameter.
    """
    if not str(folder):
        raise UserError("the name of the folder is empty: give one to save the model in")
    if type(model) in (GPT2, VariantGPT2):  # a subclass may make its parts in its own way
        check_described(model)
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
    file, arrays = stored_arrays(model)
    held = str(model.transformer.wte.weight.dtype)
    if held == INT8 and file == MODEL:
        raise UserError("a model in int8 cannot be saved: load it in float32, or in bfloat16")
    on_cpu = {name: to_device(array, "cpu") for name, array in arrays.items()}
    stored = dtype or ("float32" if held == INT8 else held)  # an adapter beside int8 is float32
    config = config_json(model.config, stored, tokenizer.special_tokens if tokenizer else None)
    if isinstance(model, GPT2):
        config |= _own_in_config(model)
        _check_comes_back(model, _as_json(config))
    config |= also_in_config or {}
    write_safetensors(folder / file, on_cpu, {"format": "pt", **(metadata or {})}, dtype)
    adapter = (ADAPTER_MODEL, ADAPTED_CONFIG, ADAPTER_CONFIG)
    if file == MODEL:
        write_text(folder / CONFIG, _as_json(config))
    else:
        write_text(folder / ADAPTED_CONFIG, _as_json(config))
        write_text(folder / ADAPTER_CONFIG, _as_json(model.adapter.config(model)))
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
    check_kept(model)
    return MODEL, {name: p.data for name, p in stored_parameters(model).items()}


def _own_in_config(model: GPT2) -> dict[str, Any]:
    """What config.json says of a class of one's own, or of a GPT2 that was given a head, where the
    words for a GPT-2 would be untrue."""
    cls = type(model)
    if cls is VariantGPT2 or (cls is GPT2 and not has_head(model)):
        return {}
    untied = {"tie_word_embeddings": False} if has_head(model) else {}
    return {"architectures": [cls.__name__], **untied}


def _check_comes_back(model: GPT2, text: str) -> None:
    """ValueError unless from_pretrained makes the model's config of this text of a config.json."""
    config, read = model.config, json.loads(text)
    kind, name = config_class(type(model)), type(config).__name__
    if type(config) is not kind:
        raise ValueError(
            f"the model's config is a {name}, but from_pretrained would make a {kind.__name__}: "
            f"say config_class = {name} in the class of the model"
        )
    fields = {field.name: field for field in dataclasses.fields(config)}
    if "__dataclass_params__" not in vars(kind):
        raise ValueError(
            f"{name} is no @dataclass, so that its own settings would be lost: make it one"
        )
    if others := vars(config).keys() - fields.keys():
        _say_once(
            f"note: {CONFIG} does not keep {name}.{min(others)}: for that, make it a field, in a "
            "@dataclass of your own"
        )
    for key, found in implied_by(stored_parameters(model)).items():
        if found != getattr(config, key):
            raise ValueError(
                f"the config says {key} = {getattr(config, key)}, but there is {found} in the "
                "model, which could not be loaded: make them agree"
            )
    again = config_for(type(model), read_config(read), read, CONFIG)
    for key in (key for key, field in fields.items() if field.init):
        before, after = getattr(config, key), getattr(again, key)
        if _as_json(before) != _as_json(after):  # a tuple becomes a list, and that is as good
            raise ValueError(
                f"{name}.{key} is {before!r}, which {CONFIG} would give back as {after!r}: change "
                "the value, or the name of the field"
            )


@functools.cache
def _say_once(note: str) -> None:
    """What holds for each checkpoint of a run."""
    say(note)


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):  # a rank or another setting may be a number of NumPy's
        return value.item()
    raise ValueError(
        f"{CONFIG} can hold numbers, texts, True, False, None and lists of these, not {value!r:.80}"
    )
