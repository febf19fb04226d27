"""Small untrained models for the tests of decoding. Their weights are large: what they say is
nonsense, but their distributions have clear favourites.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from micrograd_gpt.generation import output, sampling
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.tokenizers import Tokenizer
from micrograd_gpt.variants import CHOICES, VariantConfig, VariantGPT2
from micrograd_gpt.weights.saving import save_pretrained

VOCABULARY, POSITIONS = 11, 16
TEXT = "the quick brown fox jumps over the lazy dog.\n"  # for the vocabulary of characters


def make_model(seed: int = 3, factor: float = 12, **config: Any) -> GPT2:
    """A model whose weights are `factor` times as large as usual."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": VOCABULARY}
    settings = {**shape, "n_positions": POSITIONS, **config}
    is_variant = not settings.keys().isdisjoint(CHOICES)
    model = (
        VariantGPT2(VariantConfig(**settings), seed)
        if is_variant
        else GPT2(GPT2Config(**settings), seed)
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= factor
    return model


def save_model(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> str:
    """Save a model of one layer and 32 positions with its tokenizer; returns the folder's name."""
    size = tokenizer.vocab_size
    save_pretrained(
        make_model(seed, 8, n_layer=1, vocab_size=size, n_positions=32), folder, tokenizer
    )
    return str(folder)


def random_prompts(count: int, longest: int = 30, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(1, longest + 1)) for _ in range(count)]


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does, once this many tokens of a prompt are decided."""

    def interrupted(*args: Any) -> Iterator[sampling.Sample]:
        for count, sample in enumerate(sampling.decode(*args)):
            yield sample
            if count + 1 == steps:
                raise KeyboardInterrupt

    monkeypatch.setattr(output, "decode", interrupted)


def work_of(do: Callable[[], object]) -> int:
    """How many instructions of Python's own code this takes: the same number every time."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(before)
    return count
