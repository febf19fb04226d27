"""From a model's name to the model: GPT2.from_pretrained.

names.open_model(name)   a size, a name on the Hub, a file or a folder -> Weights
build(weights)           -> GPT2
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
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
from micrograd_gpt.variants import VariantGPT2, differences
from micrograd_gpt.weights.config import config_for, has_head, model_class
from micrograd_gpt.weights.formats import Weights
from micrograd_gpt.weights.loading import fill, stored_parameters
from micrograd_gpt.weights.names import open_model
from micrograd_gpt.weights.reading import StoredTensor

THEIRS = r"(TF|Flax)?GPT2(\w*Model\w*|For\w+)?"  # our class, and what Transformers calls its


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
    try:
        if dtype == INT8:
            model, arrays = _to_fill_in_int8(config, cls)
        else:
            model = unwritten(config, cls, dtype)
            if new := _new_in(model, weights):
                model = model_class(config, cls)(config)
            hold_in(model, dtype)
            move(model, device)
            arrays = {name: p.data for name, p in model.named_parameters() if name not in new}
    except MemoryError as error:
        raise UserError(
            f"{weights.path}: not enough memory for this model ({reason(error)})"
        ) from error
    _check_reads_all(model, weights)
    if cls is GPT2:
        _say_if_changed(weights)
    _add_shared(arrays, model, weights)
    fill(arrays, {**weights.tensors, **_own_tensors(arrays, weights)}, weights.path)
    return model.eval()


def _add_shared(arrays: dict[str, Any], model: GPT2, weights: Weights) -> None:
    """Have what blocks share be read under each of its names in the file, into the same array."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in stored_parameters(model).items():
        if name in weights.tensors and first[id(parameter)] in arrays:
            arrays.setdefault(name, arrays[first[id(parameter)]])


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
    if cls in (GPT2, VariantGPT2) or weights.values.get("architectures") == [cls.__name__]:
        return set()
    base = {name for name, _ in unwritten(weights.config).named_parameters()}
    stored = {*weights.tensors, *weights.heads, *weights.unused}
    new = {name for name, _ in model.named_parameters()} - base - stored
    if new:
        say(f"note: {weights.path} lacks {listed(sorted(new))}: new in this {cls.__name__}")
    return new


def _say_if_changed(weights: Weights) -> None:
    """A note on stderr where the config names a class of somebody's own, which may compute more."""
    named = weights.values.get("architectures")
    named = map(str, named if isinstance(named, list) else [])
    if own := [name for name in named if not re.fullmatch(THEIRS, name)]:
        say(f"note: {weights.path} was saved by a class {listed(own)}, and is loaded as a GPT2")


def _to_fill_in_int8(config: GPT2Config, cls: type[GPT2]) -> tuple[GPT2, dict[str, Any]]:
    """A model whose matrices are int8, and what its tensors are read into.

    It is made with zeros that no matrix keeps, so that those of one shape can be the same.
    """
    model, memory = unwritten(config, cls, new=functools.cache(np.zeros)), HugePages()
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
    and that take no room until then. A class whose `__init__` takes no `init` draws its own."""
    new = HugePages().zeros if new is None else new
    tables = [(rows, config.n_embd) for rows in (config.vocab_size, config.n_positions)]

    def zeros(shape: tuple[int, ...], std: float) -> Array:
        # Embeddings keep C order, and Linear would copy what is not in Fortran order.
        return new(shape, np.dtype(dtype), order="C" if shape in tables else "F")

    made = model_class(config, cls)
    takes_init = "init" in inspect.signature(made).parameters
    return made(config, init=zeros) if takes_init else made(config)
