"""Text to token ids and back: three tokenizers that fit on a page, and the names of all.

    gpt2   frequent byte sequences, merged pair by pair (byte_pairs.py)      50,257 ids
    char   characters of the training text                                   as many as the text has
    byte   the bytes of the text's UTF-8                                     257 ids
    word   words, punctuation marks and white space                          as many as asked for
    bpe    merged byte sequences like gpt2's, from the files of a folder     as many as they say

What they share is in base_tokenizer.py.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.byte_pairs import BytePairTokenizer, GPT2Tokenizer


class ByteTokenizer(Tokenizer):
    """The text's UTF-8, byte by byte: ids 0 to 255 are the bytes, 256 is `<|endoftext|>`.

    The 257th id marks where documents and samples end. No byte can, since any of the 256 can occur
    in a text.
    """

    name = "byte"

    def __init__(self) -> None:
        super().__init__([*(bytes([b]) for b in range(256)), END_OF_TEXT.encode()], 256)

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": self.name}


class LearnedTokenizer(Tokenizer):
    """A tokenizer whose vocabulary, a list of Unicode texts, comes from the training text."""

    @property
    def vocabulary(self) -> list[str]:
        return [token.decode("utf-8") for token in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": self.name, "vocabulary": self.vocabulary}


class UnknownCharacter(UserError):
    """A text has a character that its tokenizer does not know."""


class CharTokenizer(LearnedTokenizer):
    """One id per character (Unicode code point) of the training text, in the order of code points.

    A character outside the vocabulary is an UnknownCharacter, or becomes the token `<unk>` if
    the vocabulary has that entry. There is no `<|endoftext|>`.
    """

    name = "char"
    UNKNOWN: ClassVar[str] = "<unk>"

    def __init__(self, vocabulary: Iterable[str]) -> None:
        """Take the characters, each once, and perhaps "<unk>". Raises UserError for other lists."""
        vocabulary = _in_order(vocabulary)
        tokens = _as_tokens(vocabulary)
        unknown = vocabulary.index(self.UNKNOWN) if self.UNKNOWN in vocabulary else None
        super().__init__(tokens, end_of_text=None, unknown=unknown)
        characters = [(i, entry) for i, entry in enumerate(vocabulary) if entry != self.UNKNOWN]
        for _, entry in characters:
            if len(entry) != 1:
                raise UserError(
                    f"a char vocabulary holds single characters, and {entry!r} is not one"
                )
        # From code point to id. All code points past the largest known share the last entry.
        largest = max((ord(character) for _, character in characters), default=-1)
        self._ids = np.full(largest + 2, -1 if unknown is None else unknown, np.int32)
        for i, character in characters:
            self._ids[ord(character)] = i

    @classmethod
    def from_text(cls, text: str, unk: bool = False) -> CharTokenizer:
        """Make the vocabulary of `text`'s characters, followed by "<unk>" if `unk` is set."""
        return cls(sorted(set(text)) + [cls.UNKNOWN] * unk)

    def _encode(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
        ids = self._ids[np.minimum(code_points, len(self._ids) - 1)]
        if (ids < 0).any():
            position = int(np.argmax(ids < 0))
            others = len(np.unique(code_points[ids < 0])) - 1
            around = text[max(0, position - 12) : position + 12]  # to search for
            raise UnknownCharacter(
                f"the character {text[position]!r} in {around!r} is not among the "
                f"{self.vocab_size} characters of the text that this char tokenizer was made from: "
                f"remove it{f', and {others:,} more' if others else ''}"
            )
        return ids


class WordTokenizer(LearnedTokenizer):
    """Words, single punctuation marks and single white-space characters, one id each.

    Words keep their inner apostrophes ("don't"). White space is not merged, so that any layout of
    known words comes back as it was. What is not in the vocabulary becomes `<|unk|>`, and its text
    is lost. The pattern never matches a special token: `<|unk|>` typed out is cut at its marks.
    """

    name = "word"
    UNKNOWN: ClassVar[str] = "<|unk|>"
    PATTERN: ClassVar[re.Pattern[str]] = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\s")

    def __init__(self, vocabulary: Iterable[str]) -> None:
        """Take the words, marks and white space, each once, and both special tokens.

        Raises UserError for other lists.
        """
        vocabulary = _in_order(vocabulary)
        tokens = _as_tokens(vocabulary)
        self._ids = {entry: i for i, entry in enumerate(vocabulary)}
        for special in (END_OF_TEXT, self.UNKNOWN):
            if special not in self._ids:
                raise UserError(f"a word vocabulary needs the entry {special!r}")
        super().__init__(
            tokens, end_of_text=self._ids[END_OF_TEXT], unknown=self._ids[self.UNKNOWN]
        )

    @classmethod
    def from_text(cls, text: str, max_vocab_size: int = 10_000) -> WordTokenizer:
        """Make the vocabulary of what is most common in `text`: see `from_counts`."""
        return cls.from_counts(Counter(cls.PATTERN.findall(text)), max_vocab_size)

    @classmethod
    def from_counts(cls, counts: Counter[str], max_vocab_size: int = 10_000) -> WordTokenizer:
        """Make the vocabulary of the most common words, marks and white space.

        It has at most `max_vocab_size` entries. The two special tokens are ids 0 and 1. The others
        follow, most common first, and in the order of code points where they are equally common.
        Raises UserError if `max_vocab_size` leaves no room for a word.
        """
        if max_vocab_size < 3:
            raise UserError(f"max_vocab_size must be 3 or more, not {max_vocab_size}")
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([END_OF_TEXT, cls.UNKNOWN, *words[: max_vocab_size - 2]])

    def _encode(self, text: str) -> np.ndarray:
        words = self.PATTERN.findall(text)
        return np.array([self._ids.get(word, self.unknown) for word in words], np.int32)


# Tokenizers whose vocabulary is always the same, and those whose vocabulary comes from a text.
FIXED: dict[str, type[ByteTokenizer | GPT2Tokenizer]] = {
    "byte": ByteTokenizer,
    "gpt2": GPT2Tokenizer,
}
LEARNED: dict[str, type[CharTokenizer | WordTokenizer]] = {
    "char": CharTokenizer,
    "word": WordTokenizer,
}
NAMES = (*LEARNED, *FIXED)  # what --tokenizer takes, besides a folder


def _in_order(vocabulary: Iterable[str]) -> list[str]:
    """The entries as a list. Raises UserError for what has no order, as a set, and for a dict of
    ids in which they are not in the order of these."""
    if isinstance(vocabulary, set | frozenset):
        raise UserError("a vocabulary needs an order, and a set has none: give sorted(set(text))")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if ids != list(range(len(ids))) and any(isinstance(i, int) for i in ids):
        raise UserError(
            "the vocabulary is a dict whose ids are not 0, 1, 2, …: give a list of its texts in "
            "the order of their ids"
        )
    return list(vocabulary)


def _as_tokens(vocabulary: Sequence[str]) -> list[bytes]:
    """Return the entries as UTF-8. Raises UserError if one is repeated or is not Unicode text."""
    seen: set[str] = set()
    for i, entry in enumerate(vocabulary):
        if not isinstance(entry, str) or entry in seen:
            raise UserError(f"vocabulary entry {i}, {entry!r}, is repeated or not text")
        seen.add(entry)
    try:
        return [entry.encode("utf-8") for entry in vocabulary]
    except UnicodeEncodeError as error:
        raise UserError(f"the vocabulary has a lone surrogate, {error.object!r}") from error


def make_tokenizer(name: str, text: str) -> Tokenizer:
    """Return the tokenizer called `name`. If its vocabulary comes from a text, that is `text`.

    Raises UserError for any other name.
    """
    if name in LEARNED:
        return LEARNED[name].from_text(text)
    return tokenizer_from_dict({"tokenizer": name})


def tokenizer_from_dict(settings: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `to_dict` described. Raises UserError for anything else."""
    name, vocabulary = settings.get("tokenizer"), settings.get("vocabulary")
    if name == BytePairTokenizer.name and "vocabulary" in settings:
        return BytePairTokenizer.from_dict(settings)
    if name not in NAMES:
        raise UserError(f"{name!r} is not a tokenizer: choose one of {', '.join(NAMES)}")
    if name in FIXED:
        return FIXED[name]()
    if not isinstance(vocabulary, list):
        raise UserError(f"the {name} tokenizer needs a vocabulary, a list of strings")
    return LEARNED[name](vocabulary)


class StreamDecoder:
    """Decodes token by token, for text that is shown as it is produced.

    A token can end in the middle of a character; the bytes of an incomplete character wait for the
    next token. The strings that `feed` and `finish` return add up to `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Return the characters that `token_id` completes, "" if it completes none.

        Raises UserError for an id outside the vocabulary.
        """
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
