"""CRC-32C, the checksum of TensorFlow's checkpoints, vectorised.

A CRC is the remainder of a polynomial division: the message's bits are the coefficients (0 or 1) of
a polynomial, addition is exclusive or, and the divisor P is fixed. Bit by bit that is

    for each bit of the message, the lowest of each byte first:
        state ^= bit;  state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)

where the shift is a multiplication by x modulo P (the state's lowest bit is its highest power). In
Python that takes a second for a megabyte. But the remainder is linear: a message A followed by a
message B of n bits has the remainder of A · xⁿ + B, and A may be many words at once.

 1. Cut the message into rows of LANES words. Horner's rule, row by row: multiply every word of the
    rows so far by x^(32 · LANES) modulo P, and add the next row. One row is left.
 2. Fold it in half until one word is left: left half · x^(bits of the right half) + right half.

Multiplying by a constant modulo P is linear as well: a word's product is that of its lower 16 bits
plus that of its upper 16, two look-ups. This checks more than 1 GB a second.

The zeros that fill up the first row change nothing, as leading zeros never do in a polynomial.
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, lowest bit = highest power
LANES = 1 << 14  # a row is 64 KiB: it and the tables stay in the cache


def crc32c(data: bytes | np.ndarray, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of `data`'s bytes, continuing `crc`, that of those before."""
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    state = crc ^ 0xFFFFFFFF
    odd = octets.size % 4  # bytes that do not fill a word: bit by bit, as above
    for byte in octets[:odd].tolist():
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)
    words = octets[odd:].view("<u4")
    if words.size:
        lanes = min(LANES, 1 << (words.size - 1).bit_length())  # a power of 2
        first = (words.size - 1) % lanes + 1
        row = np.zeros(lanes, np.uint32)
        row[lanes - first :] = words[:first]
        row[lanes - first] ^= np.uint32(state)
        for start in range(first, words.size, lanes):
            row = _times_x32(row, lanes)
            row ^= words[start : start + lanes]
        while (half := row.size // 2) > 0:
            row = _times_x32(row[:half], half) ^ row[half:]
        state = int(_times_x32(row, 1)[0])
    return state ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    """The form in which LevelDB and TensorFlow store a CRC: rotated, and a constant added."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _times_x32(words: np.ndarray, n: int) -> np.ndarray:
    # Each word times x^(32 n) modulo P.
    lower, upper = _products(n)
    return lower.take(words & 0xFFFF, mode="clip") ^ upper.take(words >> 16, mode="clip")


@functools.cache
def _products(n: int) -> tuple[np.ndarray, np.ndarray]:
    # x^(32 n) modulo P times each lower half of a word, and times each upper half; n a power of 2.
    single_bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if n == 1:
        products = single_bits
        for _ in range(32):
            products = products >> 1 ^ np.where(products & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    else:
        products = _times_x32(_times_x32(single_bits, n // 2), n // 2)

    def sums(of_bits: np.ndarray) -> np.ndarray:
        table = np.zeros(1, np.uint32)
        for product in of_bits:
            table = np.concatenate([table, table ^ product])
        return table

    return sums(products[:16]), sums(products[16:])
