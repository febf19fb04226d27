"""The tokenizer of a model's folder, from whichever files say it.

    tokenizer.json            in the format of Hugging Face's tokenizers library (hugging_face.py),
                              or in the one that earlier versions of this package wrote
    vocab.json, merges.txt    a byte-pair encoding's tokens with their ids, and its merges in order
    meta.pkl                  the characters that a model of nanoGPT's was trained on
    none of these             OpenAI's folders and many others: the tokenizer is GPT-2's

Our own tokenizers are recognized, and other models' byte-pair encodings read, or refused by what
makes them different (foreign_tokenizers.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import finish_set
from micrograd_gpt.support.files import read_json
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.byte_pairs import BytePairTokenizer, GPT2Tokenizer
from micrograd_gpt.text.foreign_tokenizers import (
    ADDED,
    BESIDE,
    MERGES,
    OTHER_FILES,
    SPECIAL,
    BytePairs,
    of_tokenizer_json,
    of_vocabulary_files,
    refuse_other_files,
)
from micrograd_gpt.text.hugging_face import (
    ANY_CHARACTER,
    TOKENIZER,
    TOKENIZER_CONFIG,
    byte_vocabulary,
    split,
    word_pattern,
)
from micrograd_gpt.text.merges import Merges
from micrograd_gpt.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
    tokenizer_from_dict,
)

VOCABULARY = "vocab.json"
TOKENIZERS = (TOKENIZER, VOCABULARY, *OTHER_FILES)  # the others are refused by name
TOKENIZER_FILES = (*TOKENIZERS, TOKENIZER_CONFIG, MERGES, ADDED, SPECIAL)
# Of GPT-2's tokens in the order of their ids, a line each, and of OpenAI's vocab.bpe: to compare
# with the checksums takes less time than to work out the tokens and merges.
GPT2_TOKENS_SHA256 = "2d5ce813bdd43a428e2a9ae5e86a22fe1a594a6e7171d84d445ba4101f3a964d"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_SIZES = (50257, 50304)  # of GPT-2's vocabulary; padded to a multiple of 64, as by nanoGPT


def load_tokenizer(folder: str | Path, or_gpt2: bool = True) -> Tokenizer:
    """Return the tokenizer of the model in `folder`.

    Where no file says it, it is gpt2, unless `or_gpt2` is False, provided that config.json, if
    there is one, does not give another vocab_size than GPT-2's, plain or padded.

    Raises UserError, naming the file, for a damaged file and for a tokenizer that cannot be used.
    """
    from micrograd_gpt.text.nanogpt_vocabulary import nanogpt_vocabulary

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that a model or a tokenizer is in")
    finish_set(folder)
    settings = read_json(folder / TOKENIZER)
    if settings is not None:
        if "tokenizer" in settings:
            with naming(folder / TOKENIZER, " is damaged"):
                return tokenizer_from_dict(settings)
        with naming(folder / TOKENIZER):
            return _ours(settings) or _byte_pairs(of_tokenizer_json(settings, folder))
    vocabulary = read_json(folder / VOCABULARY)
    if vocabulary is not None:
        with naming(folder / VOCABULARY):
            return _byte_pairs(of_vocabulary_files(vocabulary, folder))
    refuse_other_files(folder)
    if characters := nanogpt_vocabulary(folder):
        return CharTokenizer(characters)
    if not or_gpt2:
        raise UserError(
            f"there is no tokenizer in {folder}: give a folder with {TOKENIZER}, or with "
            f"{VOCABULARY} and {MERGES}"
        )
    vocab_size = (read_json(folder / "config.json") or {}).get("vocab_size", GPT2_SIZES[0])
    if vocab_size not in GPT2_SIZES:
        raise UserError(
            f"{folder} has no {TOKENIZER}, and its vocab_size is {vocab_size} where "
            f"GPT-2's is {GPT2_SIZES[0]}: add the {TOKENIZER} the model was saved with"
        )
    return GPT2Tokenizer()


@contextmanager
def naming(path: Path, problem: str = "") -> Iterator[None]:
    """Within the block, a UserError says which file it is about, if not one of those beside it."""
    try:
        yield
    except UserError as error:
        others = [str(path.with_name(name)) for name in BESIDE]
        if str(error).removeprefix("cannot read ").startswith(tuple(others)):
            raise
        raise UserError(f"{path}{problem}: {error}") from error


def _byte_pairs(found: BytePairs) -> Tokenizer:
    """Our byte or gpt2 tokenizer, which need no working out, or another one like them."""
    if [(token.content, token.special) for token in found.added] == [(END_OF_TEXT, True)]:
        if (found.vocabulary, found.merges) == (byte_vocabulary(), []):
            return ByteTokenizer()
        if _is_gpt2(found.vocabulary, found.merges):
            return GPT2Tokenizer()
    return BytePairTokenizer(*found)


def _is_gpt2(vocabulary: Mapping[str, int], merges: Merges) -> bool:
    if sorted(vocabulary.values()) != list(range(GPT2_SIZES[0])):
        return False
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    checksums = [
        hashlib.sha256("".join(f"{line}\n" for line in each).encode()).hexdigest()
        for each in (tokens, lines)
    ]
    return checksums == [GPT2_TOKENS_SHA256, GPT2_MERGES_SHA256]


def _ours(settings: Mapping[str, Any]) -> Tokenizer | None:
    """The char or word tokenizer that a tokenizer.json describes; None for any other."""
    model, pre_tokenizer = settings.get("model"), settings.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(pre_tokenizer, dict):
        return None
    vocab, added = model.get("vocab"), settings.get("added_tokens") or []
    kind = _kind_of_words(pre_tokenizer)
    if kind is None or model.get("type") != "WordLevel" or settings.get("normalizer") is not None:
        return None
    if not isinstance(vocab, dict) or list(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"the vocabulary of a {kind.name} tokenizer has the ids 0, 1, 2, …")
    tokens = list(vocab)
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and token.get("content") in tokens for token in added
    ):
        raise UserError(f"added tokens are not supported in a {kind.name} tokenizer")
    return kind(tokens)


def _kind_of_words(
    pre_tokenizer: Mapping[str, Any],
) -> type[CharTokenizer | WordTokenizer] | None:
    """Which of our two tokenizers cuts a text up like that."""
    if pre_tokenizer == split(ANY_CHARACTER):
        return CharTokenizer
    pattern = pre_tokenizer.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str):
        return None
    # Which characters are of a word depends on the version of Unicode it was written with.
    word_characters = regex.partition("+")[0]
    return WordTokenizer if pre_tokenizer == split(word_pattern(word_characters)) else None
