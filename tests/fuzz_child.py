"""Runs cases of the fuzz test in this process, and says on stdout what goes wrong.

    python tests/fuzz_child.py PROGRAMS SEED FIRST COUNT

Before each case comes a line "case N", and before each level its name, so that it is known what
ended the process. After a case that goes wrong comes a line of JSON; after one that returned,
"returned" and the program's name. Case N runs program N modulo the number of programs: first with
the definitions alone, which says what is right, then with the kernels of each level.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
import warnings
from typing import Any

import fuzz_programs
import numpy as np
from fuzz_arguments import Arguments, GuardedNumPy

from micrograd_gpt import Tensor
from micrograd_gpt.arrays.stand_ins import LEVELS, NotForMe, at_most
from micrograd_gpt.tensor import Picked

NEVER = (SystemError, MemoryError, AssertionError, NotForMe)  # no answer to wrong arguments
TOLERANCE = {2: 0.1, 4: 1e-3, 8: 1e-8}  # by the bytes of a float; of the largest element
SMALL = 1e-20  # no error matters that is smaller


LONGEST = 30  # seconds for one case; it ends the process


class Wrong(Exception):
    """What a case did that it must not do."""


def flat(value: Any) -> list[Any]:
    """The arrays in nested results, copied."""
    if isinstance(value, Tensor):
        return flat(value.data)
    if isinstance(value, list | tuple | Picked):
        return [x for part in value for x in flat(part)]
    return [value if value is None or isinstance(value, str) else np.array(value)]


def outcome(
    program: Any, arguments: Arguments, level: str, kernels: GuardedNumPy
) -> list[Any] | Exception:
    """The arrays that the program returns and those that it may write, or what it raises."""
    os.write(1, f"{level}\n".encode())
    try:
        with at_most(level):
            results = program(arguments)
    except NEVER as error:
        if isinstance(error, SystemError) and "'at' of 'numpy.ufunc'" in str(error):
            return error  # NumPy's own: np.add.at forgets its IndexError for some arrays
        raise Wrong("".join(traceback.format_exception(error)[-4:])) from error
    except Exception as error:
        return error
    finally:
        for made in (arguments, kernels):
            try:
                made.check()
            except AssertionError as error:
                raise Wrong(str(error)) from error
    written = [] if arguments.disturbed else arguments.written
    return [*flat(results), *flat(written)]


def compare(results: list[Any], right: list[Any], arguments: Arguments) -> None:
    """Raise Wrong unless the results are equal within rounding."""
    if len(results) != len(right):
        raise Wrong(f"{len(results)} results in place of {len(right)}")
    size = max(largest(array) for array in (*right, *arguments.arrays, None))
    for i, (result, wanted) in enumerate(zip(results, right, strict=True)):
        unlike = np.shape(result) != np.shape(wanted)
        if not arguments.mixes_types:
            types = [getattr(x, "dtype", type(x)) for x in (result, wanted)]
            unlike = unlike or types[0] != types[1]
        if unlike or not isinstance(wanted, np.ndarray) or wanted.dtype.kind in "iubSU":
            is_wrong = unlike or not np.array_equal(result, wanted)
        else:
            is_wrong = not are_close(result, wanted, size, arguments)
        if is_wrong:
            raise Wrong(f"result {i} is\n{result!r}, not\n{wanted!r}")


def are_close(result: np.ndarray, wanted: np.ndarray, size: float, arguments: Arguments) -> bool:
    """Whether numbers are equal within rounding, where the largest of all numbers is `size`."""
    result, wanted = result.astype(np.complex128), wanted.astype(np.complex128)
    finite = np.isfinite(wanted)
    if not np.isfinite(result[finite]).all():
        return False
    if not arguments.masks and np.isfinite(result[~finite]).any():
        return False
    error = np.abs(result[finite] - wanted[finite]).max(initial=0)
    tolerance = TOLERANCE[arguments.float_bytes] * (largest(wanted) + size / 20) + SMALL
    return bool(error <= tolerance)


def largest(array: Any) -> float:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fcVO":
        return 0.0
    numbers = np.abs(array.astype(np.complex128))
    return float(numbers[np.isfinite(numbers)].max(initial=0))


def run(program: Any, seed: int, case: int, kernels: GuardedNumPy) -> tuple[str, list[str], bool]:
    """What went wrong ("": nothing), what the arguments were, and whether the program returned."""
    arguments = Arguments(seed, case)
    arguments.disturbs = False
    level = "no kernels"
    try:
        right = outcome(program, arguments, "definitions", kernels)
        for level in LEVELS if arguments.disturbed else LEVELS[1:]:
            again = Arguments(seed, case)
            got = outcome(program, again, level, kernels)
            if isinstance(got, Exception):
                continue
            if isinstance(right, Exception):
                raise Wrong(f"returned, where the definition raises {right!r}")
            compare(got, right, arguments)
    except Wrong as wrong:
        return f"{level}: {wrong}", arguments.notes, False
    return "", [], not isinstance(right, Exception)


def main(programs: dict[str, Any], seed: int, first: int, count: int) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    kernels, names = GuardedNumPy(), list(programs)
    for name, module in list(sys.modules.items()):
        if name.startswith(("micrograd_gpt.kernels.in_c.", "micrograd_gpt.kernels.in_numpy.")):
            vars(module).update({"np": kernels} if vars(module).get("np") is np else {})
    for case in range(first, first + count):
        os.write(1, f"case {case}\n".encode())
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        name = names[case % len(names)]
        problem, arguments, has_returned = run(programs[name], seed, case, kernels)
        if problem:
            found = {"case": case, "problem": problem, "arguments": arguments}
            os.write(1, f"{json.dumps(found)}\n".encode())
        elif has_returned:
            os.write(1, f"returned {name}\n".encode())


if __name__ == "__main__":
    main(getattr(fuzz_programs, sys.argv[1]), *map(int, sys.argv[2:]))
