"""The microscope's numbers: what is seen is what the model does, and its parts sum to the logit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_gpt2 import POSITIONS, VOCABULARY, make_model

from micrograd_gpt import layers, no_grad
from micrograd_gpt.arrays.int8 import hold_in_int8
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.generation.microscope import Observation, attribution, lens, observe
from micrograd_gpt.gpt2 import (
    GPT2,
    Block,
    CausalSelfAttention,
    GPT2Config,
    Transformer,
    through_blocks,
)
from micrograd_gpt.nn import LayerNorm, Linear
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor, stack, where
from micrograd_gpt.tuning.lora import add_lora

IDS = np.random.default_rng(0).integers(0, VOCABULARY, POSITIONS)
TARGETS = np.roll(IDS, -1)
ROUNDING = 1e-5  # of float32, relative to the largest number of an array

RELATIVES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu", "n_inner": 40},
    {"position_embedding": "sinusoidal"},
]


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = ROUNDING) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def logits_of(model: GPT2) -> np.ndarray:
    with no_grad():
        return model(IDS[None]).numpy()[0].astype(np.float64)


@pytest.fixture(scope="module")
def seen(model: GPT2) -> Observation:
    return observe(model, IDS)


# ------------------------------------------------------------------------------------ observing


def test_each_head_s_weights_mix_the_values_into_what_it_found(
    model: GPT2, seen: Observation
) -> None:
    for layer, block in enumerate(model.transformer.h):
        qkv = block.attn.c_attn(block.ln_1(Tensor(seen.stream[layer]))).numpy()
        values = qkv.reshape(POSITIONS, 3, 2, -1)[:, 2].swapaxes(0, 1)  # (H, T, D)
        mixed = seen.attention[layer] @ values  # (H, T, D)
        assert_close(mixed.swapaxes(0, 1).reshape(POSITIONS, -1), seen.mixed[layer])


def test_no_token_looks_ahead_and_the_weights_of_each_sum_to_one(seen: Observation) -> None:
    assert (np.triu(seen.attention, 1) == 0).all()
    np.testing.assert_allclose(seen.attention.sum(axis=-1), 1, rtol=ROUNDING)


def test_the_stream_grows_by_what_is_added_to_it(seen: Observation) -> None:
    assert_close(seen.stream[0], seen.token + seen.position)
    assert_close(np.diff(seen.stream, axis=0), seen.attention_added + seen.mlp_added)


def test_only_the_last_positions_are_kept_if_asked_for(model: GPT2, seen: Observation) -> None:
    last = observe(model, IDS, since=5)
    assert last.attention.shape == (2, 2, POSITIONS - 5, POSITIONS)
    assert_close(last.attention, seen.attention[:, :, 5:])
    for name in ("stream", "mixed", "attention_added", "mlp_added"):
        assert_close(getattr(last, name), getattr(seen, name)[:, 5:])
    for name in ("token", "position"):
        assert_close(getattr(last, name), getattr(seen, name)[5:])


def test_the_model_stays_as_it_was(model: GPT2) -> None:
    before = [(name, id(part)) for name, part in model.modules()]
    observe(model, IDS)
    assert [(name, id(part)) for name, part in model.modules()] == before


class Louder(Block):
    """A learner's edit: attention counts twice, and nothing normalises what the MLP reads."""

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        x = x + 2 * self.attn(self.ln_1(x), past)
        return x + self.mlp(x)


def test_an_edited_model_is_seen_as_it_is() -> None:
    model = make_model()
    as_it_was = observe(model, IDS)
    model.transformer.h[0].__class__ = Louder
    seen = observe(model, IDS)
    assert_close(lens(model, seen.stream[-1]), logits_of(model))
    added = 2 * seen.attention_added[0] + seen.mlp_added[0]
    assert_close(seen.stream[1] - seen.stream[0], added)
    assert np.abs(seen.stream[1] - as_it_was.stream[1]).max() > 0.1


def test_dropout_is_off_while_a_model_in_training_is_observed() -> None:
    model = make_model(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    seen = observe(model, IDS)
    assert_close(lens(model, seen.stream[-1]), logits_of(model.eval()))


# ---------------------------------------------------------------- the lens, and sums of the logit


def test_the_parts_of_a_model_in_int8_sum_to_its_logits() -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        hold_in_int8(name, parameter)
    seen = observe(model, IDS)
    total = attribution(model, seen, TARGETS).total()
    assert_close(total, logits_of(model)[np.arange(POSITIONS), TARGETS])


@pytest.mark.parametrize("config", RELATIVES, ids=str)
def test_the_lens_on_the_last_layer_is_the_model_s_own_logits(config: dict[str, Any]) -> None:
    model = make_model(**config)
    assert_close(lens(model, observe(model, IDS).stream[-1]), logits_of(model))


@pytest.mark.parametrize("config", RELATIVES, ids=str)
def test_the_parts_sum_to_the_logit(config: dict[str, Any]) -> None:
    model = make_model(**config)
    for parameter in model.parameters():  # biases that are not zero, LayerNorms that scale
        if parameter.ndim == 1:
            noise = np.random.default_rng(1).standard_normal(parameter.shape)
            parameter.data = parameter.data + 0.3 * noise.astype(np.float32)
    parts = attribution(model, observe(model, IDS), TARGETS)
    assert_close(parts.total(), logits_of(model)[np.arange(POSITIONS), TARGETS])
    for values in vars(parts).values():
        assert np.abs(values).max() > 1e-3


def test_the_parts_of_a_half_precision_model_sum_to_its_logit() -> None:
    model = make_model()
    hold_in(model, "bfloat16")
    parts = attribution(model, observe(model, IDS), TARGETS)
    theirs = logits_of(model)[np.arange(POSITIONS), TARGETS]
    assert_close(parts.total(), theirs, 2**-6)  # 8 bits, rounded some times over


def test_a_head_without_an_output_moves_nothing() -> None:
    model = make_model()
    model.transformer.h[1].attn.c_proj.weight.data[8:] = 0  # the rows of the second head
    heads = attribution(model, observe(model, IDS), TARGETS).heads  # (L, H, T)
    assert (heads[1, 1] == 0).all()
    assert (np.abs(np.delete(heads.reshape(4, -1), 3, axis=0)).max(axis=-1) > 1e-2).all()


def test_there_may_be_fewer_targets_than_positions(model: GPT2, seen: Observation) -> None:
    few, all_of_them = (attribution(model, seen, TARGETS[:n]) for n in (4, POSITIONS))
    for name, values in vars(all_of_them).items():
        assert_close(getattr(few, name), values[..., :4])


# -------------------------------------------------------------- edits of which all can be shown


class NoPositions(Transformer):
    def __call__(self, ids: Any, cache: Any = None) -> Tensor:
        return self.ln_f(through_blocks(self.wte(ids), self.h, cache))


class PlainNorm(LayerNorm):
    """With neither weight nor bias."""

    def __call__(self, x: Any) -> Tensor:
        return layers.layer_norm(x, Tensor(np.ones(16)), Tensor(np.zeros(16)), self.eps)


class WideAttention(CausalSelfAttention):
    """Its heads are twice as wide as GPT-2's."""

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        b, t, _ = x.shape
        qkv = self.c_attn(x).reshape(b, t, 3, self.n_head, -1)
        return self.c_proj(layers.self_attention(qkv, 0.0, (), past).reshape(b, t, -1))


def without_biases(model: GPT2) -> None:
    for _, part in model.modules():
        if isinstance(part, Linear):
            part.bias = None  # type: ignore[assignment]


def without_positions(model: GPT2) -> None:
    model.transformer.__class__ = NoPositions
    del model.transformer.wpe


def with_plain_norms(model: GPT2) -> None:
    for _, part in model.modules():
        if isinstance(part, LayerNorm):
            part.__class__ = PlainNorm
            del part.weight, part.bias


def with_wide_heads(model: GPT2) -> None:
    for block in model.transformer.h:
        block.attn.__class__ = WideAttention
        block.attn.c_attn, block.attn.c_proj = Linear(16, 3 * 32, std=0.3), Linear(32, 16, std=0.3)


def with_a_tuple_of_blocks(model: GPT2) -> None:
    model.transformer.h = tuple(model.transformer.h)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "edit",
    [
        without_biases,
        without_positions,
        with_plain_norms,
        with_wide_heads,
        with_a_tuple_of_blocks,
    ],
)
def test_a_model_with_other_parts_is_shown_as_it_is(edit: Callable[[GPT2], None]) -> None:
    model = make_model()
    edit(model)
    seen, logits = observe(model, IDS), logits_of(model)
    assert_close(seen.logits, logits)
    assert_close(lens(model, seen.stream[-1]), logits)
    parts = attribution(model, seen, TARGETS)
    assert_close(parts.total(), logits[np.arange(POSITIONS), TARGETS])
    assert (parts.position == 0).all() == (edit is without_positions)


# ------------------------------------------------------------------------------------- refusals


class Rotary(CausalSelfAttention):
    """Queries and keys are turned by an angle that grows with their place."""

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        b, t, width = x.shape
        qkv = self.c_attn(x).reshape(b, t, 3, self.n_head, -1)
        angle = np.arange(t, dtype=np.float32)[:, None, None]  # (T, 1, 1)
        turned = [
            qkv[:, :, i] * np.cos(angle) + self.swapped(qkv[:, :, i]) * np.sin(angle)
            for i in (0, 1)
        ]
        qkv = stack([*turned, qkv[:, :, 2]], 2)
        return self.c_proj(layers.self_attention(qkv).reshape(b, t, width))

    def swapped(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return stack([-x[..., half:], x[..., :half]], -2).reshape(x.shape)


class Window(CausalSelfAttention):
    """Each token sees itself and the two before it."""

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        b, t, width = x.shape
        qkv = self.c_attn(x).reshape(b, t, 3, self.n_head, -1)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))
        near = np.tri(t, dtype=bool) & ~np.tri(t, k=-3, dtype=bool)
        weights = layers.softmax(where(near, q @ k.swapaxes(-1, -2), -np.inf))
        return self.c_proj((weights @ v).swapaxes(1, 2).reshape(b, t, width))


class ThreeLayers(CausalSelfAttention):
    """Queries, keys and values by a layer each."""

    def __init__(self, c: GPT2Config) -> None:
        self.n_head = c.n_head
        self.q, self.k, self.v, self.c_proj = (Linear(16, 16, std=0.3) for _ in range(4))

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        b, t, width = x.shape
        qkv = stack(
            [each(x).reshape(b, t, self.n_head, -1) for each in (self.q, self.k, self.v)], 2
        )
        return self.c_proj(layers.self_attention(qkv).reshape(b, t, width))


class SharedKeys(CausalSelfAttention):
    """All heads have the same keys and values."""

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        b, t, width = x.shape
        parts = self.c_attn(x).reshape(b, t, 4, 1, -1)  # queries of two heads, keys, values
        q, k, v = (parts[:, :, i] for i in ([0, 1], [2, 2], [3, 3]))
        qkv = stack([each.reshape(b, t, 2, -1) for each in (q, k, v)], 2)
        return self.c_proj(layers.self_attention(qkv).reshape(b, t, width))


class Twice(Block):
    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        return super().__call__(super().__call__(x, past), past)


@pytest.mark.parametrize("kind", [Rotary, Window, ThreeLayers, SharedKeys])
def test_an_attention_that_weighs_otherwise_is_refused(kind: type[CausalSelfAttention]) -> None:
    model = make_model()
    attention = model.transformer.h[1].attn
    if kind is ThreeLayers:
        model.transformer.h[1].attn = ThreeLayers(model.config)
    else:
        attention.__class__ = kind
    if kind is SharedKeys:
        attention.c_attn = Linear(16, 32, std=0.3)
    model(IDS[None])  # the model itself works
    with pytest.raises(UserError, match=r"^the microscope .*c_attn"):
        observe(model, IDS)


def test_parts_that_are_used_twice_are_refused() -> None:
    model = make_model()
    model.transformer.h[0].__class__ = Twice
    with pytest.raises(UserError, match="has each `mlp` and calls it once"):
        observe(model, IDS)


class RMSNorm(LayerNorm):
    """A norm that leaves the mean where it is, and has no bias."""

    def __call__(self, x: Any) -> Tensor:
        return x / ((x * x).mean(-1, keepdims=True) + self.eps).sqrt() * self.weight


class Capped(GPT2):
    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return (super().__call__(*inputs, **options) / 5).tanh() * 5


class OwnHead(GPT2):
    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        return self.head(self.hidden(ids, cache))  # type: ignore[operator]


def with_rms_norm(model: GPT2) -> None:
    model.transformer.ln_f.__class__ = RMSNorm
    del model.transformer.ln_f.bias


def with_capped_logits(model: GPT2) -> None:
    model.__class__ = Capped


def with_a_head_of_its_own(model: GPT2) -> None:
    model.__class__ = OwnHead
    model.head = Linear(16, VOCABULARY, std=1.0)  # type: ignore[attr-defined]


def with_louder_attention(model: GPT2) -> None:
    model.transformer.h[0].__class__ = Louder


@pytest.mark.parametrize(
    "edit", [with_rms_norm, with_capped_logits, with_a_head_of_its_own, with_louder_attention]
)
def test_parts_that_do_not_sum_to_the_logit_are_refused(edit: Callable[[GPT2], None]) -> None:
    model = make_model()
    edit(model)
    seen = observe(model, IDS)
    assert_close(seen.logits, logits_of(model))
    with pytest.raises(UserError, match="the logits are not the sum"):
        attribution(model, seen, TARGETS)


def test_a_stream_that_is_not_a_sum_is_refused() -> None:
    with pytest.raises(UserError, match="norm_position"):
        observe(make_model(norm_position="post"), IDS)


def test_an_adapter_that_is_not_folded_in_is_refused() -> None:
    model = make_model()
    add_lora(model, rank=2, layer_names=("c_proj",))
    with pytest.raises(UserError, match="a plain Linear as c_proj: fold an adapter in"):
        attribution(model, observe(model, IDS), TARGETS)
