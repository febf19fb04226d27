"""Text to token ids and back: GPT-2's byte-pair encoding, and three tokenizers that fit on a page.

A token is a string of bytes, a vocabulary is a list of tokens, and a token's id is its place in
that list. Decoding joins the bytes; the tokenizers differ only in how they cut text up:

    gpt2   frequent byte sequences, merged pair by pair      50,257 ids
    char   characters of the training text                   as many as the text has
    byte   the bytes of the text's UTF-8                     257 ids
    word   words, punctuation marks and white space          as many as asked for

Text is Unicode (str), ids are NumPy int32 of shape (T,).
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import write_text

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"  # in a model's folder

# OpenAI's vocabulary for GPT-2, one token a line; assets/README.md says where it comes from.
GPT2_FILE = Path(__file__).parent / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# Bytes are merged only within a match of this pattern, so that no token spans "dog." or two words.
# The space before a word belongs to the word: " dog" is one match. From OpenAI's encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_LONGEST_WHITE_SPACE = 500_000  # by 10**6 the regular expression engine's stack overflows


class Tokenizer(ABC):
    """What every tokenizer does, given its vocabulary and a way to cut text up (`_encode`).

    `end_of_text` is the id of the special token `<|endoftext|>`, which stands between documents and
    ends a sample. `unknown` is the id for text that is not in the vocabulary. Each is None in a
    tokenizer that has no such token.
    """

    name: ClassVar[str]

    def __init__(
        self, tokens: list[bytes], end_of_text: int | None, unknown: int | None = None
    ) -> None:
        self.tokens = tokens  # id -> the bytes it stands for
        self.end_of_text = end_of_text
        self.unknown = unknown

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, which has no special tokens and no lone surrogates."""

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Return the ids of `text`, int32 of shape (T,).

        The characters `<|endoftext|>` in a text are ordinary characters by default, so that a
        corpus or a prompt from elsewhere cannot cut itself into documents. With `allow_special`
        they become the id `end_of_text`, if the tokenizer has one.

        Raises UserError for a character that the vocabulary cannot express, and for a lone
        surrogate, which is what Python makes of a byte that was not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has a lone surrogate, {text[error.start]!r}, at position {error.start}: "
                "give text that was read as UTF-8"
            ) from error
        if not allow_special or self.end_of_text is None:
            return self._encode(text)
        first, *rest = (self._encode(part) for part in text.split(END_OF_TEXT))
        end = np.array([self.end_of_text], np.int32)
        return np.concatenate([first, *(ids for part in rest for ids in (end, part))])

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of `ids`, integers of shape (T,). They can begin or end mid-character.

        Raises UserError for an id outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
            raise TypeError(f"ids must be integers of shape (T,), not {array.dtype} {array.shape}")
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise UserError(
                f"token id {array[outside][0]} is outside the {self.name} tokenizer's vocabulary "
                f"of {self.vocab_size} ids: give ids from 0 to {self.vocab_size - 1}"
            )
        return b"".join([self.tokens[i] for i in array.tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, integers of shape (T,).

        Bytes that are not UTF-8 become U+FFFD. `decode(encode(text)) == text` for every text that
        the vocabulary covers. Raises UserError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Return what `tokenizer_from_dict` needs, as JSON: the name, and the vocabulary if it
        comes from a text.
        """
        if self.name in FIXED:
            return {"tokenizer": self.name}
        return {"tokenizer": self.name, "vocabulary": [t.decode("utf-8") for t in self.tokens]}

    def save(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json, all or nothing (tokenizer_files.py reads it)."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1)
        write_text(Path(folder) / TOKENIZER_FILE, text + "\n")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2), computed by tiktoken.

    Ids 0 to 255 are the single bytes in OpenAI's own order, 256 to 50255 the merges, and 50256 is
    `<|endoftext|>`. Any text can be encoded, and nothing is fetched: the vocabulary comes with
    this package. Raises UserError if that file is missing or damaged.
    """

    name = "gpt2"

    def __init__(self) -> None:
        self._encoding, tokens = gpt2_encoding()
        super().__init__([*tokens, END_OF_TEXT.encode()], end_of_text=len(tokens))

    def _encode(self, text: str) -> np.ndarray:
        too_long = rf"(?<!\s)\s{{{GPT2_LONGEST_WHITE_SPACE}}}"
        if len(text) >= GPT2_LONGEST_WHITE_SPACE and re.search(too_long, text):
            raise UserError(
                f"the text has a run of {GPT2_LONGEST_WHITE_SPACE:,} or more white-space "
                "characters, more than the gpt2 tokenizer can take: shorten the run"
            )
        # No special token is recognized, and none is refused: all text is ordinary.
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)


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
    tokens = [base64.b64decode(line.split()[0]) for line in data.splitlines()]
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
    )
    return encoding, tokens


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


class CharTokenizer(Tokenizer):
    """One id per character (Unicode code point) of the training text, in the order of code points.

    A character outside the vocabulary is a UserError that names it, or becomes the token `<unk>` if
    the vocabulary has that entry. There is no `<|endoftext|>`.
    """

    name = "char"
    UNKNOWN: ClassVar[str] = "<unk>"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Take the characters, each once, and perhaps "<unk>". Raises UserError for other lists."""
        unknown = vocabulary.index(self.UNKNOWN) if self.UNKNOWN in vocabulary else None
        super().__init__(_as_tokens(vocabulary), end_of_text=None, unknown=unknown)
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
            raise UserError(
                f"the character {text[position]!r} at position {position} is not among the "
                f"{self.vocab_size} characters this char tokenizer knows: remove it from the text"
            )
        return ids


class WordTokenizer(Tokenizer):
    """Words, single punctuation marks and single white-space characters, one id each.

    Words keep their inner apostrophes ("don't"). White space is not merged, so that any layout of
    known words comes back as it was. What is not in the vocabulary becomes `<|unk|>`, and its text
    is lost. The pattern never matches a special token: `<|unk|>` typed out is cut at its marks.
    """

    name = "word"
    UNKNOWN: ClassVar[str] = "<|unk|>"
    PATTERN: ClassVar[re.Pattern[str]] = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\s")

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Take the words, marks and white space, each once, and both special tokens.

        Raises UserError for other lists.
        """
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
NAMES = (*LEARNED, *FIXED)


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
