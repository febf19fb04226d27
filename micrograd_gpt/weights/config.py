"""config.json: the shape of a GPT-2 as its folder states it, read, checked and written.

The keys are those of Transformers' GPT2Config. OpenAI's own hparams.json says the same under
slightly different names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import finish_set
from micrograd_gpt.support.files import read_json

CONFIG = "config.json"
SIZES = {  # OpenAI's four models
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
OLDER_NAMES = {"117M": "124M", "345M": "355M", "762M": "774M", "1.5B": "1558M"}

REQUIRED = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
OPTIONAL = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon")
HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}  # OpenAI's names that differ
# The two keys of a teaching variant, and what each may be: GPT-2's own choice stands first.
VARIANT = {"norm_position": ("pre", "post"), "position_embedding": ("learned", "sinusoidal")}
OWN = {key: choices[0] for key, choices in VARIANT.items()}


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
    """Everything that a folder's config.json says; UserError if it is missing or damaged."""
    finish_set(folder)
    values = read_json(Path(folder) / CONFIG)
    if values is None:
        raise UserError(f"{folder} holds no model: there is no {CONFIG}")
    return values


def read_config(source: str | Path | Mapping[str, Any], file: str | Path = CONFIG) -> GPT2Config:
    """The model's shape, from a folder with a config.json or from that file's contents.

    Raises UserError, naming the file (`file`, where `source` is its contents), if it is missing or
    damaged, or describes a model that is not a GPT-2.
    """
    if not isinstance(source, Mapping):
        file, source = Path(source) / CONFIG, read_values(source)
    n_embd = source.get("n_embd")
    supported = {
        "model_type": ("gpt2", "micrograd-gpt"),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "n_inner": (None, 4 * n_embd if isinstance(n_embd, int) else None),
    }
    for key, allowed in supported.items():
        if key in source and source[key] not in allowed:
            raise UserError(f"{file}: {key} is {source[key]!r}; only {allowed[0]!r} is supported")
    missing = sorted(set(REQUIRED) - source.keys())
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}")
    values = {key: source[key] for key in (*REQUIRED, *OPTIONAL) if key in source}
    values |= read_variant(source, file)
    try:
        return GPT2Config(**values)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


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
    config: GPT2Config,
    dtype: str,
    end_of_text: int | None = None,
    variant: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The contents of config.json, as Transformers reads it.

    `dtype` names the type that the weights are stored in, `end_of_text` is the tokenizer's id of
    that token, and `variant` holds the two keys of a teaching variant. A variant does not say that
    it is a GPT-2: Transformers would load it, and compute something else.
    """
    shape = {key: getattr(config, key) for key in (*REQUIRED, *OPTIONAL)}
    if variant:
        values = {"model_type": "micrograd-gpt", **shape, **variant}
    else:
        values = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "n_ctx": config.n_positions,
            "tie_word_embeddings": True,
            **shape,
        }
    return values | {"dtype": dtype, "bos_token_id": end_of_text, "eos_token_id": end_of_text}


# ----------------------------------------------------------------------------------------------
# The two teaching variants


def read_variant(values: Mapping[str, Any], file: str | Path = CONFIG) -> dict[str, str]:
    """The two keys of a variant in the contents of config.json; empty for GPT-2's own architecture.

    Raises UserError, naming `file`, for a value that neither GPT-2 nor a variant has.
    """
    found = {key: values.get(key, choices[0]) for key, choices in VARIANT.items()}
    for key, choices in VARIANT.items():
        if found[key] not in choices:
            raise UserError(f"{file}: {key} must be one of {choices}, not {found[key]!r}")
    return {} if found == OWN else found


def variant_of(model: GPT2) -> dict[str, str]:
    """The two keys that config.json has for a variant; empty for GPT-2's own architecture."""
    found = {key: getattr(model.config, key) for key in VARIANT}
    return {} if found == OWN else found
