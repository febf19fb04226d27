"""NVIDIA's run-time compiler, called through ctypes; it needs neither a GPU nor a driver.

It comes as a Python package, `nvidia-cuda-nvrtc`, which the `test` extra installs on Linux.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

MISSING = 'nvidia-cuda-nvrtc is not installed: on Linux, pip install -e ".[test]" installs it'


@cache
def library() -> ctypes.CDLL | None:
    """The library libnvrtc from the installed package, or None."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    return None


def compile_to_ptx(source: str, name: str, options: list[str]) -> tuple[str, str]:
    """A source's PTX and the compiler's log; AssertionError with the log if it does not compile."""
    nvrtc = library()
    assert nvrtc is not None, MISSING
    program = ctypes.c_void_p()
    arguments = (source.encode(), name.encode(), 0, None, None)
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), *arguments) == 0
    try:
        encoded = [option.encode() for option in options]
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        status = nvrtc.nvrtcCompileProgram(program, len(encoded), array)
        log = _text(nvrtc, program, "ProgramLog")
        assert status == 0, log
        return _text(nvrtc, program, "PTX"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, text) == 0
    return text.value.decode()
