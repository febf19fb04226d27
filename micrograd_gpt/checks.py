"""What a module, a model and an optimizer cannot be made of, each said in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from micrograd_gpt.arrays.habits import Habits
from micrograd_gpt.tensor import Tensor

COUNTS = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
EPSILON = "layer_norm_epsilon"


def check_config(values: Mapping[str, Any]) -> None:
    """ValueError, naming the setting, where these of a GPT2Config or VariantConfig make no model.

    `n_inner` may be left out, or None.
    """
    counts = COUNTS if values.get("n_inner") is None else (*COUNTS, "n_inner")
    for key in counts:
        value = values[key]
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, not {value!r}")
    for key in DROPOUTS:
        check_probability(key, values[key])
    value = values[EPSILON]
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"{EPSILON} must be a finite number above 0, not {value!r}")
    width, heads = values["n_embd"], values["n_head"]
    if width % heads:
        raise ValueError(f"n_embd ({width}) must be a multiple of n_head ({heads})")


def check_probability(name: str, p: Any) -> None:
    """ValueError where dropout cannot have this probability."""
    if not _is_number(p) or not 0 <= p < 1:
        raise ValueError(f"{name} must be a probability in [0, 1), not {p!r}")


def check_described(model: Any) -> None:
    """ValueError where the config of a GPT2, or one of the parts that it is made with, was changed
    so that they no longer agree: whoever loads it would get another model, or none."""
    c, body = model.config, model.transformer
    own = [getattr(block, name, None) for block in body.h for name in ("ln_1", "attn", "ln_2")]
    parts = [*own, body.ln_f]
    found = [("n_layer", len(body.h)), ("vocab_size", len(body.wte.weight))]
    found += [("n_embd", body.wte.weight.shape[1])]
    positions = getattr(getattr(body, "wpe", None), "weight", None)
    found += [("n_positions", len(positions))] if positions is not None else []
    found += [("n_head", part.n_head) for part in parts if hasattr(part, "n_head")]
    found += [(EPSILON, part.eps) for part in parts if hasattr(part, "eps")]
    for name, value in found:
        if value != getattr(c, name):
            raise ValueError(
                f"the config says {name} = {getattr(c, name)}, but there is {value} in the model, "
                "which would be loaded as another one, or not at all: make them agree"
            )


def check_call(module: type) -> None:
    """TypeError for a Module that defines `forward`, where a layer of this package that it is made
    of has a `__call__` that would be called instead."""
    called = next(cls for cls in module.__mro__ if "__call__" in vars(cls))
    made_of_it = module.__mro__[: module.__mro__.index(called)]
    has_forward = any("forward" in vars(cls) for cls in made_of_it)
    if has_forward and _is_ours(called) and called.__name__ != "Module":
        raise TypeError(
            f"{module.__name__} has a forward, which nobody would call: {called.__name__} has a "
            "__call__, so name it __call__"
        )


def check_trainable(parameters: Any) -> list[Tensor]:
    """The parameters as a list. TypeError for what are no tensors; ValueError where they cannot be
    trained, or twice the same."""
    parameters = _check_tensors("AdamW", parameters)
    if not parameters:
        raise ValueError("AdamW: there are no parameters to train")
    for i, p in enumerate(parameters):
        if p.dtype.kind in "iub" or p.dtype.itemsize < 4:  # of 16 bits: updates round to 0
            raise ValueError(f"parameters of {p.dtype} cannot be trained: hold them in float32")
        if p._node is not None:
            raise ValueError(
                f"AdamW: parameter {i} is the result of {p.made_by()!r}, not a leaf: it has no "
                "gradient of its own"
            )
    _check_each_once("AdamW", parameters)
    return parameters


def check_numbers(optimizer: Any) -> tuple[float, float, float, float, float]:
    """The lr, both betas, the eps and the weight_decay of an AdamW as floats; ValueError, naming
    it, for one with which it would not go downhill."""
    lr, betas = optimizer.lr, optimizer.betas
    eps, weight_decay = optimizer.eps, optimizer.weight_decay
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not _is_finite(value) or value < 0:
            raise ValueError(f"AdamW: {name} must be a finite number from 0, not {value!r}")
    pair = tuple(betas) if isinstance(betas, tuple | list) else ()
    if len(pair) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise ValueError(f"AdamW: betas must be two numbers in [0, 1), not {betas!r}")
    return float(lr), float(pair[0]), float(pair[1]), float(eps), float(weight_decay)


def check_update(i: int, p: Tensor, m: Any, v: Any) -> None:
    """ValueError where AdamW cannot update parameter number `i` by its gradient and its moments."""
    _check_gradient("AdamW", i, p)
    if p.grad is not None and p.grad.shape != p.shape:
        raise ValueError(
            f"AdamW: parameter {i} has the shape {p.shape}, but its gradient {p.grad.shape}"
        )
    if not m.shape == v.shape == p.shape:
        raise ValueError(
            f"AdamW: parameter {i} has the shape {p.shape}, but its moments {m.shape} and "
            f"{v.shape}: after a change of shape, make a new AdamW"
        )
    if not all(getattr(array.flags, "writeable", True) for array in (p.data, m, v)):
        raise ValueError(f"AdamW: parameter {i} of shape {p.shape} is read-only")


def check_clipping(parameters: Any, max_norm: Any) -> list[Tensor]:
    """The parameters as a list. TypeError for what are no tensors, and gradients that are no
    arrays; ValueError where a parameter is there twice, and for a norm that would turn gradients
    around, or make them NaN."""
    if not _is_number(max_norm) or not max_norm >= 0:
        raise ValueError(f"clip_grad_norm: max_norm must be a number from 0, not {max_norm!r}")
    parameters = _check_tensors("clip_grad_norm", parameters)
    _check_each_once("clip_grad_norm", parameters)
    for i, p in enumerate(parameters):
        _check_gradient("clip_grad_norm", i, p)
    return parameters


def _check_gradient(name: str, i: int, p: Tensor) -> None:
    if isinstance(p.grad, np.generic):  # which NumPy makes of `grad / 2`, where that has no axes
        p.grad = np.asarray(p.grad)
    if p.grad is not None and not hasattr(p.grad, "flags"):
        raise TypeError(
            f"{name}: the gradient of parameter {i} is {p.grad!r:.50}, not an array: to forget it, "
            "set None, as zero_grad() does"
        )


def _check_tensors(name: str, parameters: Any) -> list[Tensor]:
    what = f"{name} takes a list of tensors, as model.parameters() is"
    if isinstance(parameters, Habits) or not isinstance(parameters, Iterable):
        raise TypeError(f"{what}, not a single {type(parameters).__name__}")
    parameters = list(parameters)
    for p in parameters:
        if not isinstance(p, Habits):  # or the Tensor of a reader's own copy of tensor.py
            raise TypeError(f"{what}, not a list of {type(p).__name__}")
    return parameters


def _check_each_once(name: str, parameters: list[Tensor]) -> None:
    if len(set(map(id, parameters))) < len(parameters):
        raise ValueError(f"{name}: a parameter is there twice: give each once")


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(_plain(value)) <= sys.float_info.max


def _is_number(value: Any) -> bool:
    return isinstance(plain := _plain(value), Real) and not isinstance(plain, bool)


def _plain(value: Any) -> Any:
    """Python's number for one of NumPy's, or for an array of no axes."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "micrograd_gpt"
