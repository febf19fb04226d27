"""Each kernel of a training step and of decoding on its own: its time, bytes and operations.

Bytes are those that must pass through the device's memory, with each input read once and each
output written once. Operations are the multiplications and additions of matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import median

from micrograd_gpt import functional as F
from micrograd_gpt import layers, optim, tensor
from micrograd_gpt.arrays.devices import library_for, set_tf32
from micrograd_gpt.kernels import linear_cross_entropy as loss

SIDE = 8192  # of the square matrices whose product measures the matrix rate on a GPU


class Timer:
    """Times what a device does: by events on a GPU, by the clock on a CPU.

    A GPU is kept busy while the host prepares the calls, so that only its own time counts.
    """

    REPEATS, AT_ONCE, BUSY = 20, 5, 4  # repetitions; calls in each; products before them

    def __init__(self, device: str) -> None:
        self.device, self.xp = device, library_for(device)
        self.busy = product(SIDE, SIDE, SIDE, "bfloat16", device) if device == "gpu" else None

    def wait(self) -> None:
        if self.device == "gpu":
            self.xp.cuda.Device().synchronize()

    def seconds(self, function: Callable[[], Any]) -> float:
        """The median of several calls, after three that are not counted."""
        for _ in range(3):
            function()
        self.wait()
        return median(self._once(function) for _ in range(self.REPEATS))

    def _once(self, function: Callable[[], Any]) -> float:
        if self.device == "cpu":
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        start, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        for _ in range(self.BUSY):
            self.busy()
        start.record()
        for _ in range(self.AT_ONCE):
            function()
        end.record()
        end.synchronize()
        return self.xp.cuda.get_elapsed_time(start, end) / 1e3 / self.AT_ONCE


def numbers(device: str, dtype: str, *shape: int) -> Any:
    """Random numbers on the device, in `dtype`."""
    array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return library_for(device).asarray(array).astype(dtype, copy=False)


def product(n: int, k: int, m: int, dtype: str, device: str) -> Callable[[], Any]:
    a, b = numbers(device, dtype, n, k), numbers(device, dtype, k, m)
    return lambda: F.linear_forward(a, b, None)


class Profile:
    """Measures kernels, one row each in `rows`: kernel, seconds, gigabytes, gigaflops, limit."""

    def __init__(self, task: dict[str, Any]) -> None:
        c = task["model"]
        self.timer, self.half, self.rows = Timer(task["device"]), "bfloat16", list[dict[str, Any]]()
        self.batch, self.time, self.width = task["batch"], c["n_positions"], c["n_embd"]
        self.heads, self.vocabulary = c["n_head"], c["vocab_size"]
        self.tokens = self.batch * self.time

    def numbers(self, dtype: str, *shape: int) -> Any:
        return numbers(self.timer.device, dtype, *shape)

    def measure(
        self,
        name: str,
        function: Callable[[], Any],
        moved: list[Any],
        gigaflops: float = 0,
        limit: str = "bfloat16 GFLOP/s",
    ) -> Any:
        """Time `function`, which reads and writes the arrays `moved`, and return its result."""
        seconds = self.timer.seconds(function)
        gigabytes = sum(array.nbytes for array in moved) / 1e9
        row = {"kernel": name, "seconds": seconds, "gigabytes": gigabytes, "gigaflops": gigaflops}
        self.rows.append({**row, "limit": limit})
        return function()

    def layer_norm(self) -> None:
        x, gain = (
            self.numbers("float32", self.tokens, self.width),
            self.numbers("float32", self.width),
        )
        _, mean, rstd = self.measure(
            "layer_norm_forward", lambda: F.layer_norm_forward(x, gain, gain, 1e-5), [x, x]
        )
        self.measure(
            "layer_norm_backward",
            lambda: F.layer_norm_backward(x, x, gain, mean, rstd),
            [x, x, x],
        )

    def linear(self, n_out: int) -> None:
        x = self.numbers(self.half, self.tokens, self.width)
        weight, bias = self.numbers(self.half, self.width, n_out), self.numbers(self.half, n_out)
        work = 2e-9 * self.tokens * self.width * n_out
        y = self.measure(
            f"linear_forward {self.width} → {n_out}",
            lambda: F.linear_forward(x, weight, bias),
            [x, weight, *[x] * (n_out // self.width)],
            work,
        )
        self.measure(
            f"linear_backward {self.width} → {n_out}",
            lambda: F.linear_backward(y, x, weight),
            [y, x, weight, x, weight, weight],
            2 * work,
        )

    def gelu(self) -> None:
        x = self.numbers(self.half, self.tokens, 4 * self.width)
        self.measure("gelu_forward", lambda: F.gelu_forward(x), [x, x])
        self.measure("gelu_backward", lambda: F.gelu_backward(x, x), [x, x, x])

    def attention(self) -> None:
        qkv = self.numbers(self.half, self.batch, self.time, 3 * self.width)
        parts = self.heads_of(qkv)
        work = 2 * 2e-9 * self.tokens * (self.time / 2) * self.width  # over the causal half
        out, log_total = self.measure(
            "attention_forward",
            lambda: F.attention_forward(*parts, 0.0, ()),
            [qkv, qkv[..., ::3]],
            work,
        )
        grad = self.numbers(self.half, *out.swapaxes(1, 2).shape).swapaxes(1, 2)
        self.measure(
            "attention_backward",
            lambda: F.attention_backward(grad, *parts, out, log_total, 0.0, ()),
            [qkv, qkv, grad, out],
            2.5 * work,
        )

    def heads_of(self, qkv: Any) -> list[Any]:
        """(B, T, 3C) -> queries, keys and values, each (B, H, T, D): views, as in the model."""
        parts = qkv.reshape(*qkv.shape[:2], 3, self.heads, -1)
        return [parts[:, :, i].swapaxes(1, 2) for i in range(3)]

    def attention_in_tf32(self) -> None:
        """Attention in float32 with --tf32; the other kernels profiled do not use that setting."""
        set_tf32(self.timer.device == "gpu", self.timer.device)
        qkv = self.numbers("float32", self.batch, self.time, 3 * self.width)
        parts = self.heads_of(qkv)
        work = 2 * 2e-9 * self.tokens * (self.time / 2) * self.width  # over the causal half
        self.measure(
            "attention_forward, TF32",
            lambda: F.attention_forward(*parts, 0.0, ()),
            [qkv, qkv[..., ::3]],
            work,
            limit="TF32 GFLOP/s",
        )

    def residual(self) -> None:
        """The end of a residual branch: dropout, and the addition to the stream."""
        branch = self.numbers(self.half, self.tokens, self.width)
        stream = self.numbers("float32", self.tokens, self.width)
        self.measure(
            "dropout_forward", lambda: layers.dropout_forward(branch, 0.1, (1,)), [branch, branch]
        )
        self.measure("residual addition", lambda: stream + branch, [stream, branch, stream])

    def ends(self) -> None:
        """The loss and the embedding."""
        some = min(self.tokens, max(1, loss.LOGITS_AT_ONCE[self.timer.device] // self.vocabulary))
        logits = self.numbers(self.half, some, self.vocabulary)
        labels = self.timer.xp.arange(some) % self.vocabulary
        self.measure(
            "cross_entropy_forward",
            lambda: F.cross_entropy_forward(logits, labels),
            [logits, logits],
        )
        rows = self.numbers(self.half, some, self.width)
        head = self.numbers(self.half, self.vocabulary, self.width)
        self.measure(
            "linear_cross_entropy_forward",
            lambda: loss.linear_cross_entropy_forward(rows, head, labels, True),
            [rows, head, *[logits] * 5, head, rows, rows, head, head],
            3 * 2e-9 * some * self.width * self.vocabulary,
        )
        ids = np.random.default_rng(0).integers(0, self.vocabulary, self.tokens)
        ids, grad = self.timer.xp.asarray(ids), self.numbers("float32", self.tokens, self.width)
        table = self.numbers("float32", self.vocabulary, self.width)
        self.measure("rows added up", lambda: tensor.add_at(table, ids, grad), [grad] * 3)

    def optimizer(self) -> None:
        shapes = [(self.vocabulary, self.width), *[(self.width, 4 * self.width)] * 36]
        p, m, grads = ([self.numbers("float32", *shape) for shape in shapes] for _ in range(3))
        v = [self.timer.xp.ones_like(array) for array in p]
        parameters = [tensor.Tensor(array, requires_grad=True) for array in p]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        self.measure("clip_grad_norm", lambda: optim.clip_grad_norm(parameters, 1.0), grads * 3)
        rows = [(*arrays, 0.1) for arrays in zip(p, grads, m, v, strict=True)]
        settings = (0.0, 0.9, 0.95, 1e-8, 1)
        self.measure("adamw_update", lambda: optim.adamw_update(rows, *settings), p * 7)

    def one_token(self) -> None:
        row = self.numbers(self.half, 1, self.width)
        head = self.numbers(self.half, self.vocabulary, self.width)
        weight = self.numbers(self.half, self.width, 4 * self.width)
        bias = self.numbers(self.half, 4 * self.width)
        name = "linear_forward, one row, the head"
        self.measure(name, lambda: F.linear_forward(row, head.T, None), [head])
        name = f"linear_forward, one row, {self.width} → {4 * self.width}"
        self.measure(name, lambda: F.linear_forward(row, weight, bias), [weight])
        size = self.width // self.heads
        cache = self.numbers(self.half, 2, 1, self.heads, self.time, size)
        query = self.numbers(self.half, 1, self.heads, 1, size)
        name = "attention_forward, one query"
        self.measure(name, lambda: F.attention_forward(query, *cache, 0.0, ()), [cache])


def kernels(task: dict[str, Any]) -> list[dict[str, Any]]:
    profile = Profile(task)
    profile.layer_norm()
    profile.linear(3 * profile.width)
    profile.linear(4 * profile.width)
    profile.gelu()
    profile.attention()
    profile.attention_in_tf32()
    profile.residual()
    profile.ends()
    profile.optimizer()
    profile.one_token()
    return profile.rows
