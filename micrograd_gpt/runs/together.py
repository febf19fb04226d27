"""How the ranks that a launcher started begin and end together, with one message."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import NoReturn, TextIO

from mpi4py import MPI

from micrograd_gpt.runs.mpi import LINK_ERRORS, MPIRanks, RankDied
from micrograd_gpt.runs.ranks import Ranks, said_once, versions
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.machine import bound_to, usable_cores

SLURM = "SLURM_STEP_ID"  # which every process of srun has
PATIENCE = 1.0  # seconds that a rank leaves each rank before it to say what both have met
MOST_PATIENCE = 5.0  # seconds that it leaves them all


@contextmanager
def mpi_ranks(launcher: str, size: int, rank: int) -> Iterator[Ranks]:
    """The ranks that a launcher started, as started_ranks says."""
    if MPI.COMM_WORLD.size != size:
        library = MPI.Get_library_version().split(",")[0].strip()
        advice = f"use the {launcher} of that MPI"
        if SLURM in os.environ:
            advice = "Open MPI needs srun --mpi=pmix, MPICH srun --mpi=pmi2 (srun --mpi=list)"
        raise said_once(
            rank,
            f"{launcher} started {size} processes, of which mpi4py's {library} knows "
            f"{MPI.COMM_WORLD.size}: {advice}",
        )
    ranks, stderr = MPIRanks(launcher), sys.stderr
    try:
        with printing(ranks.is_first):
            ranks.check_same(versions())
            share_cores(ranks)
            notice_deaths(ranks)
            with leaving_together(ranks):
                yield ranks
            ranks.wait_for_all()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:  # as after --help
            raise
        end_all(ranks, error, stderr)


@contextmanager
def leaving_together(ranks: MPIRanks) -> Iterator[None]:
    """A rank whose flags end it, as --help does, answers where the others compare their flags."""
    try:
        yield
    except SystemExit as leaving:
        if not leaving.code:
            ranks.check_same({"--help or --version": "given"})
        raise


def notice_deaths(ranks: MPIRanks) -> None:
    """Have this rank say so where a launcher ends it by SIGTERM because another one has died."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        ranks.check_alive()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def printing(allowed: bool) -> Iterator[None]:
    """Within this block Python prints only if it is allowed to."""
    if allowed:
        yield
        return
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # closed below
    with nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def share_cores(ranks: MPIRanks) -> None:
    """Leave to each of a machine's ranks its share of the cores, unless OMP_NUM_THREADS says more.

    Some launchers bind each rank to cores of its own, others let all of them run on all cores.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    ours = bound_to()
    cores = set().union(*ranks.on_this_machine(ours))
    paid_for = usable_cores()  # fewer than we are bound to, if the control group has a quota
    shared = min(len(cores), paid_for if paid_for < len(ours) else len(cores))
    count = min(len(ours), max(1, shared // ranks.local_size))
    os.environ["OMP_NUM_THREADS"] = str(count)  # which the kernels read, and processes of ours


def end_all(ranks: MPIRanks, error: BaseException, stderr: TextIO) -> NoReturn:
    """End the processes of all ranks, after one message that says why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher ends the others meanwhile
    # They may be about to say the same; that a rank has died is noticed on its machine alone.
    before = ranks.living_before(here=isinstance(error, RankDied))
    time.sleep(min(MOST_PATIENCE, PATIENCE * before))
    who = "" if ranks.is_first else f"rank {ranks.rank} on {platform.node()}: "
    status = 1
    with redirect_stderr(stderr):
        if isinstance(error, UserError):
            status = 2
            say(f"error: {who}{error}")
        elif isinstance(error, LINK_ERRORS):
            say(f"error: {error}; {ranks.way_back()}")
        elif isinstance(error, KeyboardInterrupt):
            status = 130
        elif isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        else:
            say(f"error: {who}a bug, {type(error).__name__}; {ranks.way_back()}")
            traceback.print_exception(error)
    sys.stdout.flush()
    stderr.flush()
    if isinstance(error, Exception) and not isinstance(error, LINK_ERRORS):
        ranks.tell_first()
    MPI.COMM_WORLD.Abort(status)
    os._exit(status)  # with some MPIs it returns while the launcher ends the others
