"""Continuations as text: what is shown of them, and when."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_gpt2 import make_model, work_of

from micrograd_gpt.generation.context import Continuation
from micrograd_gpt.generation.output import TextStream, Writer, prompt_ids
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer


def shown(data: bytes, stops: list[str], how_many_at_once: int = 1) -> Iterator[str]:
    """What TextStream shows of these byte tokens after each step, and at the end."""
    continuation = Continuation(ids=[0], n_prompt=1)
    stream = TextStream(ByteTokenizer(), stops)
    for start in range(0, len(data), how_many_at_once):
        continuation.ids += data[start : start + how_many_at_once]
        if start + how_many_at_once >= len(data):
            continuation.stopped = "length"
        stream.follow(continuation)
        yield stream.text
        if continuation.stopped == "stop":
            return


def test_a_stop_text_that_spans_tokens_is_never_partly_shown() -> None:
    texts = list(shown(b"ab##c###d", ["###"]))
    assert texts == ["a", "ab", "ab", "ab", "ab##c", "ab##c", "ab##c", "ab##c"]


def test_what_might_have_become_a_stop_text_is_shown_at_the_end() -> None:
    assert list(shown(b"ab##", ["###"]))[-1] == "ab##"


def test_characters_are_shown_whole_or_not_at_all() -> None:
    assert list(shown("aé€".encode()[:-1], [])) == ["a", "a", "aé", "aé", "aé"]


def test_what_was_edited_is_said_before_the_text() -> None:
    code = """if True:
        from micrograd_gpt import Tensor, layers
        from micrograd_gpt.generation.output import Writer
        from micrograd_gpt.generation.settings import Settings
        from micrograd_gpt.gpt2 import GPT2, GPT2Config
        from micrograd_gpt.text.tokenizers import CharTokenizer
        layers.gelu, layers.layer_norm = Tensor.relu, lambda x, *_: x
        layers.cross_entropy = None  # which no text needs
        model = GPT2(GPT2Config(1, 1, 4, 2, 8))
        Writer(model, CharTokenizer("ab")).write(["ab"], Settings(max_new_tokens=1))
    """
    run = [sys.executable, "-c", code]
    said = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    assert re.match(r"(note: layers\.(gelu|layer_norm) has been edited.*\n){2}ab", said)


def test_end_of_text_is_not_shown_but_a_passing_one_is() -> None:
    stream = TextStream(ByteTokenizer())
    continuation = Continuation(ids=[256, 97, 256, 98, 256], n_prompt=1, stopped="end-of-text")
    stream.follow(continuation)
    assert stream.text == "ab"


@given(
    st.text("ab€", min_size=1, max_size=30),
    st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_a_stream_shows_the_text_up_to_the_first_stop(
    text: str, stops: list[str], how_many_at_once: int
) -> None:
    texts = list(shown(text.encode(), stops, how_many_at_once))
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert texts[-1] == text
    else:  # the stop that is complete first counts, not the one that begins first
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        candidates = {text[: text.find(stop)] for stop in stops if stop in text}
        assert texts[-1] in candidates
        assert len(texts[-1]) <= first
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)


@pytest.mark.parametrize("as_json", [False, True])
def test_many_samples_take_work_in_proportion(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = CharTokenizer("abc")
    writer = Writer(make_model(vocab_size=3), tokenizer, as_json)

    def write(n: int) -> None:
        writer.write(["a"], Settings(max_new_tokens=2, num_samples=n))

    write(25)  # what is made once
    one, two, four = (work_of(lambda n=n: write(n)) for n in (25, 50, 100))
    assert four - two < 2.5 * (two - one)  # 2 where it is in proportion, 4 where it is the square


def test_an_empty_prompt_starts_after_end_of_text_or_a_line_end() -> None:
    tokenizer = CharTokenizer("ab\n")
    assert prompt_ids("", ByteTokenizer()) == [256]
    assert (
        prompt_ids("", tokenizer) == prompt_ids("\n", tokenizer) == [int(tokenizer.encode("\n")[0])]
    )
    assert prompt_ids("a", ByteTokenizer()) == [97]


def test_what_the_kernels_say_comes_before_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note about the compiler would stand in the middle of a line."""
    monkeypatch.setattr("micrograd_gpt.generation.output.report", lambda: print("a note"))
    writer = Writer(make_model(vocab_size=3), CharTokenizer("abc"))
    assert writer.write(["ab"], Settings(max_new_tokens=2, end_of_text=None))
    assert capsys.readouterr().out.startswith("a note\nab")
