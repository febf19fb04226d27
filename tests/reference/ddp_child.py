"""One of several ranks that compares its gradients with those of PyTorch's DDP on the same split.

mpirun -n 2 python ddp_child.py FOLDER      # FOLDER holds a GPT-2, and a file for the meeting
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.runs.ranks import started_ranks

BATCHES, WINDOWS, CONTEXT = 4, 3, 20  # of a step


def main() -> None:
    folder = Path(sys.argv[1])
    with started_ranks() as ranks:
        ours = GPT2.from_pretrained(folder)
        vocabulary = ours.config.vocab_size
        shape = (BATCHES, WINDOWS, CONTEXT + 1)
        batches = np.random.default_rng(0).integers(0, vocabulary, shape)
        mine = [batches[i] for i in ranks.share(range(BATCHES))]

        for batch in mine:
            (ours.loss(batch[:, :-1], batch[:, 1:]) * (1 / BATCHES)).backward()
        ranks.add_up(ours.parameters())

        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=ranks.rank, world_size=ranks.size
        )
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
        parallel = torch.nn.parallel.DistributedDataParallel(theirs)
        rows = torch.tensor(np.concatenate(mine))
        logits = parallel(rows[:, :-1]).logits
        # DDP averages over the ranks, which have as many tokens each.
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()

        found = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            reference = found[name].grad.numpy()
            error = np.abs(parameter.grad - reference).max() / np.abs(reference).max()
            assert error < 1e-5, (name, error)
        print(f"{len(found)} gradients are DDP's")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
