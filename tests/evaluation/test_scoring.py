"""Scores of continuations: the same as one pass over each text gives, however they are batched."""

from __future__ import annotations

from typing import Any

import fake_cupy
import numpy as np
import pytest
from small_gpt2 import POSITIONS, VOCABULARY, make_model

from micrograd_gpt.arrays.devices import move
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.evaluation.scoring import Request, Score, score, score_all
from micrograd_gpt.generation.filters import log_softmax
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.nn import Linear
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor


def random_groups(count: int, seed: int = 0) -> list[list[Request]]:
    """Groups of all kinds: one ending and several, alike at first and not, short and too long."""
    rng = np.random.default_rng(seed)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(0, VOCABULARY, rng.integers(least, most + 1)).tolist()

    groups = []
    for _ in range(count):
        context, begun = ids(1, POSITIONS + 6), ids(0, 3)
        endings = [begun + ids(0, 10) or [3] for _ in range(rng.integers(1, 6))]
        groups.append([Request(context, ending) for ending in endings])
    return groups


def one_pass(model: GPT2, request: Request) -> Score:
    """What a pass over the whole text gives, or over its end where it is too long."""
    text = (request.context + request.continuation)[-(POSITIONS + 1) :]
    count = len(request.continuation)
    logits = model(np.array([text[:-1]])).numpy()[0, -count:].astype(np.float64)  # (n, V)
    log_probs = log_softmax(logits)[np.arange(count), request.continuation]
    return Score(log_probs, logits.argmax(-1) == request.continuation)


@pytest.mark.parametrize("tokens_at_once", [1, 50, 2048])
@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": False}, {"position_embedding": "sinusoidal"}],
    ids=["gpt2", "own head", "sinusoidal"],
)
def test_equal_to_one_pass_over_each_text(tokens_at_once: int, config: dict[str, Any]) -> None:
    model, groups = make_model(factor=6, **config).eval(), random_groups(30)
    found = dict(score(model, groups, tokens_at_once))
    assert sorted(found) == list(range(30))
    for i, group in enumerate(groups):
        for ours, request in zip(found[i], group, strict=True):
            expected = one_pass(model, request)
            np.testing.assert_allclose(ours.log_probs, expected.log_probs, atol=1e-4)
            assert ours.likeliest.tolist() == expected.likeliest.tolist()
            assert ours.log_prob == pytest.approx(expected.log_probs.sum(), abs=1e-3)


class Capped(GPT2):
    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return (super().__call__(*inputs, **options) / 5).tanh() * 5


class OwnHead(GPT2):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, std=1.0)

    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        return self.lm_head(self.hidden(ids, cache))


class NotHidden(GPT2):
    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        return self.transformer(np.asarray(ids), cache) @ self.transformer.wte.weight.T


@pytest.mark.parametrize("own", [Capped, OwnHead])
def test_an_own_class_makes_the_logits_in_its_own_way(own: type[GPT2]) -> None:
    model = own(make_model().config).eval()
    for group in random_groups(5):
        for ours, request in zip(score_all(model, [group])[0], group, strict=True):
            np.testing.assert_allclose(
                ours.log_probs, one_pass(model, request).log_probs, atol=1e-4
            )


def test_an_attention_that_no_cache_goes_with_is_scored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, groups = make_model(factor=6).eval(), random_groups(9)
    model.transformer.h[1].attn.n_head *= 2  # of another number of heads than the others
    found = score_all(model, groups)
    for group, scores in zip(groups, found, strict=True):
        for ours, request in zip(scores, group, strict=True):
            expected = one_pass(model, request)
            np.testing.assert_allclose(ours.log_probs, expected.log_probs, atol=1e-4)
    assert "note: no KV cache goes with this attention" in capsys.readouterr().err


def test_logits_that_are_not_made_of_hidden_are_refused() -> None:
    with pytest.raises(UserError, match=r"NotHidden.__call__ does not call self.hidden"):
        score_all(NotHidden(make_model().config), [[Request([1], [2])]])


def test_the_same_on_a_gpu_s_arrays() -> None:
    groups = random_groups(8)
    expected = score_all(make_model(factor=6).eval(), groups)
    with fake_cupy.installed(), at_most("fused"):
        model = make_model(factor=6).eval()
        move(model, "gpu")
        found = score_all(model, groups)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
            assert one.likeliest.tolist() == other.likeliest.tolist()


def test_an_ending_is_greedy_where_every_token_is_the_likeliest() -> None:
    model, context = make_model().eval(), [1, 2, 3]
    ids = model.generate(np.array(context), max_new_tokens=6, temperature=0).tolist()
    greedy = Request(context, ids[3:])
    other = Request(context, [*ids[3:-1], (ids[-1] + 1) % VOCABULARY])
    ((first, second),) = score_all(model, [[greedy, other]])
    assert first.is_greedy and not second.is_greedy
    assert second.likeliest.tolist() == [True] * 5 + [False]


def read_by(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass through the model reads from now on, padding included."""
    hidden, sizes = model.hidden, list[int]()

    def counting(ids: Any, cache: Any = None) -> Any:
        sizes.append(ids.size)
        return hidden(ids, cache)

    monkeypatch.setattr(model, "hidden", counting)
    return sizes


def test_what_requests_have_in_common_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().eval()
    sizes = read_by(model, monkeypatch)
    score_all(model, [[Request([1] * 10, [2, ending, 4, 5]) for ending in range(3, 7)]])
    assert sizes == [10 + 1, 4 * 2]  # the context and the 2, then two more of each; never the 5


def test_no_pass_reads_more_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().eval()
    sizes = read_by(model, monkeypatch)
    long, short = Request([1] * 15, [2]), Request([1], [2])
    list(
        score(model, [[short]] * 40 + [[long]] + [[Request([1], [i, 3, 4])] for i in range(9)], 64)
    )
    assert max(sizes) <= 64 and sum(sizes) < 200
    sizes.clear()
    list(score(model, [[Request([1] * 10, [i, 3, 4]) for i in range(9)]], 64))
    assert sizes == [10, 5 * 2, 4 * 2]  # five rows of 12 tokens in a cache are no more than 64


def test_a_continuation_that_is_too_long_is_refused() -> None:
    model = make_model().eval()
    score_all(model, [[Request([1], [2] * POSITIONS)]])
    with pytest.raises(UserError, match="17 tokens is longer than the model's context of 16"):
        score_all(model, [[Request([1], [2] * (POSITIONS + 1))]])


@pytest.mark.parametrize("ids", [([], [1]), ([1], [])])
def test_a_request_has_a_context_and_something_to_score(ids: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Request(*ids)


def test_damaged_weights_are_noticed() -> None:
    model = make_model().eval()
    model.transformer.ln_f.weight.data[0] = np.nan
    with pytest.raises(UserError, match=r"not finite: its weights are damaged, or .* edited"):
        score_all(model, [[Request([1], [2])]])


@pytest.mark.filterwarnings("error")  # NumPy's words on what overflows would come first
def test_weights_that_float16_is_too_narrow_for_are_not_called_damaged() -> None:
    model = make_model().eval()
    for name, parameter in model.named_parameters():
        if ".mlp.c_" in name:
            parameter.data *= 3e4
    score_all(model, [[Request([1], [2])]])
    hold_in(model, "float16")
    with pytest.raises(UserError, match=r"not finite in float16, .*: try bfloat16 or float32"):
        score_all(model, [[Request([1], [2])]])
