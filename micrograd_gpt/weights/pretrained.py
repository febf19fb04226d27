"""From a model's name to the model: GPT2.from_pretrained.

names.open_model(name)   a size, a name on the Hub, a file or a folder -> Weights
build(weights)           -> GPT2
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array, move
from micrograd_gpt.arrays.int8 import INT8, arriving, axis_of, is_held_in_int8, refuse_int8
from micrograd_gpt.arrays.memory import HugePages
from micrograd_gpt.arrays.precision import check_precision, hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.cli import listed, say
from micrograd_gpt.support.download import reason
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.config import model_class
from micrograd_gpt.weights.formats import Weights
from micrograd_gpt.weights.loading import fill
from micrograd_gpt.weights.names import open_model


def from_pretrained(
    cls: type[GPT2], name: str | Path, device: str = "cpu", dtype: str = "float32"
) -> GPT2:
    """A GPT2 with the weights of that name: a size, a file or folder, or a model on the Hub.

    names.py says what a name can be. A size is taken from a cache, or downloaded from Hugging Face
    or else from OpenAI; a file or folder is anything that `open_weights` reads, without the
    network. `dtype` is what the parameters are held in ("float32", "float64", "bfloat16", "float16"
    or, to use a model on a CPU, "int8": arrays/int8.py), whatever the file stores. The model is in
    evaluation mode. Raises UserError if the weights can't be found, fetched or read.
    """
    return build(open_model(str(name)), device, dtype, cls)


def build(
    weights: Weights, device: str = "cpu", dtype: str = "float32", cls: type[GPT2] = GPT2
) -> GPT2:
    """A GPT2 (or a subclass of it) with these weights, in evaluation mode.

    Each tensor is read into the parameter that keeps it, so on the CPU memory holds the model once;
    for int8 its rows become that as they are read. Raises UserError, naming the tensor, for one
    that is missing, extra, misshapen or damaged, for a model that does not fit into memory, and for
    int8 on a GPU.
    """
    refuse_int8(dtype, device)
    check_precision(dtype, INT8)
    try:
        if dtype == INT8:
            model, arrays = _to_fill_in_int8(weights, cls)
        else:
            model = unwritten(weights.config, cls, dtype)
            hold_in(model, dtype)
            move(model, device)
            arrays = {name: parameter.data for name, parameter in model.named_parameters()}
    except MemoryError as error:
        raise UserError(
            f"{weights.path}: not enough memory for this model ({reason(error)})"
        ) from error
    own = {name: head for name, head in weights.heads.items() if name in arrays}  # a subclass's
    if others := [name for name in weights.heads if name not in own]:
        what = "only the language model below is loaded"
        say(f"note: {weights.path}: {listed(others)} left out: {what}")
    fill(arrays, {**weights.tensors, **own}, weights.path)
    return model.eval()


def _to_fill_in_int8(weights: Weights, cls: type[GPT2]) -> tuple[GPT2, dict[str, Any]]:
    """A model whose matrices are int8, and what its tensors are read into.

    It is made with zeros that no matrix keeps, so that those of one shape can be the same.
    """
    model, memory = unwritten(weights.config, cls, new=functools.cache(np.zeros)), HugePages()
    arrays: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        arrays[name] = parameter.data
        parameter.requires_grad = False
        if is_held_in_int8(name, parameter):
            arrays[name] = arriving(parameter.shape, axis_of(name), memory.zeros)
            parameter.data = arrays[name].matrix
    return model, arrays


def unwritten(
    config: GPT2Config, cls: type[GPT2] = GPT2, dtype: str = "float32", new: Any = None
) -> GPT2:
    """A model to fill, whose matrices are of this type: zeros that `new`, or else the system, gives
    and that take no room until then."""
    new = HugePages().zeros if new is None else new
    tables = [(rows, config.n_embd) for rows in (config.vocab_size, config.n_positions)]

    def zeros(shape: tuple[int, ...], std: float) -> Array:
        # Embeddings keep C order, and Linear would copy what is not in Fortran order.
        return new(shape, np.dtype(dtype), order="C" if shape in tables else "F")

    return model_class(config, cls)(config, init=zeros)
