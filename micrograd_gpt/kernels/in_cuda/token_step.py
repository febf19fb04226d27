"""The token step as a CUDA graph: from one new token in each of up to 64 rows to the next logits.

A step is seven short kernels a block. Launched from Python one by one, each takes longer to start
than to run, so they are captured once and started together from then on (CUDA C++ Programming
Guide, "CUDA Graphs"). A graph repeats its launches with the arguments they had when captured. It
therefore reads and writes arrays that stay where they are. What changes from step to step (the
tokens, and how many of them the cache holds) is copied into such an array first.

All products are those of matvec.py: CuPy does not let cuBLAS be captured.
"""

from __future__ import annotations

import functools
import math
import warnings
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from micrograd_gpt.arrays.devices import Array, array_module
from micrograd_gpt.arrays.stand_ins import CUDA, NotForMe, stands_in_for
from micrograd_gpt.generation import context, filters
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.kernels.blocks import (
    BYPASSED_BY_WHOLE_MODELS,
    IN_LAYER_NORM,
    Parts,
    parameters_around,
    parameters_of,
)
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.arguments import (
    HEAD_SIZES,
    THREADS,
    activation,
    float32,
    name_of,
    strips,
)
from micrograd_gpt.kernels.in_cuda.kernels import normalise
from micrograd_gpt.kernels.in_cuda.matvec import MOST_ROWS, multiply_few_rows
from micrograd_gpt.kernels.in_cuda.modules import launch
from micrograd_gpt.kernels.shapes import BLOCK, check_fit, checked_lengths
from micrograd_gpt.tensor import is_recorded

MOST_STEPS = 8  # kept for each model; a batch whose rows end in turn needs several
WIDEST = 2048  # the rows that layer_norm_few_rows takes
AROUND = "wte V C, wpe P C, ln_f_weight C, ln_f_bias C"


@stands_in_for(context.next_logits, CUDA, bypasses=BYPASSED_BY_WHOLE_MODELS)
def next_logits(cache: KVCache, model: GPT2, ids: np.ndarray) -> Array:
    """As the definition, for one token a row: launch by launch the first time, then by a graph."""
    if type(cache) is not KVCache or type(ids) is not np.ndarray or ids.dtype.kind not in "iu":
        raise NotForMe
    few = ids.ndim == 2 and ids.shape[1] == 1 and len(ids) <= MOST_ROWS
    if not few or not cuda_modules.usable():
        raise NotForMe
    steps = _STEPS.get(model)
    if steps is None or not steps.parts.are_unchanged():
        _STEPS.pop(model, None)
        steps = Steps(model, cache)
        _STEPS[model] = steps
    if is_recorded(*steps.parts.parameters):
        raise NotForMe
    lengths = checked_lengths(cache, (*ids.shape, steps.width), steps.n_layer, steps.n_head)
    vocabulary, positions = steps.room
    if ids.min() < 0 or ids.max() >= min(vocabulary, model.config.vocab_size):
        raise NotForMe
    if lengths.max() >= min(positions, model.config.n_positions):
        raise NotForMe
    logits = steps.of(cache.data, model)(model, cache.data, np.array([ids[:, 0], lengths], int))
    cache.lengths += 1
    return logits


class Steps:
    """The token steps of a model as it is now, each for one place where a cache may be.

    Raises NotForMe unless the model is GPT-2 as it stands in gpt2.py, and fits the kernels.
    """

    def __init__(self, model: GPT2, cache: KVCache) -> None:
        around = parameters_around(model)
        blocks = model.transformer.h if around else []
        layers = parameters_of(blocks, cache) if blocks else None
        if not around or not layers:
            raise NotForMe
        arrays = [parameter.data for parameter in around]
        check_fit(AROUND, arrays)
        self.room, self.width = (len(arrays[0]), len(arrays[1])), arrays[0].shape[1]
        self.n_layer, self.n_head = len(blocks), blocks[0].attn.n_head
        if any(block.attn.n_head != self.n_head for block in blocks):
            raise NotForMe
        matrices, wide = arrays[:2], arrays[2:]
        for layer in layers:
            arrays = [parameter.data for parameter in layer]
            check_fit(BLOCK, arrays)
            if arrays[0].shape != (self.width,):
                raise NotForMe
            wide += [arrays[i] for i in IN_LAYER_NORM]
            matrices += [array for i, array in enumerate(arrays) if i not in IN_LAYER_NORM]
        float32(*wide)
        self.dtype = activation(*(a if a.flags.c_contiguous else a.T for a in matrices))
        if not matrices[0].flags.c_contiguous or type(wide[0]) is not type(matrices[0]):
            raise NotForMe
        self.parts = Parts(model, model.transformer.wte.weight)
        self.steps = dict[tuple[Any, ...], TokenStep]()

    def of(self, data: Array, model: GPT2) -> TokenStep:
        """The step for a cache's array. A graph knows only addresses: it serves any cache at this
        address with the same layout."""
        place = (cuda_modules.address(data), data.shape, data.strides, data.dtype)
        step = self.steps.pop(place, None)
        if step is None:
            size, wte = data.shape[-1], model.transformer.wte.weight.data
            alike = str(data.dtype) == self.dtype and type(data) is type(wte)
            if not alike or data.strides[-1] != data.itemsize or size not in HEAD_SIZES:
                raise NotForMe
            step = TokenStep(data.shape[2], wte)
        self.steps[place] = step  # the latest used comes last
        if len(self.steps) > MOST_STEPS:
            del self.steps[next(iter(self.steps))]
        return step


# They are freed with their model, and keep no cache alive.
_STEPS: WeakKeyDictionary[GPT2, Steps] = WeakKeyDictionary()


class TokenStep:
    """The arrays that the launches of a step share, and their graph.

    Args:
        rows: how many rows the cache has.
        wte: the table of tokens (V, C), in the type of the matrices.
    """

    def __init__(self, rows: int, wte: Array) -> None:
        (vocabulary, width), xp = wte.shape, array_module(wte)
        self.given = xp.empty((2, rows), np.int64)
        # The new tokens, and how many each row of the cache holds without them: their positions
        self.tokens, self.lengths = self.given
        self.stream = xp.empty((rows, width), np.float32)
        self.mean, self.rstd = (xp.empty((rows, 1), np.float32) for _ in range(2))
        self.normed, self.mixed, self.qkv, self.hidden = (
            xp.empty((rows, n * width), wte.dtype) for n in (1, 1, 3, 4)
        )
        self.logits = xp.empty((rows, 1, vocabulary), wte.dtype)
        self.steps, self.graph = 0, None

    def __call__(self, model: GPT2, data: Array, given: np.ndarray) -> Array:
        """The logits (B, 1, V) after new tokens; `given` (2, B), int64: those, and the lengths."""
        self.given.set(given)
        if self.steps == 1:  # the first step's launches have loaded all kernels
            self.graph = self._captured(model, data)
        if self.graph is None:
            self.launch(model, data)
        else:
            self.graph.launch()
        self.steps += 1
        return self.logits.copy()

    def _captured(self, model: GPT2, data: Array) -> Any:
        """The graph; None, after a warning, where the launches cannot be captured."""
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)  # the default one cannot be captured
        try:
            with stream:
                # Meanwhile nothing may be allocated or read; in this mode that is an error
                stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
                try:
                    self.launch(model, data)
                except BaseException:
                    with suppress(RuntimeError):  # the first error is the one to raise
                        stream.end_capture()
                    raise
                return stream.end_capture()
        except RuntimeError as problem:  # how CuPy raises the driver's and the runtime's errors
            _warn(str(problem))
            return None

    def launch(self, model: GPT2, data: Array) -> None:
        """Take one token a row through the model: `logits` changes, and the cache grows."""
        body, stream = model.transformer, self.stream
        wte = body.wte.weight.data
        embed(self.tokens, self.lengths, wte, body.wpe.weight.data, stream)
        for block, (keys, values) in zip(body.h, data, strict=True):
            attn, mlp = block.attn, block.mlp
            self._norm(block.ln_1)
            self._linear(self.normed, attn.c_attn, self.qkv)
            attend(self.qkv, keys, values, self.lengths, self.mixed)
            self._linear(self.mixed, attn.c_proj, stream=stream)
            self._norm(block.ln_2)
            self._linear(self.normed, mlp.c_fc, self.hidden, gelu=True)
            self._linear(self.hidden, mlp.c_proj, stream=stream)
        self._norm(body.ln_f)
        multiply_few_rows(self.normed, wte.T, None, self.logits)

    def _norm(self, norm: Any) -> None:
        weight, bias, width = norm.weight.data, norm.bias.data, self.stream.shape[1]
        if width <= WIDEST:
            normalise_few_rows(self.stream, weight, bias, norm.eps, self.normed)
        else:
            normalise(self.stream, weight, bias, norm.eps, self.normed, self.mean, self.rstd)

    @staticmethod
    def _linear(x: Array, layer: Any, y: Array | None = None, **then: Any) -> None:
        multiply_few_rows(x, layer.weight.data, layer.bias.data, y, **then)


def embed(tokens: Array, positions: Array, wte: Array, wpe: Array, stream: Array) -> None:
    """Write wte[tokens] + wpe[positions], in float32, into stream (B, C).

    `tokens` and `positions` (B,) are int64 arrays on the device, and rows of the tables.
    """
    dtype, (rows, width) = activation(wte, wpe), stream.shape
    grid = (rows, strips(width, dtype))
    arguments = (tokens, positions, wte, wpe, stream, width)
    launch("embedding", "embedding_token", dtype, grid, (32,), *arguments)


def normalise_few_rows(x: Array, weight: Array, bias: Array, eps: float, y: Array) -> None:
    """As `normalise`, for x (N, C) with C at most WIDEST; mean and rstd are not kept."""
    rows, width = x.shape
    kernel, dtype = "layer_norm_few_rows", name_of(y.dtype)
    launch("layer_norm", kernel, dtype, (rows,), (THREADS,), x, weight, bias, y, width, eps)


def attend(qkv: Array, keys: Array, values: Array, lengths: Array, out: Array) -> None:
    """Attention of one new token a row, qkv (B, 3C), over it and all before it, into out (B, C).

    `keys` and `values` (B, H, capacity, D) hold `lengths[b]` tokens in row b, where `lengths` (B,)
    is an int64 array on the device. The new token's are written after them.
    """
    (b, heads, _, size), dtype = keys.shape, activation(qkv, out)
    strides = (stride // keys.itemsize for stride in keys.strides[:3])
    launch(
        *("attention_decode", "attention_token", dtype, (b * heads,), (512,)),
        *(qkv, keys, values, lengths, out, heads, *strides, 1 / math.sqrt(size)),
        head_size=size,
    )


@stands_in_for(filters.likeliest, CUDA)
def likeliest(scores: Array, vocab_size: int | None = None) -> Array:
    """As the definition, in one kernel, for float32."""
    float32(scores)
    width, rows = scores.shape[-1], scores.size // scores.shape[-1]
    allowed = width if vocab_size is None else vocab_size
    if not isinstance(allowed, int) or allowed < 1:
        raise NotForMe
    found = array_module(scores).empty((3, *scores.shape[:-1]), np.float64)
    launch(
        *("cross_entropy", "likeliest", "float32", (rows,), (1024,)),
        *(scores, found, rows, width, min(allowed, width)),
    )
    return found


@functools.cache
def _warn(problem: str) -> None:
    """Warn, once for each problem."""
    warnings.warn(
        f"the kernels of decoding are launched one by one: they could not be captured ({problem})",
        RuntimeWarning,
        stacklevel=2,
    )
