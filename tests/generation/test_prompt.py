"""The interactive prompt: texts, commands, mistakes and Ctrl-C, as they are typed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from small_gpt2 import interrupt_after

from micrograd_gpt.generation.flags import Choices
from micrograd_gpt.generation.output import Writer
from micrograd_gpt.generation.prompt import converse
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.text.template import Template
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.weights.pretrained import from_pretrained

Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk_with(
    char_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Template | None], Talk]:
    """`talk_with(template)(*lines)` has these lines typed, then Ctrl-D; an exception stands for
    what raises it.

    Returns stdout and stderr, where each typed line is echoed.
    """
    model, tokenizer = from_pretrained(GPT2, char_model), load_tokenizer(char_model)
    defaults = {"max_new_tokens": (20, ""), "temperature": (0.8, ""), "top_k": (40, "")}

    def talk_with(template: Template | None) -> Talk:
        writer = Writer(model, tokenizer, template=template)

        def talk(
            *lines: str | BaseException | type[BaseException], **given: Any
        ) -> tuple[str, str]:
            typed = iter(lines)

            def type_a_line(question: str = "") -> str:
                line = next(typed, EOFError)
                print(line, file=sys.stderr)
                if isinstance(line, str):
                    return line
                raise line

            monkeypatch.setattr("builtins.input", type_a_line)
            capsys.readouterr()
            assert converse(writer, Choices(given, defaults)) == 0
            return capsys.readouterr()

        return talk

    return talk_with


@pytest.fixture
def talk(talk_with: Callable[[Template | None], Talk]) -> Talk:
    """`talk(*lines)` with a model that continues texts."""
    return talk_with(None)


def test_a_conversation(talk: Talk) -> None:
    lines = ["dog", "dog", "/set temperature 0", "dog", "dog", "/unset temperature", "/set seed 0"]
    out, _ = talk(*lines, "dog")
    _, first, second, greedy, again, third = out.split("dog")
    assert greedy == again and first == third and len({first, second, greedy}) == 3


def test_the_flags_given_hold_until_they_are_changed(talk: Talk) -> None:
    out, _ = talk("dog", "/set max-new-tokens 5", "dog", max_new_tokens=3)
    first, second = out.splitlines()
    assert (len(first), len(second)) == (6, 8)


def test_mistakes_do_not_end_a_conversation(talk: Talk) -> None:
    lines = ["über", "/sing", "/set", "/set colour red", "/set top-p 7", '/set stop "', "/set stop"]
    lines += ["/set seed 3 4", "/unset seed 3", "/set greedy yes", "/set greedy --help"]
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    out, err = talk(*lines, undecodable, "/quit", "never read")
    assert out == "" and "never read" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 12
    assert "error: /set needs a setting; /help lists them" in errors
    assert "error: /set takes no '4': put quotes around a value with spaces" in errors
    assert errors[-1] == "error: that was not UTF-8 text"


def test_help_lists_the_commands_and_the_settings_in_use(talk: Talk) -> None:
    _, err = talk("/help")
    assert "/set temperature 0.7" in err and "/unset temperature" in err
    (settings,) = (line for line in err.splitlines() if line.startswith("settings: "))
    for setting in ("top-k 40", "seed 0", "no-repeat-ngram-size 0"):
        assert setting in settings
    (off,) = (line for line in err.splitlines() if line.startswith("off: "))
    for name in ("greedy", "top-p", "stop", "no-kv-cache"):
        assert name in off and f"{name} " not in settings


def test_settings_that_take_a_word_or_none(talk: Talk) -> None:
    lines = ["/set num-beams 3", "/set early-stopping never", "/set stop 'o j'", "/set ignore-eos"]
    _, err = talk(*lines, "/help")
    for setting in ("num-beams 3", "early-stopping never", "stop ['o j']", "ignore-eos true"):
        assert setting in err


@pytest.mark.parametrize("typed", [r"\n", r'"\n"', r"'\n'"])
def test_a_line_end_can_be_typed_as_a_stop_text(talk: Talk, typed: str) -> None:
    _, err = talk(f"/set stop {typed}", "/help")
    assert r"stop ['\n']" in err


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r'"say \"hi\""', 'say "hi"'),
        (r"it\'s\ so", "it's so"),
        (r"a\tb", "a\tb"),
        (r'"\\"', "\\"),
        (r"'\\'", "\\"),
        (r"\\n", r"\n"),
    ],
)
def test_a_backslash_stays_but_before_a_quote_or_a_space(talk: Talk, typed: str, text: str) -> None:
    _, err = talk(f"/set stop {typed}", "/help")
    assert f"stop {[text]!r}" in err


def test_the_setting_that_was_meant_is_said(talk: Talk) -> None:
    _, err = talk("/set temprature 1", "/set length 5", "/set colour red")
    assert "no such setting: 'temprature': did you mean --temperature?" in err
    assert "no such setting: 'length': did you mean --max-new-tokens?" in err
    assert "no such setting: 'colour'; /help lists them" in err


def test_a_change_without_an_effect_is_said(talk: Talk) -> None:
    _, err = talk("/set top-p 0.5", "/set temperature 0", "/set top-k 4")
    for flag in ("--top-p", "--top-k"):
        assert err.count(f"note: {flag}: no effect at temperature 0, where nothing is drawn") == 1
    _, err = talk("a", "/set greedy")  # the next text would have had another seed
    assert "no effect" not in err


def test_a_change_that_contradicts_another_is_not_made(talk: Talk) -> None:
    _, err = talk("/set greedy", "/set temperature 0.5", "/help")
    assert "error: --greedy and --temperature contradict each other" in err
    assert "temperature 0.0" in err and "greedy true" in err


def test_help_says_what_holds_in_a_beam_search(talk: Talk) -> None:
    _, err = talk("/set num-beams 3", "/help")
    settings, _, off = err.partition("settings: ")[2].partition("off: ")
    assert "temperature 1.0" in settings and "top-k" not in settings and "top-k" in off


def test_ctrl_c_stops_a_text_and_not_the_conversation(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(5, monkeypatch)
    out, _ = talk("the ", "dog")
    assert len(out.partition("dog")[0].removesuffix("\n")) in (8, 9)


def test_ctrl_c_at_the_prompt_does_not_leave(talk: Talk) -> None:
    out, _ = talk(KeyboardInterrupt, "dog")
    assert out.startswith("dog")


def test_that_a_text_passes_the_context_is_said_once(talk: Talk) -> None:
    _, err = talk("/set max-new-tokens 100", "dog", "dog")
    assert err.count("at most 32 tokens") == 1


def test_a_tuned_model_takes_each_line_for_an_instruction(
    talk_with: Callable[..., Talk],
) -> None:
    template = Template("{instruction} the lazy {output}")
    out, err = talk_with(template)("quick", "/help", "quick", greedy=True)
    assert "Type an instruction to have it answered" in err
    assert "Type a text" not in err
    first, second = out.splitlines()
    (continued,) = talk_with(None)("quick the lazy ", greedy=True)[0].splitlines()
    assert continued == f"quick the lazy {first}" and first == second


def test_each_line_is_a_text_of_its_own_and_the_prompt_says_so(talk: Talk) -> None:
    out, err = talk("the quick ", "dog", "/help", greedy=True)
    alone, _ = talk("dog", greedy=True)
    assert out.endswith(alone)  # what was said before changes nothing
    assert err.count("each line a text of its own") == 2  # at the beginning, and by /help
