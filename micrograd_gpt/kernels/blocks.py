"""What the kernels that compute whole blocks of GPT-2 ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from micrograd_gpt.arrays.backend import Array

IN_LAYER_NORM = (0, 1, 6, 7)  # which of a block's twelve parameters are LayerNorms'


def parameters_of(blocks: Sequence[Any]) -> list[list[Array]] | None:
    """The arrays of each `gpt2.Block`'s twelve parameters; None unless all are just such blocks."""
    layers = list[list[Array]]()
    for block in blocks:
        arrays = block.plain_parameters() if hasattr(block, "plain_parameters") else None
        if arrays is None:
            return None
        layers.append(arrays)
    return layers
