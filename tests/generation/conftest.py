"""What the tests of decoding share."""

from __future__ import annotations

import pytest
from small_gpt2 import TEXT, make_model, save_model

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.text.tokenizers import CharTokenizer


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make_model()


@pytest.fixture(scope="module")
def char_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model whose tokens are characters."""
    return save_model(tmp_path_factory.mktemp("char"), CharTokenizer.from_text(TEXT))
