"""The C kernels, compiled once by the machine's own C compiler and kept in the cache folder.

Nothing has to be installed for them. Where there is no compiler, `library()` returns None, the
kernels in NumPy do the work, and `report()` says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from micrograd_gpt.arrays.stand_ins import described_by
from micrograd_gpt.kernels.in_numpy.threads import cores
from micrograd_gpt.support.download import cache_folder
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import written_whole

SOURCES = Path(__file__).parent / "sources"
LIBRARY_SUFFIX = ".dll" if os.name == "nt" else ".so"
# -fopenmp-simd: vectorised sums where the source allows them, without OpenMP's own threads.
# The last two options allow sqrt and rounding to be single instructions.
OPTIONS = "-O3 -std=gnu11 -shared -fPIC -pthread -fopenmp-simd -fno-math-errno -fno-trapping-math"
# Options for this very processor: the first set that the compiler accepts is used.
TARGETS = ("-march=native -mprefer-vector-width=512", "-march=native", "-mcpu=native", "")

PATIENCE = 120  # seconds for one call of the compiler; it takes a few

_LOADING = threading.Lock()
_READY: dict[int, tuple[ctypes.CDLL | None, str]] = {}  # by process id


def library() -> ctypes.CDLL | None:
    """The compiled kernels, with their threads started, or None where there are none."""
    return _loaded()[0]


@described_by
def report() -> str:
    """Which kernels run on the CPU; where not the compiled ones, why."""
    return _loaded()[1]


def _loaded() -> tuple[ctypes.CDLL | None, str]:
    process = os.getpid()
    if process not in _READY:
        with _LOADING:  # two threads at once would compile them twice
            if process not in _READY:
                _READY[process] = _load()
    return _READY[process]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and the report for this process; a forked child has to start its own threads."""
    try:
        compiler = _compiler()
        if compiler is None:
            return None, "NumPy (there is no C compiler: with one they are faster)"
        version = next(iter(_output([*compiler, "--version"]).splitlines()), "an unnamed compiler")
        found = _kept(compiler, version)
        found.use_cores(ctypes.c_int64(cores()))
    # ValueError: $CC has an open quote. AttributeError: the library hides its functions.
    except (OSError, subprocess.SubprocessError, UserError, ValueError, AttributeError) as problem:
        return None, f"NumPy (the C kernels cannot be compiled: {_reason(problem)})"
    return found, f"C, compiled by {version}"


def _compiler() -> list[str] | None:
    """The command of a C compiler: the one that $CC names, else the system's; None without one."""
    named = shlex.split(os.environ.get("CC", ""))
    if named and shutil.which(named[0]):
        return named
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return [found] if found else None


def _kept(compiler: list[str], version: str) -> ctypes.CDLL:
    """The library for these sources, compiler and processor, compiled unless it is kept already."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    texts = [source.read_text("utf-8") for source in sources]
    for target in TARGETS:
        key = [*compiler, version, OPTIONS, target, _processor(), *texts]
        name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
        path = cache_folder() / "kernels" / (name + LIBRARY_SUFFIX)
        if path.is_file():
            with suppress(OSError):  # damaged: compile it again
                return ctypes.CDLL(str(path))
        try:
            return _compile(
                [*compiler, *OPTIONS.split(), *target.split()],
                [str(source) for source in sources if source.suffix == ".c"],
                path,
            )
        except subprocess.CalledProcessError:  # the compiler does not know this target
            if target == TARGETS[-1]:
                raise
    raise AssertionError("TARGETS is empty")


def _compile(command: list[str], sources: list[str], path: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / path.name
        _output([*command, *sources, "-o", str(compiled), "-lm"])
        try:
            with written_whole(path) as file:
                file.write(compiled.read_bytes())
        except UserError:  # it cannot be kept: the next process compiles again
            return ctypes.CDLL(str(compiled))
    return ctypes.CDLL(str(path))


def _output(command: list[str]) -> str:
    return subprocess.run(
        command,
        check=True,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=PATIENCE,
    ).stdout


def _processor() -> str:
    """What the compiler may have fitted the code to: the processor's name and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux: the machine's own name stands for its features
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def _reason(problem: Exception) -> str:
    said = getattr(problem, "stderr", "") or str(problem)
    return next((line for line in said.splitlines() if "error" in line), said.strip()[:200])
