"""The token step as a CUDA graph: one new token in each of a few rows, through all blocks.

A step is seven short kernels a block. Launched from Python one by one, each takes longer to start
than to run; so they are captured once, and started together from then on (CUDA C++ Programming
Guide, "CUDA Graphs"). A graph repeats its launches with the arguments they had: it reads and writes
arrays that stay where they are, and what changes from step to step, the tokens and how many the
cache holds, is copied into such arrays before.

Compiled and emulated; not yet run on a GPU.
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

from micrograd_gpt.arrays.backend import Array, array_module
from micrograd_gpt.kernels.blocks import IN_LAYER_NORM, parameters_of
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.arguments import (
    HEAD_SIZES,
    THREADS,
    WARPS,
    Unsupported,
    activation,
    float32,
)
from micrograd_gpt.kernels.in_cuda.matvec import FEW_ROWS, multiply_few_rows
from micrograd_gpt.kernels.in_cuda.modules import launch

MOST_STEPS = 2 * FEW_ROWS  # kept for a model: of a batch whose rows end one after another, say


def cached_blocks(x: Array, blocks: Sequence[Any], cache: Any) -> Array:
    """As the definition, of one token a row: launch by launch the first time, then by a graph."""
    rows, tokens, _ = x.shape
    if tokens != 1 or rows > FEW_ROWS or not len(blocks) or not cuda_modules.usable():
        raise Unsupported
    layers = parameters_of(blocks)
    if layers is None:
        raise Unsupported
    data, width = cache.data, x.shape[2]
    fits = data.shape[:3] == (len(blocks), 2, rows) and data.shape[3] * data.shape[5] == width
    fits = fits and cache.lengths.min() >= 0 and cache.lengths.max() < data.shape[4]
    if not fits or any(block.attn.n_head != data.shape[3] for block in blocks):
        raise Unsupported  # the definition says what is wrong
    arrays = [array for layer in layers for array in layer]
    # A graph knows addresses alone: whatever cache lies at this one, so laid out, is served by it
    place = (cuda_modules.address(data), data.shape, data.strides, data.dtype, len(blocks))
    steps = _STEPS.setdefault(blocks[0], {})
    step = steps.pop(place, None)
    if step is None or not step.reads(arrays):
        step = TokenStep(x, arrays, data)
    steps[place] = step  # the latest used comes last
    if len(steps) > MOST_STEPS:
        del steps[next(iter(steps))]
    return step(x, blocks, cache)


# The steps of a model, under its first block: they go when it does, and do not keep it or a cache.
_STEPS: WeakKeyDictionary[Any, dict[tuple[Any, ...], TokenStep]] = WeakKeyDictionary()


class TokenStep:
    """The launches of a token step for certain parameters and a certain cache, and their graph.

    Args:
        x: new tokens (B, 1, C), float32.
        parameters: the arrays of all blocks' parameters, which are not kept alive.
        data: that of the cache.

    Raises Unsupported where a kernel does not take one of them.
    """

    def __init__(self, x: Array, parameters: Sequence[Array], data: Array) -> None:
        (rows, _, width), xp = x.shape, array_module(x)
        float32(x, *(a for i, a in enumerate(parameters) if i % 12 in IN_LAYER_NORM))
        matrices = [a for i, a in enumerate(parameters) if i % 12 not in IN_LAYER_NORM]
        self.dtype = activation(*(a if a.flags.c_contiguous else a.T for a in matrices))
        if str(data.dtype) != self.dtype or data.strides[-1] != data.itemsize:
            raise Unsupported
        if data.shape[-1] not in HEAD_SIZES:
            raise Unsupported
        self.parameters = [ref(array) for array in parameters]
        self.lengths = xp.empty(rows, np.int64)  # of the rows, before the new token
        self.stream = xp.empty((rows, width), np.float32)
        self.mean, self.rstd = (xp.empty((rows, 1), np.float32) for _ in range(2))
        self.normed, self.mixed, self.qkv, self.hidden = (
            xp.empty((rows, n * width), matrices[0].dtype) for n in (1, 1, 3, 4)
        )
        self.steps, self.graph = 0, None

    def reads(self, parameters: Sequence[Array]) -> bool:
        """Whether these are the very arrays that the launches read, whatever is in them."""
        return all(map(operator.is_, (array() for array in self.parameters), parameters))

    def __call__(self, x: Array, blocks: Sequence[Any], cache: Any) -> Array:
        float32(x)
        # Through memory of CuPy's own: the numbers are changed below, before the GPU may read them
        self.lengths[...] = array_module(x).asarray(cache.lengths.astype(np.int64))
        self.stream[...] = x.reshape(self.stream.shape)
        if self.steps == 1:  # all kernels have been loaded by the first step's launches
            self.graph = self._captured(blocks, cache.data)
        if self.graph is None:
            self.launch(blocks, cache.data)
        else:
            self.graph.launch()
        self.steps += 1
        cache.lengths += 1
        return self.stream.copy().reshape(x.shape)

    def _captured(self, blocks: Sequence[Any], data: Array) -> Any:
        """The graph; None, after a warning, where the launches could not be captured."""
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)  # the default one cannot be captured
        try:
            with stream:
                # Nothing is allocated or read in between, and this mode would not allow it
                stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
                try:
                    self.launch(blocks, data)
                except BaseException:
                    with suppress(RuntimeError):  # what went wrong is on its way already
                        stream.end_capture()
                    raise
                return stream.end_capture()
        except RuntimeError as problem:  # CuPy's errors of the driver and of the runtime
            _warn(str(problem))
            return None

    def launch(self, blocks: Sequence[Any], data: Array) -> None:
        """One token through the blocks: from `stream` into `stream`, and into the cache."""
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
        rows, width = self.stream.shape
        launch(
            *("layer_norm", "layer_norm_forward", self.dtype, (-(-rows // WARPS),), (THREADS,)),
            *(self.stream, norm.weight.data, norm.bias.data, self.normed, self.mean, self.rstd),
            *(rows, width, norm.eps),
        )

    @staticmethod
    def _linear(x: Array, layer: Any, y: Array | None = None, **then: Any) -> None:
        multiply_few_rows(x, layer.weight.data, layer.bias.data, y, **then)


def attend(qkv: Array, keys: Array, values: Array, lengths: Array, out: Array) -> None:
    """Attention of one new token a row, qkv (B, 3C), over itself and all before it -> out (B, C).

    `keys` and `values` (B, H, capacity, D) hold `lengths[b]` tokens in row b, int64 on the device;
    the new one's are written behind them.
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
    """Once for each problem."""
    warnings.warn(
        f"decoding launches its kernels one by one, since they could not be captured: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
