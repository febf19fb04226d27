"""C compilers made for a test, and starting a Python process of its own that uses one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CC = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")  # this machine's
needs_cc = pytest.mark.skipif(
    os.name == "nt" or not CC, reason="there is no C compiler, or no shell to run a made one"
)

# Before code for run_apart(): the package that is a compiler seems not to be installed.
WITHOUT_PACKAGE = "import sys; sys.modules['ziglang'] = None\n"
REPORT = "from micrograd_gpt.kernels.in_c import compiler; print(ascii(compiler.report()))"


class QuickCompiler:
    """A C compiler that compiles the kernels in a moment, without optimizing, and counts how often.

    It knows no instructions for bfloat16, so that its report is the same on any processor.
    `first` is what it does before each compilation, as lines of shell.
    """

    def __init__(self, folder: Path, name: str = "quick-cc", first: str = "") -> None:
        self.path, self.log = folder / name, folder / f"{name}.log"
        self.log.write_text("")
        self.path.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo quick 1 && exit\n'
            # one.c is only whether it works
            f'case "$*" in */one.c*) ;; *) echo "$@" >> "$0.log" ;; esac\n'
            f'{first}\nexec {CC} "$@" -O0 -U__AVX512BF16__\n'
        )
        self.path.chmod(0o755)

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().splitlines())


def run_apart(
    code: str, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with these settings added to the environment."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
