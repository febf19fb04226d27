"""The GPU path without a GPU, on arrays that behave like CuPy's (fake_cupy.py).

These tests are about the Python around the arithmetic. It must copy between host and device, or
wait for the device, only where it has to; it must call only what CuPy has; and files and errors
must be right.
"""

from __future__ import annotations

import json
import operator
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_cupy
import numpy as np
import pytest
from training import everything, in_this_process, script

from micrograd_gpt import Tensor, layers, nn, optim
from micrograd_gpt.arrays import devices
from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.generation.context import Context
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.graph import retain_grad
from micrograd_gpt.layers import IGNORE
from micrograd_gpt.runs.unread import Unread
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.variants import VariantConfig, VariantGPT2

ROOT = Path(__file__).parents[2]
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61, "n_positions": 16}
RUN = [
    *("--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "8", "--dropout", "0.1"),
    *("--batch-size", "4", "--warmup-steps", "2", "--eval-batches", "2", "--grad-accum-steps", "2"),
    *("--max-steps", "12", "--log-interval", "4", "--eval-interval", "100"),
]


DTYPES = ("float32", "bfloat16", "float16")
LEVELS = ("definitions", "fused", "c")


@pytest.fixture
def cupy() -> Iterator[ModuleType]:
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture
def train(train_gpt2: ModuleType, text: Path, tmp_path: Path) -> Callable[..., Path]:
    return in_this_process(train_gpt2, text, tmp_path, RUN)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["train_loss"], row["grad_norm"]) for row in rows]


# ----------------------------------------------------------------------------------------- training


def make(device: str, **variant: str) -> GPT2:
    if variant:
        model: GPT2 = VariantGPT2(VariantConfig(**SMALL, **variant), seed=3)
    else:
        model = GPT2(GPT2Config(**SMALL), seed=3)
    devices.move(model, device)
    return model


def steps(device: str, dtype: str, count: int = 3, **variant: str) -> tuple[GPT2, list[Any]]:
    model = make(device, **variant)
    optimizer, results = optim.AdamW(model.parameters()), []
    ids = np.random.default_rng(0).integers(0, 61, (2, 4, 16))
    ids[1, :, 3] = IGNORE
    with compute_in(dtype):
        for _ in range(count):
            loss = model.loss(np.abs(ids[0]), ids[1])
            loss.backward()
            results += [loss.data, optim.clip_grad_norm(model.parameters(), 0.5)]
            optimizer.step()
            optimizer.zero_grad()
    return model, results


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "variant", [{}, {"norm_position": "post", "position_embedding": "sinusoidal"}]
)
def test_steps_wait_for_nothing_and_compute_what_the_cpu_does(
    dtype: str, variant: dict[str, str], level: str, cupy: ModuleType
) -> None:
    with at_most("fused"):
        model, expected = steps("cpu", dtype, **variant)
    uploads = len(model.parameters()) + len(variant) // 2  # the waves of the variant's positions
    with at_most(level):
        _, results = steps("gpu", dtype, **variant)
    assert fake_cupy.counts.reads == 0
    # The weights once; in each step ids, targets, positions and, if fused, which targets count; and
    # for the backward again what picked rows of a table, which is sorted on the host
    again = 2 - len(variant) // 2 if level == "c" else 0
    taken = 3 if level == "definitions" else 4
    assert fake_cupy.counts.uploads == uploads + 3 * (taken + again)
    rtol = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose([float(x) for x in results], expected, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_arrays_are_2_bytes_wide(dtype: str, cupy: ModuleType) -> None:
    model = make("gpu")
    kept = np.dtype(dtype)
    assert kept.itemsize == (4 if dtype == "float32" else 2)
    with compute_in(dtype):
        x = model.transformer.wte(np.arange(8)[None])
        block = model.transformer.h[0]
        qkv = block.attn.c_attn(block.ln_1(x))
        hidden = layers.gelu(block.mlp.c_fc(block.ln_2(x)))
        attended = layers.self_attention(qkv.reshape(1, 8, 3, 2, 16))
        dropped = layers.dropout(attended, 0.5, (1,))
        for tensor in (qkv, hidden, attended, dropped, model(np.arange(8)[None])):
            assert tensor.dtype == tensor.numpy().dtype == kept
        assert (x + dropped.reshape(1, 8, 32)).dtype == np.float32
        assert KVCache(model).data.dtype == kept
        retain_grad(hidden)
        (hidden.sum() * 2).backward()
    assert hidden.grad.dtype == kept
    assert all(p.grad.dtype == np.float32 for p in model.parameters() if p.grad is not None)
    hold_in(model, dtype)
    sizes = {p.dtype.itemsize for name, p in model.named_parameters() if ".ln_" not in name}
    assert sizes == {kept.itemsize}
    devices.move(model, "cpu")
    assert all(isinstance(p.data, np.ndarray) for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_training_script_reads_once_a_logged_step(
    dtype: str, train: Callable[..., Path], cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 reads once each step, since it must know whether the step may be taken."""
    flags = ["--dtype", dtype, "--dropout", "0"]  # since a GPU draws dropout differently
    with at_most("fused"):
        expected = losses(train("cpu", *flags))
    before: list[tuple[int, int]] = []
    step = optim.AdamW.step

    def counted(optimizer: optim.AdamW) -> None:
        step(optimizer)
        before.append((fake_cupy.counts.reads, fake_cupy.counts.uploads))

    monkeypatch.setattr(optim.AdamW, "step", counted)
    out = train("gpu", *flags, "--device", "gpu")
    reads, uploads = (np.diff(column).tolist() for column in zip(*before, strict=True))
    each = 1 if dtype == "float16" else 0
    assert reads == [max(each, int(done % 4 == 0)) for done in range(2, 13)]
    assert set(uploads) == {10}  # of two micro-batches: ids and positions, twice, and targets
    rtol = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}[dtype]
    for ours, theirs in zip(losses(out), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--recompute"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_resumes_bit_for_bit(
    dtype: str,
    flags: list[str],
    train: Callable[..., Path],
    cupy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [*flags, "--dtype", dtype, "--device", "gpu"]
    straight = train("straight", *flags)
    step = optim.AdamW.step

    def stop_after_5(optimizer: optim.AdamW) -> None:
        step(optimizer)
        if optimizer.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(optim.AdamW, "step", stop_after_5)
    stopped = train("stopped", *flags)
    assert json.loads((stopped / "trainer_state.json").read_text())["step"] == 5
    monkeypatch.setattr(optim.AdamW, "step", step)
    train("stopped", resume=True)
    for name, array in everything(straight).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(everything(stopped)[name], array, err_msg=name)
    assert losses(stopped)[-1] == losses(straight)[-1]


def test_a_step_that_nobody_looked_at_is_not_saved_if_it_was_not_finite(
    train: Callable[..., Path],
    cupy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It is noticed at the next log, and the error names the step itself, not the one logged."""
    clip, calls = optim.clip_grad_norm, iter(range(100))

    def broken(*args: Any) -> Any:
        return clip(*args) * (float("nan") if next(calls) == 5 else 1)

    monkeypatch.setattr(optim, "clip_grad_norm", broken)
    with pytest.raises(
        UserError, match=r"^step 5: the loss is .*, the gradient norm nan, in batch"
    ):
        train("out", "--device", "gpu", "--save-interval", "7")
    assert (tmp_path / "out").exists() and not list((tmp_path / "out").glob("*.safetensors"))


def test_unread_numbers_come_all_at_once(cupy: ModuleType) -> None:
    unread = Unread()
    for step in range(3):
        parts = [cupy.full((), step + 0.5, np.float32), cupy.full((), 1.0, np.float32)]
        unread.add(step, parts, cupy.full((), step, np.float64))
    unread.add(3, [1.0, 2.0], 4.0)
    assert unread.read() == [(0, 1.5, 0.0), (1, 2.5, 1.0), (2, 3.5, 2.0), (3, 3.0, 4.0)]
    assert fake_cupy.counts.reads == 1 and unread.read() == []


@pytest.mark.parametrize("norm", [0.2, 5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_clipping_on_the_gpu_does_what_it_does_on_the_cpu(
    norm: float, scale: float, cupy: ModuleType
) -> None:
    with np.errstate(invalid="ignore"):  # 0 × infinity
        grad = np.array([[0.6, 0.0], [0.0, 0.8]], np.float32) * np.float32(norm * scale)
    parameters = [nn.Parameter(Tensor(np.zeros((2, 2), "f")).to(d)) for d in ("cpu", "gpu")]
    parameters[0].grad, parameters[1].grad = grad.copy(), cupy.asarray(grad)
    ours, theirs = (optim.clip_grad_norm([p], 1.0, scale) for p in parameters)
    assert fake_cupy.counts.reads == 0
    np.testing.assert_allclose(float(theirs), ours, rtol=1e-6)
    if np.isfinite(norm):
        np.testing.assert_allclose(parameters[1].grad.get(), parameters[0].grad, rtol=1e-6)
    else:
        np.testing.assert_array_equal(parameters[1].grad.get(), grad)


@pytest.mark.parametrize("norm", [0.2, 5.0, float("nan")])
def test_a_clipped_step_is_the_cpus_and_leaves_nothing_behind(
    norm: float, cupy: ModuleType
) -> None:
    """Clipping has no effect on the gradients of the next step."""
    grad = np.array([[0.6, 0.0], [0.0, 0.8]], np.float32) * np.float32(norm * 1024)
    weights = []
    for device in ("cpu", "gpu"):
        parameter = nn.Parameter(Tensor(np.ones((2, 2), np.float32)).to(device))
        optimizer = optim.AdamW([parameter], lr=0.1)
        for clipped, taken in ((True, True), (False, True), (True, False), (False, True)):
            parameter.grad = parameter.data * 0 + (grad if device == "cpu" else cupy.asarray(grad))
            length = optim.clip_grad_norm([parameter], 1.0, 1024.0) if clipped else None
            assert length is None or float(length) == pytest.approx(norm, nan_ok=True)
            if taken:
                optimizer.step()
            optimizer.zero_grad()
        weights.append([parameter.numpy(), *optimizer.m, *optimizer.v])
    theirs, ours = weights
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.get() if a is not ours[0] else a, b, rtol=1e-5)


def test_a_clip_that_finds_no_gradients_forgets_the_one_before(cupy: ModuleType) -> None:
    moments = []
    for clipped in (False, True):
        parameter = nn.Parameter(Tensor(np.ones(4, np.float32)).to("gpu"))
        optimizer = optim.AdamW([parameter])
        if clipped:
            parameter.grad = cupy.full(4, 100, "float32")
            optim.clip_grad_norm([parameter], 1.0)
            parameter.grad = None
            assert optim.clip_grad_norm([parameter], 1.0) == 0
        parameter.grad = cupy.full(4, 0.1, "float32")
        optimizer.step()
        moments.append(optimizer.m[0].get())
    np.testing.assert_array_equal(*moments)


def test_what_comes_from_the_host_is_checked_there(cupy: ModuleType) -> None:
    model = make("gpu")
    ids = np.zeros((1, 4), int)
    with pytest.raises(ValueError, match="token id 61 is outside the vocabulary of 61"):
        model.loss(ids + 61, ids)
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary of 61"):
        model.loss(ids, ids - 1)
    with pytest.raises(ValueError, match="every target is ignored"):
        model.loss(ids, ids + IGNORE)
    assert fake_cupy.counts.reads == 0
    on_gpu = cupy.asarray(ids)  # these are not checked: that would wait for the GPU
    assert model.loss(on_gpu, on_gpu).device == "gpu" and fake_cupy.counts.reads == 0


def test_an_array_may_stand_left_of_a_tensor(cupy: ModuleType) -> None:
    left, leaf = np.full((2, 2), 3, np.float32), Tensor([[1.0, 3.0], [4.0, 2.0]])
    x = leaf.to("gpu")
    x.requires_grad = True
    for operation in ("__mul__", "__sub__", "__matmul__", "__lt__"):
        apply = getattr(operator, operation)
        y = apply(cupy.asarray(left), x)
        np.testing.assert_array_equal(y.numpy(), apply(left, leaf.data))
        assert y.device == "gpu" and y.requires_grad == (operation != "__lt__")
    assert np.isfinite(x).all()


def test_tensors_are_indexed_by_lists_and_arrays(cupy: ModuleType) -> None:
    x = Tensor(np.arange(12.0).reshape(4, 3), requires_grad=True, device="gpu")
    for index in ([2, 0, 2], np.array([2, 0, 2]), Tensor(np.array([2, 0, 2]), device="gpu")):
        x.grad = None
        x[index].sum().backward()
        np.testing.assert_array_equal(x.grad.get(), [[1] * 3, [0] * 3, [2] * 3, [0] * 3])
    assert x[[]].shape == (0, 3)


# ----------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "choices",
    [
        {"temperature": 0},
        {"seed": 3, "top_k": 9, "num_samples": 3},
        {"num_beams": 3},
        {"temperature": 0, "use_cache": False},
        {"temperature": 0, "speculate": "prompt-lookup"},
    ],
    ids=lambda choices: "-".join(choices),
)
def test_decoding_reads_the_logits_and_nothing_else(
    dtype: str, choices: dict[str, Any], cupy: ModuleType, tmp_path: Path
) -> None:
    GPT2(GPT2Config(**SMALL), seed=5).save_pretrained(tmp_path)
    cpu, gpu = (GPT2.from_pretrained(tmp_path, device=d, dtype=dtype) for d in ("cpu", "gpu"))
    fake_cupy.counts.reads = 0
    prompt = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    ours = gpu.generate(prompt, max_new_tokens=12, **choices)  # past the context of 16
    reads = fake_cupy.counts.reads
    assert 0 < reads <= 12  # once for each step of decoding, however many texts there are
    with at_most("fused"):
        np.testing.assert_array_equal(ours, cpu.generate(prompt, max_new_tokens=12, **choices))


# ------------------------------------------------------------------------------- what can be wrong


def fails(monkeypatch: pytest.MonkeyPatch, module: Any, **versions: int) -> None:
    """Make CuPy find no usable GPU, with these CUDA versions of the driver and of CuPy."""

    def no_device() -> int:
        raise fake_cupy.CUDARuntimeError("cudaErrorInsufficientDriver: …")

    monkeypatch.setattr(module.cuda.runtime, "getDeviceCount", no_device)
    for name, version in versions.items():
        monkeypatch.setattr(module.cuda.runtime, name, lambda version=version: version)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"driverGetVersion": 0}, "there is no NVIDIA driver here; use --device cpu"),
        (
            {"driverGetVersion": 12040, "runtimeGetVersion": 13020},
            "the NVIDIA driver is too old for this CuPy: it knows CUDA 12.4, CuPy was built for "
            '13.2; update the driver, or pip install -e ".[cuda12]"',
        ),
        ({}, "CuPy finds no usable NVIDIA GPU (cudaErrorInsufficientDriver: …); use --device cpu"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line(
    versions: dict[str, int], message: str, cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, cupy, **versions)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        devices.library_for("gpu")


def test_no_gpu_is_one_line(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(UserError, match=r"^CuPy finds no NVIDIA GPU; use --device cpu$"):
        devices.library_for("cuda")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'cupy'", name="cupy"),
            "--device gpu needs CuPy: pip",
        ),
        (
            ImportError("libcublas.so.13:\n  not found"),
            "CuPy cannot be imported (libcublas.so.13: ",
        ),
        (ModuleNotFoundError("no fastrlock", name="fastrlock"), "CuPy cannot be imported (no fast"),
    ],
)
def test_cupy_that_is_missing_or_broken_is_one_line(
    error: ImportError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "cupy":
                raise error

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    devices._usable_cupy.cache_clear()
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
        devices.library_for("gpu")
    assert 'pip install -e ".[cuda13]"' in str(caught.value) and "\n" not in str(caught.value)


def out_of_memory(*_: Any, **__: Any) -> None:
    raise fake_cupy.OutOfMemoryError("Out of memory allocating 1,024 bytes")


def raise_memory_error(*_: Any) -> None:
    raise MemoryError


def test_training_out_of_memory_names_the_batch(
    train: Callable[..., Path], cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT2, "loss", out_of_memory)
    message = (
        "the GPU is out of memory (Out of memory allocating 1,024 bytes): a micro-batch has 4 × 8 "
        "tokens; lower --batch-size (and raise --grad-accum-steps, which keeps the step), or add "
        "--recompute"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        train("out", "--device", "gpu")
    monkeypatch.setattr(GPT2, "loss", raise_memory_error)
    with pytest.raises(UserError, match=r"^this machine is out of memory .* lower --batch-size"):
        train("other", "--device", "cpu")


@pytest.mark.parametrize(
    "message",
    [
        "cudaErrorMemoryAllocation: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_a_library_out_of_memory_is_one_line_too(message: str) -> None:
    with (
        pytest.raises(
            UserError, match=rf"^the GPU is out of memory \({message}\): buy more$"
        ) as caught,
        memory_errors("buy more"),
    ):
        raise fake_cupy.CUDARuntimeError(message)
    assert isinstance(caught.value.__cause__, fake_cupy.CUDARuntimeError)
    other = "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
    with pytest.raises(fake_cupy.CUDARuntimeError, match=other), memory_errors("no"):
        raise fake_cupy.CUDARuntimeError(other)


def test_decoding_out_of_memory_names_the_batch(
    train: Callable[..., Path], cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train("out", "--max-steps", "1")
    generate = script("generate")
    flags = ["--model", str(out), "--prompt", "The", "--device", "gpu", "--num-samples", "3"]
    assert generate.main([*flags, "--max-new-tokens", "4"]) == 0
    monkeypatch.setattr(GPT2, "__call__", out_of_memory)
    with pytest.raises(UserError, match=r"3 × 8 tokens are decoded at once; lower --num-samples"):
        generate.main(flags)
    monkeypatch.setattr(fake_cupy.ndarray, "set", out_of_memory)  # while the weights are read
    with pytest.raises(UserError, match=r"the weights do not fit; try --dtype bfloat16"):
        generate.main(flags)


def test_a_cache_that_does_not_fit_is_measured_in_its_own_type(
    cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("gpu")
    hold_in(model, "float16")
    monkeypatch.setattr(cupy, "empty", out_of_memory)
    numbers = 2 * 2 * 32 * 16 * 500_000  # n_layer, keys and values, n_embd, positions, texts
    with pytest.raises(UserError, match=f"KV cache of {2 * numbers / 1e9:.1f} GB: lower num_samp"):
        Context(model, rows=500_000, longest=16)


@pytest.mark.slow
def test_tf32_is_for_the_gpu_and_only_when_asked_for(
    train: Callable[..., Path], cupy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUPY_TF32", "1")  # as if for another program
    for flags, expected in (([], "0"), (["--tf32"], "1")):
        train("out", "--device", "gpu", "--max-steps", "1", "--overwrite", *flags)
        assert os.environ["CUPY_TF32"] == expected
    out = str(tmp_path / "new")  # the folder that the tests run in may hold a run
    for name, flags in (("train_gpt2", ["--out", out]), ("generate", ["--prompt", "The"])):
        with pytest.raises(UserError, match=r"^--tf32 is for --device gpu: leave it out"):
            script(name).main([*flags, "--tf32"])
