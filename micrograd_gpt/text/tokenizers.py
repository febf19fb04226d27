"""Text to token ids and back: GPT-2's byte-pair encoding, and three tokenizers that fit on a page.

A token is a string of bytes, a vocabulary is a list of them, and a token's id is its place in that
list. Decoding joins the bytes; the tokenizers differ only in how they cut text up:

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
from micrograd_gpt.support.files import read_json, write_text

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"

# OpenAI's vocabulary for GPT-2, one token a line; where it comes from is in assets/README.md.
GPT2_FILE = Path(__file__).parent / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# Byte pairs are merged within these pieces only, so that no token spans "dog." or two words.
# White space before a word goes with the word: " dog" is one piece. As in OpenAI's encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_LONGEST_WHITE_SPACE = 500_000  # the regular expression engine's stack overflows before 10**6


class Tokenizer(ABC):
    """What every tokenizer does, given its vocabulary and a way to cut text up (`_encode`).

    `end_of_text` is the id of the special token `<|endoftext|>`, which stands between documents and
    ends a sample; None where a tokenizer has no such token.
    """

    name: ClassVar[str]

    def __init__(self, tokens: list[bytes], end_of_text: int | None) -> None:
        self.tokens = tokens  # id -> the bytes it stands for
        self.end_of_text = end_of_text

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """The ids of `text`, in which there are no special tokens and no lone surrogates."""

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Return the ids of `text`, int32 of shape (T,).

        The characters `<|endoftext|>` in a text are by default ordinary characters: a corpus or a
        prompt that came from somewhere else cannot cut itself into documents. With `allow_special`
        they become the id `end_of_text`, where the tokenizer has one.

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
        first, *rest = (self._encode(piece) for piece in text.split(END_OF_TEXT))
        separator = np.array([self.end_of_text], np.int32)
        return np.concatenate([first, *(ids for piece in rest for ids in (separator, piece))])

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of `ids`, integers of shape (T,). They may begin or end mid-character.

        Raises UserError for an id outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
            raise TypeError(f"ids must be integers of shape (T,), not {array.dtype} {array.shape}")
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise UserError(
                f"token id {array[outside][0]} is outside the {self.name} tokenizer's vocabulary "
                f"of {self.vocab_size} ids (0 to {self.vocab_size - 1})"
            )
        return b"".join([self.tokens[i] for i in array.tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, integers of shape (T,).

        Bytes that are no UTF-8 become U+FFFD. `decode(encode(text)) == text` for every text whose
        pieces are all in the vocabulary. Raises UserError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON needs to make this tokenizer again: its name and its vocabulary."""
        if self.name in FIXED:
            return {"tokenizer": self.name}
        return {"tokenizer": self.name, "vocabulary": [t.decode("utf-8") for t in self.tokens]}

    def save(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json, whole or not at all."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1)
        write_text(Path(folder) / FILE_NAME, text + "\n")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2), computed by tiktoken.

    Ids 0 to 255 are the single bytes in OpenAI's own order, 256 to 50255 the merges, and 50256 is
    `<|endoftext|>`. Any text can be encoded, and nothing is fetched: the vocabulary is part of
    this package. Raises UserError where that file is missing or damaged.
    """

    name = "gpt2"

    def __init__(self) -> None:
        self._encoding, merged = _gpt2_encoding()
        super().__init__([*merged, END_OF_TEXT.encode()], end_of_text=len(merged))

    def _encode(self, text: str) -> np.ndarray:
        too_long = rf"(?<!\s)\s{{{GPT2_LONGEST_WHITE_SPACE}}}"
        if len(text) >= GPT2_LONGEST_WHITE_SPACE and re.search(too_long, text):
            raise UserError(
                f"the text has a run of {GPT2_LONGEST_WHITE_SPACE:,} or more white-space "
                "characters, more than the gpt2 tokenizer can take: shorten the run"
            )
        # No special token is allowed, and none is refused: all text is ordinary.
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)


@functools.cache
def _gpt2_encoding() -> tuple[tiktoken.Encoding, list[bytes]]:
    """tiktoken's encoder for GPT-2, and the 50,256 tokens in the order of their ids."""
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

    The 257th id is there because any of the 256 may occur in a text: without one more, documents
    could not be told apart and a sample could not say that it has ended.
    """

    name = "byte"

    def __init__(self) -> None:
        super().__init__([*(bytes([b]) for b in range(256)), END_OF_TEXT.encode()], 256)

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


class CharTokenizer(Tokenizer):
    """One id per character (Unicode code point) of the training text, in the order of code points.

    A character outside the vocabulary is a UserError that names it, or the token `<unk>` where the
    vocabulary has that entry. There is no `<|endoftext|>`.
    """

    name = "char"
    UNKNOWN: ClassVar[str] = "<unk>"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Take the characters, each once, and perhaps "<unk>". Raises UserError for other lists."""
        super().__init__(_as_tokens(vocabulary), end_of_text=None)
        characters = [(i, entry) for i, entry in enumerate(vocabulary) if entry != self.UNKNOWN]
        for _, entry in characters:
            if len(entry) != 1:
                raise UserError(f"a char vocabulary cannot hold {entry!r}: it is no character")
        self._unknown = vocabulary.index(self.UNKNOWN) if self.UNKNOWN in vocabulary else -1
        # From code point to id. All code points past the largest known share the last entry.
        largest = max((ord(character) for _, character in characters), default=-1)
        self._ids = np.full(largest + 2, self._unknown, np.int32)
        for i, character in characters:
            self._ids[ord(character)] = i

    @classmethod
    def from_text(cls, text: str, unk: bool = False) -> CharTokenizer:
        """Make the vocabulary of `text`'s characters, followed by "<unk>" where `unk` is set."""
        return cls(sorted(set(text)) + [cls.UNKNOWN] * unk)

    def _encode(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
        ids = self._ids[np.minimum(code_points, len(self._ids) - 1)]
        if self._unknown < 0 and (ids < 0).any():
            position = int(np.argmax(ids < 0))
            raise UserError(
                f"the character {text[position]!r} at position {position} is not among the "
                f"{self.vocab_size} characters this char tokenizer knows: leave it out"
            )
        return ids


class WordTokenizer(Tokenizer):
    """Words, single punctuation marks and single white-space characters, one id each.

    Words keep their inner apostrophes ("don't"). White space is not merged, so that any layout of
    known words comes back as it was. What is not in the vocabulary becomes `<|unk|>`, whose text
    is lost. Special tokens are no piece of any text: `<|unk|>` typed out is cut at its marks.
    """

    name = "word"
    UNKNOWN: ClassVar[str] = "<|unk|>"
    PIECE: ClassVar[re.Pattern[str]] = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\s")

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Take the pieces, each once, and both special tokens. Raises UserError for other lists."""
        tokens = _as_tokens(vocabulary)
        self._ids = {entry: i for i, entry in enumerate(vocabulary)}
        for special in (END_OF_TEXT, self.UNKNOWN):
            if special not in self._ids:
                raise UserError(f"a word vocabulary needs the entry {special!r}")
        self._unknown = self._ids[self.UNKNOWN]
        super().__init__(tokens, end_of_text=self._ids[END_OF_TEXT])

    @classmethod
    def from_text(cls, text: str, max_vocab_size: int = 10_000) -> WordTokenizer:
        """Make the vocabulary of `text`'s most common pieces: see `from_counts`."""
        return cls.from_counts(Counter(cls.PIECE.findall(text)), max_vocab_size)

    @classmethod
    def from_counts(cls, counts: Counter[str], max_vocab_size: int = 10_000) -> WordTokenizer:
        """Make the vocabulary of the most common pieces, `max_vocab_size` with the two special
        tokens, which are ids 0 and 1. Equally common pieces go in the order of code points.

        Raises UserError where `max_vocab_size` leaves no room for a word.
        """
        if max_vocab_size < 3:
            raise UserError(f"max_vocab_size must be 3 or more, not {max_vocab_size}")
        pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
        return cls([END_OF_TEXT, cls.UNKNOWN, *pieces[: max_vocab_size - 2]])

    def _encode(self, text: str) -> np.ndarray:
        pieces = self.PIECE.findall(text)
        return np.array([self._ids.get(piece, self._unknown) for piece in pieces], np.int32)


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
    """The entries as UTF-8. Raises UserError where one is repeated or is not Unicode text."""
    seen: set[str] = set()
    for i, entry in enumerate(vocabulary):
        if not isinstance(entry, str) or entry in seen:
            raise UserError(f"vocabulary entry {i}, {entry!r}, is repeated or no text")
        seen.add(entry)
    try:
        return [entry.encode("utf-8") for entry in vocabulary]
    except UnicodeEncodeError as error:
        raise UserError(f"the vocabulary holds a lone surrogate, {error.object!r}") from error


def make_tokenizer(name: str, text: str) -> Tokenizer:
    """Return the tokenizer called `name`, with the vocabulary of the training text `text` where its
    vocabulary comes from a text. Raises UserError for any other name.
    """
    if name in LEARNED:
        return LEARNED[name].from_text(text)
    return from_dict({"tokenizer": name})


def from_dict(settings: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `to_dict` described. Raises UserError for anything else."""
    name, vocabulary = settings.get("tokenizer"), settings.get("vocabulary")
    if name not in NAMES:
        raise UserError(f"no tokenizer is called {name!r}: choose one of {', '.join(NAMES)}")
    if name in FIXED:
        return FIXED[name]()
    if not isinstance(vocabulary, list):
        raise UserError(f"the {name} tokenizer needs a vocabulary, a list of strings")
    return LEARNED[name](vocabulary)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a model's folder.

    Our own tokenizer.json says which it is. A folder without one is a Hugging Face folder, which
    may have Hugging Face's tokenizer.json or vocab.json, or neither: its tokenizer is gpt2 if the
    vocabulary found is GPT-2's, entry by entry, and config.json's vocab_size is 50257.

    Raises UserError, naming the file, for a damaged file and for a tokenizer that is none of ours.
    """
    folder = Path(folder)
    settings = read_json(folder / FILE_NAME)
    if settings is not None and "tokenizer" in settings:
        try:
            return from_dict(settings)
        except UserError as error:
            raise UserError(f"{folder / FILE_NAME} is damaged: {error}") from error

    gpt2 = GPT2Tokenizer()
    if settings is not None and not _is_gpt2(settings, gpt2):
        raise UserError(
            f"{folder / FILE_NAME} is not one of our tokenizers ({', '.join(NAMES)}), nor "
            "Hugging Face's for GPT-2: only models that use one of these can be loaded"
        )
    vocabulary = read_json(folder / "vocab.json")
    if vocabulary is not None and vocabulary != _gpt2_vocabulary(gpt2):
        raise UserError(f"{folder / 'vocab.json'} is not GPT-2's vocabulary, the only one we read")
    config = read_json(folder / "config.json") or {}
    if config.get("vocab_size", gpt2.vocab_size) != gpt2.vocab_size:
        raise UserError(
            f"{folder} has no {FILE_NAME}, and its vocab_size, {config['vocab_size']}, is not that "
            f"of GPT-2's tokenizer, {gpt2.vocab_size}: add the {FILE_NAME} the model was saved with"
        )
    return gpt2


def _is_gpt2(settings: dict[str, Any], gpt2: GPT2Tokenizer) -> bool:
    """Whether Hugging Face's tokenizer.json describes GPT-2's 50,257 tokens and no other."""
    model, added = settings.get("model"), settings.get("added_tokens", [])
    return (
        isinstance(model, dict)
        and model.get("vocab") == _gpt2_vocabulary(gpt2)
        and isinstance(added, list)
        and all(isinstance(t, dict) and t.get("content") == END_OF_TEXT for t in added)
    )


def _gpt2_vocabulary(gpt2: GPT2Tokenizer) -> dict[str, int]:
    """GPT-2's tokens as OpenAI's encoder.json, and after it Hugging Face's files, spell them.

    One printable character stands for each byte: the byte's own Latin-1 character if that can be
    printed, else the next one from U+0100 on (a space is "Ġ").
    """
    hidden = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
    characters = {b: chr(256 + hidden.index(b)) if b in hidden else chr(b) for b in range(256)}
    return {
        END_OF_TEXT if i == gpt2.end_of_text else "".join(characters[b] for b in token): i
        for i, token in enumerate(gpt2.tokens)
    }


class StreamDecoder:
    """Decoding token by token, for text that is shown as it is produced.

    A token may end in the middle of a character, so the bytes of an incomplete one wait for the
    next token. All that `feed` and `finish` return, joined, is `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Return the characters that `token_id` completes, "" where it completes none.

        Raises UserError for an id outside the vocabulary.
        """
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
