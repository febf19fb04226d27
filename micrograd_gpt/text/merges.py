"""The merges of a byte-pair encoding: how files spell them, and what they say in tiktoken's terms.

A word starts as single bytes. Of the pairs of neighbours that have a merge, the earliest merge is
carried out, at the leftmost place first, again and again (Sennrich et al. 2016, arXiv:1508.07909).

Files list the merges as pairs of tokens. tiktoken is given ranks of tokens instead, and joins any
two neighbours that together are a token, the lowest rank first. The result is the same, because the
bytes of a token can only ever be merged in one way: where they stand in a word with nothing merged
across their ends, it does not matter what is beside them. So no two other parts of a token can be
neighbours at the time when its own merge is due, nor later, when it has been carried out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from micrograd_gpt.support.errors import UserError

Merges = list[tuple[str, str]]  # pairs of tokens, spelled, in the order of merging

# ------------------------------------------------------------------------------------ the spelling

# Files spell a token as text, each byte as one printable character: its Latin-1 character if that
# can be printed, else the next one from U+0100 on. A space is "Ġ", a line end "Ċ". OpenAI chose
# this for GPT-2, and all later files follow.
_HIDDEN = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
SPELLING = [chr(256 + _HIDDEN.index(b)) if b in _HIDDEN else chr(b) for b in range(256)]
BYTES = {character: byte for byte, character in enumerate(SPELLING)}


def spelled(token: bytes) -> str:
    """A token as files spell it."""
    return "".join([SPELLING[byte] for byte in token])


def unspelled(token: str) -> bytes:
    """The bytes that a token of a file stands for; one that is not spelled like that is UTF-8."""
    try:
        return bytes([BYTES[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


# ------------------------------------------------------------------------------- merges and ranks


class MergeOrder:
    """Merges that can be carried out, added one by one in their order.

    `ranks` has the tokens that they make, after the 256 bytes: a token's rank is its place. `parts`
    has the two tokens that each of them is made of.
    """

    def __init__(self) -> None:
        self.ranks = {character: rank for rank, character in enumerate(SPELLING)}
        self.parts: dict[str, tuple[str, str]] = {}

    def add(self, left: str, right: str) -> bool:
        """Add a merge of two tokens that are made already; False if it can't happen, because the
        merges before it make something else of the same bytes.
        """
        token = left + right
        if not self.can_be_neighbours(left, right):
            return False
        self.ranks[token] = len(self.ranks)
        self.parts[token] = (left, right)
        return True

    def can_be_neighbours(self, left: str, right: str) -> bool:
        """Whether the bytes of two tokens, side by side, become these two tokens.

        Goes back in time from there, and takes apart whichever was made later. What is then on both
        sides of the place between the two were neighbours for some time. If there is a merge of
        them, and it was due in that time, it has been carried out.
        """
        left_until = right_until = math.inf
        while True:
            token = left + right
            if self.parts.get(token) == (left, right):
                due = self.ranks[token]
                # In "aaa" the same merge is possible at two places, and the leftmost goes first
                if due < left_until and due <= right_until:
                    return False
            if left in self.parts and self.ranks[left] > self.ranks[right]:
                left_until, left = self.ranks[left], self.parts[left][1]
            elif right in self.parts:
                right_until, right = self.ranks[right], self.parts[right][0]
            else:
                return True


def ranks_of(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The tokens that a text can become, spelled, with their ranks for tiktoken.

    Merges that can't happen, and tokens that no merge makes, are left out. Raises UserError for a
    byte that has no token, for a merge whose result has none, and for a merge that comes before
    those that make its parts, which ranks cannot express.
    """
    if missing := [character for character in SPELLING if character not in vocabulary]:
        raise UserError(
            f"its vocabulary lacks {len(missing)} of the 256 bytes, such as {missing[0]!r}, so it "
            "cannot encode every text"
        )
    order, early = MergeOrder(), []
    last_place = {pair: place for place, pair in enumerate(merges)}  # it counts if there are two
    for left, right in sorted(last_place, key=last_place.__getitem__):
        if left + right not in vocabulary:
            raise UserError(f"its merge '{left} {right}' makes no token of its vocabulary")
        if left in order.ranks and right in order.ranks:
            order.add(left, right)
        else:
            early.append((left, right))
    for left, right in early:
        if left in order.ranks and right in order.ranks:
            raise UserError(f"its merge '{left} {right}' comes before those that make its parts")
    return order.ranks


def merges_of(tokens: Sequence[str]) -> Merges:
    """The merges that make these tokens, spelled, in the order of their ranks after the bytes."""
    order = MergeOrder()
    for token in tokens:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in order.ranks and right in order.ranks and order.add(left, right):
                break
    return list(order.parts.values())
