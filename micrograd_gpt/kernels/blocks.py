"""The checks shared by the kernels that compute whole blocks of GPT-2, or all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any
from weakref import ref

from micrograd_gpt import gpt2
from micrograd_gpt.arrays.precision import compute_dtype, computes_as_held
from micrograd_gpt.generation.kv_cache import KVCache, Past
from micrograd_gpt.gpt2 import GPT2, MLP, Block, CausalSelfAttention, Transformer
from micrograd_gpt.nn import Dropout, Embedding, LayerNorm, Linear, Module, Parameter, no_dropout

# What these kernels do the work of; the layers and the arithmetic that these call are found there.
BYPASSED = (
    *(part.__call__ for part in (Block, CausalSelfAttention, MLP, LayerNorm, Linear, Dropout)),
    *(Dropout.draw, KVCache.layer, Past.__init__, Past.attention),
)

# The same for a kernel that goes from tokens to logits
BYPASSED_BY_WHOLE_MODELS = (
    *(*BYPASSED, gpt2.through_blocks, KVCache.positions, GPT2.hidden),
    *(part.__call__ for part in (GPT2, Transformer, Embedding)),
)

IN_LAYER_NORM = (0, 1, 6, 7)  # which of a block's twelve parameters belong to a LayerNorm


def parameters_of_block(block: Any) -> list[Parameter] | None:
    """A block's twelve parameters, in the order in which the block uses them.

    Returns None unless the block does exactly what GPT-2's does: no part of it has been replaced by
    one of another class.
    """
    if type(block) is not Block or [type(block.attn), type(block.mlp)] != [
        CausalSelfAttention,
        MLP,
    ]:
        return None
    attn, mlp = block.attn, block.mlp
    parts = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
    types = [LayerNorm, Linear, Linear] * 2 + [Dropout] * 3
    if [type(part) for part in (*parts, *dropouts_of(block))] != types:
        return None
    if any("draw" in vars(dropout) for dropout in dropouts_of(block)):
        return None
    parameters = [parameter for part in parts for parameter in (part.weight, part.bias)]
    return None if any(parameter is None for parameter in parameters) else parameters


def dropouts_of(block: Block) -> tuple[Dropout, ...]:
    return block.attn.attn_dropout, block.attn.resid_dropout, block.mlp.resid_dropout


def parameters_of(blocks: Sequence[Block], cache: Any) -> list[list[Parameter]] | None:
    """Each block's parameters, as `parameters_of_block` gives them.

    Returns None where that does, where something is dropped out, the cache is one of another class,
    or a block computes in another type than its weights are held in.
    """
    if type(cache) is not KVCache:
        return None
    layers = []
    for block in blocks:
        parameters = parameters_of_block(block)
        if parameters is None or any(part.training and part.p for part in dropouts_of(block)):
            return None
        if not computes_as_held(block.attn.c_attn.weight):
            return None
        layers.append(parameters)
    return layers


def parameters_around(model: Any) -> list[Parameter] | None:
    """A model's parameters outside its blocks: of its two embeddings, then of the last LayerNorm.

    Returns None unless what is around the blocks does exactly what GPT-2's does; see
    `parameters_of`.
    """
    if type(model) is not GPT2 or "hidden" in vars(model):
        return None
    body = model.transformer
    if type(body) is not Transformer:
        return None
    parts = (body.wte, body.wpe, body.ln_f, body.drop)
    if [type(part) for part in parts] != [Embedding, Embedding, LayerNorm, Dropout]:
        return None
    if (body.drop.training and body.drop.p) or "draw" in vars(body.drop):
        return None
    if not computes_as_held(body.wte.weight):
        return None
    parameters = [body.wte.weight, body.wpe.weight, body.ln_f.weight, body.ln_f.bias]
    return None if any(parameter is None for parameter in parameters) else parameters


class Parts:
    """The parts of a module as they are now, to tell in microseconds if they are still the same.

    It keeps neither the module alive nor the arrays of its parameters, whose numbers may change.
    `weight` is the one whose type decides in which type the matrix work is done.
    """

    def __init__(self, module: Module, weight: Parameter) -> None:
        self.weight, self.parameters = weight, module.parameters()
        _, *self.parts = (part for _, part in module.modules())
        self.types = list(map(type, self.parts))
        self.namespaces = [vars(part) for part in (module, *self.parts)]
        self.values = list(self._values())
        self.lists = [(value, list(value)) for value in self.values if isinstance(value, list)]
        self.arrays = [ref(parameter.data) for parameter in self.parameters]
        self.context = self._context()

    def are_unchanged(self) -> bool:
        """Whether every part has the attributes it had, the lists their parts, the parameters their
        arrays, and whether dropout is on and the type of the matrix work are what they were.
        """
        arrays = (parameter.data for parameter in self.parameters)
        return (
            sum(map(len, self.namespaces)) == len(self.values)
            and all(map(is_, self._values(), self.values))
            and all(map(is_, map(type, self.parts), self.types))
            and all(now == before for now, before in self.lists)
            and all(map(is_, arrays, (array() for array in self.arrays)))
            and self._context() == self.context
        )

    def _values(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self.namespaces))

    def _context(self) -> tuple[Any, ...]:
        return no_dropout.inside.get(), compute_dtype(self.weight)
