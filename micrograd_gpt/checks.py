"""What a model and an optimizer cannot be made of, each said in one line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from micrograd_gpt.tensor import Tensor

COUNTS = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
EPSILON = "layer_norm_epsilon"


def check_config(values: Mapping[str, Any]) -> None:
    """ValueError, naming the setting, where these of a GPT2Config or VariantConfig make no model.

    `n_inner` may be left out, or None.
    """
    for key in COUNTS if values.get("n_inner") is None else (*COUNTS, "n_inner"):
        value = values[key]
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, not {value!r}")
    for key in DROPOUTS:
        if not _is_number(values[key]) or not 0 <= values[key] < 1:
            raise ValueError(f"{key} must be a probability in [0, 1), not {values[key]!r}")
    value = values[EPSILON]
    if not _is_number(value) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{EPSILON} must be a finite number above 0, not {value!r}")
    width, heads = values["n_embd"], values["n_head"]
    if width % heads:
        raise ValueError(f"n_embd ({width}) must be a multiple of n_head ({heads})")


def check_adamw(
    parameters: Sequence[Any], lr: Any, betas: Any, eps: Any, weight_decay: Any
) -> None:
    """TypeError for parameters that are not tensors; ValueError where they cannot be trained, or
    twice the same, and for numbers with which AdamW would not go downhill."""
    if not parameters:
        raise ValueError("AdamW: there are no parameters to train")
    for i, p in enumerate(parameters):
        if not isinstance(p, Tensor):
            raise TypeError(
                f"AdamW takes tensors, as model.parameters() are, not a {type(p).__name__}"
            )
        if p.dtype.kind in "iub" or p.dtype.itemsize < 4:  # of 16 bits: updates round to 0
            raise ValueError(f"parameters of {p.dtype} cannot be trained: hold them in float32")
        if p._node is not None:
            raise ValueError(
                f"AdamW: parameter {i} is the result of {p._node.name!r}, not a leaf: it has no "
                "gradient of its own"
            )
    if len(set(map(id, parameters))) < len(parameters):
        raise ValueError("AdamW: a parameter is there twice: give each once")
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not _is_number(value) or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"AdamW: {name} must be a finite number from 0, not {value!r}")
    pair = tuple(betas) if isinstance(betas, tuple | list) else ()
    if len(pair) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise ValueError(f"AdamW: betas must be two numbers in [0, 1), not {betas!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
