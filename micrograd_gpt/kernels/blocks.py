"""The check shared by the kernels that compute whole blocks of GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from micrograd_gpt.arrays.precision import compute_dtype
from micrograd_gpt.generation.kv_cache import KVCache, Past
from micrograd_gpt.gpt2 import MLP, Block, CausalSelfAttention
from micrograd_gpt.nn import Dropout, LayerNorm, Linear, Parameter

# What these kernels do the work of; the layers and the arithmetic that these call are found there.
BYPASSED = (
    *(part.__call__ for part in (Block, CausalSelfAttention, MLP, LayerNorm, Linear, Dropout)),
    *(Dropout.draw, KVCache.layer, Past.__init__, Past.attention),
)

IN_LAYER_NORM = (0, 1, 6, 7)  # which of a block's twelve parameters belong to a LayerNorm


def parameters_of(blocks: Sequence[Block], cache: Any) -> list[list[Parameter]] | None:
    """Each block's twelve parameters, in the order in which the block uses them.

    Returns None unless every block does exactly what GPT-2's does: nothing is dropped out, no part
    and no cache has been replaced by one of another class, and it computes in the type that its
    weights are held in.
    """
    if type(cache) is not KVCache:
        return None
    layers = []
    for block in blocks:
        if type(block) is not Block or [type(block.attn), type(block.mlp)] != [
            CausalSelfAttention,
            MLP,
        ]:
            return None
        attn, mlp = block.attn, block.mlp
        parts = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
        dropouts = (attn.attn_dropout, attn.resid_dropout, mlp.resid_dropout)
        types = [LayerNorm, Linear, Linear] * 2 + [Dropout] * 3
        if [type(part) for part in (*parts, *dropouts)] != types:
            return None
        drops_out = any((part.training and part.p) or "draw" in vars(part) for part in dropouts)
        if drops_out or compute_dtype(attn.c_attn.weight) != attn.c_attn.weight.dtype:
            return None
        parameters = [parameter for part in parts for parameter in (part.weight, part.bias)]
        if any(parameter is None for parameter in parameters):
            return None
        layers.append(parameters)
    return layers
