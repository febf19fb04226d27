"""Thousands of random calls, right and wrong, of everything public, with the kernels of each level.

Shapes, types, layouts, values and numbers are spoiled at random; arrays are read-only, overlap, or
change while they are in use. Each call ends in the definitions' result or in an exception, never in
a signal, and writes nothing that it was not given to write. The cases run in child processes.

    FUZZ_CASES    how many cases to run (850, some five seconds; 10,000 take about a minute)
    FUZZ_SEED     another seed runs other cases (0)
    FUZZ_FIRST    the case to begin with (0)

A failure prints the command that repeats it. tests/fuzz_programs.py says what is called,
tests/fuzz_arguments.py with what, and tests/fuzz_child.py what is right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz_programs import MISTAKES, PROGRAMS, missing

WORDS = {  # in the description of each mistake
    "dies": "exit status",
    "writes beside its array": "bytes were written",
    "writes into its input": "bytes were written",
    "raises an error of the interpreter": "SystemError",
    "returns something else with kernels": "numpy: result 0 is",
    "returns where the definition raises": "returned, where the definition raises",
    "follows what is changed later": "result 0 is",
}

TESTS = Path(__file__).parent
AT_ONCE = 500  # cases in one child
ENOUGH = 10 * len(PROGRAMS)  # of so many cases, each program must have returned in some

CASES, SEED, FIRST = (
    int(os.environ.get(name, default))
    for name, default in (("FUZZ_CASES", 850), ("FUZZ_SEED", 0), ("FUZZ_FIRST", 0))
)


def child(programs: str, first: int, count: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TESTS / "fuzz_child.py", programs, str(SEED), str(first), str(count)]
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )


def fuzzed(programs: str, first: int, count: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """What went wrong in these cases, and how often each program returned."""
    problems, returned, end = [], Counter[str](), first + count
    while first < end:
        result = child(programs, first, min(AT_ONCE, end - first))
        lines = result.stdout.splitlines()
        cases = [int(line.split()[1]) for line in lines if line.startswith("case ")]
        problems += [json.loads(line) for line in lines if line.startswith("{")]
        returned.update(line.partition(" ")[2] for line in lines if line.startswith("returned "))
        assert cases, f"the child did not start:\n{result.stderr}"
        if result.returncode:
            alone = child(programs, cases[-1], 1).returncode
            how = f"{lines[-1]}: exit status {result.returncode}, {alone} when run alone"
            problems.append({"case": cases[-1], "problem": f"{how}:\n{result.stderr[:3000]}"})
        first = cases[-1] + 1
    return problems, returned


def described(problem: dict[str, Any], programs: str = "PROGRAMS") -> str:
    """What went wrong, in which program, and how to run it again."""
    names = list(PROGRAMS if programs == "PROGRAMS" else MISTAKES)
    case, arguments = problem["case"], problem.get("arguments", [])
    command = f"python tests/fuzz_child.py {programs} {SEED} {case} 1"
    heading = f"{names[case % len(names)]}, seed {SEED}, case {case}; again: {command}"
    return "\n".join([heading, problem["problem"], *(f"    {line}" for line in arguments)])


def test_everything_public_is_called() -> None:
    assert list(missing()) == []


def test_every_call_ends_in_a_right_result_or_an_exception() -> None:
    problems, returned = fuzzed("PROGRAMS", FIRST, CASES)
    text = "\n\n".join(map(described, problems[:20]))
    assert not problems, f"{len(problems)} of {CASES} cases went wrong\n\n{text}"
    if CASES >= ENOUGH:
        assert set(PROGRAMS) == {name for name, count in returned.items() if count}


# ------------------------------------------------------------- what goes wrong is found and named


@pytest.mark.slow
def test_mistakes_are_found_and_named_and_the_cases_after_a_death_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "SEED", 0)  # whether a mistake shows is up to the numbers
    count = 2 * len(MISTAKES)
    problems, returned = fuzzed("MISTAKES", 0, count)
    texts = [described(problem, "MISTAKES") for problem in problems]
    for name, words in WORDS.items():
        assert len([text for text in texts if name in text and words in text]) == 2, texts
    assert len(texts) == 2 * len(WORDS) and returned == {"is fine": 2}
