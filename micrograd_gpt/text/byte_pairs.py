"""Byte-pair encoding: GPT-2's own vocabulary, and any other that is cut up as GPT-2's is.

A text is cut into words by a pattern, and the bytes of each word are merged to tokens as the
vocabulary's merges say (Radford et al. 2019, section 2.2; merges.py). tiktoken computes it.
"""

from __future__ import annotations

import binascii
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.merges import Merges, merges_of, ranks_of, spelled, unspelled

if TYPE_CHECKING:
    import tiktoken

# OpenAI's vocabulary for GPT-2, one token a line; assets/README.md says where it comes from.
GPT2_FILE = Path(__file__).parent / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# Bytes are merged only within a match of this pattern, so that no token spans "dog." or two words.
# The space before a word belongs to the word: " dog" is one match. From OpenAI's encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_WHITE_SPACE = 500_000  # by 10**6 the regular expression engine's stack overflows


# ------------------------------------------------------------------------------------------- gpt2


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, computed by tiktoken.

    Ids 0 to 255 are the single bytes in OpenAI's own order, 256 to 50255 the merges, and 50256 is
    `<|endoftext|>`. Any text can be encoded, and nothing is fetched: the vocabulary comes with
    this package. Raises UserError if that file is missing or damaged.
    """

    name = "gpt2"

    def __init__(self) -> None:
        self._encoding, tokens = gpt2_encoding()
        super().__init__([*tokens, END_OF_TEXT.encode()], end_of_text=len(tokens))

    def _encode(self, text: str) -> np.ndarray:
        return _encoded(text, self._encoding).astype(np.int32)

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": self.name}


def _encoded(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """The ids that tiktoken gives, after refusing a text that would end the process."""
    too_long = rf"(?<!\s)\s{{{LONGEST_WHITE_SPACE}}}"
    if len(text) >= LONGEST_WHITE_SPACE and re.search(too_long, text):
        raise UserError(
            f"the text has a run of {LONGEST_WHITE_SPACE:,} or more white-space characters, more "
            f"than the {encoding.name} tokenizer can take: shorten the run"
        )
    # No special token is recognized, and none is refused: all text is ordinary.
    return encoding.encode_to_numpy(text, disallowed_special=())


@functools.cache
def gpt2_encoding() -> tuple[tiktoken.Encoding, list[bytes]]:
    """Return tiktoken's encoder for GPT-2, and the 50,256 ordinary tokens in the order of ids."""
    import tiktoken

    try:
        data = GPT2_FILE.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {GPT2_FILE}: install micrograd-gpt again") from error
    if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
        raise UserError(f"{GPT2_FILE} is damaged (wrong sha256): install micrograd-gpt again")
    tokens = [binascii.a2b_base64(token) for token in data.split()[::2]]  # each before its rank
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
    )
    return encoding, tokens


@functools.cache
def gpt2_vocabulary() -> dict[str, int]:
    """GPT-2's tokens and ids as in OpenAI's encoder.json and Hugging Face's files."""
    tokens = gpt2_encoding()[1]
    return {spelled(token): i for i, token in enumerate(tokens)} | {END_OF_TEXT: len(tokens)}


@functools.cache
def gpt2_merges() -> Merges:
    """GPT-2's merges as in OpenAI's vocab.bpe, worked out from the order of the tokens."""
    return merges_of(list(gpt2_vocabulary())[256:50256])


# ------------------------------------------------------------------------- any other such tokenizer


class AddedToken(NamedTuple):
    """A token that was added to a finished vocabulary: a text that is found before the rest of a
    text is cut into words. One that is special is found only where special tokens are allowed.
    """

    content: str
    id: int
    special: bool
    normalized: bool  # such tokens are looked for in what the others leave


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding with the vocabulary and merges of another model, computed by tiktoken."""

    name = "bpe"

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        added: Sequence[AddedToken] = (),
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        """Take a vocabulary as files spell it, with ids in any order, and the merges.

        `special_tokens` has the ids of eos_token, which becomes `end_of_text`, bos_token and so on.
        Raises UserError where these do not fit together, or where a byte has no token.
        """
        import tiktoken

        self.vocabulary, self.merges = dict(vocabulary), list(merges)
        # In one order, so that `to_dict` is the same after the tokenizer has been saved and read
        self.added = sorted(added, key=lambda token: token.id)
        self._special_tokens = dict(sorted((special_tokens or {}).items()))
        super().__init__(
            _tokens(self.vocabulary, self.added), self._special_tokens.get("eos_token")
        )
        ranks = ranks_of(self.vocabulary, self.merges)
        self._ids = np.array([vocabulary[token] for token in ranks], np.int32)  # by rank
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks={unspelled(token): rank for token, rank in ranks.items()},
            special_tokens={},
        )
        self._added = {token.content: token for token in added}
        self._patterns = [
            _pattern([token.content for token in added if token.normalized == normalized])
            for normalized in (False, True)
        ]
        if any(not token.special for token in added):
            self.indivisible = list(self._added)

    @property
    def special_tokens(self) -> dict[str, int]:
        return self._special_tokens

    @property
    def special_texts(self) -> list[str]:
        return list(self._added)

    def _encode(self, text: str) -> np.ndarray:
        return self._encode_parts(text, allow_special=False)

    def _encode_special(self, text: str) -> np.ndarray:
        return self._encode_parts(text, allow_special=True)

    def _encode_parts(self, text: str, allow_special: bool) -> np.ndarray:
        """The ids of the added tokens in `text`, and of what is between them."""
        parts: list[str | int] = [text]
        for pattern in self._patterns if allow_special or self.indivisible else ():
            parts = [
                found
                for part in parts
                for found in (
                    self._found(pattern, part, allow_special) if isinstance(part, str) else [part]
                )
            ]
        ids = [
            self._ids[_encoded(part, self._encoding)] if isinstance(part, str) else [part]
            for part in parts
        ]
        return np.concatenate([np.empty(0, np.int32), *ids]).astype(np.int32)

    def _found(
        self, pattern: re.Pattern[str], text: str, allow_special: bool
    ) -> Iterator[str | int]:
        """The ids of the added tokens that match, and the texts between them."""
        start = 0
        for match in pattern.finditer(text):
            token = self._added[match[0]]
            if token.special and not allow_special:
                continue  # it is text, and no other token is looked for within it
            if start < match.start():
                yield text[start : match.start()]
            yield token.id
            start = match.end()
        if start < len(text):
            yield text[start:]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokenizer": self.name,
            "vocabulary": self.vocabulary,
            "merges": [list(pair) for pair in self.merges],
            "added": [list(token) for token in self.added],
            "special_tokens": self._special_tokens,
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> BytePairTokenizer:
        """The tokenizer that `to_dict` described; UserError for anything else."""
        try:
            return cls(
                settings["vocabulary"],
                [(left, right) for left, right in settings["merges"]],
                [AddedToken(*token) for token in settings["added"]],
                settings["special_tokens"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"that is not the description of a bpe tokenizer ({error!r})"
            ) from error


def _tokens(vocabulary: Mapping[str, int], added: Sequence[AddedToken]) -> list[bytes]:
    """The bytes of each id; UserError where an id is missing or taken. `added` is in the order of
    ids."""
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"its vocabulary's ids are not 0 to {len(vocabulary) - 1}, each once")
    tokens = [unspelled(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    for token in added:
        due = vocabulary.get(token.content, len(tokens))
        if token.id != due:
            raise UserError(
                f"its added token {token.content!r} has the id {token.id} where {due} is due"
            )
        tokens[due : due + 1] = [token.content.encode("utf-8")]
    return tokens


def _pattern(texts: Sequence[str]) -> re.Pattern[str]:
    """What finds the longest of the texts that begin at the first place where one does."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if texts else r"(?!)")
