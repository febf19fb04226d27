"""GPT-2's relatives live against Transformers, each with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import no_grad
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.variants import ACTIVATIONS, SAME_FUNCTION

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 211, "n_positions": 40}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}

FUNCTIONS = (*ACTIVATIONS, *SAME_FUNCTION)
RELATIVES: dict[str, dict[str, Any]] = {
    **{name: {"activation_function": name} for name in FUNCTIONS},
    "scores by layer": {"scale_attn_by_inverse_layer_idx": True},
    "plain scores": {"scale_attn_weights": False},
    "plain scores by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "upcast attention": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    "narrow": {"n_inner": 80},
    "wide": {"n_inner": 320},
    "4 n_embd": {"n_inner": 192},
    "untied": {"tie_word_embeddings": False},
    "large epsilon": {"layer_norm_epsilon": 0.01},
    # As published, but for the sizes
    "distilgpt2": {"n_layer": 2, "n_ctx": 40},
    "DialoGPT": {"n_ctx": 40, "vocab_size": 210},
    "Cerebras-GPT": {"activation_function": "gelu", "n_inner": 192, "scale_attn_weights": True},
    "Mistral": {
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "n_inner": None,
    },
    "CodeParrot": {
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "vocab_size": 256,
    },
    "AraGPT2-base": {"vocab_size": 300, "activation_function": "gelu_new", "n_ctx": 40},
    "all at once": {
        "activation_function": "silu",
        "n_inner": 100,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-6,
    },
}
EVERY = pytest.mark.parametrize("name", RELATIVES)


def moved(model: Any) -> Any:
    """Every parameter moved at random, so that no bias is 0 and attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def their_config(**settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2Config(**{**SMALL, **QUIET, **NO_ENDS, **settings})


def relative_error(ours: np.ndarray, theirs: Any) -> float:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@EVERY
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    theirs = moved(transformers.GPT2LMHeadModel(their_config(**RELATIVES[name])))
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 210, (3, 41))
    logits = theirs(torch.tensor(ids[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
    )
    loss.backward()
    assert relative_error(ours(ids[:, :-1]).data, logits) < 1e-5
    our_loss = ours.loss(ids[:, :-1], ids[:, 1:])
    our_loss.backward()
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for parameter_name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[parameter_name]) < 1e-4, parameter_name


@EVERY
def test_cached_decoding_and_what_we_save(name: str, tmp_path: Path) -> None:
    theirs = moved(transformers.GPT2LMHeadModel(their_config(**RELATIVES[name])))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2.from_pretrained(tmp_path / "theirs")
    ids = np.random.default_rng(1).integers(0, 210, (2, 40))
    with no_grad(), torch.no_grad():
        expected, cache = theirs(torch.tensor(ids)).logits, KVCache(ours, batch_size=2)
        parts = [ours(part, cache).data for part in np.split(ids, [7, 8, 9, 20], axis=1)]
        assert relative_error(np.concatenate(parts, axis=1), expected) < 1e-5
        greedy = theirs.generate(
            torch.tensor(ids[:1, :8]), max_new_tokens=30, do_sample=False, pad_token_id=0
        )
    np.testing.assert_array_equal(
        ours.generate(ids[0, :8], max_new_tokens=30, temperature=0), greedy[0].numpy()
    )
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative_error(again(torch.tensor(ids)).logits.numpy(), expected) < 1e-5


def test_one_that_is_gpt2_is_plain_gpt2(tmp_path: Path) -> None:
    """So that every kernel computes it."""
    for name in ("distilgpt2", "4 n_embd", "gelu_fast", "gelu_pytorch_tanh", "large epsilon"):
        config = their_config(**RELATIVES[name])
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        assert type(GPT2.from_pretrained(tmp_path / name)) is GPT2


@pytest.mark.parametrize(
    ("head", "weight"),
    [
        ("GPT2ForSequenceClassification", "score.weight"),
        ("GPT2ForTokenClassification", "classifier.weight"),
        ("GPT2ForQuestionAnswering", "qa_outputs.weight"),
        ("GPT2DoubleHeadsModel", "multiple_choice_head.summary.weight"),
    ],
)
def test_the_body_below_another_head(
    head: str, weight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = moved(getattr(transformers, head)(their_config(pad_token_id=0)))
    theirs.save_pretrained(tmp_path)
    capsys.readouterr()
    ours = GPT2.from_pretrained(tmp_path)
    (note,) = capsys.readouterr().err.splitlines()
    assert weight in note and "left out: only the language model below is loaded" in note
    assert_body(ours, theirs.transformer)


def test_the_bare_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = moved(transformers.GPT2Model(their_config(activation_function="gelu")))
    theirs.save_pretrained(tmp_path)
    capsys.readouterr()
    assert_body(GPT2.from_pretrained(tmp_path), theirs)
    assert capsys.readouterr().err == ""


def assert_body(ours: GPT2, theirs: Any) -> None:
    """The hidden state is theirs, and the logits are its products with the embedding."""
    ids = np.random.default_rng(2).integers(0, 210, (2, 40))
    with no_grad(), torch.no_grad():
        hidden = theirs(torch.tensor(ids)).last_hidden_state
        assert relative_error(ours.hidden(ids).data, hidden) < 1e-5
        assert relative_error(ours(ids).data, hidden @ theirs.wte.weight.T) < 1e-5


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    config = their_config(tie_word_embeddings=False)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 'lm_head\.weight'"):
        GPT2.from_pretrained(tmp_path)


def test_a_model_with_cross_attention_is_refused(tmp_path: Path) -> None:
    config = their_config(add_cross_attention=True)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="add_cross_attention is True; only False is supported"):
        GPT2.from_pretrained(tmp_path)
