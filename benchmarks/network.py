"""Steps of two ranks with a slow link between them: gradients after the backward, or during it.

    python benchmarks/network.py                     # at 500, 1000 and 2000 Mbit/s
    python benchmarks/network.py --rates 1000 --hold # then keeps the two machines, to try more

Two network namespaces of this machine stand for two machines: Open MPI starts a rank in each, and
they talk through TCP. Needs Linux, root, `ip` and `tc` (iproute2), mpi4py and Open MPI's mpirun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import median, print_table, processor
from ranks import ALLOWED, mpirun

from micrograd_gpt import optim
from micrograd_gpt.arrays.memory import keep_freed_memory
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs.ranks import Ranks, started_ranks

MACHINES = ("10.77.0.1", "10.77.0.2")  # namespaces, which are called as their addresses
# What Open MPI is to start a process on another machine with, instead of ssh: HOST COMMAND…
AGENT = """#!/bin/sh
machine=$1; shift
exec ip netns exec "$machine" unshare --uts sh -c "hostname $machine; $*"
"""
WAYS = ("not sent", "after", "during")
SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 4096, "n_positions": 256}
WINDOWS = 4  # of each rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=int, nargs="+", default=[500, 1000, 2000], help="Mbit/s")
    parser.add_argument("--steps", type=int, default=9, help="measured of each way")
    parser.add_argument("--hold", action="store_true", help="keep the machines until Enter")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    print(f"{processor()}; 2 ranks × 1 thread\n")
    rows = []
    with two_machines() as start:
        for rate in args.rates:
            shape_link(rate)
            command = [*start, sys.executable, __file__, "--child", str(args.steps)]
            result = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True)
            rows.append(table_row(rate, json.loads(result.stdout.splitlines()[-1])))
        print_table(
            ["Mbit/s", "backward", "sending", *WAYS, "at best", "hidden, of what can be"], rows
        )
        if args.hold:
            print("\n" + " ".join(f"{k}={v}" for k, v in environment(ours=False).items()))
            input(f"{' '.join(start)} COMMAND…\nEnter ends the two machines")


def table_row(rate: int, found: dict[str, float]) -> list[str]:
    """Seconds a step; at best the backward runs all the time that something is sent, or longer."""
    sending = found["after"] - found["not sent"]
    best = found["not sent"] + max(0, sending - found["backward"])
    hidden = (found["after"] - found["during"]) / (found["after"] - best)
    seconds = [found["backward"], sending, *(found[way] for way in WAYS), best]
    return [str(rate), *(f"{x:.2f} s" for x in seconds), f"{hidden:.0%}"]


# --------------------------------------------------------------------------- two machines in one


@contextmanager
def two_machines() -> Iterator[list[str]]:
    """How to start two ranks, one on each of two machines that last as long as the block."""
    ends = ("micrograd-one", "micrograd-two")
    with tempfile.TemporaryDirectory() as folder:
        agent = Path(folder, "agent")
        agent.write_text(AGENT, "utf-8")
        agent.chmod(0o755)
        try:
            for machine in MACHINES:
                run("ip netns add", machine)
            run("ip link add", ends[0], "type veth peer name", ends[1])
            for machine, end in zip(MACHINES, ends, strict=True):
                run("ip link set", end, "netns", machine, "name wire")
                run("ip -n", machine, "addr add", f"{machine}/24", "dev wire")
                for device in ("lo", "wire"):
                    run("ip -n", machine, "link set", device, "up")
            yield [
                *(str(agent), MACHINES[0], mpirun(), "--prtemca", "plm_ssh_agent", str(agent)),
                *("--host", ",".join(MACHINES), "-n", "2", "--map-by", "node"),
            ]
        finally:
            for machine in MACHINES:
                subprocess.run(["ip", "netns", "delete", machine], check=False)


def shape_link(rate: int) -> None:
    """Let no more than `rate` Mbit/s pass, in each direction."""
    for machine in MACHINES:
        shape = f"root tbf rate {rate}mbit burst 1m latency 50ms"
        run("tc -n", machine, "qdisc replace dev wire", shape)


def run(*words: str) -> None:
    subprocess.run(" ".join(words).split(), check=True)


def environment(ours: bool = True) -> dict[str, str]:
    told = ALLOWED | {"OMP_NUM_THREADS": "1"}
    return os.environ | told if ours else told


# ------------------------------------------------------------------------------ in the children


def child(steps: int) -> None:
    with started_ranks() as ranks:
        assert "2 machines" in ranks.description, ranks.description
        model = GPT2(GPT2Config(**SHAPE))
        optimizer = optim.AdamW(model.parameters(), lr=6e-4)
        windows = WINDOWS, SHAPE["n_positions"] + 1
        ids = np.random.default_rng(ranks.rank).integers(0, SHAPE["vocab_size"], windows)
        keep_freed_memory()
        found: dict[str, list[float]] = {"backward": [], **{way: [] for way in WAYS}}
        for _ in range(steps + 1):
            for way in WAYS:
                backward, whole = step(ranks, model, optimizer, ids, way)
                found[way].append(whole)
                if way == "not sent":
                    found["backward"].append(backward)
        print(json.dumps({name: median(times[1:]) for name, times in found.items()}))


def step(
    ranks: Ranks, model: GPT2, optimizer: optim.AdamW, ids: np.ndarray, way: str
) -> tuple[float, float]:
    """The seconds of a step's backward, and of the whole step."""
    ranks.join([0.0])  # all begin together
    start = time.perf_counter()
    loss = model.loss(ids[:, :-1], ids[:, 1:]) * (1 / ranks.size)
    if way == "during":
        ranks.add_up_during(loss, optimizer.parameters)
    before = time.perf_counter()
    loss.backward()
    backward = time.perf_counter() - before
    if way != "not sent":
        ranks.add_up(optimizer.parameters)
    optim.clip_grad_norm(optimizer.parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ranks.join([0.0])
    return backward, time.perf_counter() - start


if __name__ == "__main__":
    main()
