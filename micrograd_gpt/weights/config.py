"""config.json: the shape of a GPT-2 as its folder states it, read, checked and written.

The keys are those of Transformers' GPT2Config. OpenAI's own hparams.json says the same under
slightly different names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micrograd_gpt.checks import COUNTS, DROPOUTS, EPSILON
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import finish_set
from micrograd_gpt.support.files import read_json
from micrograd_gpt.variants import (
    CHOICES,
    FOR_LEARNING,
    OWN_VALUES,
    VariantConfig,
    VariantGPT2,
    differences,
)

CONFIG = "config.json"
GENERATION = "generation_config.json"  # Transformers' settings of generate(), not read here
# The same beside an adapter, which Transformers would take for a whole model if it were config.json
ADAPTED_CONFIG = "model_config.json"
SIZES = {  # OpenAI's four models
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
# What Transformers calls its models, and we ours
KNOWN_CLASSES = (
    r"(TF|Flax)?GPT2(LMHead|DoubleHeads|PreTrained)?Model"
    r"|(TF)?GPT2For(Sequence|Token)Classification|GPT2ForQuestionAnswering|GPT2"
)
OLDER_NAMES = {"117M": "124M", "345M": "355M", "762M": "774M", "1.5B": "1558M"}

REQUIRED, OPTIONAL = COUNTS, (*DROPOUTS, EPSILON)
HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}  # OpenAI's names that differ


def size_name(name: str) -> str:
    """The name in SIZES of a size the user gave, older names included; UserError if unknown."""
    name = OLDER_NAMES.get(name, name)
    if name not in SIZES:
        raise UserError(f"unknown GPT-2 size {name!r}: choose one of {', '.join(SIZES)}")
    return name


def published_shape(size: str) -> dict[str, int]:
    """The keys REQUIRED of a config.json, for OpenAI's model of this size."""
    return SIZES[size] | {
        key: value
        for key, value in (("vocab_size", 50257), ("n_positions", 1024))
        if key not in SIZES[size]
    }


def read_values(folder: str | Path) -> dict[str, Any]:
    """Everything that a folder's config.json, or the one beside an adapter, says.

    Raises UserError if it is missing or damaged.
    """
    finish_set(folder)
    values = read_json(Path(folder) / CONFIG)
    if values is None:
        values = read_json(Path(folder) / ADAPTED_CONFIG)
    if values is None:
        raise UserError(f"{folder} holds no model: there is no {CONFIG}")
    return values


def read_config(source: str | Path | Mapping[str, Any], file: str | Path = CONFIG) -> GPT2Config:
    """The model's shape, from a folder with a config.json or from that file's contents.

    It is a VariantConfig unless the architecture is GPT-2's own. Raises UserError, naming the file
    (`file`, where `source` is its contents), if it is missing or damaged, or describes a model that
    is not a GPT-2.
    """
    if not isinstance(source, Mapping):
        file, source = Path(source) / CONFIG, read_values(source)
    supported = {"model_type": ("gpt2", "micrograd-gpt"), "add_cross_attention": (False,)}
    for key, allowed in supported.items():
        if key in source and source[key] not in allowed:
            raise UserError(f"{file}: {key} is {source[key]!r}; only {allowed[0]!r} is supported")
    if "n_ctx" in source:  # what the oldest files call it
        source = {"n_positions": source["n_ctx"], **source}
    missing = sorted(set(REQUIRED) - source.keys())
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}")
    if was_edited(source):  # it makes its own head
        source = {key: source[key] for key in source if key != "tie_word_embeddings"}
    own = {*CHOICES, "n_inner"} - OWN_VALUES.keys()  # settings of a GPT2Config that was edited
    try:
        variant = {key: source[key] for key in source if key not in own}
        config = VariantConfig(**taken(VariantConfig, variant))
        return GPT2Config(**taken(GPT2Config, source)) if is_gpt2(config) else config
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def config_for(
    cls: type[GPT2], config: GPT2Config, values: Mapping[str, Any], file: str | Path
) -> GPT2Config:
    """What a model of this class is made with: `config`, or for a class of one's own its
    `config_class`, as in Transformers, whose further fields are taken from `values`.

    `config` is what `read_config` made of `values`, the contents of `file`. A field that is missing
    there keeps its default. Raises UserError if the class does not take what is there.
    """
    kind = config_class(model_class(config, cls))
    if type(config) is kind:
        return config
    try:
        return kind(**taken(kind, {**values, **vars(config)}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error


def read_hparams(hparams: Mapping[str, Any], file: str | Path) -> GPT2Config:
    """The model's shape from the contents of OpenAI's hparams.json, which is at `file`.

    Raises UserError, in the names that the file uses, if it describes no GPT-2.
    """
    try:
        return read_config({HPARAMS.get(key, key): hparams[key] for key in hparams}, file)
    except UserError as error:
        problem = str(error).removeprefix(str(file))
        for theirs, ours in HPARAMS.items():
            problem = problem.replace(ours, theirs)
        raise UserError(f"{file}{problem}") from None


def config_json(
    config: GPT2Config, dtype: str, special_tokens: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The contents of config.json, as Transformers reads it.

    Further fields of a config class of one's own are among them. `dtype` names the type that the
    weights are stored in, `special_tokens` has the tokenizer's ids of bos_token, with which a text
    begins, and eos_token, with which it ends. An architecture for learning does not say that it is
    a GPT-2: Transformers would load it, and compute something else.
    """
    shape = {key: getattr(config, key) for key in (*REQUIRED, *OPTIONAL)}
    variant = differences(config)
    further = taken(type(config), vars(config))
    further = {key: further[key] for key in further if key not in (*shape, *OWN_VALUES)}
    if variant.keys() & set(FOR_LEARNING):
        choices = {key: getattr(config, key, OWN_VALUES.get(key)) for key in FOR_LEARNING}
        values = {"model_type": "micrograd-gpt", **shape, **choices, **variant}
    else:
        values = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": getattr(config, "activation_function", "gelu_new"),
            "n_ctx": config.n_positions,
            "tie_word_embeddings": True,
            **shape,
            **variant,
        }
    ids = {f"{name}_id": (special_tokens or {}).get(name) for name in ("bos_token", "eos_token")}
    return further | values | {"dtype": dtype, **ids}


def taken(kind: type[GPT2Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these values that a config of this class is made with."""
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return {name: values[name] for name in names if name in values}


def is_gpt2(config: GPT2Config) -> bool:
    """True for GPT-2's own architecture, False for a variant of it."""
    return not differences(config)


def model_class(config: GPT2Config, cls: type[GPT2] = GPT2) -> type[GPT2]:
    """The class of the model with this config: `cls`, but VariantGPT2 for a variant of GPT2."""
    return VariantGPT2 if cls is GPT2 and not is_gpt2(config) else cls


def config_class(cls: type) -> type[GPT2Config]:
    """The class of the configs that models of this class are made with."""
    return getattr(cls, "config_class", GPT2Config)


def architecture(cls: type) -> str:
    """What config.json calls this class: with its module if ours or Transformers' has that name."""
    is_taken = cls is not GPT2 and re.fullmatch(KNOWN_CLASSES, cls.__name__)
    return f"{cls.__module__}.{cls.__name__}" if is_taken else cls.__name__


def own_classes(values: Mapping[str, Any]) -> list[str]:
    """The architectures in a config.json's values that are classes of somebody's own."""
    named = values.get("architectures")
    named = map(str, named if isinstance(named, list) else [])
    return [name for name in named if not re.fullmatch(KNOWN_CLASSES, name)]


def was_edited(values: Mapping[str, Any]) -> bool:
    """Whether a config.json's values are of a GPT2 that was edited in its file."""
    return values.get("architectures") == [GPT2.__name__]


def has_head(model: GPT2) -> bool:
    """Whether a model has a head of its own, so that its embedding is not its head as well."""
    return any(name == "lm_head.weight" for name, _ in model.named_parameters())
