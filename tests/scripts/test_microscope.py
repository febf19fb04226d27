"""generate.py --microscope as its users meet it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import training
from small_gpt2 import TEXT, interrupt_after, save_model

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer

generate = training.script("generate")


@pytest.fixture(scope="module")
def char_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("char"), CharTokenizer.from_text(TEXT))


def page_of(path: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def text_of(data: dict[str, Any]) -> str:
    return "".join(data["tokens"][str(i)] for i in data["ids"])


@pytest.mark.parametrize("how", [(), ("--num-samples", "2"), ("--num-beams", "3"), ("--json",)])
def test_the_page_is_of_the_text_that_was_written(
    char_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: tuple[str, ...]
) -> None:
    file, asked = tmp_path / "pages" / "page.html", ["--model", char_model, "--prompt", "the "]
    asked += ["--max-new-tokens", "20", *how]
    assert generate.main(asked) == 0
    without = capsys.readouterr().out
    assert generate.main([*asked, "--microscope", str(file)]) == 0
    shown = capsys.readouterr()
    text = text_of(page_of(file))
    assert page_of(file)["prompt"] == 4 and len(text) == 24
    if "--json" in how:
        (found,) = map(json.loads, shown.out.splitlines())
        assert found["prompt"] + found["text"] == text
    else:
        assert shown.out == without and shown.out.startswith(text.rstrip("\n"))
    assert str(file) in shown.err
    assert ("the first of the texts" in shown.err) == ("--num-samples" in how)


def test_the_probabilities_are_those_that_json_has(
    char_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "20", "--json"]
    assert generate.main([*argv, "--microscope", str(tmp_path / "page.html")]) == 0
    logs = json.loads(capsys.readouterr().out)["log_probs"]
    found = page_of(tmp_path / "page.html")["predictions"]["probability"][3:]
    assert found == pytest.approx([2.718281828**log for log in logs], rel=2e-3)


def test_an_answer_s_page_begins_with_its_instruction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "tuned", ByteTokenizer())
    save_template(Template("{instruction}|\n\n{input}|\n\n={output}"), folder)
    argv = ["--model", folder, "--instruction", "Add", "--max-new-tokens", "5"]
    assert generate.main([*argv, "--microscope", str(tmp_path / "page.html")]) == 0
    assert text_of(page_of(tmp_path / "page.html")).startswith("Add|")


def test_mistakes_are_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = ["--model", str(tmp_path / "none"), "--microscope"]
    with pytest.raises(UserError, match="is a folder: name a file"):
        generate.main([*absent, str(tmp_path), "--prompt", "a"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(UserError, match="give that with --prompt"):
        generate.main([*absent, str(tmp_path / "page.html")])


def test_a_page_that_cannot_be_written_is_an_error(
    char_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    argv = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "3"]
    with pytest.raises(UserError, match="cannot write"):
        generate.main([*argv, "--microscope", str(tmp_path / "file" / "page.html")])


def test_a_text_that_ctrl_c_cut_short_has_no_page(
    char_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(5, monkeypatch)
    argv = ["--model", char_model, "--prompt", "the ", "--microscope", str(tmp_path / "page.html")]
    assert generate.main(argv) == 130
    assert not (tmp_path / "page.html").exists()


def test_a_page_takes_the_place_of_no_other_file(char_model: str, tmp_path: Path) -> None:
    file, asked = tmp_path / "precious.json", ["--model", char_model, "--prompt", "the "]
    file.write_text("{}")
    for other in (file, tmp_path / "page"):  # nor is it one that could not be replaced later
        with pytest.raises(UserError, match=rf"{other} is to be a page: .* \.html$"):
            generate.main([*asked, "--microscope", str(other)])
    assert file.read_text() == "{}"
    for _ in range(2):  # an earlier page may be replaced
        generate.main([*asked, "--max-new-tokens", "2", "--microscope", str(tmp_path / "a.html")])
