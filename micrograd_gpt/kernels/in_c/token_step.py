"""A token step in C: a few new tokens through all blocks of a GPT-2 in one call (decode.c)."""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from micrograd_gpt import gpt2
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.gpt2 import Block
from micrograd_gpt.kernels.blocks import BYPASSED, parameters_of
from micrograd_gpt.kernels.in_c.arguments import (
    Array,
    call,
    floats,
    in_c,
    ints,
    pointers,
    strides_of,
)
from micrograd_gpt.kernels.in_c.kernels import FEW_ROWS
from micrograd_gpt.kernels.shapes import BLOCK, FLOAT32, check_fit, check_plain, checked_lengths
from micrograd_gpt.tensor import Tensor, is_recorded


class _Block(ctypes.Structure):
    _fields_ = [
        *pointers("ln_1_weight", "ln_1_bias", "c_attn_weight", "c_attn_bias"),
        *pointers("attn_c_proj_weight", "attn_c_proj_bias", "ln_2_weight", "ln_2_bias"),
        *pointers("c_fc_weight", "c_fc_bias", "mlp_c_proj_weight", "mlp_c_proj_bias"),
    ]


class _Decode(ctypes.Structure):
    _fields_ = [
        *ints("rows", "tokens", "width", "heads", "layers"),
        *floats("eps"),
        *pointers("blocks", "cache"),
        *ints("layer_stride", "value_stride", "row_stride", "head_stride"),
        *pointers("lengths", "x", "room"),
    ]


@in_c(gpt2.through_blocks, bypasses=BYPASSED)
def through_blocks(x: Tensor, blocks: list[Block], cache: Any = None) -> Tensor:
    """As the definition, in one call of C; NotForMe unless few new tokens meet a float32 cache."""
    layers = parameters_of(blocks, cache)
    if not layers or is_recorded(x, *(p for block in blocks for p in block.parameters())):
        raise NotForMe
    arrays = [[parameter.data for parameter in layer] for layer in layers]
    heads, data = blocks[0].attn.n_head, cache.data
    check_plain([x.data, data], [FLOAT32])
    lengths = checked_lengths(cache, x.shape, len(blocks), heads)
    rows, tokens, width = x.shape
    *strides, token, element = strides_of(data)
    if rows * tokens > FEW_ROWS or (token, element) != (width // heads, 1):
        raise NotForMe
    if not data.flags.writeable:
        raise NotForMe
    eps, *others = {norm.eps for block in blocks for norm in (block.ln_1, block.ln_2)}
    if others or any(block.attn.n_head != heads for block in blocks):
        raise NotForMe
    entries = (_block(block, layer, width) for block, layer in zip(blocks, arrays, strict=True))
    table = (_Block * len(blocks))(*entries)
    y = np.array(x.data, order="C")
    room = np.empty(rows * tokens * (6 * width + heads + 2), np.float32)
    call(
        "decode",
        _Decode(
            *(rows, tokens, width, heads, len(blocks), eps),
            *(ctypes.addressof(table), data.ctypes.data, *strides),
            *(lengths.ctypes.data, y.ctypes.data, room.ctypes.data),
        ),
    )
    cache.lengths += tokens
    return Tensor(y)


# The addresses of each block's parameters, and the arrays they are of: reading them takes a while.
_BLOCKS: WeakKeyDictionary[Any, tuple[list[ref[Array]], _Block]] = WeakKeyDictionary()


def _block(block: Any, arrays: list[Array], width: int) -> _Block:
    """The addresses of a block's parameters; NotForMe where decode.c cannot read them."""
    check_fit(BLOCK, arrays)
    if arrays[0].shape != (width,):
        raise NotForMe
    asked, places = _BLOCKS.get(block, ((), None))
    if places is not None and all(array() is now for array, now in zip(asked, arrays, strict=True)):
        return places
    check_plain(arrays, [FLOAT32])
    if not all(array.flags.f_contiguous for array in arrays):  # a bias is so in C order too
        raise NotForMe
    places = _Block(*(array.ctypes.data for array in arrays))
    _BLOCKS[block] = list(map(ref, arrays)), places
    return places
