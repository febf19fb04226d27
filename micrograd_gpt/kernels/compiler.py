"""The C kernels, compiled once by the machine's own C compiler and kept.

Nothing has to be installed for them: where there is no compiler, `library()` is None, NumPy's
kernels do the work, and `report()` says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from micrograd_gpt.download import cache_folder
from micrograd_gpt.errors import UserError
from micrograd_gpt.files import written_whole
from micrograd_gpt.kernels.threads import cores

SOURCES = Path(__file__).parent / "c"
# -fopenmp-simd: sums in vectors where the source allows it, without OpenMP's own threads.
# The last two let sqrt and rounding be single instructions.
OPTIONS = "-O3 -std=gnu11 -shared -fPIC -pthread -fopenmp-simd -fno-math-errno -fno-trapping-math"
# For this very processor; the first set that the compiler takes.
TARGETS = ("-march=native -mprefer-vector-width=512", "-march=native", "-mcpu=native", "")


def library() -> ctypes.CDLL | None:
    """The compiled kernels, their threads at work, or None where they cannot be had."""
    return _load(os.getpid())[0]


def report() -> str:
    """Which kernels run on the CPU, and if not the compiled ones, why."""
    return _load(os.getpid())[1]


@cache
def _load(process: int) -> tuple[ctypes.CDLL | None, str]:
    """The library and the report, for this process: a forked child has to start threads anew."""
    if os.environ.get("MICROGRAD_GPT_KERNELS") == "numpy":
        return None, "NumPy (as MICROGRAD_GPT_KERNELS asks)"
    compiler = _compiler()
    if compiler is None:
        return None, "NumPy (there is no C compiler: with one they are faster)"
    try:
        version = _output([*compiler, "--version"]).splitlines()[0]
        loaded = _kept(compiler, version)
    except (OSError, subprocess.SubprocessError, UserError) as problem:
        return None, f"NumPy (the C kernels cannot be compiled: {_reason(problem)})"
    loaded.use_threads(ctypes.c_int64(cores()))
    return loaded, f"C, compiled by {version}"


def _compiler() -> list[str] | None:
    """The command of a C compiler: the one $CC names, or the system's."""
    named = shlex.split(os.environ.get("CC", ""))
    if named and shutil.which(named[0]):
        return named
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return [found] if found else None


def _kept(compiler: list[str], version: str) -> ctypes.CDLL:
    """The library for these sources, this compiler and this processor, compiled if it is new."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    key = [*compiler, version, OPTIONS, *TARGETS, _processor(), *(s.read_text() for s in sources)]
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"{name}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    if path.is_file():
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / path.name
        _compile(compiler, [str(s) for s in sources if s.suffix == ".c"], compiled)
        try:
            with written_whole(path) as file:
                file.write(compiled.read_bytes())
        except UserError:  # nowhere to keep it: the next process compiles again
            return ctypes.CDLL(str(compiled))
    return ctypes.CDLL(str(path))


def _compile(compiler: list[str], sources: list[str], result: Path) -> None:
    for target in TARGETS:
        options = [*OPTIONS.split(), *target.split()]
        try:
            _output([*compiler, *options, *sources, "-o", str(result), "-lm"])
            return
        except subprocess.CalledProcessError:
            if target == TARGETS[-1]:
                raise


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _processor() -> str:
    """What the compiler may have fitted the code to: the processor's name and its abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def _reason(problem: Exception) -> str:
    said = getattr(problem, "stderr", "") or str(problem)
    return next((line for line in said.splitlines() if "error" in line), said.strip()[:200])
