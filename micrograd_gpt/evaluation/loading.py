"""The model to be evaluated, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from micrograd_gpt.arrays.devices import resolve_device
from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import say
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.weights.names import open_language_model
from micrograd_gpt.weights.pretrained import build


def load(name: str | None, device: str = "cpu", dtype: str = "float32") -> tuple[GPT2, Tokenizer]:
    """The model called `name` (weights/names.py) and its tokenizer; None: as generate.py chooses.

    Raises UserError where there is no such model or it does not fit into memory, and where the
    tokenizer is not the model's.
    """
    if name is None:
        name = "out" if Path("out", "config.json").exists() else "124M"
        say(f"no --model given: using {name}")
    with memory_errors("the weights do not fit; try --dtype bfloat16, or a smaller --model"):
        weights = open_language_model(name)
        tokenizer = load_tokenizer(weights.folder)
        tokenizer.check_size(weights.config.vocab_size)
        return build(weights, resolve_device(device), dtype), tokenizer
