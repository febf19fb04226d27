"""From a model's name to the model: GPT2.from_pretrained.

names.open_model(name)   a size, a name on the Hub, a file or a folder -> Weights
build(weights)           -> GPT2
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array, move
from micrograd_gpt.arrays.int8 import (
    INT8,
    arriving,
    axis_of,
    hold_in_int8,
    is_held_in_int8,
    refuse_int8,
)
from micrograd_gpt.arrays.memory import HugePages
from micrograd_gpt.arrays.precision import check_precision, hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.nn import Linear
from micrograd_gpt.support.cli import listed, say
from micrograd_gpt.support.download import reason
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.variants import VariantGPT2, differences
from micrograd_gpt.weights.config import (
    CONFIG,
    architecture,
    config_for,
    has_head,
    model_class,
    own_classes,
)
from micrograd_gpt.weights.formats import Weights, check_agreement
from micrograd_gpt.weights.loading import each_once, fill
from micrograd_gpt.weights.names import open_model
from micrograd_gpt.weights.reading import StoredTensor


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

    A GPT2 becomes a VariantGPT2 where the config asks for that. A class of one's own stays itself:
    its `config_class` reads the settings, and its parameters are filled by their own names. Those
    that a model of another class lacks stay as the class draws them, and stderr says so.
    Each tensor is read into the parameter that keeps it, so on the CPU memory holds the model once;
    for int8 its rows become that as they are read. Raises UserError, naming the tensor, for one
    that is missing, extra, misshapen or damaged, for a model that does not fit into memory, and for
    int8 on a GPU.
    """
    refuse_int8(dtype, device)
    check_precision(dtype, INT8)
    config = config_for(cls, weights.config, weights.values, weights.path)
    if cls is GPT2 and (own := own_classes(weights.values)):
        check_agreement(weights.path, weights.config, CONFIG, weights.tensors)
        say(f"note: {weights.path} was saved by a class {listed(own)}, and is loaded as a GPT2")
    try:
        model = unwritten(config, cls, dtype)
        if new := _new_in(model, weights):
            model = model_class(config, cls)(config)
        if dtype == INT8:
            arrays = _to_fill_in_int8(model, new)
        else:
            hold_in(model, dtype)
            move(model, device)
            arrays = {name: p.data for name, p in model.named_parameters() if name not in new}
    except MemoryError as error:
        raise UserError(
            f"{weights.path}: not enough memory for this model ({reason(error)})"
        ) from error
    _check_reads_all(model, weights)
    tensors = {**weights.tensors, **_own_tensors(arrays, weights)}
    fill(arrays, each_once(tensors, model), weights.path)
    return model.eval()


def _own_tensors(arrays: Mapping[str, Any], weights: Weights) -> dict[str, StoredTensor]:
    """The tensors that only a class of one's own has a use for; a note where heads are left out."""
    besides = {**weights.heads, **weights.unused}
    own = {name: besides[name] for name in besides if name in arrays}
    if others := [name for name in weights.heads if name not in own]:
        what = "only the language model below is loaded"
        say(f"note: {weights.path}: {listed(others)} left out: {what}")
    return own


def _check_reads_all(model: GPT2, weights: Weights) -> None:
    """UserError where the config has a setting that the model, of a class of one's own, lacks."""
    ignored = differences(weights.config).keys() - vars(model.config).keys()
    if has_head(model):
        ignored -= {"tie_word_embeddings"}
    if ignored:
        name, cls = min(ignored), type(model).__name__
        value = getattr(weights.config, name)
        raise UserError(
            f"{weights.path}: {name} is {value!r}, which {cls} does not read: derive {cls} from "
            "VariantGPT2 (micrograd_gpt.variants)"
        )


def _new_in(model: GPT2, weights: Weights) -> set[str]:
    """The parameters that a class of one's own has beyond the model which another class saved."""
    cls = type(model)
    if cls in (GPT2, VariantGPT2) or weights.values.get("architectures") == [architecture(cls)]:
        return set()
    base = {name for name, _ in unwritten(weights.config).named_parameters()}
    stored = {*weights.tensors, *weights.heads, *weights.unused}
    new = {name for name, _ in model.named_parameters()} - base - stored
    if new:
        say(f"note: {weights.path} lacks {listed(sorted(new))}: new in this {cls.__name__}")
    return new


def _to_fill_in_int8(model: GPT2, new: set[str]) -> dict[str, Any]:
    """Make a model's matrices int8; what its tensors are read into, but for the new ones."""
    memory = HugePages()
    arrays: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if name in new:
            hold_in_int8(name, parameter)
            continue
        parameter.requires_grad = False
        if is_held_in_int8(name, parameter):
            arrays[name] = arriving(parameter.shape, axis_of(name), memory.zeros)
            parameter.data = arrays[name].matrix
        else:  # `unwritten` may have made one array for all of this shape
            arrays[name] = parameter.data = np.zeros_like(parameter.data)
    return arrays


def unwritten(config: GPT2Config, cls: type[GPT2] = GPT2, dtype: str = "float32") -> GPT2:
    """A model to fill, whose matrices are of this type: zeros that the system gives and that take
    no room until then; for int8 float32's, the same for all of one shape, as no matrix keeps them.
    A class whose `__init__` takes no `init` draws its own."""
    is_int8 = dtype == INT8
    new = functools.cache(np.zeros) if is_int8 else HugePages().zeros
    held = np.dtype("float32" if is_int8 else dtype)

    def zeros(shape: tuple[int, ...], std: float) -> Array:
        return new(shape, held, order="F")  # as Linear keeps them, which would copy others

    made = model_class(config, cls)
    takes_init = "init" in inspect.signature(made).parameters
    if not takes_init:
        return made(config)
    model = made(config, init=zeros)
    of_linears = {id(part.weight) for _, part in model.modules() if isinstance(part, Linear)}
    for parameter in model.parameters():  # others keep C order
        if id(parameter) not in of_linears and not parameter.data.flags.c_contiguous:
            parameter.data = new(parameter.shape, held, order="C")
    return model
