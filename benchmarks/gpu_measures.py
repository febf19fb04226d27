"""What benchmarks/gpu.py measures: one function for each kind of part, run in its own process.

A `task` is the part's settings: "device" is "gpu", or "cpu" in a rehearsal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import gpu_profile
import numpy as np
from common import median, peak_megabytes
from train import flops_per_token

from micrograd_gpt import no_grad, optim
from micrograd_gpt.arrays.devices import library_for, move, set_tf32
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.generation import context
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.documents import load_documents
from micrograd_gpt.text.windows import Windows

BLOCKS = 3  # of steps, each timed as a whole: only at its end do we wait for the device


def limits(task: dict[str, Any]) -> dict[str, float]:
    """The machine's best rates: of a large copy, bytes read plus written, and of large products."""
    timer = gpu_profile.Timer(task["device"])
    xp, n = timer.xp, gpu_profile.SIDE if task["device"] == "gpu" else 256
    found = {}
    source = xp.ones(2**28 if task["device"] == "gpu" else 2**20, np.float32)
    target = xp.empty_like(source)
    copied = timer.seconds(lambda: xp.copyto(target, source))
    found["copy GB/s"] = 2 * source.nbytes / copied / 1e9
    for name, dtype, tf32 in (("bfloat16", "bfloat16", False), ("TF32", "float32", True)):
        set_tf32(tf32 and task["device"] == "gpu", task["device"])
        product = gpu_profile.product(n, n, n, dtype, task["device"])
        found[f"{name} GFLOP/s"] = 2 * n**3 / timer.seconds(product) / 1e9
    return {name: round(value) for name, value in found.items()}


def training(task: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second and memory of training steps at the model's longest context."""
    config, context = task["model"], task["model"]["n_positions"]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config["vocab_size"], (task["batch"], context + 1))
    step, wait = (our_step if task["side"] == "ours" else peer_step)(task, ids)
    for _ in range(3):
        step()
    wait()
    times = []
    for _ in range(BLOCKS):
        started = time.perf_counter()
        for _ in range(task["steps"]):
            step()
        wait()
        times.append((time.perf_counter() - started) / task["steps"])
    tokens_per_second = task["batch"] * context / median(times)
    return {
        "tokens_per_second": tokens_per_second,
        "teraflops": tokens_per_second * _flops_per_token(config) / 1e12,
        "seconds": times,
        **_memory(task["device"], torch=task["side"] != "ours"),
    }


def _flops_per_token(config: dict[str, int]) -> float:
    if config["n_embd"] == 768:
        return flops_per_token("124M", config["n_positions"])
    return float("nan")  # a rehearsal's model, for which nobody asks


def our_model(sizes: dict[str, int], device: str) -> GPT2:
    model = GPT2(GPT2Config(**sizes), seed=0)
    move(model, device)
    return model


def our_step(task: dict[str, Any], ids: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    device = task["device"]
    set_tf32(device == "gpu" and task["dtype"] == "float32", device)
    model = our_model(task["model"], device)
    optimizer = optim.AdamW(model.parameters(), lr=6e-4)

    def step() -> None:
        with compute_in(task["dtype"]):
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optim.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, gpu_profile.Timer(device).wait


def peer_step(task: dict[str, Any], ids: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch
    from peer_gpt2 import PeerGPT2

    torch.set_float32_matmul_precision("high")  # TF32, for what is float32
    device = "cuda" if task["device"] == "gpu" else "cpu"
    model = PeerGPT2(**task["model"]).to(device)
    optimizer = model.optimizer(fused=True)
    run = torch.compile(model) if "compiled" in task["side"] else model
    inputs, targets = (
        torch.tensor(part, device=device) for part in (ids[:, :-1].copy(), ids[:, 1:].copy())
    )
    half = task["dtype"] == "bfloat16"

    def step() -> None:
        cast = torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
        with cast:
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, torch.cuda.synchronize if device == "cuda" else lambda: None


def _memory(device: str, torch: bool) -> dict[str, float]:
    """Megabytes (of 2**20 bytes): the most that arrays took at once, and all in use on the device.

    PyTorch's allocator keeps the peak of its arrays. CuPy's pool does not, but it returns nothing
    to the device: in the end it holds the most its arrays ever took plus the gaps between them, so
    our figure is on the high side. What is in use on the device includes CUDA itself and, on both
    sides, everything the allocator ever needed.
    """
    if device == "cpu":
        return dict.fromkeys(("peak_allocated_megabytes", "device_megabytes"), peak_megabytes())
    if torch:
        from torch import cuda

        peak, (free, total) = cuda.max_memory_allocated(), cuda.mem_get_info()
    else:
        cupy = library_for("gpu")
        peak = cupy.get_default_memory_pool().total_bytes()
        free, total = cupy.cuda.runtime.memGetInfo()
    return {
        "peak_allocated_megabytes": peak / 2**20,
        "device_megabytes": (total - free) / 2**20,
    }


def decoding(task: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens per second over the whole batch, with random weights, without the prompt."""
    vocabulary = task["model"]["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, (task["batch"], task["prompt"]))
    generate = (our_generate if task["side"] == "ours" else their_generate)(task)
    times = {}
    for count in (1, 1 + task["new"]):
        runs = []
        for _ in range(4):
            started = time.perf_counter()
            generate(ids, count)
            runs.append(time.perf_counter() - started)
        times[count] = median(runs[1:])
    seconds = times[1 + task["new"]] - times[1]
    return {"tokens_per_second": task["batch"] * task["new"] / seconds, "seconds": seconds}


def our_generate(task: dict[str, Any]) -> Callable[[np.ndarray, int], Any]:
    model = our_model(task["model"], task["device"]).eval()
    hold_in(model, "bfloat16")
    if not task.get("graph", True):  # the kernels of each layer, launched one by one
        context.next_logits = context.next_logits.definition  # type: ignore[attr-defined]

    def generate(ids: np.ndarray, count: int) -> Any:
        with no_grad():
            return model.generate(ids, max_new_tokens=count, temperature=0)

    return generate


def their_generate(task: dict[str, Any]) -> Callable[[np.ndarray, int], Any]:
    import torch
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    device = "cuda" if task["device"] == "gpu" else "cpu"
    model = GPT2LMHeadModel(TheirConfig(**task["model"])).eval().to(device, torch.bfloat16)

    def generate(ids: np.ndarray, count: int) -> Any:
        with torch.inference_mode():
            prompt = torch.tensor(ids, device=device)
            result = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            return result.cpu()

    return generate


def losses(task: dict[str, Any]) -> dict[str, Any]:
    """The loss of a small model after some steps on Python's manual, byte by byte."""
    device, config = task["device"], task["learner"]
    set_tf32(False, device)
    text = "\n".join(load_documents("pydocs")).encode()
    windows = Windows(np.frombuffer(text, np.uint8).astype(np.uint16), config["n_positions"])
    model = our_model(config, device)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(task["loss_steps"]):
        with compute_in(task["dtype"]):
            loss = model.loss(*windows.batch(0, step, 4))
            loss.backward()
        optim.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.data)
    curve = [float(value) for value in found]
    return {"loss": float(np.mean(curve[-10:])), "curve": curve}


def profile(task: dict[str, Any]) -> dict[str, Any]:
    return {"kernels": gpu_profile.kernels(task)}
