"""What a user is told while a script loads its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_gpt2 import make_model

from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.weights import language_model
from micrograd_gpt.weights.language_model import load_language_model

needs_compiler = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    make_model().save_pretrained(tmp_path, CharTokenizer("abcdefghijk"))
    return str(tmp_path)


@needs_compiler
def test_int8_is_faster_in_decoding_alone(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    for decoding, level in ((True, "c"), (False, "c"), (True, "numpy")):
        with at_most(level):
            load_language_model(folder, dtype="int8", decoding=decoding)
        is_faster = decoding and level == "c"
        assert ("not faster" in capsys.readouterr().err) is not is_faster


@pytest.mark.parametrize(
    ("dtype", "advice"), [("float32", "try --dtype int8"), ("int8", "try a smaller model")]
)
def test_where_the_weights_do_not_fit_something_smaller_is_named(
    folder: str, dtype: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(language_model, "build", too_much)
    with pytest.raises(UserError, match=advice):
        load_language_model(folder, dtype=dtype)
