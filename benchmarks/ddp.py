"""Two ranks beside PyTorch's DistributedDataParallel, and one process beside PyTorch's, in one run.

    python benchmarks/ddp.py                         # 124M at 2 × 256, and tiny at 12 × 64
    python benchmarks/ddp.py --work tiny --rounds 5

All sides take the same step, of the same windows, with one thread a process: forward, backward, the
sum of all ranks' gradients, clipping, AdamW (PyTorch's fused one). DDP sends gradients by gloo,
while its backward runs. Beside the tokens/s stands what matters where other programs use the same
cores: the processor time of a step, of all ranks together. Needs torch, mpi4py and mpirun.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from common import installed, median, print_table, processor
from ranks import ALLOWED, mpirun
from train import SHAPES

# size: (windows in a step, context, steps measured in each child)
WORK = {"124M": (2, 256, 3), "tiny": (12, 64, 50)}
OURS, SHARDED, PYTORCH = "ours", "ours, sharded", "PyTorch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=[*WORK, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-optimizer", action="store_true", help="in our ranks")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    if not installed("torch"):
        return
    print(f"{processor()}; Python {sys.version.split()[0]}; 1 thread a process\n")
    rows = []
    for size in WORK:
        if args.work in (size, "all"):
            rows += table_rows(size, args.rounds, SHARDED if args.shard_optimizer else OURS)
    head = ["work", "processes", "ours, tokens/s", "PyTorch", "ours is", "ours, processor s a step"]
    print_table([*head, "PyTorch", "ours is"], rows)


def table_rows(size: str, rounds: int, in_ranks: str) -> list[list[str]]:
    """A row for each number of processes: medians, over the rounds, of the median step."""
    sides = [(1, OURS), (1, PYTORCH), (2, in_ranks), (2, PYTORCH)]
    found: dict[tuple[int, str], list[list[float]]] = {side: [] for side in sides}
    for number in range(rounds):
        for ranks, side in sides:
            print(f"round {number + 1} of {rounds}: {size}, {ranks} × {side}", file=sys.stderr)
            found[ranks, side].append(measured(size, ranks, side))
    rows, (windows, context, _) = [], WORK[size]
    for ranks, ours_is in ((1, OURS), (2, in_ranks)):
        (ours, our_work), (theirs, their_work) = (
            np.median(found[ranks, side], axis=0) for side in (ours_is, PYTORCH)
        )
        speeds = [f"{windows * context / seconds:,.0f}" for seconds in (ours, theirs)]
        work = [f"{seconds:.3f}" for seconds in (our_work, their_work)]
        ratios = [f"**{ratio:.2f} ×**" for ratio in (theirs / ours, their_work / our_work)]
        name = f"{size}, {windows} × {context}"
        rows.append([name, str(ranks), *speeds, ratios[0], *work, ratios[1]])
    return rows


def measured(size: str, ranks: int, side: str) -> list[float]:
    """The seconds that a step takes, and the processor time of all processes in it."""
    command = [sys.executable, __file__, "--child", size, side]
    told = os.environ | ALLOWED | {"OMP_NUM_THREADS": "1"}
    if side != PYTORCH:
        commands = [[mpirun(), "-n", str(ranks), *command] if ranks > 1 else command]
        environments = [told]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        commands = [command] * ranks
        told |= {"WORLD_SIZE": str(ranks)}
        environments = [told | {"RANK": str(rank)} for rank in range(ranks)]
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        for command, env in zip(commands, environments, strict=True)
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return json.loads(outputs[0].splitlines()[-1])


# ------------------------------------------------------------------------------ in the children


def child(size: str, side: str) -> None:
    windows, context, _ = WORK[size]
    config = SHAPES[size]
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (windows, context + 1))
    if side == PYTORCH:
        in_ddp(size, config, ids)
    else:
        in_our_ranks(size, config, ids, sharded=side == SHARDED)


def report(size: str, step: Callable[[], object], total: Callable[[float], float]) -> None:
    """Measure steps and print the seconds and, by `total` of all ranks, the processor time of one.

    The first step is not counted.
    """
    walls, works = [], []
    for _ in range(WORK[size][2] + 1):
        wall, work = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        works.append(time.process_time() - work)
    work = total(median(works[1:]))
    print(json.dumps([median(walls[1:]), work]), flush=True)


def in_our_ranks(size: str, config: dict[str, int], ids: np.ndarray, sharded: bool) -> None:
    from micrograd_gpt import optim
    from micrograd_gpt.arrays.memory import keep_freed_memory
    from micrograd_gpt.gpt2 import GPT2, GPT2Config
    from micrograd_gpt.runs.ranks import started_ranks
    from micrograd_gpt.runs.sharding import ShardedAdamW, clip_grad_norm

    with started_ranks() as ranks:
        model = GPT2(GPT2Config(**config))
        adamw = partial(ShardedAdamW, ranks) if sharded else optim.AdamW
        optimizer = adamw(model.parameters(), lr=6e-4)
        ours = ids[list(ranks.share(range(len(ids))))]
        keep_freed_memory()

        def step() -> None:
            loss = model.loss(ours[:, :-1], ours[:, 1:]) * (1 / ranks.size)
            ranks.add_up_during(loss, optimizer.parameters)
            loss.backward()
            ranks.add_up(optimizer.parameters)
            clip_grad_norm(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ranks.join([loss.data])

        report(size, step, lambda work: sum(ranks.join([work])))


def in_ddp(size: str, config: dict[str, int], ids: np.ndarray) -> None:
    import torch
    from peer_gpt2 import PeerGPT2
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    model = PeerGPT2(**config)
    optimizer = model.optimizer(fused=True)
    distributed.init_process_group("gloo")
    run = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks > 1 else model
    share = len(ids) // ranks
    ours = torch.tensor(ids[rank * share : (rank + 1) * share])

    def step() -> None:
        loss = run(ours[:, :-1], ours[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks == 1)
        loss.item()

    def total(work: float) -> float:
        distributed.all_reduce(works := torch.tensor(work))
        return works.item()

    report(size, step, total)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
