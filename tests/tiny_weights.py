"""The committed TensorFlow checkpoint, a tiny GPT-2, as arrays and as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from micrograd_gpt.gpt2 import GPT2

DATA = Path(__file__).parent / "data" / "tf_checkpoint"
TINY = {"n_layer": 2, "n_head": 4, "n_embd": 16, "vocab_size": 61, "n_positions": 32}  # of DATA
CONFIG = {"model_type": "gpt2", **TINY}
Arrays = dict[str, np.ndarray]


def expected_arrays() -> Arrays:
    """The committed checkpoint's arrays under our names, read without this package."""
    arrays = {}
    for name, array in safetensors.numpy.load_file(DATA / "expected.safetensors").items():
        name = name.replace("model/", "transformer.").replace("/h", "/h.").replace("/", ".")
        for i in range(2):
            name = name.replace(f"transformer.h{i}.", f"transformer.h.{i}.")
        head, _, last = name.rpartition(".")
        last = {"g": "weight", "w": "weight", "b": "bias"}.get(last, f"{last}.weight")
        arrays[f"{head}.{last}"] = array[0] if array.ndim == 3 else array
    return arrays


ARRAYS = expected_arrays()


def numbers(model: GPT2) -> Arrays:
    return {name: p.data for name, p in model.named_parameters()}


def assert_same(model: GPT2, arrays: Arrays = ARRAYS, dtype: str = "float32") -> None:
    got = numbers(model)
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == dtype
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def hf_folder(folder: Path, arrays: Arrays | None = None, config: Any = CONFIG) -> Path:
    """A Hugging Face folder, written by the safetensors library."""
    folder.mkdir(exist_ok=True)
    tensors = {
        n: np.ascontiguousarray(a) for n, a in (ARRAYS if arrays is None else arrays).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_masks(arrays: Arrays) -> Arrays:
    # Transformers used to save these with each layer: the causal mask, and a large negative number.
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 32, 32), "f4")) for i in range(2)}
    return arrays | masks | {"h.0.attn.masked_bias": np.array(-1e4, "f4")}


def bare(arrays: Arrays) -> Arrays:
    return {name.removeprefix("transformer."): array for name, array in arrays.items()}
