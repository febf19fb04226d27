"""Gradients that several ranks add up, live beside PyTorch's DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi_launch import mpirun, needs_mpi

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 48, "vocab_size": 211, "n_positions": 40}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@needs_mpi
def test_gradients_are_those_of_ddp(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SHAPE, **QUIET, bos_token_id=None, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    result = mpirun(2, Path(__file__).with_name("ddp_child.py"), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "28 gradients are DDP's\n"
