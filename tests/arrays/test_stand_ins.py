"""How faster functions stand in for definitions: registration, choice and the environment."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import kernel_cases
import layer_cases
import numpy as np
import pytest

import micrograd_gpt
from micrograd_gpt import Tensor, gpt2, layers
from micrograd_gpt.arrays.stand_ins import (
    LEVELS,
    NotForMe,
    at_most,
    definition,
    highest_level,
    stands_in_for,
)

# ------------------------------------------------------------------- all that the package registers


def all_definitions() -> Iterator[Callable[..., Any]]:
    """Every definition of the package, once: functions of modules and methods of classes."""
    modules = [m for name, m in sys.modules.items() if name.startswith("micrograd_gpt.")]
    owners = modules + [c for m in modules for c in vars(m).values() if inspect.isclass(c)]
    found = [value for owner in owners for value in list(vars(owner).values())]
    yield from {id(f): f for f in found if hasattr(f, "stand_ins")}.values()


REGISTERED = [(f, level) for f in all_definitions() for level in f.stand_ins]


def test_the_package_registers_what_it_should() -> None:
    levels = {level for _, level in REGISTERED}
    assert {"fused", "numpy", "c"} <= levels <= {*LEVELS, "cuda"}
    assert layers.linear is micrograd_gpt.functional.linear  # whichever computes it


@pytest.mark.parametrize(("of", "level"), REGISTERED, ids=lambda v: getattr(v, "__name__", v))
def test_everything_that_stands_in_has_a_case_and_takes_the_same(
    of: Callable[..., Any], level: str
) -> None:
    """A new stand-in without a case in one of the tables fails here."""
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (of.stand_ins[level], of.definition)
    )
    assert ours == theirs
    if level == "fused":
        assert of in {case.layer for case in layer_cases.CASES.values()}
    elif level in ("numpy", "c"):  # those in CUDA are tested in kernels/test_gpu_kernels.py
        elsewhere = {gpt2.through_blocks, layers.embedding}  # kernels/test_token_step, _gpu_model
        assert of in kernel_cases.CASES or of in elsewhere


# ---------------------------------------------------------------------------------- registration


def a_definition() -> Any:
    """A definition that says which function answered; nothing stands in for it yet."""

    @definition
    def who(x: Any, factor: float = 1.0) -> str:
        return "definition"

    return who


def register(who: Any, level: str, takes: bool = True) -> None:
    @stands_in_for(who, level)
    def stand_in(x: Any, factor: float = 1.0) -> str:
        if not takes:
            raise NotForMe
        return level


X = np.ones(3, np.float32)


def test_the_fastest_that_is_registered_answers() -> None:
    who = a_definition()
    assert who(X) == "definition"
    for level in ("fused", "c", "numpy"):  # in any order
        register(who, level)
    assert who(X) == "c"
    for level, answer in zip(LEVELS, ("definition", "fused", "numpy", "c"), strict=True):
        with at_most(level):
            assert who(X) == answer and highest_level() == level
            with at_most("definitions"):
                assert who(X) == "definition"
            assert who(X) == answer
    assert who(X) == "c"


def test_what_is_not_for_one_goes_on_to_the_next() -> None:
    who = a_definition()
    for level in ("c", "fused"):
        register(who, level, takes=False)
    assert who(X) == "definition"
    register(who, "numpy")
    assert who(X) == "numpy"
    register(who, "numpy", takes=False)  # replaces the one before
    assert who(X) == "definition"


def test_any_other_error_of_a_stand_in_is_an_error() -> None:
    who = a_definition()

    @stands_in_for(who, "fused")
    def stand_in(x: Any, factor: float = 1.0) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        who(X)


def test_definition_and_stand_ins_can_be_reached() -> None:
    who = a_definition()
    register(who, "numpy")
    assert who.definition(X) == "definition" and who.stand_ins["numpy"](X) == "numpy"
    assert who.__name__ == "who" and list(inspect.signature(who).parameters) == ["x", "factor"]


def test_a_wrong_signature_is_a_type_error_that_names_both() -> None:
    who = a_definition()

    def other_name(x: Any, times: float = 1.0) -> str:
        return ""

    def other_default(x: Any, factor: float = 2.0) -> str:
        return ""

    def no_default(x: Any, factor: float) -> str:
        return ""

    def one_more(x: Any, factor: float = 1.0, out: Any = None) -> str:
        return ""

    for wrong in (other_name, other_default, no_default, one_more):
        with pytest.raises(TypeError, match=wrong.__name__) as caught:
            stands_in_for(who, "numpy")(wrong)
        both = str(caught.value)
        assert "('factor', (1.0,))" in both  # the definition's; and the stand-in's:
        assert all(name in both for name in inspect.signature(wrong).parameters)
    assert who.stand_ins == {} and who(X) == "definition"


def test_a_level_that_is_none_is_refused() -> None:
    who = a_definition()
    with pytest.raises(ValueError):
        at_most("fast").__enter__()
    with pytest.raises((KeyError, TypeError, ValueError)):
        register(who, "fast")


def test_a_library_s_value_error_carries_the_definition_s_name() -> None:
    @definition
    def product(x: Any) -> Any:
        return np.ones((2, 3)) @ x

    with pytest.raises(ValueError, match=r"^product: .*mismatch"):
        product(np.ones(4))
    with at_most("definitions"):
        with pytest.raises(ValueError, match=r"^linear: "):
            layers.linear(Tensor(np.ones((2, 3))), Tensor(np.ones((4, 5))))
        with pytest.raises(ValueError, match=r"^layer_norm: "):
            three, four = (Tensor(np.ones(n)) for n in (3, 4))
            layers.layer_norm(three, four, four)


def test_the_first_argument_says_where_it_runs_whatever_it_is() -> None:
    who = a_definition()
    register(who, "numpy")
    for first in (X, Tensor(X), [X, X], [(X, X)], [], 3, [1, 2], None):
        assert who(first) == "numpy"


# ------------------------------------------------------------------------------ the environment

SAY = """if True:
    import numpy as np
    import micrograd_gpt
    from micrograd_gpt.arrays.stand_ins import definition, highest_level, stands_in_for
    @definition
    def who(x):
        return "definitions"
    def fused(x): return "fused"
    def in_numpy(x): return "numpy"
    def in_c(x): return "c"
    for level, function in (("fused", fused), ("numpy", in_numpy), ("c", in_c)):
        stands_in_for(who, level)(function)
    print(highest_level(), who(np.ones(3)))
"""


def in_a_child(level: str, code: str = SAY) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MICROGRAD_GPT_KERNELS": level}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("level", ["definitions", "numpy", "c", ""])
def test_the_environment_chooses(level: str) -> None:
    result = in_a_child(level)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [level or "c"] * 2  # without it: the fastest there is


@pytest.mark.parametrize("level", ["fused", "C", "cuda", "fast", "numpy "])
def test_another_value_in_the_environment_is_one_clear_error(level: str) -> None:
    result = in_a_child(level)
    assert result.returncode != 0
    *_, last = result.stderr.splitlines()
    assert f"MICROGRAD_GPT_KERNELS is {level!r}" in last
    assert "definitions, numpy, c" in last
