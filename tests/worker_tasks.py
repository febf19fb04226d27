"""The tasks of the workers in tests/text/test_workers.py, in a module that they can import."""

from __future__ import annotations

import os
import signal

import numpy as np

from micrograd_gpt.text.pieces import encode_piece
from micrograd_gpt.text.tokenizers import ByteTokenizer


def deaf_from_the_start_and_later(piece: list[str]) -> tuple[bool, bool]:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return blocked, signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def total(piece: list[str]) -> int:
    return sum(map(len, piece))


def encode_bytes(piece: list[str]) -> np.ndarray:
    return encode_piece(piece, ByteTokenizer())


def kill_yourself(piece: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
