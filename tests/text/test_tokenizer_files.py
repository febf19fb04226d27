"""A model folder's tokenizer: ours, other models' byte-pair encodings, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import END, added_token, merges_txt, tokenizer_json, vocabulary, write

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer, gpt2_merges, gpt2_vocabulary
from micrograd_gpt.text.tokenizer_files import load_tokenizer, model_tokenizer
from micrograd_gpt.text.tokenizers import CharTokenizer, make_tokenizer

SIZE = len(vocabulary())
TEXT = "The dog's tail, the doo dogs.\n"


def pieces(tokenizer: Tokenizer, text: str, allow_special: bool = False) -> list[str]:
    return [tokenizer.decode([id]) for id in tokenizer.encode(text, allow_special)]


# -------------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize("name", ["char", "word", "byte", "gpt2"])
def test_what_earlier_versions_wrote_is_read(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(name, TEXT)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()))
    found = load_tokenizer(tmp_path)
    assert type(found) is type(tokenizer) and found.tokens == tokenizer.tokens
    assert found.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_a_folder_without_tokenizer_files_uses_gpt2_if_its_size_is_gpt2s(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path).name == "gpt2"
    for size in (50257, 50304):  # plain, and padded as nanoGPT does
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
        assert load_tokenizer(tmp_path).vocab_size == 50257
    for size in (65, 50258):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
        with pytest.raises(UserError, match=f"its vocab_size is {size} where GPT-2's is 50257"):
            load_tokenizer(tmp_path)
    CharTokenizer.from_text("ab").save(tmp_path)
    assert load_tokenizer(tmp_path).name == "char"


@pytest.mark.parametrize("content", [{"accuracy": 0.5}, {"itos": {0: "a", 1: "b"}}])
def test_another_meta_pkl_beside_a_model_of_gpt2_s_size_is_not_asked(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    for size in (50257, 50304, 50432):
        assert model_tokenizer(tmp_path, size).name == "gpt2"


def test_characters_beside_a_model_of_nanogpt_s(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))
    assert model_tokenizer(tmp_path, 2).encode("ba").tolist() == [1, 0]
    assert model_tokenizer(tmp_path, 128).vocab_size == 2  # a multiple that computes faster
    for size in (65, 192):
        with pytest.raises(UserError, match=f"the tokenizer has 2 tokens and the model {size}"):
            model_tokenizer(tmp_path, size)
    CharTokenizer("xy").save(tmp_path)
    assert model_tokenizer(tmp_path, 2).encode("yx").tolist() == [1, 0]


def test_a_folder_that_is_not_there_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    for place in ("mistyped", "tokenizer.json"):
        with pytest.raises(UserError, match=f"there is no folder .*{place}"):
            load_tokenizer(tmp_path / place)


@pytest.mark.slow
def test_gpt2_is_recognized_in_other_s_files(tmp_path: Path) -> None:
    merges = [" ".join(pair) for pair in gpt2_merges()]
    model = {"vocab": gpt2_vocabulary(), "merges": merges, "unk_token": ""}
    older = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "type": "BPE"}
    end = added_token(END, 50256)
    (tmp_path / "json").mkdir()
    (tmp_path / "files").mkdir()
    write(tmp_path / "json", tokenizer_json=tokenizer_json([end], {**model, **older}))
    write(tmp_path / "files", vocab_json=gpt2_vocabulary(), merges_txt=merges_txt(gpt2_merges()))
    for folder in ("json", "files"):
        assert isinstance(load_tokenizer(tmp_path / folder), GPT2Tokenizer)

    # The same tokens merged in another order, and one more: these are other tokenizers.
    write(tmp_path / "files", added_tokens_json={"<|pad|>": 50257})
    padded = load_tokenizer(tmp_path / "files")
    assert padded.name == "bpe" and padded.vocab_size == 50258
    assert padded.encode(TEXT).tolist() == GPT2Tokenizer().encode(TEXT).tolist()
    swapped = [merges[1], merges[0], *merges[2:]]
    write(tmp_path / "json", tokenizer_json=tokenizer_json([end], {**model, "merges": swapped}))
    assert load_tokenizer(tmp_path / "json").name == "bpe"
    # The same ids in the opposite order in the file; two tokens with each other's ids
    opposite = dict(reversed(gpt2_vocabulary().items()))
    exchanged = gpt2_vocabulary() | {"a": gpt2_vocabulary()["b"], "b": gpt2_vocabulary()["a"]}
    for vocab, name in ((opposite, "gpt2"), (exchanged, "bpe")):
        write(tmp_path / "json", tokenizer_json=tokenizer_json([end], {**model, "vocab": vocab}))
        assert load_tokenizer(tmp_path / "json").name == name


# ------------------------------------------------------------------- other byte-pair encodings


def test_a_tokenizer_json_of_another_vocabulary(tmp_path: Path) -> None:
    added = [
        added_token("<s>", SIZE),
        added_token("</s>", SIZE + 1),
        added_token("二匹", SIZE + 2, special=False),
    ]
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    write(tmp_path, tokenizer_json=tokenizer_json(added), tokenizer_config_json=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == SIZE + 3
    assert tokenizer.special_tokens == {"bos_token": SIZE, "eos_token": SIZE + 1}
    assert tokenizer.end_of_text == SIZE + 1
    text = "the dog 二匹</s>"
    assert pieces(tokenizer, text) == ["the", " dog", " ", "二匹", "<", "/", "s", ">"]
    assert pieces(tokenizer, text, allow_special=True) == ["the", " dog", " ", "二匹", "</s>"]
    assert tokenizer.encode("dog").tolist() == [vocabulary()["dog"]]

    again = tmp_path / "again"
    tokenizer.save(again)
    restored = load_tokenizer(again)
    assert restored.to_dict() == tokenizer.to_dict()


def test_that_nothing_says_which_token_ends_a_text_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, tokenizer_json=tokenizer_json([added_token("</s>", SIZE)]))
    assert load_tokenizer(tmp_path).end_of_text is None
    said = capsys.readouterr().err
    assert "nothing says which token ends a text, of '</s>': one that does is named in" in said
    write(tmp_path, tokenizer_config_json={"eos_token": "</s>"})
    assert load_tokenizer(tmp_path).end_of_text == SIZE and not capsys.readouterr().err


def test_vocab_json_and_merges_txt(tmp_path: Path) -> None:
    tokens = {**vocabulary(), END: SIZE}
    write(tmp_path, vocab_json=tokens, merges_txt=merges_txt())
    tokenizer = load_tokenizer(tmp_path)
    assert pieces(tokenizer, f"the dog{END}", allow_special=True) == ["the", " dog", END]
    assert END not in pieces(tokenizer, f"the dog{END}")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (SIZE + 1, SIZE)
    (tmp_path / "merges.txt").write_text(merges_txt().replace("\n", "\r\n"))
    assert load_tokenizer(tmp_path).to_dict() == tokenizer.to_dict()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.json: there is no merges\.txt beside it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"special_tokens_map_json": {"eos_token": {"content": "</s>"}}}, "</s>"),
        ({"tokenizer_config_json": {"eos_token": "</s>"}}, "</s>"),
        (
            {
                "special_tokens_map_json": {"eos_token": "</s>"},
                "tokenizer_config_json": {"eos_token": END},
            },
            "</s>",
        ),
        (
            {
                "special_tokens_map_json": {"eos_token": END},
                "tokenizer_config_json": {"eos_token": "</s>", "added_tokens_decoder": {}},
            },
            "</s>",
        ),
        ({"config_json": {"eos_token_id": SIZE + 1}}, "</s>"),
        # As in many folders: the ids of GPT-2 were left where the vocabulary is another one
        ({"config_json": {"eos_token_id": 50256}}, END),
        ({"config_json": {"eos_token_id": 7}}, END),  # an ordinary token
        ({}, END),
    ],
)
def test_which_token_ends_a_text(files: dict[str, Any], end: str, tmp_path: Path) -> None:
    added = [added_token(END, SIZE), added_token("</s>", SIZE + 1)]
    write(tmp_path, tokenizer_json=tokenizer_json(added), **files)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text is not None
    assert tokenizer.decode([tokenizer.end_of_text]) == end


def test_a_token_that_ends_texts_is_special_whatever_its_flag_says(tmp_path: Path) -> None:
    """Or a text from elsewhere could end itself."""
    added = [added_token("</s>", SIZE, special=False), added_token("二匹", SIZE + 1, special=False)]
    config = {"eos_token": "</s>", "additional_special_tokens": ["二匹"]}
    write(tmp_path, tokenizer_json=tokenizer_json(added), tokenizer_config_json=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text == SIZE
    assert pieces(tokenizer, "the</s>二匹") == ["the", "<", "/", "s", ">", "二匹"]
    assert pieces(tokenizer, "the</s>", allow_special=True) == ["the", "</s>"]


def test_the_flags_in_tokenizer_config_json_count_where_both_files_have_some(
    tmp_path: Path,
) -> None:
    write(tmp_path, tokenizer_json=tokenizer_json([added_token("二匹", SIZE, special=False)]))
    assert SIZE in load_tokenizer(tmp_path).encode("二匹")
    special = {str(SIZE): added_token("二匹", SIZE, special=True)}
    write(tmp_path, tokenizer_config_json={"added_tokens_decoder": special})
    assert SIZE not in load_tokenizer(tmp_path).encode("二匹")


def test_a_tokenizer_is_described_in_one_way_before_and_after_it_is_saved(tmp_path: Path) -> None:
    """Whether tokens on disk are of this tokenizer is told from the description."""
    tokens = {**vocabulary(), "<pad>": SIZE, END: SIZE + 1}
    names = {"pad_token": "<pad>", "eos_token": END}
    write(tmp_path, vocab_json=tokens, merges_txt=merges_txt(), special_tokens_map_json=names)
    write(tmp_path, added_tokens_json={"<|sep|>": SIZE + 2})
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert json.dumps(again.to_dict()) == json.dumps(tokenizer.to_dict())


def test_special_tokens_that_the_model_has_no_room_for_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens to pad with were often added to a tokenizer, and not to its model."""
    added = [added_token(END, SIZE), added_token("[PAD]", SIZE + 1)]
    config = {"eos_token": END, "pad_token": "[PAD]"}
    write(tmp_path, tokenizer_json=tokenizer_json(added), tokenizer_config_json=config)
    for size, tokens in ((SIZE + 2, SIZE + 2), (SIZE + 1, SIZE + 1), ("?", SIZE + 2)):
        write(tmp_path, config_json={"vocab_size": size})
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.vocab_size == tokens
        assert ("pad_token" in tokenizer.special_tokens) == (tokens == SIZE + 2)
        assert tokenizer.end_of_text == SIZE
        note = capsys.readouterr().err
        left_out = f"note: {tmp_path}: the model has no '[PAD]', which its tokenizer adds\n"
        assert note == ("" if tokens == SIZE + 2 else left_out)
    # Not so where the model is another tokenizer's, and a token that is looked for in every text
    write(tmp_path, config_json={"vocab_size": SIZE - 1})
    assert load_tokenizer(tmp_path).vocab_size == SIZE + 2
    added[1]["special"] = False
    write(tmp_path, config_json={"vocab_size": SIZE + 1}, tokenizer_config_json={})
    write(tmp_path, tokenizer_json=tokenizer_json(added))
    assert load_tokenizer(tmp_path).vocab_size == SIZE + 2


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_json=tokenizer_json()))
    assert tokenizer.end_of_text is None and tokenizer.special_tokens == {}


def test_an_added_token_comes_back_as_it_was_typed(tmp_path: Path) -> None:
    """Though "é" is also how files spell the byte 0xE9."""
    added = [added_token("café", SIZE, special=False)]
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_json=tokenizer_json(added)))
    assert tokenizer.encode("a café").tolist()[-1] == SIZE
    assert tokenizer.decode(tokenizer.encode("a café")) == "a café"


# ----------------------------------------------------------------------------------------- refused

SPLIT = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
LEVEL = tokenizer_json()["pre_tokenizer"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "its model is Unigram"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "its model is WordPiece"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "its model is WordLevel"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "its pre_tokenizer is Metaspace"),
        ({"pre_tokenizer": None}, "its pre_tokenizer is None"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, LEVEL]}},
            "its pre_tokenizer is a sequence of Split, ByteLevel",
        ),
        ({"pre_tokenizer": {**LEVEL, "add_prefix_space": True}}, "has add_prefix_space True"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "has add_prefix_space True"),
        ({"pre_tokenizer": {**LEVEL, "use_regex": False}}, "has use_regex False"),
        ({"normalizer": {"type": "NFC"}}, "its normalizer is NFC"),
        ({"decoder": {"type": "Metaspace"}}, "its decoder is Metaspace"),
        (
            {"post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}},
            "its post_processor is TemplateProcessing",
        ),
        ({"added_tokens": [added_token("<m>", SIZE, lstrip=True)]}, "'<m>' has lstrip"),
        ({"added_tokens": [added_token("<m>", SIZE + 1)]}, f"has the id {SIZE + 1} where {SIZE}"),
        ({"added_tokens": [added_token("the", SIZE)]}, f"'the' has the id {SIZE} where 4 is due"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_refused_by_name(
    content: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write(tmp_path, tokenizer_json={**tokenizer_json(), **content}) / "tokenizer.json"
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*{problem}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dropout": 0.1}, "its dropout is 0.1"),
        ({"byte_fallback": True}, "its byte_fallback is True"),
        ({"ignore_merges": True}, "its ignore_merges is True"),
        ({"end_of_word_suffix": "</w>"}, "its end_of_word_suffix is </w>"),
        ({"vocab": {"a": 0}, "merges": []}, "its vocabulary lacks 255 of the 256 bytes"),
    ],
)
def test_a_model_that_merges_in_another_way_is_refused_by_name(
    options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    write(tmp_path, tokenizer_json=tokenizer_json(model=options))
    with pytest.raises(UserError, match=problem):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("option", ["add_prefix_space", "add_bos_token", "add_eos_token"])
def test_an_option_that_changes_the_ids_is_refused_by_name(option: str, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config_json={option: True}, tokenizer_json=tokenizer_json())
    with pytest.raises(UserError, match=rf"tokenizer_config\.json sets {option}"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, vocab_json=vocabulary(), merges_txt=merges_txt())
    with pytest.raises(UserError, match=rf"tokenizer_config\.json sets {option}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "Qwen2Tokenizer", "RobertaTokenizerFast", 3])
def test_vocab_json_of_a_class_that_cuts_text_up_in_another_way_is_refused(
    kind: Any, tmp_path: Path
) -> None:
    write(tmp_path, vocab_json=vocabulary(), merges_txt=merges_txt())
    for name in ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", None):
        write(tmp_path, tokenizer_config_json={"tokenizer_class": name})
        assert load_tokenizer(tmp_path).encode("dog").tolist() == [vocabulary()["dog"]]
    write(tmp_path, tokenizer_config_json={"tokenizer_class": kind})
    problem = rf"^{re.escape(str(tmp_path))}.tokenizer_config\.json: a {kind} is refused: only byte"
    with pytest.raises(UserError, match=problem):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()  # nor is it taken for GPT-2's
    with pytest.raises(UserError, match=problem):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("tokenizer.model", "SentencePiece"), ("vocab.txt", "WordPiece")]
)
def test_other_tokenizers_files_are_refused_by_name(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\0")
    with pytest.raises(UserError, match=f"{re.escape(name)} is a {kind} tokenizer"):
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
        b'{"tokenizer": "bpe", "vocabulary": 3}',
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


DAMAGED: list[dict[str, Any]] = [
    {"model": None},
    {"model": 3},
    {"added_tokens": 3},
    {"added_tokens": [3]},
    {"added_tokens": [{"content": "a"}]},
    {"added_tokens": [added_token("", SIZE)]},
    {"model": {"type": "BPE", "merges": ["a b"]}},
    {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": "a b"}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", 1]]}},
    {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"\ud800": 0}, "merges": []}},
    {"model": {"type": "BPE", "vocab": vocabulary(), "merges": ["\ud800 a"]}},
    {"added_tokens": [added_token("\ud800", SIZE)]},
    {"normalizer": 3},
    {"pre_tokenizer": "ByteLevel"},
    {"pre_tokenizer": [], "decoder": []},
]


@pytest.mark.parametrize("content", [*DAMAGED, {**tokenizer_json(), "model": {}}])
def test_a_tokenizer_json_with_parts_that_are_damaged_is_named(
    content: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, tokenizer_json={**tokenizer_json(), **content}) / "tokenizer.json"
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: it") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"normalizer": {"type": "NFC\n\x1b[2J"}},
        {"pre_tokenizer": {"type": "x" * 10**5}},
        {"model": {"type": "Unigram\r"}},
        {"added_tokens": [{"content": "a", "x": "x" * 10**5}]},
    ],
)
def test_what_a_stranger_wrote_is_short_and_printable_in_the_message(
    content: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, tokenizer_json={**tokenizer_json(), **content})
    with pytest.raises(UserError, match=r"is supported$|added token") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_names_of_special_tokens_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    names: dict[str, Any] = {"eos_token": 3, "bos_token": {"content": []}, "pad_token": "nowhere"}
    names |= {"additional_special_tokens": 3, "extra_special_tokens": {"x": [], "y": "the"}}
    write(tmp_path, tokenizer_json=tokenizer_json(), special_tokens_map_json=names)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {}
    assert pieces(tokenizer, "other", allow_special=True) == ["o", "the", "r"]


def test_the_damaged_file_is_named_and_not_the_one_beside_it(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_json=tokenizer_json(), tokenizer_config_json="{")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'tokenizer_config.json'))} "):
        load_tokenizer(tmp_path)
    for id in ("x", "²", "9" * 5000):
        decoder = {id: added_token("<s>", SIZE)}
        write(tmp_path, tokenizer_config_json={"added_tokens_decoder": decoder})
        with pytest.raises(UserError, match="it is damaged: it has the added token"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, vocab_json=vocabulary())
    (tmp_path / "merges.txt").write_bytes(b"\xff \xff")
    with pytest.raises(UserError, match=r"merges\.txt is damaged: it is not UTF-8"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_like_ours_that_changes_characters_first_is_refused(tmp_path: Path) -> None:
    make_tokenizer("char", TEXT).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(UserError, match="its model is WordLevel"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("folder", [".", "a", "token"])
def test_the_file_is_named_whatever_its_folder_is_called(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(folder, "tokenizer.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"tokenizer": "klingon"}')
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is damaged: 'klingon'"):
        load_tokenizer(folder)
    write(path.parent, tokenizer_json={**tokenizer_json(), "normalizer": {"type": "NFC"}})
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: its normalizer is NFC"):
        load_tokenizer(folder)
    write(path.parent, tokenizer_json=tokenizer_json(), special_tokens_map_json="{")
    with pytest.raises(UserError, match=f"^{re.escape(str(path.with_name('special_')))}.*damaged"):
        load_tokenizer(folder)
    path.unlink()
    vocab = write(path.parent, vocab_json=vocabulary()) / "vocab.json"
    with pytest.raises(UserError, match=rf"^{re.escape(str(vocab))}: there is no merges\.txt"):
        load_tokenizer(folder)


def test_a_word_tokenizer_with_added_tokens_is_refused(tmp_path: Path) -> None:
    make_tokenizer("word", TEXT).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    for added in ([*content["added_tokens"], added_token("[PAD]", 99)], 3, [3], [{"content": []}]):
        path.write_text(json.dumps({**content, "added_tokens": added}))
        with pytest.raises(UserError, match="added tokens are not supported in a word tokenizer"):
            load_tokenizer(tmp_path)
    content["model"]["vocab"] = {"a": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the vocabulary of a word tokenizer has the ids 0, 1"):
        load_tokenizer(tmp_path)
