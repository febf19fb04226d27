"""The token step as a CUDA graph: one new token in each of a few rows, through all blocks.

A step is seven short kernels a block. Launched from Python one by one, each takes longer to start
than to run, so they are captured once and started together from then on (CUDA C++ Programming
Guide, "CUDA Graphs"). A graph repeats its launches with the arguments they had when captured. It
therefore reads and writes arrays that stay where they are. What changes from step to step (the
tokens, and how many of them the cache holds) is copied into such arrays first.

It has been compiled and emulated, but not yet run on a GPU.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from micrograd_gpt import gpt2
from micrograd_gpt.arrays.devices import Array, array_module
from micrograd_gpt.arrays.stand_ins import CUDA, NotForMe, stands_in_for
from micrograd_gpt.gpt2 import Block
from micrograd_gpt.kernels.blocks import BYPASSED, IN_LAYER_NORM, parameters_of
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.arguments import HEAD_SIZES, activation, float32
from micrograd_gpt.kernels.in_cuda.kernels import normalise
from micrograd_gpt.kernels.in_cuda.matvec import FEW_ROWS, multiply_few_rows
from micrograd_gpt.kernels.in_cuda.modules import launch
from micrograd_gpt.kernels.shapes import BLOCK, check_fit, checked_lengths
from micrograd_gpt.tensor import Tensor, is_recorded

MOST_STEPS = 2 * FEW_ROWS  # kept for each model; a batch whose rows end in turn needs several


@stands_in_for(gpt2.through_blocks, CUDA, bypasses=BYPASSED)
def through_blocks(x: Tensor, blocks: list[Block], cache: Any = None) -> Tensor:
    """As the definition, for one token a row: launch by launch the first time, then by a graph."""
    few = x.ndim == 3 and x.shape[1] == 1 and len(x) <= FEW_ROWS and cache is not None
    layers = parameters_of(blocks, cache) if few and blocks and cuda_modules.usable() else None
    if layers is None:
        raise NotForMe
    parameters = [parameter for layer in layers for parameter in layer]
    if is_recorded(x, *parameters):
        raise NotForMe
    data, n_head = cache.data, blocks[0].attn.n_head
    lengths = checked_lengths(cache, x.data, len(blocks), n_head)
    if any(block.attn.n_head != n_head for block in blocks):
        raise NotForMe
    arrays = [parameter.data for parameter in parameters]
    for i in range(0, len(arrays), 12):
        check_fit(BLOCK, arrays[i : i + 12])
        if arrays[i].shape != x.shape[-1:]:
            raise NotForMe
    # A graph knows only addresses: it serves any cache at this address with the same layout
    place = (cuda_modules.address(data), data.shape, data.strides, data.dtype, len(blocks))
    steps = _STEPS.setdefault(blocks[0], {})
    step = steps.pop(place, None)
    if step is None or not step.reads(arrays):
        step = TokenStep(x.data, arrays, data)
    steps[place] = step  # the latest used comes last
    if len(steps) > MOST_STEPS:
        del steps[next(iter(steps))]
    return Tensor(step(x.data, blocks, cache, lengths))


# The steps of each model, by its first block. They are freed with it, and keep no cache alive.
_STEPS: WeakKeyDictionary[Any, dict[tuple[Any, ...], TokenStep]] = WeakKeyDictionary()


class TokenStep:
    """The launches of a token step for certain parameters and a certain cache, and their graph.

    Args:
        x: the new tokens' residual stream (B, 1, C), float32.
        parameters: the arrays of all blocks' parameters, which are not kept alive.
        data: the cache's array, in the type of the matrices.

    Raises NotForMe where a kernel does not take one of these.
    """

    def __init__(self, x: Array, parameters: Sequence[Array], data: Array) -> None:
        (rows, _, width), xp = x.shape, array_module(x)
        float32(x, *(a for i, a in enumerate(parameters) if i % 12 in IN_LAYER_NORM))
        matrices = [a for i, a in enumerate(parameters) if i % 12 not in IN_LAYER_NORM]
        dtype = activation(*(a if a.flags.c_contiguous else a.T for a in matrices))
        alike = str(data.dtype) == dtype and type(data) is type(x) is type(matrices[0])
        if not alike or data.strides[-1] != data.itemsize or data.shape[-1] not in HEAD_SIZES:
            raise NotForMe
        self.parameters = [ref(array) for array in parameters]
        self.lengths = xp.empty(rows, np.int64)  # of the rows, without the new token
        self.stream = xp.empty((rows, width), np.float32)
        self.mean, self.rstd = (xp.empty((rows, 1), np.float32) for _ in range(2))
        self.normed, self.mixed, self.qkv, self.hidden = (
            xp.empty((rows, n * width), matrices[0].dtype) for n in (1, 1, 3, 4)
        )
        self.steps, self.graph = 0, None

    def reads(self, parameters: Sequence[Array]) -> bool:
        """Whether these are the arrays that the launches read, whatever numbers they hold."""
        return all(map(operator.is_, (array() for array in self.parameters), parameters))

    def __call__(self, x: Array, blocks: Sequence[Any], cache: Any, lengths: np.ndarray) -> Array:
        """The blocks' result for x; `lengths` (B,) are the cache's, in int64."""
        float32(x)
        self.lengths[...] = array_module(x).asarray(lengths)
        self.stream[...] = x.reshape(self.stream.shape)
        if self.steps == 1:  # the first step's launches have loaded all kernels
            self.graph = self._captured(blocks, cache.data)
        if self.graph is None:
            self.launch(blocks, cache.data)
        else:
            self.graph.launch()
        self.steps += 1
        cache.lengths += 1
        return self.stream.copy().reshape(x.shape)

    def _captured(self, blocks: Sequence[Any], data: Array) -> Any:
        """The graph; None, after a warning, where the launches cannot be captured."""
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)  # the default one cannot be captured
        try:
            with stream:
                # Meanwhile nothing may be allocated or read; in this mode that is an error
                stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
                try:
                    self.launch(blocks, data)
                except BaseException:
                    with suppress(RuntimeError):  # the first error is the one to raise
                        stream.end_capture()
                    raise
                return stream.end_capture()
        except RuntimeError as problem:  # how CuPy raises the driver's and the runtime's errors
            _warn(str(problem))
            return None

    def launch(self, blocks: Sequence[Any], data: Array) -> None:
        """Take one token a row through the blocks: `stream` changes in place, the cache grows."""
        stream = self.stream
        for block, (keys, values) in zip(blocks, data, strict=False):
            attn, mlp = block.attn, block.mlp
            self._norm(block.ln_1)
            self._linear(self.normed, attn.c_attn, self.qkv)
            attend(self.qkv, keys, values, self.lengths, self.mixed)
            self._linear(self.mixed, attn.c_proj, stream=stream)
            self._norm(block.ln_2)
            self._linear(self.normed, mlp.c_fc, self.hidden, gelu=True)
            self._linear(self.hidden, mlp.c_proj, stream=stream)

    def _norm(self, norm: Any) -> None:
        weight, bias = norm.weight.data, norm.bias.data
        normalise(self.stream, weight, bias, norm.eps, self.normed, self.mean, self.rstd)

    @staticmethod
    def _linear(x: Array, layer: Any, y: Array | None = None, **then: Any) -> None:
        multiply_few_rows(x, layer.weight.data, layer.bias.data, y, **then)


def attend(qkv: Array, keys: Array, values: Array, lengths: Array, out: Array) -> None:
    """Attention of one new token a row, qkv (B, 3C), over it and all before it, into out (B, C).

    `keys` and `values` (B, H, capacity, D) hold `lengths[b]` tokens in row b, where `lengths` (B,)
    is an int64 array on the device. The new token's are written after them.
    """
    (b, heads, _, size), dtype = keys.shape, activation(qkv, out)
    strides = (stride // keys.itemsize for stride in keys.strides[:3])
    launch(
        *("attention_decode", "attention_token", dtype, (b * heads,), (128,)),
        *(qkv, keys, values, lengths, out, heads, *strides, 1 / math.sqrt(size)),
        head_size=size,
    )


@functools.cache
def _warn(problem: str) -> None:
    """Warn, once for each problem."""
    warnings.warn(
        f"the kernels of decoding are launched one by one: they could not be captured ({problem})",
        RuntimeWarning,
        stacklevel=2,
    )
