"""nanoGPT's checkpoints: what differs in them from GPT-2's own files.

nanoGPT's train.py writes `ckpt.pt`, by torch.save, which holds

    model        the tensors, under GPT-2's names, before which torch.compile puts `_orig_mod.`
    model_args   n_layer, n_head, n_embd, block_size, vocab_size, bias, dropout
    optimizer, iter_num, best_val_loss, config

Its layers are torch.nn.Linear, so their weights are (n_out, n_in). With `bias` false its Linear and
LayerNorm layers have none. The 50,257 tokens of GPT-2 are padded to 50,304, for speed on a GPU. Its
GELU is the exact one (until June 2023 it was GPT-2's approximation, which no checkpoint says).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.reading import StoredTensor, Transposed, Zeros
from micrograd_gpt.weights.torch_file import stored_tensors

SHAPE = {  # nanoGPT's names, and GPT-2's
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
PADDED, GPT2_TOKENS = 50304, 50257
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
TABLES = ("transformer.wte.weight", "lm_head.weight")  # a row for each token


def is_nanogpt(saved: Any) -> bool:
    """Whether this is the content of a ckpt.pt."""
    return isinstance(saved, dict) and {"model", "model_args"} <= saved.keys()


def nanogpt_config(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """What config.json would say of it, padding left out; UserError if `model_args` is wrong."""
    arguments = saved["model_args"]
    if not isinstance(arguments, dict):
        raise UserError(f"{path}: its model_args are not a dict")
    for name in SHAPE:
        if type(arguments.get(name)) is not int:
            raise UserError(f"{path}: its model_args have no whole number {name}")
    config: dict[str, Any] = {ours: arguments[name] for name, ours in SHAPE.items()}
    if arguments["vocab_size"] == PADDED:
        config["vocab_size"] = GPT2_TOKENS
    dropout = arguments.get("dropout", 0.0)
    if type(dropout) not in (int, float):
        raise UserError(f"{path}: its model_args have a dropout that is not a number")
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    return config | {"activation_function": "gelu"}


def nanogpt_tensors(saved: dict[str, Any], path: Path) -> dict[str, StoredTensor]:
    """The tensors as GPT-2's files have them: (n_in, n_out), biases everywhere, no padding."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored_tensors(saved["model"], path).items():
        short = name.removeprefix("_orig_mod.")
        if short in tensors:
            raise UserError(f"{path} holds {short!r} twice")
        tensors[short] = tensor
    for name in TABLES:
        if name in tensors and tensors[name].shape[:1] == (PADDED,):
            shape = (GPT2_TOKENS, *tensors[name].shape[1:])
            tensors[name] = dataclasses.replace(tensors[name], shape=shape)
    for name, tensor in list(tensors.items()):
        layer = name.removesuffix(".weight")
        if layer == name or name in TABLES or layer == "transformer.wpe":
            continue
        if layer.endswith(LINEAR):
            tensors[name] = Transposed(name, path, tensor.dtype, tensor.shape[::-1], tensor.offset)
        bias = f"{layer}.bias"
        if saved["model_args"].get("bias") is False and bias not in tensors:
            tensors[bias] = Zeros(bias, path, tensor.dtype, tensors[name].shape[-1:], 0)
    return tensors
