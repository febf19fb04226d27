"""A model's folder, written as Transformers reads it: config.json, model.safetensors, tokenizer."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array, to_device
from micrograd_gpt.arrays.int8 import INT8, UNSAVED
from micrograd_gpt.checks import check_described
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.nn import Parameter, parts
from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import without, written_as_set
from micrograd_gpt.support.files import read_json, reading, write_text, written_whole
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.byte_pairs import BytePairTokenizer
from micrograd_gpt.text.tokenizer_files import TOKENIZER_FILES, TOKENIZERS, load_tokenizer
from micrograd_gpt.text.tokenizers import FIXED, LEARNED
from micrograd_gpt.variants import VariantGPT2
from micrograd_gpt.weights.config import (
    ADAPTED_CONFIG,
    CONFIG,
    architecture,
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
    is_adapter,
    weight_files,
)
from micrograd_gpt.weights.loading import say_what_is_not_kept
from micrograd_gpt.weights.tensor_files import write_safetensors

KINDS = (*FIXED.values(), *LEARNED.values(), BytePairTokenizer)  # of tokenizers that have files


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
    was there before, for a whole model in int8, for a folder that holds the adapter's base or
    another kind of model, whole or an adapter, and for an empty name, which would be the current
    folder, and for a tokenizer of more tokens; ValueError for a GPT2 that its config no longer
    describes, TypeError for a tokenizer of a kind that has no files. What `from_pretrained` would
    not give back of a class of one's own is said on stderr, once: a setting, or a layer's weight
    that is no Parameter.
    """
    if not str(folder):
        raise UserError("the name of the folder is empty: give one to save the model in")
    if tokenizer is not None and not isinstance(tokenizer, KINDS):
        raise TypeError(
            f"the tokenizer, {tokenizer!r:.60}, is not one of ours: load_tokenizer(FOLDER), of "
            "micrograd_gpt.text.tokenizer_files, makes one of files; without files, leave it out"
        )
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the model room for "
            f"{model.config.vocab_size}: give the tokenizer that the model was trained with"
        )
    if tokenizer:
        try:
            tokenizer.check_size(model.config.vocab_size)
        except UserError:  # no reason to lose what was learned
            say_once(
                f"note: the scripts will not read {folder}: its tokenizer has "
                f"{tokenizer.vocab_size} tokens, and its model {model.config.vocab_size}: make "
                f"one with GPT2Config(vocab_size={tokenizer.vocab_size}, …)"
            )
    if type(model) in (GPT2, VariantGPT2):  # a subclass may make its parts in its own way
        check_described(model)
    if (adapter := getattr(model, "adapter", None)) is not None:
        adapter.check_place(Path(folder))
    elif is_adapter(folder):
        raise UserError(
            f"{folder} holds an adapter, which a whole model would replace: give another folder"
        )
    with written_as_set(folder) as new:
        ids = None if tokenizer else _ids_beside(Path(folder), model.config)
        write_model(model, new, tokenizer, dtype, metadata, ids)


def _ids_beside(folder: Path, config: GPT2Config) -> dict[str, int]:
    """The ids in the config.json of a folder whose tokenizer stays there beside another model."""
    with suppress(UserError):  # a damaged one is replaced
        values = read_json(folder / CONFIG) or {}
        is_same = values.get("vocab_size") == config.vocab_size
        if not is_same and any((folder / name).exists() for name in TOKENIZERS):
            _say_if_another_s(folder, config.vocab_size)
        ids = {name: values.get(name) for name in ("bos_token_id", "eos_token_id")}
        return {n: i for n, i in ids.items() if isinstance(i, int) and i < config.vocab_size}
    return {}


def _say_if_another_s(folder: Path, vocab_size: int) -> None:
    """A note where the tokenizer that stays in a folder may not be that of the model, which has
    another number of ids and is not padded."""
    with suppress(UserError):
        tokenizer = load_tokenizer(folder)
        if vocab_size == tokenizer.vocab_size or tokenizer.is_padded_to(vocab_size):
            return
    say_once(
        f"note: {folder} keeps the tokenizer that is there, which may not be this model's: give "
        "save_pretrained the model's, too"
    )


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
        raise UserError(UNSAVED)
    on_cpu = {name: to_device(array, "cpu") for name, array in arrays.items()}
    stored = dtype or ("float32" if held == INT8 else held)  # an adapter beside int8 is float32
    config = config_json(model.config, stored, tokenizer.special_tokens if tokenizer else None)
    config = storable(config)
    if isinstance(model, GPT2):
        config |= _own_in_config(model)
        _say_what_is_lost(model, config)
    config |= also_in_config or {}
    write_safetensors(folder / file, on_cpu, {"format": "pt", **(metadata or {})}, dtype)
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
    say_what_is_not_kept(model)
    if not model.parameters():
        raise ValueError(
            f"{type(model).__name__} has no parameters to save: if nn.py was loaded again, or "
            "copied, its layers are of other classes than that one's: start Python anew"
        )
    return MODEL, {name: p.data for name, p in stored_parameters(model).items()}


def stored_parameters(model: Any) -> dict[str, Parameter]:
    """A model's parameters by their names in its file. Those that the blocks of a GPT2 share have
    one for each block, so that it loads as any other; in a class of one's own each has one."""
    once = dict(model.named_parameters())
    blocks = len(getattr(model.transformer, "h", ()))
    is_own = isinstance(model, GPT2) and type(model) not in (GPT2, VariantGPT2)
    if is_own or blocks != model.config.n_layer:
        return once
    return {
        name: part
        for name, part in parts(model)
        if isinstance(part, Parameter) and (name in once or name.startswith("transformer.h."))
    }


def _own_in_config(model: GPT2) -> dict[str, Any]:
    """What config.json says of a class of one's own, or of a GPT2 that was edited to have a head or
    other shapes than its config, where the words for a GPT-2 would be untrue."""
    cls, implied = type(model), implied_by(stored_parameters(model))
    is_described = all(getattr(model.config, key) == found for key, found in implied.items())
    if cls is VariantGPT2 or (cls is GPT2 and is_described and not has_head(model)):
        return {}
    untied = {"tie_word_embeddings": False} if has_head(model) else {}
    return {"architectures": [architecture(cls)], **untied}


def _say_what_is_lost(model: GPT2, values: dict[str, Any]) -> None:
    """Notes on stderr where from_pretrained would not make the model's config of these values, the
    contents of config.json."""
    config, name = model.config, type(model.config).__name__
    fields = dataclasses.fields(config)
    if others := vars(config).keys() - {field.name for field in fields}:
        say_once(
            f"note: {CONFIG} does not keep {name}.{min(others)}: for that, make it a field, in a "
            "@dataclass of your own"
        )
    try:
        again = config_for(type(model), read_config(values), values, CONFIG)
    except Exception as error:  # whatever a class of one's own raises: its weights are saved
        say_once(f"note: from_pretrained will not take the {name} that was saved: {error!s:.200}")
        return
    if type(again) is not type(config):
        say_once(
            f"note: from_pretrained will make a {type(again).__name__} of the model's {name}: say "
            f"config_class = {name} in the class of the model"
        )
        return
    for key in (field.name for field in fields if field.init):
        before, after = getattr(config, key), getattr(again, key)
        before = before.item() if isinstance(before, np.generic) else before
        if repr(before) != repr(after):  # a tuple as a list, or a key 1 as the text "1"
            say_once(
                f"note: {CONFIG} gives {name}.{key} back as {after!r:.80}, not {before!r:.80}: "
                "change the value, or the name of the field"
            )


def storable(values: dict[str, Any]) -> dict[str, Any]:
    """Those of these values that JSON can hold, as it gives them back."""
    found = {}
    for key, value in values.items():
        with suppress(TypeError, ValueError):  # NumPy's numbers it can hold as Python's
            found[key] = json.loads(json.dumps(value, default=np.generic.item))
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # A rank or another setting may be a number of NumPy's
    write_text(path, json.dumps(content, indent=2, default=np.generic.item) + "\n")
