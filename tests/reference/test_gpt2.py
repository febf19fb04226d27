"""GPT-2 live against Transformers: a small one, and a full 124M with random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from micrograd_gpt import no_grad, optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPTS = Path(__file__).parents[2]
SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 211, "n_positions": 40}


def their_model(seed: int = 0, **shape: int) -> transformers.GPT2LMHeadModel:
    """Transformers' GPT-2, random, with biases and LayerNorms moved off their 0 and 1."""
    torch.manual_seed(seed)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {} if "vocab_size" not in shape else {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **quiet, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def their_logits(model: transformers.GPT2LMHeadModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.GPT2LMHeadModel, GPT2]:
    folder = tmp_path_factory.mktemp("small")
    theirs = their_model(**SMALL)
    theirs.save_pretrained(folder)
    return theirs, GPT2.from_pretrained(folder)


def test_small_logits_loss_and_gradients(
    small: tuple[transformers.GPT2LMHeadModel, GPT2],
) -> None:
    theirs, ours = small
    ids = np.random.default_rng(0).integers(0, 211, (4, 41))
    targets = ids[:, 1:].copy()
    targets[1, 5:] = -100
    logits = theirs(torch.tensor(ids[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=-100
    )
    theirs.zero_grad()
    loss.backward()
    assert relative_error(ours(ids[:, :-1]).data, logits.detach().numpy()) < 1e-5
    our_loss = ours.loss(ids[:, :-1], targets)
    our_loss.backward()
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-4, name


def test_ten_adamw_steps() -> None:
    theirs = their_model(seed=1, **SMALL)
    ours = GPT2(GPT2Config(**SMALL))
    for name, p in ours.named_parameters():
        p.data[...] = theirs.get_parameter(name).detach().numpy()
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    their_optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    optimizer = optim.AdamW(ours.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    rng = np.random.default_rng(1)
    for _ in range(10):
        ids = rng.integers(0, 211, (4, 33))
        logits = theirs(torch.tensor(ids[:, :-1])).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
        )
        loss.backward()
        our_loss = ours.loss(ids[:, :-1], ids[:, 1:])
        our_loss.backward()
        assert our_loss.item() == pytest.approx(loss.item(), rel=1e-4)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert optim.clip_grad_norm(ours.parameters(), 0.5) == pytest.approx(norm.item(), rel=1e-4)
        their_optimizer.step()
        their_optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()


def test_what_we_save_transformers_loads(
    small: tuple[transformers.GPT2LMHeadModel, GPT2], tmp_path: Path
) -> None:
    ours = small[1]
    ours.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = np.random.default_rng(2).integers(0, 211, (2, 40))
    assert relative_error(ours.eval()(ids).data, their_logits(theirs, ids)) < 1e-5
    for name, p in ours.named_parameters():
        np.testing.assert_array_equal(p.data, theirs.get_parameter(name).detach().numpy())


# --------------------------------------------------------------------------------- the full 124M


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.GPT2LMHeadModel, GPT2]:
    """124M with random weights: written by Transformers, converted by load_gpt2.py, loaded."""
    written, converted = (tmp_path_factory.mktemp(name) for name in ("written", "converted"))
    theirs = their_model(seed=2).eval()
    theirs.save_pretrained(written)
    subprocess.run(
        [sys.executable, SCRIPTS / "load_gpt2.py", "--from", written, "--out", converted],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return theirs, GPT2.from_pretrained(converted).eval()


def test_full_logits_at_every_position(full: tuple[transformers.GPT2LMHeadModel, GPT2]) -> None:
    theirs, ours = full
    ids = np.random.default_rng(3).integers(0, 50257, (1, 200))
    with no_grad():
        logits = ours(ids).data
    expected = their_logits(theirs, ids)
    for position in range(ids.shape[1]):
        assert relative_error(logits[:, position], expected[:, position]) < 1e-5, position


def test_full_greedy_continuation(full: tuple[transformers.GPT2LMHeadModel, GPT2]) -> None:
    theirs, ours = full
    prompt = np.array([464, 3290])
    ids = ours.generate(prompt, max_new_tokens=40, temperature=0)
    expected = theirs.generate(
        torch.tensor(prompt[None]),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=50256,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(ids, expected[0].numpy())
