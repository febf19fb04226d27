"""Prompt templates: what an instruction becomes, and which texts can be no template."""

from __future__ import annotations

from pathlib import Path

import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import (
    Template,
    choose_template,
    read_template,
    save_template,
    template_of,
)


def test_the_default_leaves_out_what_there_is_not() -> None:
    template = Template()
    assert template.prompt("Add.") == "### Instruction:\nAdd.\n\n### Response:\n"
    assert template.prompt("Add.", "1 2", "Be brief.") == (
        "Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_texts_are_put_in_as_they_are() -> None:
    said = "a {input} {output} {system}\n\n{b} \\1"
    prompt = Template("{instruction}\n\n{input}\n\nA: {output}").prompt(said, "{instruction}")
    assert prompt == f"{said}\n\n{{instruction}}\n\nA: "


def test_a_template_on_one_line() -> None:
    template = Template("Q: {instruction} {input} A:{output}\n")
    assert template.prompt("Add", "1 2") == "Q: Add 1 2 A:"
    assert template.prompt("Add") == "Q: Add  A:"


def test_paragraphs_without_places_stay() -> None:
    assert Template("Hi\n\n\n{instruction}\n\n-\n\n{output}").prompt("a") == "Hi\n\n\na\n\n-\n\n"


def test_a_folder_keeps_its_template(tmp_path: Path) -> None:
    assert template_of(tmp_path) is None
    for text in (Template().text, "{instruction}\n\n\n{output}", "ü{instruction}{output}"):
        save_template(Template(text), tmp_path)
        kept = template_of(tmp_path)
        assert kept and kept.text == text


def test_that_a_chat_template_is_not_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_template(None, tmp_path).text == Template().text
    assert capsys.readouterr().err == ""
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert choose_template(None, tmp_path).text == Template().text
    assert f"the chat template in {tmp_path} is left out" in capsys.readouterr().err
    save_template(Template("{instruction}={output}"), tmp_path)
    assert choose_template(None, tmp_path).text == "{instruction}={output}"
    assert capsys.readouterr().err == ""


def test_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_bytes(b"{instruction}\r\n\r\n{input}\r\n\r\n{output}\r\n")
    assert read_template(path).prompt("a") == "a\n\n"


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_bytes(b"\xef\xbb\xbfDo {instruction}: {output}\r\n")
    assert read_template(path).prompt("this") == "Do this: "


def test_what_may_be_a_misspelt_place_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "template.txt"
    path.write_text("{inputs} { system }\n\n{instruction} {inputs} {} {1 2} {output}")
    assert choose_template(path, None).prompt("a") == "{inputs} { system }\n\na {inputs} {} {1 2} "
    err = capsys.readouterr().err
    assert err.startswith(f"note: {path}: '{{inputs}}', '{{ system }}' will be part of every")
    assert err.endswith(": the places are {system}, {instruction}, {input} and {output}\n")
    path.write_text("{system}\n\n{instruction} {input} {} {1 2} {output}")
    choose_template(path, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{instruction}", r"has no place \{output\}"),
        ("{input} {output}", r"has no place \{instruction\}"),
        ("", r"has no place \{instruction\}"),
        ("{instruction} {output} {output}", r"has 2 places \{output\}"),
        ("{instruction} {output}.", r"goes on after \{output\}"),
        ("{output} {instruction}", r"goes on after \{output\}"),
    ],
)
def test_what_can_be_no_template(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "template.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_template(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_template(tmp_path / "none.txt")
    (tmp_path / "latin").write_bytes(b"{instruction}\xff{output}")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_template(tmp_path / "latin")


@pytest.mark.parametrize(("name", "what"), [("input", "an input"), ("system", "a system message")])
def test_a_template_without_a_place_for_what_is_given(name: str, what: str) -> None:
    with pytest.raises(UserError, match=f"no place for {what}: add {{{name}}} to it"):
        Template("{instruction}{output}").prompt("a", **{name: "b"})


def test_a_system_message_without_a_place_is_left_out_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    assert Template("Q{instruction}A{output}").conversation(chat, "|") == "QuAa|QuA"
    said = "note: the template has no place for a system message: left out\n"
    assert capsys.readouterr().err == said
    assert Template("{system}Q{instruction}A{output}").conversation(chat, "|") == "sQuAa|QuA"
    assert capsys.readouterr().err == ""
