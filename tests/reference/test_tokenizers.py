"""Our tokenizers against Transformers', ids and texts, for random Unicode; no network needed.

What we write, AutoTokenizer reads; what the tokenizers library makes, we read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer, gpt2_merges, gpt2_vocabulary
from micrograd_gpt.text.merges import SPELLING
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import CharTokenizer, make_tokenizer
from micrograd_gpt.weights.saving import save_pretrained

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

NAMES = ["char", "byte", "word", "gpt2"]
LEARNED_FROM = "The dog's tail wagged; it didn't stop. Два пса — 二匹の犬 🐕‍🦺 ½ x² ١٢٣ \r\n\t"
SPECIAL = [END_OF_TEXT, "<|unk|>", "<unk>", "<s>", "</s>", "[PAD]"]

# All planes, and what tokenizers tell apart: white space of all kinds, marks that combine,
# controls, parts of words, special tokens that are typed out
characters = st.characters(exclude_categories=["Cs"])
chunks = st.sampled_from(
    [
        *LEARNED_FROM,
        *SPECIAL,
        "'",
        "’",
        "'s",
        "dog",
        " the",
        "  ",
        "\x1c",
        "\x85",
        "\u3000",
        "e\u0301",
    ]
)
texts = st.lists(chunks | characters, max_size=40).map("".join)
many = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    """A model's folder with this tokenizer."""
    config = GPT2Config(1, 1, 4, tokenizer.vocab_size, 16)
    save_pretrained(GPT2(config), folder, tokenizer)
    return folder


def assert_agree(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text).tolist()
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == ours.decode(ids)


# ------------------------------------------------------------------------------------ what we write


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Each of our tokenizers, and AutoTokenizer's reading of it; two of char's."""
    ours = {name: make_tokenizer(name, LEARNED_FROM) for name in NAMES}
    ours["char with unk"] = CharTokenizer.from_text(LEARNED_FROM, unk=True)
    return {
        name: (
            tokenizer,
            transformers.AutoTokenizer.from_pretrained(
                saved(tokenizer, tmp_path_factory.mktemp(name.replace(" ", "-")))
            ),
        )
        for name, tokenizer in ours.items()
    }


@pytest.mark.parametrize("name", ["byte", "word", "gpt2", "char with unk"])
@many
@given(text=texts)
def test_any_text_has_our_ids(
    name: str, written: dict[str, tuple[Tokenizer, Any]], text: str
) -> None:
    assert_agree(*written[name], text)


@many
@given(text=st.text(LEARNED_FROM + END_OF_TEXT, max_size=60))
def test_any_text_of_known_characters_has_our_ids(
    written: dict[str, tuple[Tokenizer, Any]], text: str
) -> None:
    known = set(LEARNED_FROM)
    ours, theirs = written["char"]
    assert_agree(ours, theirs, "".join(c for c in text if c in known))


def test_a_character_that_is_not_known_is_refused_there_too(
    written: dict[str, tuple[Tokenizer, Any]],
) -> None:
    with pytest.raises(Exception, match="UNK"):
        written["char"][1].encode("the ж")


def test_every_character_of_unicode(written: dict[str, tuple[Tokenizer, Any]]) -> None:
    """Also those that are younger than this Python's Unicode, among letters and alone."""
    planes = [0, 1, 2, 3, 14]  # the others have no characters yet, or private ones
    codes = [code for plane in planes for code in range(plane << 16, (plane + 1) << 16)]
    every = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    for name, separator in (("byte", ""), ("word", "b'"), ("word", ""), ("gpt2", "b'")):
        for start in range(0, len(every), 1 << 12):
            assert_agree(*written[name], separator.join(every[start : start + (1 << 12)]))


@pytest.mark.parametrize("name", ["byte", "gpt2"])
@many
@given(data=st.data())
def test_any_ids_decode_to_our_text(
    name: str, written: dict[str, tuple[Tokenizer, Any]], data: st.DataObject
) -> None:
    """Bytes that are not UTF-8, and special tokens, among them."""
    ours, theirs = written[name]
    some = st.integers(0, ours.vocab_size - 1) | st.integers(100, 255) | st.just(ours.end_of_text)
    ids = data.draw(st.lists(some, max_size=20))
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("name", ["byte", "word", "gpt2", "char"])
def test_special_tokens_are_special_only_when_allowed(
    name: str, written: dict[str, tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    ours, theirs = written[name]
    end = ours.end_of_text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (
        *(end, end),
        ours.unknown,
    )
    if end is not None:
        text = f"The tail{END_OF_TEXT} tail{END_OF_TEXT}{END_OF_TEXT}"
        assert end not in theirs.encode(text)
        ids = ours.encode(text, allow_special=True).tolist()
        folder = saved(ours, tmp_path)
        auto = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
        assert auto.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == "The tail tail"


def test_the_model_gets_what_it_takes(written: dict[str, tuple[Tokenizer, Any]]) -> None:
    """token_type_ids would be added to the tokens by Transformers' GPT-2."""
    for _, theirs in written.values():
        assert set(theirs("the dog")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_continues_text(name: str, tmp_path: Path) -> None:
    ours = make_tokenizer(name, LEARNED_FROM)
    model = GPT2(GPT2Config(2, 2, 16, ours.vocab_size, 32), seed=1)
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim == 2 else 1
    save_pretrained(model, tmp_path, ours)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.end_of_text,) * 2
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path))
    prompt = "The dog's"
    (found,) = pipeline(prompt, max_new_tokens=12, do_sample=False)
    ids = model.eval().generate(
        ours.encode(prompt), max_new_tokens=12, temperature=0, end_of_text=ours.end_of_text
    )
    expected = ours.decode([i for i in ids if i not in (ours.end_of_text, ours.unknown)])
    assert found["generated_text"] == expected


@pytest.mark.parametrize("name", [*NAMES, "char with unk"])
def test_what_transformers_saves_again_is_read(
    name: str, written: dict[str, tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    ours, theirs = written[name]
    theirs.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(ours) and again.to_dict() == ours.to_dict()


# -------------------------------------------------------------------------------------------- gpt2


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """Transformers' own class for GPT-2's tokenizer."""
    merges = [tuple(pair) for pair in gpt2_merges()]
    return transformers.GPT2Tokenizer(vocab=gpt2_vocabulary(), merges=merges)


def test_published_ids(gpt2: Any) -> None:
    """Transformers as built here is the tokenizer it should be: what follows has a reference."""
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(END_OF_TEXT) == [50256]


def test_real_text(gpt2: Any) -> None:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ours = GPT2Tokenizer().encode(text)
    assert ours.tolist() == gpt2.encode(text)
    assert GPT2Tokenizer().decode(ours) == text


def test_end_of_text_where_it_is_allowed(gpt2: Any) -> None:
    text = f"One.{END_OF_TEXT}Two. {END_OF_TEXT}{END_OF_TEXT}\n"
    assert GPT2Tokenizer().encode(text, allow_special=True).tolist() == gpt2.encode(text)


# ------------------------------------------------------------------ what others make, and we read


def trained(vocab_size: int = 700, **options: Any) -> Any:
    """A byte-level BPE that the tokenizers library learned from Python's manual."""
    from pydoc_data.topics import topics

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **options,
    )
    made.train_from_iterator([*topics.values(), LEARNED_FROM], trainer)
    return made


def shuffled(made: Any, seed: int) -> Any:
    """The same merges, with the ids in a random order."""
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    ids = random.Random(seed).sample(range(len(vocabulary)), len(vocabulary))
    content["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def plain() -> Any:
    return trained(special_tokens=["<s>", "</s>"])


def random_order() -> Any:
    return shuffled(trained(), 1)


def with_added_tokens() -> Any:
    """Special ones and others, of which some overlap, and texts that merges make too."""
    made = shuffled(trained(900), 2)
    made.add_special_tokens(["<s>", "</s>", "[PAD]", "[PAD][PAD]"])
    made.add_tokens(["dog's", "dog", "  ", "二匹", " the", "PAD]x", "]\n"])
    raw = tokenizers.AddedToken("og", normalized=False)
    made.add_tokens([raw, tokenizers.AddedToken("犬 🐕", normalized=False)])
    return made


def random_merges() -> Any:
    """Merges that no text was learned from: many can never happen."""
    draw = random.Random(3)
    tokens, merges = list("dogthe'") + ["Ġ"], []
    for _ in range(400):
        pair = (draw.choice(tokens), draw.choice(tokens))
        if len("".join(pair)) < 8 and "".join(pair) not in tokens:
            merges.append(pair)
            tokens.append("".join(pair))
    vocabulary = {token: id for id, token in enumerate(dict.fromkeys([*SPELLING, *tokens]))}
    made = trained(256)
    made.model = tokenizers.models.BPE(vocabulary, merges)
    return shuffled(made, 4)


MAKERS = [plain, random_order, with_added_tokens, random_merges]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def foreign(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Tokenizer]]:
    """A folder that Transformers saved, with its tokenizer as we read it."""
    folder = tmp_path_factory.mktemp("foreign")
    maker: Callable[[], Any] = request.param
    names = {"bos_token": "<s>", "eos_token": "</s>"} if "</s>" in maker().get_vocab() else {}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=maker(), **names)
    fast.save_pretrained(folder)
    yield folder, load_tokenizer(folder)


foreign_texts = st.lists(
    chunks
    | characters
    | st.text("dogthe' ", min_size=4, max_size=12)
    | st.sampled_from(["[PAD]", "[PAD][PAD]x", "dog's", "二匹", "犬 🐕", "]\n", "   ", " the"]),
    max_size=30,
).map("".join)


@many
@given(text=foreign_texts)
def test_another_s_tokenizer_has_the_same_ids_here(
    foreign: tuple[Path, Tokenizer], text: str
) -> None:
    folder, ours = foreign
    theirs = loaded(folder)
    ids = ours.encode(text, allow_special=True).tolist()
    assert theirs.encode(text) == ids and theirs.decode(ids) == ours.decode(ids)
    assert theirs.encode(text, split_special_tokens=True) == ours.encode(text).tolist()
    assert ours.decode(ours.encode(text)) == text


@many
@given(text=foreign_texts)
def test_another_s_tokenizer_has_the_same_ids_once_saved(
    foreign: tuple[Path, Tokenizer], text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, ours = foreign
    mine = folder / "mine"
    if not mine.exists():
        saved(ours, mine)
    assert_agree(load_tokenizer_once(mine), loaded(mine), text)


def test_where_the_two_files_differ_we_read_what_transformers_reads(tmp_path: Path) -> None:
    made = trained(special_tokens=["<s>", "</s>"])
    made.add_tokens(["dog", "二匹", " the"])
    ids = [made.token_to_id(token) for token in ("dog", "二匹", " the")]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": "<s>", "eos_token": "dog", "additional_special_tokens": [" the"]},
        "added_tokens_decoder": {
            str(id): {"content": token, "special": special, **flags}
            for id, token, special in zip(
                ids, ("dog", "二匹", " the"), (False, True, False), strict=True
            )
        },
    }
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<s>the dog 二匹 the"
    assert ours.encode(text, allow_special=True).tolist() == theirs.encode(text)
    assert ours.encode(text).tolist() == theirs.encode(text, split_special_tokens=True)
    assert [id in ours.encode(text) for id in ids] == [False, False, True]
    assert theirs.eos_token_id == ours.end_of_text == ids[0]


LOADED: dict[Path, Any] = {}
READ: dict[Path, Tokenizer] = {}


def loaded(folder: Path) -> Any:
    if folder not in LOADED:
        LOADED[folder] = transformers.AutoTokenizer.from_pretrained(folder)
    return LOADED[folder]


def load_tokenizer_once(folder: Path) -> Tokenizer:
    if folder not in READ:
        READ[folder] = load_tokenizer(folder)
    return READ[folder]


def test_vocab_json_and_merges_txt(tmp_path: Path) -> None:
    """As GPT-2's older folders have them; special tokens have their names there."""
    made = trained(600, special_tokens=[END_OF_TEXT])
    made.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 601}')
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 600}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end_of_text, 600)
    text = f"{LEARNED_FROM}[PAD]{END_OF_TEXT}the dog{END_OF_TEXT}"
    assert ours.encode(text, allow_special=True).tolist() == theirs.encode(text)
