"""The C kernels, compiled once by the machine's own C compiler and kept (kept_library.py).

Where the machine has none, the package `ziglang` is one, which the extra `compiler` installs: Zig
contains Clang, and the headers of each system's C library. Without any compiler `library()` returns
None, the kernels in NumPy do the work, and `report()` says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from micrograd_gpt.arrays.precision import multiplies
from micrograd_gpt.arrays.stand_ins import described_by, highest_level
from micrograd_gpt.kernels.in_c.kept_library import keep, kept, load, places
from micrograd_gpt.kernels.in_numpy.threads import cores
from micrograd_gpt.support.cli import say

SOURCES = Path(__file__).parent / "sources"
LIBRARY_SUFFIX = ".dll" if os.name == "nt" else ".so"
# -fopenmp-simd: vectorised sums where the source allows them, without OpenMP's own threads.
# The last two options allow sqrt and rounding to be single instructions.
OPTIONS = "-O3 -std=gnu11 -shared -fPIC -pthread -fopenmp-simd -fno-math-errno -fno-trapping-math"
# Options for this very processor: the first set that the compiler accepts is used.
TARGETS = ("-march=native -mprefer-vector-width=512", "-march=native", "-mcpu=native", "")

NOT_FOUND = "which is not found"
NO_COMPILER = 'there is no C compiler: with one they are faster: pip install -e ".[compiler]"'
# What the processor multiplies bfloat16 with, as bfloat16.c numbers its ways
WAYS = ("float32", "avx512_bf16", "AMX tiles")
READ_AS_THEY_ARE = ("bfloat16", "float16", "int8")  # by narrow.c, at a rate that memory sets
# Seconds for one call of the compiler. It takes a few; Zig, which first compiles parts of its own,
# more than a minute where the machine is busy.
PATIENCE = 300

_LOADING = threading.Lock()
_LOADED: tuple[ctypes.CDLL | None, str] | None = None  # None until something asks for it


def library() -> ctypes.CDLL | None:
    """The compiled kernels, with their threads started, or None where there are none."""
    return _loaded()[0]


@described_by
def report() -> str:
    """Which kernels run on the CPU; where not the compiled ones, why."""
    return _loaded()[1]


@multiplies
def multiplies_fast(dtype: str, decoding: bool) -> bool:
    """Whether the processor itself multiplies numbers of this type of half precision, or for
    decoding, whether there are kernels that read weights of this type as they are."""
    if highest_level() != "c" or (found := library()) is None:
        return False
    return (dtype in READ_AS_THEY_ARE and decoding) or (dtype == "bfloat16" and _way(found) > 0)


def _way(found: ctypes.CDLL) -> int:
    """The number, in WAYS, of how the library multiplies bfloat16."""
    return int(found.bfloat16_products(len(WAYS) - 1))


def _loaded() -> tuple[ctypes.CDLL | None, str]:
    global _LOADED
    if _LOADED is None:
        with _LOADING:  # two threads at once would compile them twice
            if _LOADED is None:
                found, words = _find()
                if found is not None:
                    found.use_cores(cores())
                if os.environ.get("CC") and (found is None or NOT_FOUND in words):
                    say(f"note: the compiler of CC is not used: CPU kernels: {words}")
                _LOADED = found, words
    return _LOADED


def _after_fork() -> None:
    """A child has only the thread that forked: none of the kernels', and none with the lock."""
    global _LOADING, _LOADED
    _LOADING, _LOADED = threading.Lock(), None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache  # a forked child has what its parent has
def _find() -> tuple[ctypes.CDLL | None, str]:
    """The library, kept or compiled now, and the report."""
    notes: list[str] = []
    try:
        made = _compiled_by_the_first(notes)
        if made is None:
            return None, _words("NumPy", NO_COMPILER, *notes)
        compiled, version = made
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        return None, _words(
            "NumPy", f"the C kernels cannot be compiled: {_reason(problem)}", *notes
        )
    try:
        found = load(compiled)
        found.use_cores.argtypes = found.bfloat16_products.argtypes = [ctypes.c_int64]
        notes += [f"bfloat16 by {WAYS[way]}"] if (way := _way(found)) else []
    except (OSError, AttributeError) as problem:  # AttributeError: the library hides its functions
        return None, _words("NumPy", f"the C kernels cannot be loaded: {_reason(problem)}", *notes)
    return found, _words(f"C, compiled by {version}", *notes)


def _compiled_by_the_first(notes: list[str]) -> tuple[bytes, str] | None:
    """The library and the version of its compiler: the one that $CC names, else the system's if it
    works, else an installed package's; None without one.
    """
    if named := _named_compiler(notes):
        return _compiled_by(named, notes)
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found:
        try:
            return _compiled_by([found], notes)
        except (OSError, subprocess.SubprocessError) as problem:
            # macOS has one that only advises; others lack the C library's headers, or a linker
            notes.append(f"{found} does not work: {_reason(problem)}")
    if not sys.executable or not importlib.util.find_spec("ziglang"):
        return None
    return _compiled_by([sys.executable, "-m", "ziglang", "cc"], notes)


def _named_compiler(notes: list[str]) -> list[str]:
    """The command that $CC names; empty where it names none that is there, which is noted."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise ValueError(f"CC is {os.environ['CC']!r}: {error}") from error
    if named and not shutil.which(named[0]):
        notes.append(f"CC names {named[0]}, {NOT_FOUND}")
        return []
    return named


def _compiled_by(compiler: list[str], notes: list[str]) -> tuple[bytes, str]:
    """The library, kept or compiled now, and the compiler's version; an error where it fails."""
    version = _version(compiler)
    return _kept_or_compiled(compiler, version, notes), version


def _version(compiler: list[str]) -> str:
    """The first line that a compiler says of itself; an error where it does not work."""
    return next(iter(_output([*compiler, "--version"]).splitlines()), "an unnamed compiler")


def _kept_or_compiled(compiler: list[str], version: str, notes: list[str]) -> bytes:
    """The library for these sources, compiler and processor, compiled unless it is kept already."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    texts = [source.read_text("utf-8") for source in sources]
    for target in TARGETS:
        key = [*compiler, version, OPTIONS, target, *platform.libc_ver(), _processor(), *texts]
        digest = hashlib.sha256("\0".join(key).encode("utf-8", "surrogateescape")).hexdigest()
        name = digest[:16] + LIBRARY_SUFFIX
        if (found := kept(name)) is not None:
            return found
        if target == TARGETS[0]:
            _check(compiler)
        try:
            compiled = _compile(
                [*compiler, *OPTIONS.split(), *target.split()],
                [str(source) for source in sources if source.suffix == ".c"],
            )
        except subprocess.CalledProcessError:  # the compiler does not know this target
            if target == TARGETS[-1]:
                raise
        else:
            if not keep(name, compiled):
                folders = " or ".join(map(str, places()))
                notes.append(f"compiled again at every start: they cannot be kept in {folders}")
            return compiled
    raise AssertionError("TARGETS is empty")


def _check(compiler: list[str]) -> None:
    """An error where a compiler makes no library of a single line, nor then of all sources."""
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "one.c").write_text("int one(void) { return 1; }\n")
        _compile([*compiler, "-shared", "-fPIC"], [str(source)])


def _compile(command: list[str], sources: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / f"kernels{LIBRARY_SUFFIX}"
        _output([*command, *sources, "-o", str(compiled), "-lm"])
        if not compiled.exists():
            raise FileNotFoundError(f"{command[0]} wrote no library")
        return compiled.read_bytes()


def _output(command: list[str]) -> str:
    """What a compiler prints; it gets no input, which belongs to the user's program."""
    with _zig_cache(command) as settings:
        return subprocess.run(
            command,
            check=True,
            env=settings | os.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE,
        ).stdout


@contextmanager
def _zig_cache(command: list[str]) -> Iterator[dict[str, str]]:
    """Settings that let Zig keep what it makes in a folder that is removed, not in a home, which
    not every user has; none for other compilers.
    """
    if not any("zig" in Path(word).name for word in command):
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        yield {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}


def _processor() -> str:
    """What the compiler may have fitted the code to: the processor's name and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:  # not Linux: the machine's own name stands for its features
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def _words(which: str, *notes: str) -> str:
    """The report in one line that can be printed, even where it names a path that is not UTF-8."""
    line = f"{which} ({'; '.join(notes)})" if notes else which
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


def _reason(problem: Exception) -> str:
    said = (getattr(problem, "stderr", "") or str(problem)).strip()
    lines = said.splitlines() or [type(problem).__name__]
    return next((line for line in lines if "error" in line), lines[0][:200])
