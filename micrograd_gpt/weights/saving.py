"""A model's folder, written as Transformers reads it: config.json, model.safetensors, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.file_sets import written_as_set
from micrograd_gpt.support.files import write_text
from micrograd_gpt.text.tokenizers import Tokenizer
from micrograd_gpt.weights.config import CONFIG, config_json
from micrograd_gpt.weights.formats import MODEL
from micrograd_gpt.weights.tensor_files import write_safetensors


def save_pretrained(
    model: GPT2,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write config.json, model.safetensors and, if given, the tokenizer into `folder`, as a set.

    `transformers.GPT2LMHeadModel.from_pretrained(folder)` loads it. `dtype` ("float16", "bfloat16")
    stores the weights in that type, rounded to nearest; `metadata` is added to the safetensors
    file's own. Raises UserError if the files can't be written, and leaves what was there before.
    """
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
    arrays = {name: p.numpy() for name, p in model.named_parameters()}
    write_safetensors(folder / MODEL, arrays, {"format": "pt", **(metadata or {})}, dtype)
    stored = dtype or str(arrays["transformer.wte.weight"].dtype)
    config = config_json(model.config, stored, tokenizer.special_tokens if tokenizer else None)
    write_text(folder / CONFIG, json.dumps(config | (also_in_config or {}), indent=2) + "\n")
    if tokenizer:
        tokenizer.save(folder)
