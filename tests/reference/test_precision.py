"""Half precision live against PyTorch: how numbers round, and what autocast makes of a GPT-2."""

from __future__ import annotations

import numpy as np
import pytest

from micrograd_gpt import Tensor
from micrograd_gpt.arrays.precision import HALF, compute_in, widened
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2, GPT2Config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 211, "n_positions": 40}


@pytest.mark.parametrize("half", HALF)
def test_numbers_round_as_in_pytorch(half: str) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32)
    ties = words & 0xFFFF0000 | 0x8000  # between two bfloat16
    exponents = (words & 0x8FFFE000 | 0x1000) + 0x30000000  # between two float16, in their range
    numbers = np.concatenate([words, ties, exponents]).astype(np.uint32).view(np.float32)
    theirs = torch.tensor(numbers).to(getattr(torch, half)).float().numpy()
    ours = widened(Tensor(numbers, dtype=half).data)
    np.testing.assert_array_equal(ours, theirs)


def their_gradients(
    model: transformers.GPT2LMHeadModel, ids: np.ndarray, dtype: str
) -> dict[str, np.ndarray]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
        logits = model(torch.tensor(ids[:, :-1])).logits
    labels = torch.tensor(ids[:, 1:]).reshape(-1)
    torch.nn.functional.cross_entropy(logits.float().reshape(len(labels), -1), labels).backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def our_gradients(
    theirs: transformers.GPT2LMHeadModel, ids: np.ndarray, compute: str, level: str
) -> dict[str, np.ndarray]:
    model = GPT2(GPT2Config(**SMALL))
    for name, p in model.named_parameters():
        p.data[...] = theirs.get_parameter(name).detach().numpy()
    with compute_in(compute), at_most(level):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("level", ["definitions", "c"])
@pytest.mark.parametrize("half", HALF)
def test_gradients_against_autocast(half: str, level: str) -> None:
    """Ours and autocast's differ from the exact ones by some roundings each, and from each other
    by no more: autocast rounds inside GELU too, and sums in another order.

    1e-2 is two and a half times what one rounding to bfloat16 can change (2**-8 of a number; every
    activation and gradient on the way is rounded once); they were found to agree within 7.5e-3.
    """
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": None}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **quiet, **ends))
    ids = np.random.default_rng(0).integers(0, 211, (4, 41))
    exact = their_gradients(theirs, ids, "float32")
    autocast = their_gradients(theirs, ids, half)
    ours = our_gradients(theirs, ids, half, level)
    for name in exact:
        assert difference(ours[name], autocast[name]) < 1e-2, name
        assert 0 < difference(ours[name], exact[name]) < 1e-2, name
    errors = [np.mean([difference(g[n], exact[n]) for n in exact]) for g in (ours, autocast)]
    assert errors[0] < 1.1 * errors[1]  # on the whole ours are as near to the exact ones
