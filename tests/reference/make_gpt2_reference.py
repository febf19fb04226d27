"""Write tests/data/gpt2_reference.safetensors: what Transformers' GPT-2 computes.

    python tests/reference/make_gpt2_reference.py

A small GPT-2 with seeded random weights: the weights, logits, loss, the gradient of every
parameter, and the losses of ten steps of PyTorch's AdamW with clipping. tests/test_gpt2.py holds
ours against it, so that the default tests need neither PyTorch nor Transformers.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from micrograd_gpt.weights.tensor_files import write_safetensors

TARGET = Path(__file__).parents[1] / "data" / "gpt2_reference.safetensors"
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 67, "n_positions": 16}


def main() -> None:
    torch.manual_seed(7)
    config = GPT2Config(
        **SHAPE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # Transformers starts biases at 0 and LayerNorm at 1: nothing to see
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, SHAPE["vocab_size"], (10, 3, 17))
    inputs, targets = ids[..., :-1], ids[..., 1:].clone()
    targets[:, 0, :5] = -100
    arrays = {f"weight.{n}": p.detach().clone().numpy() for n, p in model.named_parameters()}
    arrays |= {"inputs": inputs.numpy(), "targets": targets.numpy()}

    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.ndim >= 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for step in range(10):
        logits = model(inputs[step]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[step].flatten())
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            arrays["logits"] = logits.detach().numpy()
            arrays |= {f"gradient.{n}": p.grad.clone().numpy() for n, p in named.items()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert math.isfinite(norm)
        optimizer.step()
        optimizer.zero_grad()
    arrays["losses"] = np.array(losses)
    metadata = {"torch": torch.__version__, **{k: str(v) for k, v in SHAPE.items()}}
    write_safetensors(TARGET, arrays, metadata)
    print(
        f"{TARGET.name}: {TARGET.stat().st_size:,} bytes, losses {losses[0]:.4f} … {losses[-1]:.4f}"
    )


if __name__ == "__main__":
    main()
