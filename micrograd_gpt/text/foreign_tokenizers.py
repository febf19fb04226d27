"""Byte-pair encodings of other models, as their folders describe them, read or refused.

    tokenizer.json            hugging_face.py explains it; or else these two:
    vocab.json, merges.txt    tokens with their ids, and the merges in order, a pair on each line
    tokenizer_config.json, special_tokens_map.json
                              which token ends a text, and others that have a name
    added_tokens.json         tokens that were added to the vocabulary, with their ids

A tokenizer that cuts text up in another way than GPT-2's, or changes it before, would give other
ids than it was trained with. It is refused, with what makes it different.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from micrograd_gpt.support.cli import listed, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, reading
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT
from micrograd_gpt.text.byte_pairs import AddedToken
from micrograd_gpt.text.hugging_face import TOKENIZER_CONFIG
from micrograd_gpt.text.merges import Merges

MERGES, ADDED, SPECIAL = "merges.txt", "added_tokens.json", "special_tokens_map.json"
MODEL = "config.json"
BESIDE = (TOKENIZER_CONFIG, MERGES, ADDED, SPECIAL, MODEL)  # the files that are read besides
NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
OTHER_SPECIAL = ("additional_special_tokens", "extra_special_tokens")  # lists
# Files that only tokenizers of other kinds have
OTHER_FILES = {
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "vocab.txt": "WordPiece",
}
# Transformers' classes that cut text up as GPT-2's does, with "Fast" after their names or without.
# vocab.json and merges.txt are other classes' files too, and do not say how text is cut up.
CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
ONLY = "only byte-level BPE that cuts text up as GPT-2 does is supported"


class BytePairs(NamedTuple):
    """What a folder says of its byte-pair encoding: the arguments of BytePairTokenizer."""

    vocabulary: dict[str, int]
    merges: Merges
    added: list[AddedToken]
    special_tokens: dict[str, int]  # by name


def refuse_other_files(folder: Path) -> None:
    """Raise UserError if the folder has the files of a tokenizer of another kind, or says so."""
    for name, kind in OTHER_FILES.items():
        if (folder / name).exists():
            raise UserError(f"{folder / name} is a {kind} tokenizer: {ONLY}")
    _refuse_other_classes(folder)


def _refuse_other_classes(folder: Path) -> None:
    kind = (read_json(folder / TOKENIZER_CONFIG) or {}).get("tokenizer_class")
    if kind is not None and str(kind).removesuffix("Fast") not in CLASSES:
        raise UserError(f"{folder / TOKENIZER_CONFIG}: a {_shown(kind)} is refused: {ONLY}")


# -------------------------------------------------------------------------------- the two formats


def of_tokenizer_json(settings: Mapping[str, Any], folder: Path) -> BytePairs:
    """The byte-pair encoding of a tokenizer.json with these contents, and the files beside it.

    Raises UserError for a damaged file, and for a tokenizer that cuts text up in another way.
    """
    model = settings.get("model")
    if not isinstance(model, dict):
        raise UserError("it is damaged: it has no model")
    kind = model.get("type", "BPE" if "merges" in model else None)  # older files do not say it
    if kind != "BPE":
        raise UserError(f"its model is {_shown(kind)}: {ONLY}")
    config = read_json(folder / TOKENIZER_CONFIG) or {}
    _refuse_differences(settings, model, config)
    described = settings.get("added_tokens") or []
    if not isinstance(described, list):
        raise UserError("it is damaged: its added_tokens are not a list")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise UserError("it is damaged: its merges are not a list")
    return _complete(
        _vocabulary(model.get("vocab")),
        _merges(merge.split(" ") if isinstance(merge, str) else merge for merge in merges),
        [
            _added(token, token.get("id") if isinstance(token, dict) else None)
            for token in described
        ],
        folder,
    )


def of_vocabulary_files(vocabulary: Mapping[str, Any], folder: Path) -> BytePairs:
    """The byte-pair encoding of a vocab.json with these contents, and the files beside it.

    Raises UserError for damaged files, and where there is no merges.txt.
    """
    with reading(folder / MERGES):
        try:
            text = (folder / MERGES).read_text("utf-8")
        except FileNotFoundError:
            raise UserError(f"there is no {MERGES} beside it: {ONLY}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / MERGES} is damaged: it is not UTF-8 ({error})") from None
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    config = read_json(folder / TOKENIZER_CONFIG) or {}
    _refuse_other_classes(folder)
    _refuse_options(config)
    merges = _merges(line.rstrip("\r").split(" ") for line in lines)
    return _complete(_vocabulary(vocabulary), merges, [], folder)


# ------------------------------------------------------------------------------ what is refused


def _refuse_differences(
    settings: Mapping[str, Any], model: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Raise UserError, naming it, for what makes a tokenizer differ from GPT-2's."""
    pre_tokenizer, post_processor = settings.get("pre_tokenizer"), settings.get("post_processor")
    if isinstance(post_processor, dict) and post_processor.get("special_tokens") == {}:
        post_processor = None  # a template that adds nothing
    for what, value, allowed in (
        ("normalizer", _type(settings.get("normalizer")), (None,)),
        ("pre_tokenizer", _type(pre_tokenizer), ("ByteLevel",)),
        ("decoder", _type(settings.get("decoder")), ("ByteLevel",)),
        ("post_processor", _type(post_processor), (None, "ByteLevel")),
        ("dropout", model.get("dropout"), (None, 0)),
        ("byte_fallback", model.get("byte_fallback"), (None, False)),
        ("ignore_merges", model.get("ignore_merges"), (None, False)),
        ("continuing_subword_prefix", model.get("continuing_subword_prefix"), (None, "")),
        ("end_of_word_suffix", model.get("end_of_word_suffix"), (None, "")),
    ):
        if value not in allowed:
            raise UserError(f"its {what} is {_shown(value)}: {ONLY}")
    assert isinstance(pre_tokenizer, dict)
    for option, wanted in (("add_prefix_space", False), ("use_regex", True)):
        if pre_tokenizer.get(option, True) is not wanted:
            raise UserError(f"its pre_tokenizer has {option} {not wanted}: {ONLY}")
    _refuse_options(config)


def _refuse_options(config: Mapping[str, Any]) -> None:
    """Raise UserError for options of a tokenizer_config.json that would give other ids."""
    for option in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if config.get(option):
            raise UserError(f"{TOKENIZER_CONFIG} sets {option}, which is not supported")


def _shown(value: Any) -> str:
    """What a stranger's file says, short and printable."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 80 else f"{text!a:.80}"


def _type(part: Any) -> Any:
    """The type of a part of tokenizer.json, with those of its parts if it is a sequence."""
    if not isinstance(part, dict):
        return None if part is None else repr(part)
    for parts in ("pretokenizers", "normalizers", "processors", "decoders"):
        if isinstance(part.get(parts), list):
            return f"a sequence of {', '.join(str(_type(inner)) for inner in part[parts])}"
    return part.get("type")


# ------------------------------------------------------------------------ vocabulary, added tokens


def _vocabulary(values: Any) -> dict[str, int]:
    if not isinstance(values, dict) or any(type(id) is not int for id in values.values()):
        raise UserError("it is damaged: its vocabulary does not map tokens to ids")
    _check_unicode(values)
    return values


def _check_unicode(texts: Collection[str]) -> None:
    try:
        "".join(texts).encode("utf-8")  # all at once: there are 50,000 tokens
    except UnicodeEncodeError:
        wrong = next(text for text in texts if any("\ud800" <= c <= "\udfff" for c in text))
        raise UserError(f"it is damaged: {wrong!r} has a lone surrogate") from None


def _merges(pairs: Iterable[Any]) -> Merges:
    merges = []
    for pair in pairs:
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise UserError(f"it is damaged: its merge {pair!r} is not two tokens")
        merges.append((pair[0], pair[1]))
    _check_unicode(list(itertools.chain.from_iterable(merges)))
    return merges


def _added(token: Any, id: Any) -> AddedToken:
    """An added token as tokenizer.json or tokenizer_config.json describes it."""
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not content or type(id) is not int:
        raise UserError(f"it is damaged: it has the added token {_shown(token)}")
    for option in ("lstrip", "rstrip", "single_word"):
        if token.get(option):
            raise UserError(f"its added token {content!r} has {option}, which is not supported")
    _check_unicode([content])
    special = bool(token.get("special"))
    return AddedToken(content, id, special, bool(token.get("normalized", not special)))


def _complete(
    vocabulary: dict[str, int], merges: Merges, added: Iterable[AddedToken], folder: Path
) -> BytePairs:
    """Add to what a tokenizer's own file says what the files beside it say of special tokens."""
    config = read_json(folder / TOKENIZER_CONFIG) or {}
    decoder = config.get("added_tokens_decoder")
    files = [config, read_json(folder / SPECIAL) or {}]
    # As in Transformers, the older file counts unless the other one lists the tokens too
    names, special = _special(*(files if decoder is None else reversed(files)))
    tokens = {token.content: token for token in added}
    for id, described in decoder.items() if isinstance(decoder, dict) else ():
        token = _added(described, int(id) if id.isdecimal() and len(id) < 10 else None)
        tokens[token.content] = token  # Transformers too follows this file where the two differ
    for text, id in _vocabulary(read_json(folder / ADDED) or {}).items():
        tokens.setdefault(text, AddedToken(text, id, text in special, text not in special))

    ids = vocabulary | {token.content: token.id for token in tokens.values()}
    by_id = {token.id: token.content for token in tokens.values()}
    model = read_json(folder / MODEL) or {}
    for name in ("bos_token", "eos_token"):
        if names.get(name) not in ids:
            id = model.get(f"{name}_id")  # often GPT-2's, where the vocabulary is another
            said = by_id.get(id) if isinstance(id, int) else None
            names[name] = said or END_OF_TEXT
    for text in sorted({*special, *names.values()} & ids.keys()):
        token = tokens.get(text, AddedToken(text, ids[text], special=True, normalized=False))
        tokens[text] = token._replace(special=token.special or text in names.values())
    for text in _beyond(tokens.values(), vocabulary, model.get("vocab_size")):
        say(f"note: {folder}: the model has no {text!a}, which its tokenizer adds")
        del tokens[text], ids[text]
    named = {name: ids[text] for name, text in names.items() if text in ids}
    if tokens and "eos_token" not in named and not config:
        say(
            f"note: {folder}: nothing says which token ends a text, of {listed(tokens)}: one that "
            f"does is named in a {TOKENIZER_CONFIG} beside it, as its eos_token"
        )
    return BytePairs(vocabulary, merges, list(tokens.values()), named)


def _beyond(
    added: Iterable[AddedToken], vocabulary: Mapping[str, int], vocab_size: Any
) -> list[str]:
    """The special tokens that were added without making the model's vocabulary larger, as padding
    often was, since no text that is trained on has it.
    """
    if not isinstance(vocab_size, int) or vocab_size < len(vocabulary):
        return []  # the model is another tokenizer's, which is for others to say
    return [token.content for token in added if token.special and token.id >= vocab_size]


def _special(*files: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """The special tokens that have a name, the last file's word for each, and all of them."""
    names: dict[str, str] = {}
    special: set[str] = set()
    for values in files:
        names |= {name: text for name in NAMES if (text := _content(values.get(name)))}
        for key in OTHER_SPECIAL:
            others = values.get(key)
            others = list(others.values()) if isinstance(others, dict) else others
            texts = others if isinstance(others, list) else []
            special |= {text for token in texts if (text := _content(token))}
    return names, special | set(names.values())


def _content(token: Any) -> str | None:
    """The text of a special token, which is written as a text or as a description."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
