"""The token step as a CUDA graph: recorded and replayed by fake_cupy.py, the kernels emulated.

The fake fails where CUDA would: at an allocation, a copy or a read while launches are captured.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import cuda_emulator
import numpy as np
import pytest
from gpu_machine import emulated_cupy

from micrograd_gpt import Tensor, gpt2, no_grad
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda import token_step
from micrograd_gpt.tensor import RECORDING, setting
from micrograd_gpt.variants import VariantConfig, VariantGPT2

fake_cupy = pytest.importorskip("fake_cupy")
pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason=cuda_emulator.MISSING)

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=53, n_positions=48)
one_by_one = gpt2.through_blocks.definition


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> cuda_emulator.Emulator:
    return cuda_emulator.Emulator(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(autouse=True)
def device(emulator: cuda_emulator.Emulator) -> Iterator[None]:
    token_step._warn.cache_clear()
    with emulated_cupy(emulator), no_grad():
        yield


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many launches each replayed graph had."""
    found: list[int] = []
    launch = fake_cupy.Graph.launch

    def counted(graph: Any, stream: None = None) -> None:
        found.append(len(graph.launches))
        launch(graph, stream)

    monkeypatch.setattr(fake_cupy.Graph, "launch", counted)
    return found


def make(dtype: str = "float32", **changes: Any) -> GPT2:
    model = GPT2(GPT2Config(**{**vars(CONFIG), **changes}), seed=1)
    return on_gpu(model, dtype)


def on_gpu(model: GPT2, dtype: str) -> GPT2:
    hold_in(model, dtype)
    move(model, "gpu")
    model.eval()
    for parameter in model.parameters():
        parameter.data *= fake_cupy.full((), 3, parameter.dtype)  # attention far from uniform
    return model


def prefill(model: GPT2, cache: KVCache, lengths: list[int], seed: int = 0) -> None:
    """Read prompts of these lengths into the rows of a cache."""
    rng = np.random.default_rng(seed)
    for row, length in enumerate(lengths):
        part = cache.rows(row, row + 1)
        part.length = 0
        model.hidden(rng.integers(0, 53, (1, length)), part)


def logits_of(model: GPT2, cache: KVCache, steps: int, seed: int = 1) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, 53, (steps, len(cache.lengths), 1))
    return np.stack([model(step, cache).data.get() for step in ids])


def uncaptured(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **more: Any) -> np.ndarray:
    """The logits computed block by block, each kernel launched on its own."""
    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "through_blocks", one_by_one)
        return logits_of(*arguments, **more)


def assert_same(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == expected.dtype and np.isfinite(ours.astype(float)).all()
    assert ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("dtype", "lengths", "tokens"),
    [("float32", [1, 7, 3], 40), ("bfloat16", [4, 4], 6), ("float16", [3], 6)],
)
def test_tokens_are_those_of_the_launches_one_by_one(
    dtype: str,
    lengths: list[int],
    tokens: int,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, the cache too; the first token by launches, the others by the graph."""
    model = make(dtype)
    ours, theirs = (KVCache(model, len(lengths)) for _ in range(2))
    for cache in (ours, theirs):
        prefill(model, cache, lengths)
    assert_same(logits_of(model, ours, tokens), uncaptured(monkeypatch, model, theirs, tokens))
    assert replays == [7 * CONFIG.n_layer] * (tokens - 1)
    np.testing.assert_array_equal(ours.lengths, np.array(lengths) + tokens)
    for row, length in enumerate(ours.lengths):
        parts = (c.data[:, :, row, :, :length].get() for c in (ours, theirs))
        np.testing.assert_array_equal(*parts)


def test_a_second_prompt_and_rows_that_end(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    ours, theirs = (KVCache(model, 3) for _ in range(2))
    found = []
    for cache, decoded in ((ours, logits_of), (theirs, lambda *a: uncaptured(monkeypatch, *a))):
        prefill(model, cache, [3, 3, 3])
        results = [decoded(model, cache, 3)]
        prefill(model, cache, [5, 2, 9], seed=2)  # shorter or longer: the same graph serves it
        results.append(decoded(model, cache, 2))
        results.append(decoded(model, cache.rows(0, 2), 2))  # another graph, of two rows
        results.append(decoded(model, cache.rows(1, 3), 2))
        results.append(decoded(model, cache, 2))
        found.append(results)
    for a, b in zip(*found, strict=True):
        assert_same(a, b)
    assert len(replays) == 2 + 2 + 1 + 1 + 2
    assert len(token_step._STEPS[model.transformer.h[0]]) == 3


def test_parameters_that_are_replaced_or_changed_are_noticed(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    cache, layer = KVCache(model), model.transformer.h[1].mlp.c_fc
    prefill(model, cache, [4])

    def step() -> np.ndarray:
        results = []
        for decoded in (logits_of, lambda *a: uncaptured(monkeypatch, *a)):
            results.append(decoded(model, cache, 3))
            cache.length -= 3
        assert_same(*results)
        return results[0]

    before, count = step(), len(replays)
    layer.weight.data *= fake_cupy.full((), 2, np.float32)  # the same array with other numbers
    doubled = step()
    assert len(replays) == count + 3  # by the same graph
    layer.weight.data = layer.weight.data * fake_cupy.full((), 2, np.float32)
    replaced = step()
    assert len(replays) == count + 5  # and a new one
    assert len({x.tobytes() for x in (before, doubled, replaced)}) == 3


def test_a_model_and_a_cache_go_with_their_owners() -> None:
    model = make()
    cache = KVCache(model)
    logits_of(model, cache, 3)
    memory, block = weakref.ref(cache.data), model.transformer.h[0]
    weight = weakref.ref(block.attn.c_attn.weight.data)
    del cache
    gc.collect()
    assert memory() is None
    block.attn.c_attn.weight.data = block.attn.c_attn.weight.data.copy()
    gc.collect()
    assert weight() is None
    step = weakref.ref(next(iter(token_step._STEPS[block].values())))
    whole, begun = weakref.ref(model), weakref.ref(block)
    del model, block
    gc.collect()
    assert whole() is begun() is step() is None


def test_only_so_many_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_step, "MOST_STEPS", 2)
    model = make()
    caches = [KVCache(model) for _ in range(3)]
    for cache in (*caches, caches[1]):
        prefill(model, cache, [2])
        logits_of(model, cache, 2)
    steps = token_step._STEPS[model.transformer.h[0]]
    places = [cuda_modules.address(caches[i].data) for i in (2, 1)]
    assert [place[0] for place in steps] == places  # the latest used comes last


@pytest.mark.parametrize("problem", ["an allocation", "a read"])
def test_what_cannot_be_captured_is_launched_and_said_once(
    problem: str, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    ours, theirs = (KVCache(model) for _ in range(2))
    launch = token_step.TokenStep.launch

    def spoiled(step: Any, *arguments: Any) -> None:
        launch(step, *arguments)
        _ = step.lengths.get() if problem == "a read" else fake_cupy.empty(3)

    with monkeypatch.context() as patch:
        patch.setattr(token_step.TokenStep, "launch", spoiled)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = logits_of(model, ours, 6)
            logits_of(model, KVCache(model), 3)
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "kernels of decoding are launched one by one" in str(caught[0].message)
    assert "cudaErrorStreamCaptureUnsupported" in str(caught[0].message) and replays == []
    assert_same(found, uncaptured(monkeypatch, model, theirs, 6))
    assert fake_cupy.capture.launches is None  # the capture was ended


def test_an_error_of_ours_is_no_problem_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, launch = make(), token_step.TokenStep.launch
    cache = KVCache(model)

    def broken(step: Any, *arguments: Any) -> None:
        launch(step, *arguments)
        if fake_cupy.capture.launches is not None:
            raise TypeError("a launch that does not fit")

    monkeypatch.setattr(token_step.TokenStep, "launch", broken)
    with pytest.raises(TypeError, match="does not fit"):
        logits_of(model, cache, 2)
    assert fake_cupy.capture.launches is None and cache.length == 1


def refusals() -> dict[str, tuple[GPT2, int, int]]:
    """Models, rows and tokens for which no graph is made."""
    post = VariantGPT2(VariantConfig(**vars(CONFIG), norm_position="post"), seed=1)
    return {
        "post-norm": (on_gpu(post, "float32"), 1, 1),
        "dropout": (make(attn_pdrop=0.5).train(), 1, 1),
        "head size": (make(n_head=4), 1, 1),
        "many rows": (make(), 9, 1),
        "several tokens": (make(), 1, 2),
        "float64": (make("float64"), 1, 1),
        "rounded weights": (make(), 1, 1),
    }


@pytest.mark.parametrize(
    "which",
    ["post-norm", "dropout", "head size", "many rows", "several tokens", "float64"]
    + ["rounded weights"],
)
def test_what_it_does_not_do_is_refused_before_anything_is_written(which: str) -> None:
    model, rows, tokens = refusals()[which]
    with compute_in("bfloat16" if which == "rounded weights" else "float32"):
        cache = KVCache(model, rows)
        cache.data.fill(0)
        kind = model.transformer.wte(np.zeros((1, 1), int)).dtype
        x = Tensor(fake_cupy.ones((rows, tokens, 32), kind))
        with pytest.raises(NotForMe):
            token_step.through_blocks(x, model.transformer.h, cache)
        assert cache.length == 0 and not cache.data.get().astype(float).any()
        model(np.zeros((rows, tokens), int), cache)  # block by block it works
    assert cache.length == tokens


def test_without_a_cache_or_where_a_gradient_is_wanted_it_is_refused() -> None:
    model = make()
    x = Tensor(fake_cupy.ones((1, 1, 32), "float32"))
    with pytest.raises(NotForMe):
        token_step.through_blocks(x, model.transformer.h)
    with setting(RECORDING, True), pytest.raises(NotForMe):
        token_step.through_blocks(x, model.transformer.h, KVCache(model))
    with setting(RECORDING, True), pytest.raises(RuntimeError, match="use it within no_grad"):
        model(np.zeros((1, 1), int), KVCache(model))


def test_a_full_cache_is_named(replays: list[int]) -> None:
    model = make()
    cache = KVCache(model, capacity=4)
    logits_of(model, cache, 4)
    with pytest.raises(ValueError, match="holds 4 positions: no 1 more"):
        logits_of(model, cache, 1)
    assert cache.length == 4 and len(replays) == 3


@pytest.mark.parametrize("other", [{"n_head": 1}, {"n_layer": 1}, {"n_embd": 64, "n_head": 4}])
def test_a_cache_of_another_model_is_not_read(
    other: dict[str, int], replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would read and write outside of it; the definition raises an error instead."""
    model, cache = make(), KVCache(make(**other))
    monkeypatch.setattr(token_step, "TokenStep", lambda *args: pytest.fail("not refused"))
    with pytest.raises((ValueError, IndexError)):
        logits_of(model, cache, 3)
    assert replays == []


@pytest.mark.parametrize("name", dict(GPT2(CONFIG).transformer.h[1].named_parameters()))
def test_a_parameter_of_another_size_is_refused(name: str) -> None:
    model, x = make(), Tensor(fake_cupy.ones((1, 1, 32), "float32"))
    token_step.through_blocks(x, model.transformer.h, KVCache(model))
    parameter = dict(model.transformer.h[1].named_parameters())[name]
    parameter.data = parameter.data[..., :-1].copy("F")
    cache = KVCache(model)
    cache.data.fill(0)
    with pytest.raises(NotForMe):
        token_step.through_blocks(x, model.transformer.h, cache)
    assert cache.length == 0 and not cache.data.get().any()


@pytest.mark.parametrize("lengths", [[-1], [48], [2**62], [5, 5], [5.0], [[5]]])
def test_lengths_that_are_none_of_the_caches_rows_are_refused(lengths: list[Any]) -> None:
    model, x = make(), Tensor(fake_cupy.ones((1, 1, 32), "float32"))
    cache = KVCache(model)
    cache.lengths = np.array(lengths)
    with pytest.raises(NotForMe):
        token_step.through_blocks(x, model.transformer.h, cache)
    np.testing.assert_array_equal(cache.lengths, lengths)
