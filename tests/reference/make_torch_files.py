"""Write tests/data/torch_files: a tiny GPT-2 as PyTorch stores it, in each of its two formats.

    python tests/reference/make_torch_files.py          # needs torch

The numbers are those of tests/data/tf_checkpoint. `pytorch_model.bin` is Transformers' file, as
PyTorch has written it since 1.6, `old/pytorch_model.bin` the same as it was written before, and
`ckpt.pt` is what nanoGPT's train.py saves of a compiled model after one step of AdamW.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_weights import ARRAYS, CONFIG, TINY

FOLDER = Path(__file__).parents[1] / "data" / "torch_files"


def transformers_state(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The state dict of a GPT2LMHeadModel: with the causal mask of each layer, and a tied head."""
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    mask = torch.ones(32, 32, dtype=torch.uint8).tril().view(1, 1, 32, 32)
    masks = {f"transformer.h.{i}.attn.bias": mask for i in range(TINY["n_layer"])}
    return as_saved({**state, **masks, "lm_head.weight": state["transformer.wte.weight"]})


def as_saved(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of the kind that Module.state_dict() returns."""
    ordered = OrderedDict(state)
    ordered._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return ordered


def nanogpt_checkpoint(arrays: dict[str, np.ndarray], dropout: float = 0.0) -> dict[str, Any]:
    """What nanoGPT saves: the model, and the state of an optimizer that has made one step."""
    parameters = {}
    for name, array in arrays.items():
        is_linear = array.ndim == 2 and ".h." in name
        numbers = torch.tensor(np.ascontiguousarray(array.T) if is_linear else array)
        parameters[name] = torch.nn.Parameter(numbers)
    groups = [[p for p in parameters.values() if (p.ndim >= 2) == decay] for decay in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.0, weight_decay=0.0)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    state = {f"_orig_mod.{name}": p.detach() for name, p in parameters.items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    shape = {("block_size" if k == "n_positions" else k): v for k, v in TINY.items()}
    return {
        "model": as_saved(state),
        "optimizer": optimizer.state_dict(),
        "model_args": {**shape, "bias": True, "dropout": dropout},
        "iter_num": 1,
        "best_val_loss": torch.tensor(4.25),
        "config": {"out_dir": "out", "compile": True, "learning_rate": 6e-4, "meta": None},
    }


def write_files(folder: Path) -> None:
    (folder / "old").mkdir(parents=True, exist_ok=True)
    state = transformers_state(ARRAYS)
    torch.save(state, folder / "pytorch_model.bin")
    torch.save(state, folder / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.save(nanogpt_checkpoint(ARRAYS), folder / "ckpt.pt")
    for place in (folder, folder / "old"):
        (place / "config.json").write_text(json.dumps(CONFIG) + "\n")


if __name__ == "__main__":
    write_files(FOLDER)
