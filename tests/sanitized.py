"""The tests of the C kernels, on kernels that stop where memory or arithmetic goes wrong.

    python tests/sanitized.py                   # all tests that call kernels in C
    python tests/sanitized.py -k attention      # any flags of pytest

AddressSanitizer reports what is read or written outside of the memory that C or NumPy allocated,
UndefinedBehaviorSanitizer arithmetic that C does not define. A report ends the process and is
printed, and the exit status is not 0. Needs Linux and GCC with its sanitizers.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    *("kernels/test_kernels.py", "kernels/test_compiled_kernels.py", "kernels/test_token_step.py"),
    *("kernels/test_c_numbers.py", "kernels/test_c_threads.py", "kernels/test_shapes.py"),
    *("kernels/test_c_bfloat16.py", "kernels/test_c_narrow.py", "test_fuzz.py"),
)
# These look at how much memory a process has, and a sanitizer takes more of it by far.
LEFT_OUT = (
    "kernels/test_c_threads.py::test_too_little_memory_is_an_error_and_the_threads_live_on",
    "kernels/test_compiled_kernels.py::test_a_thread_that_ends_gives_its_memory_back",
)
OPTIONS = (
    "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
    " -fno-omit-frame-pointer -g -O1"
)
WHICH_KERNELS = "from micrograd_gpt.arrays import stand_ins; print(stand_ins.report())"


def main() -> int:
    flags = sys.argv[1:]
    if {"-h", "--help"} & set(flags):
        print(__doc__)
        return 0
    gcc = shutil.which("gcc")
    if gcc is None or not sys.platform.startswith("linux"):
        print("error: sanitized.py needs Linux and gcc", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = prepare(folder, gcc)
        kernels = run(
            [sys.executable, "-c", WHICH_KERNELS], environment, stdout=subprocess.PIPE
        ).stdout
        if not kernels.startswith("C, compiled by"):
            print(f"error: there are no sanitized kernels: {kernels.strip()}", file=sys.stderr)
            return 2
        tests = [f"tests/{test}" for test in TESTS if (ROOT / "tests" / test).exists()]
        without = [f"--deselect=tests/{test}" for test in LEFT_OUT]
        # GCC's UndefinedBehaviorSanitizer writes to stderr whatever log_path says: let it through.
        command = [sys.executable, "-m", "pytest", "--capture=sys", *tests, *without, *flags]
        status = run(command, environment).returncode
        reports = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("report.*"))]
    if reports or status:
        print(*reports, sep="\n")
        return status or 1
    print("no sanitizer reported anything")
    return 0


def prepare(folder: Path, gcc: str) -> dict[str, str]:
    """Write a compiler that sanitizes into this folder; the environment in which Python uses it."""
    compiler = folder / "sanitizing-gcc"
    # The options go last, as -O1 is to count. The compiler itself is not to run sanitized.
    compiler.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.quote(gcc)} "$@" {OPTIONS}\n')
    compiler.chmod(0o755)
    find = [gcc, "-print-file-name=libasan.so"]
    library = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    common = f"log_path={folder / 'report'}:halt_on_error=1"
    return os.environ | {
        "CC": str(compiler),
        "LD_PRELOAD": library,
        "XDG_CACHE_HOME": str(folder),  # these kernels are not for other processes
        "PYTHONMALLOC": "malloc",  # so that each of Python's objects is guarded, too
        # Python frees little at its end. An array that is too large is a MemoryError.
        "ASAN_OPTIONS": f"{common}:detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
    }


def run(
    command: list[str], environment: dict[str, str], **settings: int
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, **settings)


if __name__ == "__main__":
    sys.exit(main())
