"""What every tokenizer does: text to token ids, ids to bytes and text, and itself to a folder.

A token is a string of bytes, a vocabulary is a list of tokens, and a token's id is its place in
that list. Decoding joins the bytes; the tokenizers (tokenizers.py, byte_pairs.py) differ only in
how they cut text up. Text is Unicode (str), ids are NumPy int32 of shape (T,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from micrograd_gpt.support.cli import say, say_once
from micrograd_gpt.support.errors import UserError

END_OF_TEXT = "<|endoftext|>"


def with_lf(text: str) -> str:
    r"""A text whose lines end in \n alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Tokenizer(ABC):
    """What every tokenizer does, given its vocabulary and a way to cut text up (`_encode`).

    `end_of_text` is the id of the special token `<|endoftext|>`, which stands between documents and
    ends a sample. `unknown` is the id for text that is not in the vocabulary. Each is None in a
    tokenizer that has no such token.
    """

    name: ClassVar[str]
    indivisible: Sequence[str] = ()  # texts that a large text must not be cut within (pieces.py)

    def __init__(
        self, tokens: list[bytes], end_of_text: int | None, unknown: int | None = None
    ) -> None:
        self.tokens = tokens  # id -> the bytes it stands for
        self.end_of_text = end_of_text
        self.unknown = unknown

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, which has no lone surrogates; special tokens are only text."""

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by the names that Transformers has for them."""
        ids = {
            "bos_token": self.end_of_text,
            "eos_token": self.end_of_text,
            "unk_token": self.unknown,
        }
        return {name: id for name, id in ids.items() if id is not None}

    @property
    def special_texts(self) -> list[str]:
        """The texts that `encode` takes for tokens of their own with `allow_special`."""
        return [] if self.end_of_text is None else [END_OF_TEXT]

    def encode(
        self, text: str, allow_special: bool = False, keep_line_ends: bool = False
    ) -> np.ndarray:
        r"""Return the ids of `text`, int32 of shape (T,).

        The characters `<|endoftext|>` in a text are ordinary characters by default, so that a
        corpus or a prompt from elsewhere cannot cut itself into documents. With `allow_special`
        they become the id `end_of_text`, if the tokenizer has one.

        A vocabulary that cannot express "\r" was made of a text whose line ends were read as "\n",
        and so are those of this text, unless `keep_line_ends` is set.

        Raises UserError for a character that the vocabulary cannot express, and for a lone
        surrogate, which is what Python makes of a byte that was not UTF-8.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a text, a str, not a {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has a lone surrogate, {text[error.start]!r}, at position {error.start}: "
                "give text that was read as UTF-8"
            ) from error
        can_express = self.unknown is not None or b"\r" in self.tokens
        if "\r" in text and not keep_line_ends and not can_express:
            say_once(rf"note: \r\n and \r are read as \n: the {self.name} tokenizer has no \r")
            text = with_lf(text)
        return self._encode_special(text) if allow_special else self._encode(text)

    def _encode_special(self, text: str) -> np.ndarray:
        """Return the ids of `text`, in which the special tokens are recognized."""
        if self.end_of_text is None:
            return self._encode(text)
        first, *rest = (self._encode(part) for part in text.split(END_OF_TEXT))
        end = np.array([self.end_of_text], np.int32)
        return np.concatenate([first, *(ids for part in rest for ids in (end, part))])

    def count_unknown(self, ids: Sequence[int] | np.ndarray) -> int:
        """How many of the ids stand for text that the vocabulary does not have."""
        return 0 if self.unknown is None else int((np.asarray(ids) == self.unknown).sum())

    def tell_unknown(self, ids: Sequence[int] | np.ndarray, what: str) -> None:
        """Say on stderr how many of the ids of `what` stand for text that there is no token for."""
        if unknown := self.count_unknown(ids):
            tokens = f"{unknown:,} of {len(ids):,} tokens"
            say(f"note: {what}: {tokens} are words that the tokenizer does not know, all as one")

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

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return what `tokenizer_from_dict` needs, as JSON: the name, and the vocabulary if it is
        not always the same.
        """

    def check_special(self, wanted: bool) -> None:
        """Raise UserError if special tokens are `wanted` and there are none."""
        if wanted and not self.special_texts:
            raise UserError(
                f"the {self.name} tokenizer has no special tokens, as gpt2's has: leave "
                "--special-tokens out"
            )

    def tell_typed(self, source: str | Path) -> None:
        """Say that `<|endoftext|>` in this text is read as text, where there is such a token."""
        if END_OF_TEXT in self.special_texts:
            say(
                f"note: {source} has {END_OF_TEXT} in it, which is read as these 13 characters; "
                "--special-tokens takes it for the token"
            )

    def is_padded_to(self, vocab_size: int) -> bool:
        """Whether a model may have so many ids since multiples of 64 or 128 compute faster."""
        return vocab_size % 64 == 0 and self.vocab_size <= vocab_size < self.vocab_size + 128

    def check_size(self, vocab_size: int) -> None:
        """Raise UserError unless a model with this vocab_size can be the tokenizer's.

        A model may have more ids than its tokenizer, but not twice as many, unless it is padded:
        then the tokenizer is another model's.
        """
        is_twice = vocab_size >= 2 * self.vocab_size and not self.is_padded_to(vocab_size)
        if vocab_size < self.vocab_size or is_twice:
            raise UserError(
                f"the tokenizer has {self.vocab_size} tokens and the model {vocab_size}: put the "
                "tokenizer files it was trained with beside it"
            )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, as Transformers reads them
        (tokenizer_files.py reads them here).
        """
        from micrograd_gpt.text.hugging_face import write_tokenizer

        write_tokenizer(self, folder)
