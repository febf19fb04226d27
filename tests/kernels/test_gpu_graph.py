"""The token step as a CUDA graph: recorded and replayed by fake_cupy.py, the kernels emulated.

The fake fails where CUDA would: at an allocation, a copy or a read while launches are captured.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import cuda_emulator
import numpy as np
import pytest
from gpu_machine import emulated_cupy

from micrograd_gpt import layers, no_grad
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import NotForMe, setting
from micrograd_gpt.generation.context import next_logits
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config, Transformer
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda import token_step
from micrograd_gpt.nn import Embedding, no_dropout
from micrograd_gpt.variants import VariantConfig, VariantGPT2

fake_cupy = pytest.importorskip("fake_cupy")
pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason=cuda_emulator.MISSING)

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=53, n_positions=48)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # products added up, and rounded, otherwise
ONE = np.zeros((1, 1), int)  # a token for a row
LAUNCHES = 7 * CONFIG.n_layer + 3  # the embeddings, the blocks, the last LayerNorm, the head
one_by_one = next_logits.definition


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


def logits_of(
    model: GPT2, cache: KVCache, steps: int, seed: int = 1, function: Any = next_logits
) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, 53, (steps, len(cache.lengths), 1))
    return np.stack([function(cache, model, step).get() for step in ids])


def uncaptured(model: GPT2, cache: KVCache, steps: int) -> np.ndarray:
    """The logits computed layer by layer, each kernel launched on its own."""
    return logits_of(model, cache, steps, function=one_by_one)


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == expected.dtype
    tolerance, (a, b) = TOLERANCE[str(ours.dtype)], (x.astype(float) for x in (ours, expected))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "lengths", "tokens"),
    [("float32", [1, 7, 3], 12), ("bfloat16", [4, 4], 3)],
)
def test_tokens_are_those_of_the_launches_one_by_one(
    dtype: str,
    lengths: list[int],
    tokens: int,
    replays: list[int],
) -> None:
    """The cache too; the first token by launches, the others by the graph."""
    model = make(dtype)
    ours, theirs = (KVCache(model, len(lengths)) for _ in range(2))
    for cache in (ours, theirs):
        prefill(model, cache, lengths)
    assert_close(logits_of(model, ours, tokens), uncaptured(model, theirs, tokens))
    assert replays == [LAUNCHES] * (tokens - 1)
    np.testing.assert_array_equal(ours.lengths, np.array(lengths) + tokens)
    for row, length in enumerate(ours.lengths):
        assert_close(*(c.data[:, :, row, :, :length].get() for c in (ours, theirs)))


@pytest.mark.slow
def test_a_second_prompt_and_rows_that_end(replays: list[int]) -> None:
    model = make()
    ours, theirs = (KVCache(model, 3) for _ in range(2))
    found = []
    for cache, decoded in ((ours, logits_of), (theirs, uncaptured)):
        prefill(model, cache, [3, 3, 3])
        results = [decoded(model, cache, 3)]
        prefill(model, cache, [5, 2, 9], seed=2)  # shorter or longer: the same graph serves it
        results.append(decoded(model, cache, 2))
        results.append(decoded(model, cache.rows(0, 2), 2))  # another graph, of two rows
        results.append(decoded(model, cache.rows(1, 3), 2))
        results.append(decoded(model, cache, 2))
        found.append(results)
    for a, b in zip(*found, strict=True):
        assert_close(a, b)
    assert len(replays) == 2 + 2 + 1 + 1 + 2
    assert len(token_step._STEPS[model].steps) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wte", "wpe", "ln_f", "h.1.mlp.c_fc"])
def test_parameters_that_are_replaced_or_changed_are_noticed(name: str, replays: list[int]) -> None:
    model = make()
    cache, layer = KVCache(model), dict(model.transformer.modules())[name]
    prefill(model, cache, [4])

    def step() -> np.ndarray:
        results = []
        for decoded in (logits_of, uncaptured):
            results.append(decoded(model, cache, 3))
            cache.length -= 3
        assert_close(*results)
        return results[0]

    before, count = step(), len(replays)
    layer.weight.data *= fake_cupy.full((), 2, np.float32)  # the same array with other numbers
    doubled = step()
    assert len(replays) == count + 3  # by the same graph
    layer.weight.data = layer.weight.data * fake_cupy.full((), 2, np.float32)
    replaced = step()
    assert len(replays) == count + 5  # and a new one
    assert len({x.tobytes() for x in (before, doubled, replaced)}) == 3


class Scaled(Embedding):
    def __call__(self, ids: Any) -> Any:
        return super().__call__(ids) * 2.0


def halved(function: Any) -> Any:
    return lambda *args, **named: function(*args, **named) * 0.5


CHANGES: dict[str, Callable[[GPT2], None]] = {
    "another part": lambda m: setattr(m.transformer, "wpe", m.transformer.wte),
    "another block": lambda m: m.transformer.h.reverse(),
    "one block less": lambda m: m.transformer.h.pop(),
    "another number": lambda m: setattr(m.transformer.ln_f, "eps", 0.5),
    "another class": lambda m: setattr(m.transformer.wte, "__class__", Scaled),
    "a method of its own": lambda m: setattr(m, "hidden", halved(m.hidden)),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_changed_after_the_first_tokens_is_followed(change: str) -> None:
    model = make()
    cache = KVCache(model)
    before = logits_of(model, cache, 3)[-1]
    CHANGES[change](model)
    found = []
    for function in (one_by_one, next_logits):
        again = KVCache(model)
        found.append(logits_of(model, again, 3, function=function))
    assert_close(*found)
    assert np.abs(found[0][-1] - before).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        *((GPT2, "__call__"), (GPT2, "hidden"), (Transformer, "__call__")),
        *((Embedding, "__call__"), (layers, "linear"), (layers, "embedding")),
    ],
)
def test_an_edit_of_the_embeddings_or_of_the_head_is_followed(
    owner: Any, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    before = logits_of(model, KVCache(model), 2)
    monkeypatch.setattr(owner, attribute, halved(getattr(owner, attribute)))
    after = logits_of(model, KVCache(model), 2)
    assert_close(after, uncaptured(model, KVCache(model), 2))
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.slow
def test_dropout_and_the_type_of_the_products_may_change_from_token_to_token() -> None:
    model = make(resid_pdrop=0.5).train()
    cache = KVCache(model)
    with no_dropout():
        token_step.next_logits(cache, model, ONE)
    for wrong in (setting(no_dropout.inside, False), compute_in("bfloat16")):
        with wrong, pytest.raises(NotForMe):
            token_step.next_logits(cache, model, ONE)
    assert cache.length == 1


@pytest.mark.parametrize("ids", [[[53]], [[-1]], [[0.0]], [[0, 0]], [0], [[0], [0]]])
def test_ids_that_are_none_are_refused(ids: list[Any]) -> None:
    model = make()
    cache = KVCache(model)
    with pytest.raises(NotForMe):
        token_step.next_logits(cache, model, np.array(ids))
    assert cache.length == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_is_read_in_groups_of_rows(dtype: str, replays: list[int]) -> None:
    """More rows than one pass over a matrix serves; layer by layer they go through cuBLAS."""
    model = make(dtype, n_layer=1)
    ours, theirs = (KVCache(model, 9) for _ in range(2))
    for cache in (ours, theirs):
        prefill(model, cache, [2, 5, *[3] * 7])
    assert_close(logits_of(model, ours, 3), uncaptured(model, theirs, 3))
    assert len(replays) == 2


@pytest.mark.slow
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
    step = weakref.ref(next(iter(token_step._STEPS[model].steps.values())))
    whole, begun = weakref.ref(model), weakref.ref(block)
    del model, block
    gc.collect()
    assert whole() is begun() is step() is None


@pytest.mark.slow
def test_only_so_many_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_step, "MOST_STEPS", 2)
    model = make()
    caches = [KVCache(model) for _ in range(3)]
    for cache in (*caches, caches[1]):
        prefill(model, cache, [2])
        logits_of(model, cache, 2)
    steps = token_step._STEPS[model].steps
    places = [cuda_modules.address(caches[i].data) for i in (2, 1)]
    assert [place[0] for place in steps] == places  # the latest used comes last


@pytest.mark.slow
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
    assert_close(found, uncaptured(model, theirs, 6))
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
        "many rows": (make(), 65, 1),
        "several tokens": (make(), 1, 2),
        "float64": (make("float64"), 1, 1),
        "rounded weights": (make(), 1, 1),
    }


@pytest.mark.slow_after(2)
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
        ids = np.zeros((rows, tokens), int)
        with pytest.raises(NotForMe):
            token_step.next_logits(cache, model, ids)
        assert cache.length == 0 and not cache.data.get().astype(float).any()
        next_logits(cache, model, ids)  # layer by layer it works
    assert cache.length == tokens


def test_where_a_gradient_is_wanted_it_is_refused() -> None:
    model = make()
    with setting(no_grad.inside, False), pytest.raises(NotForMe):
        token_step.next_logits(KVCache(model), model, ONE)
    with setting(no_grad.inside, False), pytest.raises(RuntimeError, match="use it within no_grad"):
        next_logits(KVCache(model), model, ONE)


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


PARAMETERS = dict(GPT2(CONFIG).transformer.named_parameters())


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", [name for name in PARAMETERS if not name.startswith("h.0.")])
def test_a_parameter_of_another_size_is_refused(name: str) -> None:
    model = make()
    token_step.next_logits(KVCache(model), model, ONE)
    parameter = dict(model.transformer.named_parameters())[name]
    parameter.data = parameter.data[..., :-1].copy("F")
    cache = KVCache(model)
    cache.data.fill(0)
    with pytest.raises(NotForMe):
        token_step.next_logits(cache, model, ONE)
    assert cache.length == 0 and not cache.data.get().any()


@pytest.mark.parametrize("lengths", [[-1], [48], [2**62], [5, 5], [5.0], [[5]]])
def test_lengths_that_are_none_of_the_caches_rows_are_refused(lengths: list[Any]) -> None:
    model = make()
    cache = KVCache(model)
    cache.lengths = np.array(lengths)
    with pytest.raises(NotForMe):
        token_step.next_logits(cache, model, ONE)
    np.testing.assert_array_equal(cache.lengths, lengths)
