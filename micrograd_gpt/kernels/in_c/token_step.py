"""A token step in C: a few new tokens through all blocks of a GPT-2 in one call (decode.c)."""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from micrograd_gpt import gpt2
from micrograd_gpt.arrays import int8
from micrograd_gpt.arrays.int8 import Int8Matrix
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.gpt2 import Block
from micrograd_gpt.kernels.blocks import BYPASSED, IN_LAYER_NORM, parameters_of
from micrograd_gpt.kernels.in_c.arguments import (
    Array,
    address,
    call,
    floats,
    in_c,
    ints,
    pointers,
    strides_of,
)
from micrograd_gpt.kernels.in_c.half import BFLOAT16, FEW_ROWS, KINDS
from micrograd_gpt.kernels.shapes import (
    BLOCK,
    FLOAT32,
    INT8,
    check_fit,
    check_int8,
    check_plain,
    checked_lengths,
)
from micrograd_gpt.tensor import Tensor, is_recorded

BYPASSED_OF_INT8 = (
    *(int8.product, Int8Matrix.__array_ufunc__),
    *(Int8Matrix.axis, Int8Matrix.values, Int8Matrix.scales),
)
C_ATTN = 2  # the place of c_attn's weight among a block's parameters; `_block` has the others


class _Linear(ctypes.Structure):
    _fields_ = pointers("weight", "bias", "scales")


class _Block(ctypes.Structure):
    _fields_ = [
        *pointers("ln_1_weight", "ln_1_bias"),
        *[("c_attn", _Linear), ("attn_c_proj", _Linear)],
        *pointers("ln_2_weight", "ln_2_bias"),
        *[("c_fc", _Linear), ("mlp_c_proj", _Linear)],
    ]


class _Decode(ctypes.Structure):
    _fields_ = [
        *ints("kind", "rows", "tokens", "width", "heads", "layers"),
        *floats("eps"),
        *pointers("blocks", "cache"),
        *ints("layer_stride", "value_stride", "row_stride", "head_stride"),
        *pointers("lengths", "x", "room"),
    ]


@in_c(gpt2.through_blocks, bypasses=(*BYPASSED, *BYPASSED_OF_INT8))
def through_blocks(x: Tensor, blocks: list[Block], cache: Any = None) -> Tensor:
    """As the definition, in one call of C, for weights of float32, bfloat16 or int8.

    NotForMe unless new tokens, few of them or in bfloat16, meet a cache of the type that belongs to
    the weights.
    """
    layers = parameters_of(blocks, cache)
    if not layers or is_recorded(x, *(parameter for layer in layers for parameter in layer)):
        raise NotForMe
    arrays = [[parameter.data for parameter in layer] for layer in layers]
    heads, data = blocks[0].attn.n_head, cache.data
    kind = arrays[0][C_ATTN].dtype
    check_plain([x.data], [FLOAT32])
    check_plain([data], [BFLOAT16 if kind == BFLOAT16 else FLOAT32])
    lengths = checked_lengths(cache, x.shape, len(blocks), heads)
    rows, tokens, width = x.shape
    *strides, token, element = strides_of(data)
    few = rows * tokens <= FEW_ROWS
    if not (few or kind == BFLOAT16) or (token, element) != (width // heads, 1):
        raise NotForMe
    if not data.flags.writeable:
        raise NotForMe
    eps, *others = {norm.eps for block in blocks for norm in (block.ln_1, block.ln_2)}
    if others or any(block.attn.n_head != heads for block in blocks):
        raise NotForMe
    entries = (_block(*each, width, kind) for each in zip(blocks, arrays, strict=True))
    table = (_Block * len(blocks))(*entries)
    y = np.array(x.data, order="C")
    room = np.empty(rows * tokens * (6 * width + heads + 2), np.float32)
    call(
        "decode" if few else "read_prompt",
        _Decode(
            *(KINDS.index(kind), rows, tokens, width, heads, len(blocks), eps),
            *(ctypes.addressof(table), data.ctypes.data, *strides),
            *(lengths.ctypes.data, y.ctypes.data, room.ctypes.data),
        ),
    )
    cache.lengths += tokens
    return Tensor(y)


# The addresses of each block's parameters, and the arrays they are of: reading them takes a while.
_BLOCKS: WeakKeyDictionary[Any, tuple[list[ref[Array]], _Block]] = WeakKeyDictionary()


def _block(block: Any, arrays: list[Array], width: int, kind: np.dtype) -> _Block:
    """The addresses of a block's parameters; NotForMe where decode.c cannot read them."""
    check_fit(BLOCK, arrays)
    if arrays[0].shape != (width,) or arrays[C_ATTN].dtype != kind:
        raise NotForMe
    asked, places = _BLOCKS.get(block, ((), None))
    if places is not None and all(array() is now for array, now in zip(asked, arrays, strict=True)):
        return places
    if kind not in KINDS:
        raise NotForMe
    norms = [arrays[i] for i in IN_LAYER_NORM]
    check_plain(norms, [FLOAT32])
    if not all(array.flags.c_contiguous for array in norms):
        raise NotForMe
    at = [array.ctypes.data for array in norms]
    linear = [_linear(arrays[i], arrays[i + 1], kind) for i in (C_ATTN, 4, 8, 10)]
    places = _Block(*at[:2], *linear[:2], *at[2:], *linear[2:])
    _BLOCKS[block] = list(map(ref, arrays)), places
    return places


def _linear(weight: Array, bias: Array, kind: np.dtype) -> _Linear:
    """The addresses of a linear layer's parameters, whose weights are of this kind."""
    scales = None
    if kind == INT8:
        weight, scales = check_int8(weight)
    check_plain([weight], [kind])
    check_plain([bias], [FLOAT32 if kind == INT8 else kind])
    if not (weight.flags.f_contiguous and bias.flags.c_contiguous):
        raise NotForMe
    return _Linear(weight.ctypes.data, bias.ctypes.data, address(scales))
