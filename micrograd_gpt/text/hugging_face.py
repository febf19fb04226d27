"""Tokenizers in the format of Hugging Face's tokenizers library, which Transformers reads.

tokenizer.json says what happens to a text, in this order:

    added_tokens     texts that become a token before anything else is done; ours are all special
    normalizer       changes characters; ours have none
    pre_tokenizer    cuts the text into pieces
    model            pieces to ids: its "vocab" maps each token, as it is spelled, to its id
    decoder          tokens back to text

and tokenizer_config.json which class of Transformers reads it, and which token ends a text. Each of
our tokenizers becomes the model that gives its very ids:

    gpt2, bpe   BPE: each byte one character (merges.py), cut up by GPT-2's pattern, and merged
    byte        BPE: the same, without any merges
    char        WordLevel: a piece is a token; here each character is a piece
    word        WordLevel: the pieces are what WordTokenizer.PATTERN matches

A special token that is typed out in a text is text to our tokenizers, so that no text from
elsewhere can end a document. "split_special_tokens" tells Transformers so. (With
`AutoTokenizer.from_pretrained(folder, split_special_tokens=False)` it finds them, as ours find
`<|endoftext|>` with `encode(text, allow_special=True)`.)
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from micrograd_gpt.support.files import write_text
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.byte_pairs import (
    AddedToken,
    BytePairTokenizer,
    GPT2Tokenizer,
    gpt2_merges,
    gpt2_vocabulary,
)
from micrograd_gpt.text.merges import SPELLING
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PROMPT_TEMPLATE = "prompt_template.txt"  # beside them, for a model tuned on instructions

ANY_CHARACTER = r"[\s\S]"


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, each whole or not at all."""
    for name, content in (
        (TOKENIZER, tokenizer_json(tokenizer)),
        (TOKENIZER_CONFIG, tokenizer_config_json(tokenizer)),
    ):
        write_text(Path(folder) / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def tokenizer_config_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    special = {
        name: tokenizer.tokens[id].decode("utf-8") for name, id in tokenizer.special_tokens.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # that is: tokenizer.json says it all
        **special,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,  # or decoding would take the space from " ."
        # Without this, Transformers 4 adds token_type_ids, which its GPT-2 takes for more tokens
        "model_input_names": ["input_ids", "attention_mask"],
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    if isinstance(tokenizer, CharTokenizer):
        parts = _word_level(tokenizer, ANY_CHARACTER)
    elif isinstance(tokenizer, WordTokenizer):
        parts = _word_level(tokenizer, word_pattern(python_word_characters()))
    elif isinstance(tokenizer, ByteTokenizer):
        parts = _byte_level(byte_vocabulary(), [])
    elif isinstance(tokenizer, GPT2Tokenizer):
        parts = _byte_level(gpt2_vocabulary(), gpt2_merges())
    else:
        assert isinstance(tokenizer, BytePairTokenizer)
        parts = _byte_level(tokenizer.vocabulary, tokenizer.merges)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_as_json(token) for token in added_tokens(tokenizer)],
        "normalizer": None,
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": None,
        "decoder": parts["decoder"],
        "model": parts["model"],
    }


def added_tokens(tokenizer: Tokenizer) -> list[AddedToken]:
    """The tokens that do not come about by cutting text up, in the order of their ids."""
    if isinstance(tokenizer, BytePairTokenizer):
        return tokenizer.added
    ids = sorted(set(tokenizer.special_tokens.values()))
    return [AddedToken(tokenizer.tokens[id].decode("utf-8"), id, True, False) for id in ids]


def _as_json(token: AddedToken) -> dict[str, Any]:
    exact = {"single_word": False, "lstrip": False, "rstrip": False}
    flags = {"normalized": token.normalized, "special": token.special}
    return {"id": token.id, "content": token.content, **exact, **flags}


# ------------------------------------------------------------------------------ byte-pair encoding


def byte_vocabulary() -> dict[str, int]:
    """The 256 bytes as files spell them."""
    return {character: byte for byte, character in enumerate(SPELLING)}


def _byte_level(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    # Cuts text up by GPT-2's pattern, and spells bytes as characters; the decoder spells them back
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": [f"{left} {right}" for left, right in merges],  # as all versions read them
        },
    }


# ------------------------------------------------------------------------------ characters, words


def _word_level(tokenizer: CharTokenizer | WordTokenizer, pattern: str) -> dict[str, Any]:
    # Without an unknown token the library refuses unknown text, as our tokenizer does
    unknown = "" if tokenizer.unknown is None else tokenizer.UNKNOWN
    return {
        "pre_tokenizer": split(pattern),
        "decoder": {"type": "Fuse"},  # joined with nothing in between
        "model": {
            "type": "WordLevel",
            "vocab": {token: id for id, token in enumerate(tokenizer.vocabulary)},
            "unk_token": unknown,
        },
    }


def split(pattern: str) -> dict[str, Any]:
    """What cuts a text into the matches of a pattern (Oniguruma's syntax)."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def word_pattern(word_characters: str) -> str:
    """WordTokenizer.PATTERN with a class of characters in place of \\w."""
    return rf"{word_characters}+(?:['’]{word_characters}+)*|{ANY_CHARACTER}"


@functools.cache
def python_word_characters() -> str:
    """The characters that Python's \\w matches, as a class of some 750 ranges.

    By name they would be another set wherever Python and the library have not the same version of
    Unicode, and a word that has a new letter another number of tokens.
    """
    every_character = "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, 0x110000))))
    runs = re.findall(r"\w+", every_character)
    ranges = [f"\\x{{{ord(run[0]):X}}}-\\x{{{ord(run[-1]):X}}}" for run in runs]
    return f"[{''.join(ranges)}]"
