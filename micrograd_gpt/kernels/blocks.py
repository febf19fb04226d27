"""The check shared by the kernels that compute whole blocks of GPT-2."""

from __future__ import annotations

from collections.abc import Sequence

from micrograd_gpt.arrays.precision import compute_dtype
from micrograd_gpt.gpt2 import MLP, Block, CausalSelfAttention
from micrograd_gpt.nn import Dropout, LayerNorm, Linear, Parameter

IN_LAYER_NORM = (0, 1, 6, 7)  # which of a block's twelve parameters belong to a LayerNorm


def parameters_of(blocks: Sequence[Block]) -> list[list[Parameter]] | None:
    """Each block's twelve parameters, in the order in which the block uses them.

    Returns None unless every block does exactly what GPT-2's does: nothing is dropped out, no part
    has been replaced, and it computes in the type that its weights are held in.
    """
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
        drops_out = any(dropout.training and dropout.p for dropout in dropouts)
        if drops_out or compute_dtype(attn.c_attn.weight) != attn.c_attn.weight.dtype:
            return None
        layers.append([parameter for part in parts for parameter in (part.weight, part.bias)])
    return layers
