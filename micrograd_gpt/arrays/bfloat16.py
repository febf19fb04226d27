"""bfloat16 by integer arithmetic: NumPy has no such type, but it is the upper half of a float32."""

from __future__ import annotations

import numpy as np


def round_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """float32 numbers, of any shape, rounded to the nearest bfloat16, ties to even; still float32.

    Infinity and NaN stay what they are; what is nearer to infinity than to the largest bfloat16
    becomes infinity.
    """
    bits = numbers.view(np.uint32)
    # Adding just under half of the lower part's range, and one more where the upper part is odd,
    # carries into the upper part exactly when rounding to nearest, ties to even, goes up.
    rounded = np.right_shift(bits, 16, out=np.empty_like(bits))
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded &= 0xFFFF0000
    nan = np.isnan(numbers)
    if nan.any():  # it could carry into infinity: it keeps its upper half, and becomes quiet
        rounded[nan] = bits[nan] & 0xFFFF0000 | 0x00400000
    return rounded.view(np.float32)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """bfloat16 numbers, given as their 16 bits in unsigned integers, as float32."""
    return (bits.astype("<u4") << 16).view("<f4")


def to_bits(numbers: np.ndarray) -> np.ndarray:
    """The 16 bits of the nearest bfloat16 to each float32 number, as `round_to_bfloat16` rounds."""
    return (round_to_bfloat16(numbers).view(np.uint32) >> 16).astype("<u2")
