"""A model folder's tokenizer: ours, Hugging Face's files for GPT-2, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizer_files import load_tokenizer, spelled_gpt2_vocabulary
from micrograd_gpt.text.tokenizers import END_OF_TEXT, CharTokenizer, GPT2Tokenizer


def test_a_folder_without_tokenizer_json_uses_gpt2_if_its_size_is_gpt2s(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path).name == "gpt2"
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}')
    assert load_tokenizer(tmp_path).name == "gpt2"
    (tmp_path / "config.json").write_text('{"vocab_size": 65}')
    with pytest.raises(UserError, match="its vocab_size is 65 where GPT-2's is 50257"):
        load_tokenizer(tmp_path)
    CharTokenizer.from_text("ab").save(tmp_path)
    assert load_tokenizer(tmp_path).name == "char"


def hugging_face(vocabulary: dict[str, int], added: list[str]) -> str:
    tokens = [{"id": 50256 + i, "content": content} for i, content in enumerate(added)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": tokens, "model": model})


def test_hugging_faces_own_tokenizer_files(tmp_path: Path) -> None:
    path, vocabulary = tmp_path / "tokenizer.json", spelled_gpt2_vocabulary(GPT2Tokenizer())
    path.write_text(hugging_face(vocabulary, [END_OF_TEXT]))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    assert load_tokenizer(tmp_path).name == "gpt2"

    other = {**vocabulary, "!": 1, '"': 0}  # as many entries, but another language's
    refused = [
        hugging_face(other, []),
        hugging_face(vocabulary, [END_OF_TEXT, "<|pad|>"]),
        hugging_face({"a": 0}, []),
        '{"version": "1.0", "model": null}',
        "{}",
    ]
    for text in refused:
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{re.escape(str(path))} is neither one of our"):
            load_tokenizer(tmp_path)

    path.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"vocab\.json is not GPT-2's vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"tokenizer": "char", "vocabulary": ["a"',
        b"[]",
        b'\xff\xfe{"tokenizer": "byte"}',
        b"[" * 100_000,
        b'{"tokenizer": "klingon"}',
        b'{"tokenizer": ["char"]}',
        b'{"tokenizer": "char"}',
        b'{"tokenizer": "char", "vocabulary": "ab"}',
        b'{"tokenizer": "char", "vocabulary": ["a", "a"]}',
        b'{"tokenizer": "char", "vocabulary": ["a", ""]}',
        b'{"tokenizer": "char", "vocabulary": ["a", 1]}',
        b'{"tokenizer": "char", "vocabulary": ["a", "bc"]}',
        b'{"tokenizer": "char", "vocabulary": ["\\ud800"]}',
        b'{"tokenizer": "word", "vocabulary": ["a", "<|unk|>"]}',
        b'{"tokenizer": "word", "vocabulary": ["a", "<|endoftext|>"]}',
    ],
)
def test_a_damaged_tokenizer_json_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is damaged") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
