"""Weights exchanged with Transformers and TensorFlow themselves.

Each half needs its own library and is skipped without it: `pip install transformers torch`, and
`pip install tensorflow` (or tensorflow-cpu).
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.weights.formats import open_weights
from micrograd_gpt.weights.pretrained import build, from_pretrained
from micrograd_gpt.weights.releases import RELEASES
from micrograd_gpt.weights.saving import save_pretrained
from micrograd_gpt.weights.tensor_files import TensorFile
from micrograd_gpt.weights.tf_checkpoint import TFCheckpoint

ROOT = Path(__file__).parents[2]
SHAPE = {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_positions": 40, "vocab_size": 70}
FULL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


# ---------------------------------------------------------------------------------------------
# Transformers


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def their_model(transformers: Any, **config: int) -> Any:
    import torch

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    with torch.no_grad():  # its biases and LayerNorms start as zeros and ones, which hide mistakes
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def assert_same(model: GPT2, theirs: Any) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.data, expected.pop(name).detach().float().numpy())
    assert not expected  # the tied head counts as wte


def assert_logits_close(model: GPT2, theirs: Any, vocab_size: int) -> None:
    import torch

    ids = np.random.default_rng(0).integers(0, vocab_size, (2, 20))
    with no_grad(), torch.no_grad():
        ours, reference = model(ids).data, theirs(torch.tensor(ids)).logits.numpy()
    # float32 sums in another order; DESIGN's limit for logits.
    assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("shape", [SHAPE, FULL], ids=["small", "124M"])
def test_what_transformers_saves_we_load_and_back(
    transformers: Any, tmp_path: Path, shape: dict[str, int]
) -> None:
    theirs = their_model(transformers, **shape)
    theirs.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(GPT2, tmp_path / "theirs")
    assert_same(model, theirs)
    assert_logits_close(model, theirs, shape["vocab_size"])
    save_pretrained(model, tmp_path / "ours")
    assert_same(model, transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours"))
    assert_same(from_pretrained(GPT2, tmp_path / "ours"), theirs)


def test_the_bare_model_and_shards(transformers: Any, tmp_path: Path) -> None:
    theirs = their_model(transformers, **SHAPE)
    theirs.transformer.save_pretrained(tmp_path / "bare")
    assert_same(from_pretrained(GPT2, tmp_path / "bare"), theirs)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(from_pretrained(GPT2, tmp_path / "shards"), theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_both_ways(transformers: Any, tmp_path: Path, dtype: str) -> None:
    import torch

    theirs = their_model(transformers, **SHAPE)
    save_pretrained(build_from(theirs, tmp_path / "float32"), tmp_path / "ours", dtype=dtype)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    # torch rounds as we do: the stored numbers are the same bit for bit …
    ours, reference = (TensorFile(tmp_path / x / "model.safetensors") for x in ("ours", "theirs"))
    for name, entry in ours.entries.items():
        stored = reference.entries[name]
        with open(entry.path, "rb") as a, open(stored.path, "rb") as b:
            a.seek(entry.offset), b.seek(stored.offset)
            assert a.read(entry.nbytes) == b.read(stored.nbytes)
    # … and each loads the other's.
    assert_same(from_pretrained(GPT2, tmp_path / "theirs"), theirs)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert_same(from_pretrained(GPT2, tmp_path / "ours"), loaded)


def build_from(theirs: Any, folder: Path) -> GPT2:
    theirs.save_pretrained(folder)
    return build(open_weights(folder))


def test_a_hub_of_transformers_files(transformers: Any, tmp_path: Path) -> None:
    """The script against a server in the Hub's place, through HF_ENDPOINT, in its own process."""
    from faults import serving

    theirs = their_model(transformers, **(SHAPE | {"vocab_size": 50257}))
    theirs.save_pretrained(tmp_path / "theirs")
    base = f"/{RELEASES['355M'].repository}/resolve/main/"
    files = {
        base + name: (tmp_path / "theirs" / name).read_bytes()
        for name in ("config.json", "model.safetensors")
    }
    with serving(files) as server:
        result = subprocess.run(
            [sys.executable, ROOT / "load_gpt2.py", "--size", "345M", "--source", "huggingface"],
            env=os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    # It is fetched, recognised as what it is, and not kept.
    assert "is not GPT-2 355M: its n_layer is 2, not 24" in result.stderr
    assert result.returncode == 2 and not (tmp_path / "models").exists()
    assert not [*(tmp_path / "home").rglob("model.safetensors")]


# ---------------------------------------------------------------------------------------------
# TensorFlow


@pytest.fixture(scope="module")
def maker() -> dict[str, Any]:
    pytest.importorskip("tensorflow")
    return runpy.run_path(str(Path(__file__).with_name("make_tf_checkpoint.py")))


@pytest.mark.parametrize("write", ["write_saver", "write_sharded"])
@pytest.mark.parametrize("full", [False, True], ids=["small", "124M"])
def test_what_tensorflow_writes_is_read_bit_for_bit(
    maker: dict[str, Any], tmp_path: Path, write: str, full: bool
) -> None:
    hparams = dict(maker["HPARAMS"])
    if full:
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    arrays = maker["variables"](hparams, seed=7)
    maker[write](tmp_path, hparams, arrays)
    checkpoint = TFCheckpoint(tmp_path)
    assert checkpoint.shapes == {name: array.shape for name, array in arrays.items()}
    names = checkpoint.gpt2_names()
    model = from_pretrained(GPT2, tmp_path)
    for name, parameter in model.named_parameters():
        array = arrays[names.pop(name)]
        np.testing.assert_array_equal(parameter.data, array.reshape(parameter.data.shape))
    assert not names
    if full:
        sizes = [p.stat().st_size for p in tmp_path.glob("*.data-*")]
        assert sum(sizes) == RELEASES["124M"].openai_data_bytes


def test_the_committed_checkpoint_is_what_the_script_writes(
    maker: dict[str, Any], tmp_path: Path
) -> None:
    maker["write_saver"](tmp_path, maker["HPARAMS"], maker["variables"](maker["HPARAMS"]))
    committed = maker["FOLDER"] / "saver"
    for name in ("checkpoint", "hparams.json", "model.ckpt.data-00000-of-00001"):
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes()
    assert json.loads((committed / "hparams.json").read_text()) == maker["HPARAMS"]
