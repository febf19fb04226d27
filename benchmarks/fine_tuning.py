"""A fine-tuning step of GPT-2 124M, of all weights and by LoRA, beside PyTorch's and PEFT's.

    python benchmarks/fine_tuning.py                         # 1 × 256 tokens, rank 8 on c_attn
    python benchmarks/fine_tuning.py --layers attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj

A step is forward, backward, clipping and AdamW, with random weights and tokens. "gradients" and
"moments" are the arrays that exist once a step has been made; "peak" is the whole process, with its
libraries. The sides take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from common import (
    in_turns,
    installed,
    median,
    peak_megabytes,
    print_table,
    processor,
    seconds,
)

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}
MEGABYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", nargs="+", default=["c_attn"])
    parser.add_argument("--steps", type=int, default=3, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(json.loads(args.child))))
        return
    sides = ["ours, all weights", "ours, LoRA"]
    if installed("torch"):
        sides += ["PyTorch, all weights"]
    if installed("transformers") and installed("peft"):
        sides += ["Transformers, all weights", "Transformers, PEFT's LoRA"]
    task = {key: getattr(args, key) for key in ("batch", "context", "rank", "layers", "steps")}
    results = in_turns({side: {"side": side, **task} for side in sides}, args.rounds)
    print(
        f"{processor()}; Python {sys.version.split()[0]}, NumPy {np.__version__}; "
        f"{args.batch} × {args.context} tokens, LoRA of rank {args.rank} on {args.layers}\n"
    )
    header = ["side", "trained", "gradients MB", "moments MB", "step s", "peak MB"]
    print_table(header, [table_row(side, runs) for side, runs in results.items()])


def table_row(side: str, runs: list[dict[str, Any]]) -> list[str]:
    return [
        side,
        f"{runs[0]['trained']:,}",
        *(f"{runs[0][kind] / MEGABYTE:,.1f}" for kind in ("gradients", "moments")),
        f"{median(r['seconds'] for r in runs):.2f}",
        f"{median(r['peak'] for r in runs):,.0f}",
    ]


# ------------------------------------------------------------------------------ in the children

Step = Callable[[], None]
Sizes = Callable[[], dict[str, int]]  # how much is trained, and bytes


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, bytes of gradients and moments, and the peak in MB of 2**20 bytes."""
    shape = (task["batch"], task["context"] + 1)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], shape)
    make = our_step if task["side"].startswith("ours") else their_step
    step, sizes = make(task, ids)
    times = seconds(step, task["steps"])
    return {"seconds": median(times), "peak": peak_megabytes(), **sizes()}


def our_step(task: dict[str, Any], ids: np.ndarray) -> tuple[Step, Sizes]:
    from micrograd_gpt import optim
    from micrograd_gpt.gpt2 import GPT2, GPT2Config
    from micrograd_gpt.tuning.lora import add_lora, trained_parameters

    model = GPT2(GPT2Config(**SHAPE))
    if "LoRA" in task["side"]:
        add_lora(model, task["rank"], layer_names=task["layers"])
    optimizer = optim.AdamW(trained_parameters(model), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optim.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        loss.item()

    def sizes() -> dict[str, int]:
        return {
            "trained": sum(p.size for p in optimizer.parameters),
            "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
            "moments": sum(moment.nbytes for moment in (*optimizer.m, *optimizer.v)),
        }

    return step, sizes


def their_step(task: dict[str, Any], ids: np.ndarray) -> tuple[Step, Sizes]:
    import torch

    loss_of, parameters = their_model(task)
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    inputs, targets = torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()

    def sizes() -> dict[str, int]:
        states = [state[m] for state in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
        return {
            "trained": sum(p.numel() for p in trained),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "moments": sum(state.nbytes for state in states),
        }

    return step, sizes


def their_model(task: dict[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The loss of a peer's model as a function of ids and targets, and all its parameters."""
    from torch.nn import functional as F

    if task["side"].startswith("PyTorch"):
        from peer_gpt2 import PeerGPT2

        plain = PeerGPT2(**SHAPE)
        return plain, list(plain.parameters())
    import transformers

    quiet = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, **quiet))
    if "LoRA" in task["side"]:
        import peft

        settings = {"r": task["rank"], "lora_alpha": 2 * task["rank"], "fan_in_fan_out": True}
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=task["layers"], **settings)
        model = peft.get_peft_model(model, config)
    model.train()

    def loss_of(inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss_of, list(model.parameters())


if __name__ == "__main__":
    main()
