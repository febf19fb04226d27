"""The microscope's page as a file: what part of a text it shows, what it holds, that it is safe.

How it behaves in a browser is tested in tests/reference/test_microscope_in_browser.py.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt import no_grad
from micrograd_gpt.generation.context import Continuation
from micrograd_gpt.generation.microscope import observe
from micrograd_gpt.generation.microscope_page import (
    Part,
    choose_part,
    most_tokens,
    page,
    page_data,
    write_page,
)
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.tokenizers import CharTokenizer, Tokenizer, WordTokenizer, make_tokenizer
from micrograd_gpt.weights.names import config_named
from micrograd_gpt.weights.releases import RELEASES

LETTERS = CharTokenizer(list("abcdefghij\n"))
MODEL = make_model(n_positions=24)
IDS = np.random.default_rng(0).integers(0, 11, 20).tolist()


def data_of(html: str) -> dict[str, Any]:
    """The numbers in a page, as its script reads them."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def text_of(ids: list[int], n_prompt: int = 3) -> Continuation:
    return Continuation(ids=ids, n_prompt=n_prompt)


def data_for(part: Part, ids: list[int] = IDS, tokenizer: Tokenizer = LETTERS) -> dict[str, Any]:
    return data_of(page(page_data(MODEL, tokenizer, text_of(ids), part)))


def weights(encoded: str) -> np.ndarray:
    """Attention weights as the page holds them, flat."""
    roots = np.frombuffer(base64.b64decode(encoded), np.uint8)
    return (roots / 255) ** 2


# -------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("length", "n_prompt", "part"),
    [
        (60, 10, Part(0, 0, 60)),  # all of it
        (200, 10, Part(0, 0, 143)),  # the beginning, as most of the text is new
        (200, 190, Part(0, 57, 200)),  # the end, as most of the text is the prompt
        (900, 500, Part(0, 429, 572)),  # at most half of it is prompt
        (1100, 1000, Part(0, 881, 1024)),  # only what one window of the model's holds
        (2000, 1100, Part(256, 1029, 1172)),  # a prompt longer than the window
    ],
)
def test_the_part_that_is_shown(length: int, n_prompt: int, part: Part) -> None:
    assert choose_part(length, n_prompt, GPT2Config()) == part


@pytest.mark.slow
def test_the_largest_page_of_124m_is_below_3_mb() -> None:
    tokens = most_tokens(GPT2Config())
    assert tokens >= 64
    # A narrow model's page has as many numbers
    model = make_model(n_layer=12, n_head=12, n_embd=24, vocab_size=9000, n_positions=1024)
    ids = np.random.default_rng(0).integers(0, 9000, tokens).tolist()
    gpt2 = make_tokenizer("gpt2", "")
    html = page(page_data(model, gpt2, text_of(ids), Part(0, 0, tokens)))
    assert 2_000_000 < len(html.encode("utf-8")) < 2_900_000


@pytest.mark.parametrize("size", RELEASES)
def test_every_size_shows_a_few_dozen_tokens(size: str) -> None:
    config = config_named(size)
    maps = config.n_layer * config.n_head * most_tokens(config) ** 2 / 2
    assert most_tokens(config) >= 48 and maps < 1_500_000


# ----------------------------------------------------------------------------------- the numbers


def test_the_probabilities_are_the_model_s() -> None:
    data = data_for(Part(0, 0, 20))
    with no_grad():
        logits = MODEL(np.array([IDS])).numpy()[0, :-1].astype(float)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)  # (N - 1, V)
    found, own = data["predictions"], expected[np.arange(19), IDS[1:]]
    np.testing.assert_allclose(found["probability"], own, rtol=1e-3)
    np.testing.assert_allclose(
        found["entropy"], -(expected * np.log2(expected)).sum(axis=-1), rtol=1e-3
    )
    assert found["rank"] == (1 + (expected > own[:, None]).sum(axis=-1)).tolist()
    for k, top in enumerate(found["top"]):  # all ten others, the likeliest first
        assert sorted([*top, IDS[k + 1]]) == list(range(11))
        np.testing.assert_allclose(found["top_probability"][k], expected[k, top], rtol=1e-3)
        assert found["top_probability"][k] == sorted(found["top_probability"][k], reverse=True)


def test_the_last_layer_of_the_lens_says_what_the_model_says() -> None:
    data = data_for(Part(0, 0, 20))
    assert len(data["lens"]) == 3  # the embeddings and two layers
    assert data["lens"][-1]["probability"] == data["predictions"]["probability"]
    assert data["lens"][0]["probability"] != data["predictions"]["probability"]


def test_the_parts_sum_to_the_logit_as_the_page_has_them() -> None:
    parts = data_for(Part(0, 0, 20))["parts"]
    logit = np.array(parts.pop("logit"))
    total = sum(np.array(values).reshape(-1, 19).sum(axis=0) for values in parts.values())
    np.testing.assert_allclose(total, logit, atol=2e-3 * np.abs(logit).max())


def test_sizes_are_lengths_in_the_residual_stream() -> None:
    sizes, seen = data_for(Part(0, 0, 20))["sizes"], observe(MODEL, IDS)
    np.testing.assert_allclose(
        sizes["stream"], np.sqrt((seen.stream[:, :-1] ** 2).sum(axis=-1)), rtol=1e-3
    )
    assert np.shape(sizes["attention"]) == np.shape(sizes["mlp"]) == (2, 19)


def test_a_part_of_a_text_has_the_numbers_of_the_whole() -> None:
    """Attention to tokens that are not shown is summed up, so that none is lost."""
    whole, part = data_for(Part(0, 0, 20)), data_for(Part(0, 6, 16))
    assert part["left_out"] == {"unread": 0, "before": 6, "after": 4}
    assert part["ids"] == IDS[6:16]
    # Up to rounding: a shorter text is read in another order of additions
    for name in ("probability", "entropy"):
        np.testing.assert_allclose(
            part["predictions"][name], whole["predictions"][name][6:15], rtol=2e-3
        )
    shown = observe(MODEL, IDS).attention[:, :, 6:16, :16]
    rows, columns = np.tril_indices(10)
    maps = weights(part["attention"]["maps"]).reshape(2, 2, -1)
    np.testing.assert_allclose(maps, shown[:, :, rows, 6 + columns], atol=5e-3)
    earlier = weights(part["attention"]["earlier"]).reshape(2, 2, 10)
    np.testing.assert_allclose(earlier, shown[..., :6].sum(axis=-1), atol=5e-3)


def test_the_window_is_the_one_that_the_model_read() -> None:
    data = data_for(Part(4, 4, 20))
    with no_grad():
        logits = MODEL(np.array([IDS[4:]])).numpy()[0, :-1].astype(float)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    own = expected[np.arange(15), IDS[5:]]
    np.testing.assert_allclose(data["predictions"]["probability"], own, rtol=1e-3)
    assert data["left_out"] == {"unread": 4, "before": 0, "after": 0}


def test_ids_that_stand_for_no_token_are_not_shown() -> None:
    """A model may have more ids than its tokenizer has tokens."""
    letters = CharTokenizer(list("abcdefgh\n"))
    ids = [i % 9 for i in IDS]
    data = data_for(Part(0, 0, 20), ids, letters)
    assert {int(i) for i in data["tokens"]} <= set(range(9))
    assert all(len(top) == 8 for top in [row[:8] for row in data["predictions"]["top"]])


# ------------------------------------------------------------------------------------ the file


def test_a_token_cannot_end_the_script_or_begin_another() -> None:
    hostile = ["</script><script>alert(1)</script>", "<!--", "&lt;", "{{data}}", "\u2028"]
    words = WordTokenizer.from_text("a b c d")
    words.tokens = [word.encode() for word in [*hostile, *"abcdefgh"]][: len(words.tokens)]
    assert len(words.tokens) >= 5
    ids = [0, 1, 2, 3, 4, 0, 1]
    html = page(page_data(MODEL, words, text_of(ids), Part(0, 0, 7)))
    data = data_of(html)
    assert [data["tokens"][str(i)] for i in range(5)] == hostile
    assert "alert(1)</" not in html and html.count("<script") == 2


def test_bytes_that_are_half_a_character_are_written_out() -> None:
    data = page_data(
        make_model(vocab_size=257), make_tokenizer("byte", ""), text_of([0xE2, 65]), Part(0, 0, 2)
    )
    assert (data["tokens"][0xE2], data["tokens"][65]) == ("\\xe2", "A")


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page(page_data(MODEL, LETTERS, text_of(IDS), Part(0, 0, 20)))
    assert "default-src 'none'" in html
    addresses = set(re.findall(r"https?://[^\"' ]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches
    assert not re.search(r"<link|<img|\bsrc=|@import|url\(", html)


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = (IDS * 3)[:50]
    write_page(str(tmp_path / "a.html"), MODEL, LETTERS, [text_of(ids), text_of(ids)])
    said = capsys.readouterr().err
    assert "tokens 1 to 24 of 50" in said and "the first of the texts" in said
    assert data_of((tmp_path / "a.html").read_text("utf-8"))["left_out"]["after"] == 26
    write_page(str(tmp_path / "b.html"), MODEL, LETTERS, [text_of(IDS)])
    assert "note" not in capsys.readouterr().err


def test_a_text_of_one_token_has_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two tokens"):
        write_page(str(tmp_path / "a.html"), MODEL, LETTERS, [text_of([1], 1)])
    assert not list(tmp_path.iterdir())


class Capped(GPT2):
    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return (super().__call__(*inputs, **options) / 5).tanh() * 5


def test_logits_that_are_not_the_lens_s_are_refused(tmp_path: Path) -> None:
    model = make_model(n_positions=24)
    model.__class__ = Capped
    with pytest.raises(UserError, match="the logits are not the embedding times"):
        write_page(str(tmp_path / "page.html"), model, LETTERS, [text_of(IDS)])
    assert not list(tmp_path.iterdir())


def test_a_block_more_than_the_config_says_is_shown() -> None:
    model = make_model(n_positions=24)
    model.transformer.h.append(make_model(seed=5).transformer.h[0])
    data = page_data(model, LETTERS, text_of(IDS), Part(0, 0, 20))
    assert data["shape"]["layers"] == 3 == len(data["parts"]["mlp"])
