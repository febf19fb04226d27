"""Documents to pieces of bounded size that can be tokenized one by one.

The ids of the pieces, one after another, are the ids of the whole text: a piece ends only where no
token could reach across, and the pieces are a function of the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer

BETWEEN_DOCUMENTS = "\n\n"  # where the tokenizer has no end-of-text token
PIECE_SIZE = 1 << 18  # characters that a piece has at least
LONGEST_PIECE = 1 << 20  # characters after which it ends even where that is not safe

# A piece is a list of strings, with the end of a document between each two. The first string
# continues the last string of the piece before: the documents "a b" and "c" can be the one piece
# ["a b", "c"], or the two pieces ["a"], [" b", "c"].
Piece = list[str]

# Text can safely be cut in two places.
# - Before white space that follows something else. No token has white space after anything else,
#   so none spans that place, and no tokenizer looks across it, because GPT-2's pattern looks ahead
#   only within runs of white space. (Python counts U+001C to U+001F as white space; GPT-2's pattern
#   does not.)
# - Between a letter or digit and one of the marks below, for languages without spaces, such as
#   Chinese. No token has such a mark after a letter or digit.
SAFE_PLACE = re.compile(r"(?<=\S)[^\S\x1c-\x1f]|(?<=[^\W_])[,.;:!?、。，．；：！？]")
CUT_ANYWHERE = ("char", "byte")  # tokenizers of single characters: every place is safe


def encode_piece(
    piece: Iterable[str], tokenizer: Tokenizer, allow_special: bool = False
) -> np.ndarray:
    """Return the ids of the strings with `<|endoftext|>` between them, int32 of shape (N,).

    A tokenizer without that token gets an empty line between them. With `allow_special`, special
    tokens that are written in the strings are recognized too.
    """
    # What becomes of line ends was decided when the text was read
    encode = partial(tokenizer.encode, allow_special=allow_special, keep_line_ends=True)
    if tokenizer.end_of_text is None:
        return encode(BETWEEN_DOCUMENTS.join(piece))
    end = np.array([tokenizer.end_of_text], np.int32)
    ids = [array for text in piece for array in (end, encode(text))]
    return np.concatenate([np.empty(0, np.int32), *ids[1:]])


def joined(piece: Iterable[str], allow_special: bool = False) -> str:
    """Return the strings as one text, of which a vocabulary can be made. With `allow_special`, a
    `<|endoftext|>` that is written in them ends a document, and is no part of the text.
    """
    text = BETWEEN_DOCUMENTS.join(piece)
    return text.replace(END_OF_TEXT, BETWEEN_DOCUMENTS) if allow_special else text


def refuse_where_cut(tokenizer: Tokenizer, allow_special: bool = False) -> None:
    """Raise UserError if a token that was added to a vocabulary may be cut in two, as "U.S."."""
    for text in tokenizer.special_texts if allow_special else tokenizer.indivisible:
        if SAFE_PLACE.search(text, 1):
            raise UserError(
                f"the tokenizer has an added token {text!r}, within which a large text may be cut: "
                "give a text of less than 50 MB, or a tokenizer without it"
            )


def cut(
    documents: Iterable[Iterable[str]],
    end_last: bool,
    size: int = PIECE_SIZE,
    longest: int = LONGEST_PIECE,
    anywhere: bool = False,
) -> Iterator[Piece]:
    """Yield documents, each given in chunks, as pieces of at least `size` characters.

    A piece ends at the first safe place after `size` characters, so that `encode_piece` of all
    pieces, one after another, gives the ids of the whole. With `anywhere`, which is for tokenizers
    of single characters, every place is safe. Empty documents are left out. With `end_last`, the
    last of several documents is followed by an end of document too.

    A piece that would grow past `longest` characters (a million letters without white space or a
    mark) ends there all the same, to bound the memory. Only then can gpt2's and word's ids differ
    from those of the whole, and only in the run (of letters and digits, of marks, or of white
    space) that is cut and in the runs beside it.
    """
    longest = max(size, longest)
    piece: Piece = []
    count = filled = 0  # documents so far; characters in `piece`
    for chunks in documents:
        begun = False  # whether this document has any text yet
        for text in _at_most(size, chunks):
            if not begun:
                piece.append("")
                count, begun = count + 1, True
            piece[-1] += text
            filled += len(text)
            while filled >= size:
                before = filled - len(piece[-1])
                place = _place(piece[-1], size - before, longest - before, anywhere)
                if place is None:
                    break
                yield [*piece[:-1], piece[-1][:place]]
                piece = [piece[-1][place:]]
                filled = len(piece[0])
        if filled >= size:
            yield piece
            piece, filled = [""], 0
    if end_last and count > 1:
        piece.append("")
    if any(piece) or len(piece) > 1:
        yield piece


def _at_most(size: int, chunks: Iterable[str]) -> Iterator[str]:
    """Yield the chunks without the empty ones, and the long ones in parts of `size` characters."""
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]


def _place(text: str, least: int, most: int, anywhere: bool) -> int | None:
    """Return where to cut `text`: at the first safe place from `least` on, at the latest at `most`.

    None where that depends on what follows the text.
    """
    if anywhere:
        return least if len(text) > least else None
    safe = SAFE_PLACE.search(text, least, most + 1)
    if safe:
        return safe.start()
    return most if len(text) > most else None
