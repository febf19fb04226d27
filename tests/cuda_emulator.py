"""The CUDA kernels on the CPU, compiled by g++ with tests/cuda_on_cpu/ in CUDA's place.

`Emulator.run` takes the place of `run` in kernels/in_cuda/modules.py. Then the functions of
kernels/in_cuda/ work on NumPy arrays, host code and device code alike. cuda_on_cpu.h says what is
the same as on a GPU and what is not.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.kernels.in_cuda import modules as cuda_modules

HEADERS = Path(__file__).parent / "cuda_on_cpu"
NEEDED = "#include <bit>\n#include <ucontext.h>\n_Float16 x = std::bit_cast<_Float16>((short)0);\n"
MISSING = "there is no g++ with C++20 and _Float16, which runs the CUDA kernels on the CPU"


def _compiler() -> str | None:
    """A g++ that can compile the emulator (GCC 12 or newer, on Linux), or None."""
    found = shutil.which("g++")
    command = [str(found), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if sys.platform != "linux" or found is None:
        return None
    tried = subprocess.run(command, input=NEEDED.encode(), capture_output=True)
    return found if tried.returncode == 0 else None


COMPILER = _compiler()


_COMPILED: dict[tuple[str, tuple[str, ...]], ctypes.CDLL] = {}  # by program and definitions


class Emulator:
    """Compiles each source with each set of options once in a process, into `folder`.

    `order` says in which order the threads of a block take turns: 0 upwards, 1 downwards, any other
    number shuffled with that seed. `launched` lists (file, kernel, options) of every launch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.order = folder, 0
        self.libraries: dict[tuple[str, tuple[str, ...]], ctypes.CDLL] = {}
        self.launched: list[tuple[str, str, tuple[str, ...]]] = []

    def run(
        self,
        file: str,
        kernel: str,
        options: tuple[str, ...],
        grid: tuple[int, ...],
        block: tuple[int, ...],
        values: list[Any],
    ) -> None:
        self.launched.append((file, kernel, options))
        launch = getattr(self.library(file, options), f"launch_{kernel}")
        launch.restype = ctypes.c_char_p
        held = [np.asarray(value) for value in values]  # each stays where it is until the end
        pointers = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
        sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        problem = launch(*sizes, pointers, ctypes.c_uint(self.order))
        assert problem is None, f"{kernel}: {problem.decode()}"

    def library(self, file: str, options: tuple[str, ...]) -> ctypes.CDLL:
        if (file, options) not in self.libraries:
            defines = tuple(option for option in options if option.startswith("-D"))
            program = self._program(file)
            if (program, defines) not in _COMPILED:
                _COMPILED[program, defines] = self._compiled(file, program, defines)
            self.libraries[file, options] = _COMPILED[program, defines]
        return self.libraries[file, options]

    def _compiled(self, file: str, program: str, defines: tuple[str, ...]) -> ctypes.CDLL:
        path = self.folder / f"{file}-{len(self.libraries)}.cpp"
        path.write_text(program)
        command = [str(COMPILER), "-std=c++20", "-O1", "-fno-strict-aliasing", "-shared"]
        # Else libraries share the statics of inline functions: shared memory of wrong sizes
        command += ["-fno-gnu-unique"]
        command += ["-fPIC", "-w", *defines, f"-I{HEADERS}", str(path), "-o", f"{path}.so"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        return ctypes.CDLL(f"{path}.so")

    @staticmethod
    def _program(file: str) -> str:
        return "\n".join(
            [
                '#include "cuda_on_cpu.h"',
                cuda_modules.source(file),
                '#include "written_in_ptx.h"',
                *(f"LAUNCHABLE({kernel})" for kernel in cuda_modules.declarations(file)),
            ]
        )
