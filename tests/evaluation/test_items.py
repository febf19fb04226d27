"""Items of a file as contexts and endings, and those as token ids; mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders

from micrograd_gpt.evaluation.items import (
    Choice,
    LastWord,
    read_choices,
    read_last_words,
    read_objects,
    request_of,
)
from micrograd_gpt.evaluation.scoring import Request
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import CharTokenizer

PLAIN = {"context": "The sky is", "endings": ["blue", "a fish"], "label": 0}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man bakes [header] Bread [title] Start.",
    "ctx_b": "he",
    "endings": ["eats.", "[step] flies  off ."],
    "label": "1",
}
PIQA = {"goal": "Open it", "sol1": "Pull.", "sol2": "Push.", "label": 1}


def write(folder: Path, *objects: Any) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(json.dumps(fields) for fields in objects) + "\n\n", "utf-8")
    return path


def test_each_form_is_known_by_its_fields(tmp_path: Path) -> None:
    plain, hellaswag, piqa = read_choices(write(tmp_path, PLAIN, HELLASWAG, PIQA))
    assert plain == Choice("The sky is", ("blue", "a fish"), 0)
    context = "Baking: A man bakes Bread. Start. He"
    assert hellaswag == Choice(context, ("eats.", " flies off ."), 1)
    assert piqa == Choice("Question: Open it\nAnswer:", ("Pull.", "Push."), 1)


@pytest.mark.parametrize("label", [1, "1", " 1 ", 1.0, "1.0"])
def test_a_label_is_a_whole_number_however_it_is_written(tmp_path: Path, label: Any) -> None:
    (item,) = read_choices(write(tmp_path, PLAIN | {"label": label}))
    assert repr(item.label) == "1"


def test_a_json_file_holds_a_list(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_text(json.dumps([PLAIN, PIQA]))
    assert [item.label for item in read_choices(path)] == [0, 1]
    path.write_text(f"{json.dumps(PLAIN)}\n{json.dumps(PIQA)}\n")  # many call lines so too
    assert [item.label for item in read_choices(path)] == [0, 1]
    path.write_text(json.dumps(PLAIN))
    with pytest.raises(UserError, match=r"items.json holds no list"):
        read_choices(path)


def test_a_json_file_of_lines_is_read_and_a_table_is_called_one(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN, PIQA).rename(tmp_path / "items.json")
    assert [item.label for item in read_choices(path)] == [0, 1]
    for name in ("items.csv", "items.parquet"):
        path = path.rename(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} is a table: convert it to .jsonl"):
            read_choices(path)


def test_items_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes('{"text": "un café"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text: .* give its encoding with --encoding"):
        read_last_words(path)
    assert read_last_words(path, "latin-1") == [LastWord("un", "café")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": 2}, r"line 2: 'label' is to be the number of .* 0 to 1: this is 2"),
        ({"label": None}, "there is none"),
        ({"label": True}, "this is true"),
        ({"label": 0.5}, "this is 0.5"),
        ({"label": "1.5"}, 'this is "1.5"'),
        ({"label": "first"}, 'this is "first"'),
        ({"endings": ["blue"]}, "nothing to choose from: 1 endings"),
        ({"endings": ["blue", ""]}, "'endings' is to be a list of texts, none of them empty"),
        ({"endings": "blue"}, "'endings' is to be a list"),
        ({"context": 3}, "'context' is to be a text, not 3"),
        ({"context": "\ud800"}, "line 2: there is half a character"),
    ],
)
def test_a_wrong_item_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_choices(write(tmp_path, PLAIN, PLAIN | change))


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2: 'sol1' or 'sol2' is empty"):
        read_choices(write(tmp_path, PIQA, PIQA | {"sol2": ""}))
    with pytest.raises(UserError, match=r"line 1: an item has .* this one has a, b"):
        read_choices(write(tmp_path, {"a": 1, "b": 2}))
    with pytest.raises(UserError, match=r"item 1: this is not a JSON object"):
        read_choices(write(tmp_path, [1]))
    with pytest.raises(UserError, match="has no items"):
        list(read_objects(write(tmp_path)))
    for name in ("items.jsonl", "items.json"):
        (tmp_path / name).write_text("[1]\n[2]\n")
        with pytest.raises(UserError, match=r"line 1: this is not a JSON object"):
            read_choices(tmp_path / name)
    (tmp_path / "items.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"line 1: this is not JSON"):
        read_choices(tmp_path / "items.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_choices(tmp_path / "missing.jsonl")


def test_last_words(tmp_path: Path) -> None:
    texts = ["to be or not to be", "one  two", "ends in a line \n"]
    words = read_last_words(write(tmp_path, *({"text": text} for text in texts)))
    pairs = [("to be or not to", "be"), ("one ", "two"), ("ends in a", "line")]
    assert words == [LastWord(*pair) for pair in pairs]
    for text in ("word", " word", " \n"):
        with pytest.raises(UserError, match="line 1: the text is to end in a word to ask for"):
            read_last_words(write(tmp_path, {"text": text}))


# -------------------------------------------------------------------------------- as token ids


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("The dog", " was found"), ("The dog \n", " was"), ("un", "believable"), ("  ", "The dog")],
)
def test_both_are_one_text_and_no_context_ends_in_spaces(context: str, continuation: str) -> None:
    tokenizer = GPT2Tokenizer()
    request = request_of(context, continuation, tokenizer)
    known = [] if not context.strip() else tokenizer.encode(context.rstrip()).tolist()
    assert request.context == (known or [50256])
    assert request.continuation == tokenizer.encode(context + continuation).tolist()[len(known) :]


def test_without_a_context_a_text_begins() -> None:
    tokenizer = CharTokenizer.from_text("ab\n")
    newline = int(tokenizer.encode("\n")[0])
    assert request_of("", "ab", tokenizer) == Request([newline], tokenizer.encode("ab").tolist())
    again = request_of("", "\nab", tokenizer)  # the token that it begins with is there already
    assert again == Request([newline], tokenizer.encode("ab").tolist())


def test_a_text_begins_with_its_tokenizers_bos_token(tmp_path: Path) -> None:
    """As the harness's own, and not with the eos_token where that is another."""
    size = len(tokenizer_folders.vocabulary())
    added = [
        tokenizer_folders.added_token(text, size + i) for i, text in enumerate(("<s>", "</s>"))
    ]
    tokenizer_folders.write(
        tmp_path,
        tokenizer_json=tokenizer_folders.tokenizer_json(added),
        tokenizer_config_json={"bos_token": "<s>", "eos_token": "</s>"},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text == size + 1
    assert request_of("", "the", tokenizer) == Request([size], tokenizer.encode("the").tolist())


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(UserError, match="no token of '' to score after 'The dog'"):
        request_of("The dog", "", GPT2Tokenizer())
