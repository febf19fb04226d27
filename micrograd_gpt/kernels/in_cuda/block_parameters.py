"""Which blocks of GPT-2 block.py takes, and their parameters as it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.arrays.precision import HALF, compute_dtype
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.gpt2 import Block
from micrograd_gpt.kernels.blocks import IN_LAYER_NORM, Parts, parameters_of_block
from micrograd_gpt.kernels.in_cuda.arguments import HEAD_SIZES, activation, float32
from micrograd_gpt.kernels.in_cuda.residual import narrowed
from micrograd_gpt.kernels.shapes import BLOCK, check_fit
from micrograd_gpt.nn import Parameter
from micrograd_gpt.tensor import Tensor, is_recorded

MOST_HEADS = 65535  # B × H that attention takes, one a row of its grid


class Layer(NamedTuple):
    """A layer's weight and bias: half precision, but those of LayerNorm, which are float32."""

    weight: Array
    bias: Array


class Weights(NamedTuple):
    """The parameters of a block's six layers, in the order in which it uses them."""

    ln_1: Layer
    c_attn: Layer
    attn_c_proj: Layer
    ln_2: Layer
    c_fc: Layer
    mlp_c_proj: Layer


class Known(NamedTuple):
    """A block that is GPT-2's own, as long as its parts are unchanged."""

    parts: Parts
    parameters: list[Parameter]  # as Weights has them, weight and bias in turn
    dtype: np.dtype  # of the matrix work: float16 or bfloat16

    def ln_1(self) -> Layer:
        return Layer(*(parameter.data for parameter in self.parameters[:2]))

    def rounded(self) -> Weights:
        """The parameters as they are now, the matrices and their biases in half precision."""
        arrays = [parameter.data for parameter in self.parameters]
        places = [i for i in range(len(arrays)) if i not in IN_LAYER_NORM]
        if arrays[places[0]].dtype != self.dtype:
            copies = narrowed([arrays[i] for i in places], self.dtype)
            for i, copy in zip(places, copies, strict=True):
                arrays[i] = copy
        return Weights(*map(Layer, arrays[::2], arrays[1::2]))


_KNOWN: WeakKeyDictionary[Block, Known] = WeakKeyDictionary()


def known_block(block: Block) -> Known:
    """The block as these kernels know it; NotForMe where they do not take it."""
    if type(block) is not Block:
        raise NotForMe
    known = _KNOWN.get(block)
    if known is None or not known.parts.are_unchanged():
        _KNOWN.pop(block, None)
        known = _KNOWN[block] = _looked_at(block)
    return known


def _looked_at(block: Block) -> Known:
    parameters = parameters_of_block(block)
    if parameters is None:
        raise NotForMe
    arrays = [parameter.data for parameter in parameters]
    dtype = compute_dtype(block.attn.c_attn.weight)
    if str(dtype) not in HALF:
        raise NotForMe
    check_fit(BLOCK, arrays)
    float32(*(arrays[i] for i in IN_LAYER_NORM))
    matrices = [array for i, array in enumerate(arrays) if i not in IN_LAYER_NORM]
    held_in = activation(*(a if a.flags.c_contiguous else a.T for a in matrices))
    if held_in not in ("float32", str(dtype)):
        raise NotForMe
    width, n_head = len(arrays[0]), block.attn.n_head
    if width % n_head or width // n_head not in HEAD_SIZES:
        raise NotForMe
    return Known(Parts(block, block.attn.c_attn.weight), parameters, dtype)


def check_stream(x: Tensor, known: Sequence[Known], blocks: Sequence[Block]) -> None:
    """NotForMe unless x (B, T, C) is a float32 stream that these blocks take, and all of them train
    if any does."""
    parameters = [parameter for block in known for parameter in block.parameters]
    if x.ndim != 3 or x.dtype != np.float32 or not x.size:
        raise NotForMe
    first, width = known[0], x.shape[-1]
    if any((k.dtype, len(k.parameters[0].data)) != (first.dtype, width) for k in known):
        raise NotForMe
    if type(x.data) is not type(parameters[0].data):
        raise NotForMe
    if len(x.data) * max(block.attn.n_head for block in blocks) > MOST_HEADS:
        raise NotForMe
    if is_recorded(x, *parameters) and not all(p.requires_grad for p in parameters):
        raise NotForMe
