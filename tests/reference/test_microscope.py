"""The microscope against Transformers' output_attentions and output_hidden_states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt.generation.microscope import Observation, attribution, lens, observe
from micrograd_gpt.gpt2 import GPT2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 211, "n_positions": 40}
IDS = np.random.default_rng(0).integers(0, 211, 40)
ROUNDING = 1e-5  # of float32, relative to the largest number of an array


def assert_close(ours: np.ndarray, theirs: Any) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= ROUNDING * np.abs(theirs).max()


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**SHAPE, **ends, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from 0 and 1, and sharper than a new model
            parameter.mul_(4).add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    folder: Path = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return GPT2.from_pretrained(folder)


@pytest.fixture(scope="module")
def seen(ours: GPT2) -> Observation:
    return observe(ours, IDS)


@pytest.fixture(scope="module")
def output(theirs: Any) -> Any:
    with torch.no_grad():
        ids = torch.tensor(IDS[None])
        return theirs(ids, output_attentions=True, output_hidden_states=True)


def test_attention_is_theirs(seen: Observation, output: Any) -> None:
    assert len(output.attentions) == len(seen.attention)
    for weights, their_weights in zip(seen.attention, output.attentions, strict=True):
        assert_close(weights, their_weights[0])


def test_the_residual_stream_is_theirs(ours: GPT2, seen: Observation, output: Any) -> None:
    *before_each_block, after_ln_f = output.hidden_states
    for x, their_x in zip(seen.stream[:-1], before_each_block, strict=True):
        assert_close(x, their_x[0])
    rows = torch.nn.functional.layer_norm(
        torch.tensor(seen.stream[-1]),
        (48,),
        torch.tensor(ours.transformer.ln_f.weight.data),
        torch.tensor(ours.transformer.ln_f.bias.data),
    )
    assert_close(rows.numpy(), after_ln_f[0])


def test_the_lens_reads_their_hidden_states(
    theirs: Any, ours: GPT2, seen: Observation, output: Any
) -> None:
    with torch.no_grad():
        for x, their_x in zip(seen.stream[:-1], output.hidden_states[:-1], strict=True):
            their_logits = theirs.lm_head(theirs.transformer.ln_f(their_x))
            assert_close(lens(ours, x), their_logits[0])
    assert_close(lens(ours, seen.stream[-1]), output.logits[0])


def test_the_parts_sum_to_their_logits(ours: GPT2, seen: Observation, output: Any) -> None:
    targets = np.random.default_rng(1).integers(0, 211, 40)
    parts = attribution(ours, seen, targets)
    assert_close(parts.total(), output.logits[0, torch.arange(40), torch.tensor(targets)])


def test_a_head_moves_the_logit_as_far_as_leaving_it_out_of_their_stream(
    theirs: Any, ours: GPT2, seen: Observation
) -> None:
    """Taking a head's output off their last hidden state, at the same deviation, takes off as much
    of the logit as the head is said to have moved it."""
    targets = np.random.default_rng(1).integers(0, 211, 40)
    parts = attribution(ours, seen, targets)
    transformer, mixed = theirs.transformer, torch.tensor(seen.mixed)
    x = torch.tensor(seen.stream[-1])
    deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    rows = theirs.lm_head.weight[targets] * transformer.ln_f.weight / deviation  # (T, C)
    for layer in range(3):
        weight = transformer.h[layer].attn.c_proj.weight
        for head in range(4):
            part = slice(12 * head, 12 * head + 12)
            added = mixed[layer][:, part] @ weight[part]  # (T, C)
            moved = ((added - added.mean(-1, keepdim=True)) * rows).sum(-1)
            assert_close(parts.heads[layer, head], moved)
