"""Weights exchanged with Transformers, PyTorch and TensorFlow themselves.

Each part needs its own library and is skipped without it: `pip install transformers torch`, and
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
from tiny_weights import ARRAYS, TINY

from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.formats import open_weights
from micrograd_gpt.weights.pretrained import build, from_pretrained
from micrograd_gpt.weights.reading import same_bytes
from micrograd_gpt.weights.releases import RELEASES
from micrograd_gpt.weights.saving import save_pretrained
from micrograd_gpt.weights.tensor_files import TensorFile
from micrograd_gpt.weights.tf_checkpoint import TFCheckpoint
from micrograd_gpt.weights.torch_file import read_state_dict

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
# PyTorch's files


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.parametrize("shape", [SHAPE, FULL], ids=["small", "124M"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin(
    transformers: Any, torch: Any, tmp_path: Path, shape: dict[str, int], zipped: bool
) -> None:
    theirs = their_model(transformers, **shape)
    theirs.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=zipped)
    model = from_pretrained(GPT2, tmp_path)
    assert_same(model, theirs)
    assert_logits_close(model, theirs, shape["vocab_size"])


@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_that_torch_saves(torch: Any, tmp_path: Path, zipped: bool) -> None:
    table = torch.arange(24).reshape(4, 6)
    tensors = {
        "float32": table.float() / 7,
        "float64": table.double() / 7,
        "float16": table.half() / 7,
        "bfloat16": table.bfloat16() / 7,
        "int64": table,
        "uint8": table.to(torch.uint8),
        "bool": table > 9,
        "rows": table.float()[1:3],
        "column": table.float()[:, 2:3].contiguous(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(table.float()),
        "again": table,
    }
    file = tmp_path / "x.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    stored = read_state_dict(file)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        out = np.empty(stored[name].shape, stored[name].dtype)
        stored[name].read_into(out)
        np.testing.assert_array_equal(out.astype("f8"), tensor.detach().double().numpy(), name)
    assert stored["again"].offset == stored["int64"].offset
    torch.save({"x": table.T}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="not stored row by row"):
        read_state_dict(file)
    torch.save(torch.nn.Linear(2, 3), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"is refused: .*torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(file)


def nanogpt_logits(torch: Any, model: dict[str, Any], ids: Any, n_head: int) -> Any:
    """nanoGPT's forward pass over its checkpoint's tensors, as its model.py computes it."""
    functional = torch.nn.functional
    w = {name.removeprefix("_orig_mod.transformer."): tensor for name, tensor in model.items()}

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"))

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    x = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    for layer in range(2):
        block = f"h.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in qkv)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.c_proj")
        hidden = functional.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return functional.linear(norm(x, "ln_f"), w["_orig_mod.lm_head.weight"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [61, 50304])
def test_nanogpt_s_checkpoint_computes_what_nanogpt_does(
    torch: Any, tmp_path: Path, bias: bool, vocab_size: int
) -> None:
    maker = runpy.run_path(str(Path(__file__).with_name("make_torch_files.py")))
    tokens = torch.randn(vocab_size, TINY["n_embd"], generator=torch.Generator().manual_seed(0))
    arrays = ARRAYS | {"transformer.wte.weight": tokens.numpy()}
    if not bias:
        arrays = {name: array for name, array in arrays.items() if not name.endswith("bias")}
    saved = maker["nanogpt_checkpoint"](arrays)
    saved["model_args"] |= {"vocab_size": vocab_size, "bias": bias}
    torch.save(saved, tmp_path / "ckpt.pt")
    model = from_pretrained(GPT2, tmp_path / "ckpt.pt")
    known = 50257 if vocab_size == 50304 else vocab_size
    ids = np.random.default_rng(0).integers(0, known, (2, 20))
    with no_grad():
        ours = model(ids).data
    reference = nanogpt_logits(torch, saved["model"], torch.tensor(ids), TINY["n_head"]).numpy()
    assert ours.shape == (2, 20, known)
    reference = reference[..., :known]
    assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()


def test_the_committed_files_are_what_torch_writes(torch: Any, tmp_path: Path) -> None:
    maker = runpy.run_path(str(Path(__file__).with_name("make_torch_files.py")))
    maker["write_files"](tmp_path)
    for name in ("pytorch_model.bin", "old/pytorch_model.bin", "ckpt.pt"):
        ours, committed = (open_weights(folder / name) for folder in (tmp_path, maker["FOLDER"]))
        assert vars(ours.config) == vars(committed.config)
        for key, tensor in ours.tensors.items():
            other = committed.tensors[key]
            assert type(tensor) is type(other) and same_bytes(tensor, other), key


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
