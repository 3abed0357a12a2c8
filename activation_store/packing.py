"""Encodings of Parquet columns that are sorted or nearly so, as compiled loops.

Source: https://github.com/apache/parquet-format/blob/master/Encodings.md
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from activation_store.compiled import compiled

_BLOCK, _MINIBLOCKS, _MINIBLOCK = 128, 4, 32


def room(n: int) -> int:
    """Return the most bytes that n values can take in either encoding."""
    return 10 * n + 1024


@compiled
@no_type_check
def delta_pack(values: Int32[np.ndarray, " n"], out: UInt8[np.ndarray, " bytes"]) -> int:
    """Write values as DELTA_BINARY_PACKED and return the bytes taken; n >= 1."""
    n = values.shape[0]
    at = _put(out, 0, np.int64(_BLOCK))
    at = _put(out, at, np.int64(_MINIBLOCKS))
    at = _put(out, at, np.int64(n))
    at = _put(out, at, _zigzag(np.int64(values[0])))
    delta = np.zeros(_BLOCK, np.int64)
    done = 1
    while done < n:
        m = min(_BLOCK, n - done)
        for k in range(m):
            delta[k] = np.int64(values[done + k]) - np.int64(values[done + k - 1])
        least = delta[0]
        for k in range(m):
            least = min(least, delta[k])
        for k in range(m):
            delta[k] -= least
        for k in range(m, _BLOCK):
            delta[k] = 0
        at = _put(out, at, _zigzag(least))
        widths = at
        at += _MINIBLOCKS
        for miniblock in range(_MINIBLOCKS):
            first = miniblock * _MINIBLOCK
            out[widths + miniblock], at = _pack(delta, first, out, at)
        done += m
    return at


@compiled
@no_type_check
def _pack(delta: np.ndarray, first: int, out: np.ndarray, at: int) -> tuple[int, int]:
    """Write one miniblock with as few bits per value as it needs; return the bits and the end."""
    every = np.int64(0)
    for k in range(_MINIBLOCK):
        every |= delta[first + k]
    width = 0
    while every >> width:
        width += 1
    if width == 0:
        return 0, at
    held, bits = np.uint64(0), np.uint64(0)
    for k in range(_MINIBLOCK):
        held |= np.uint64(delta[first + k]) << bits
        bits += np.uint64(width)
        if bits >= np.uint64(32):
            word = np.uint32(held)
            out[at] = word & 0xFF
            out[at + 1] = (word >> 8) & 0xFF
            out[at + 2] = (word >> 16) & 0xFF
            out[at + 3] = word >> 24
            at += 4
            held >>= np.uint64(32)
            bits -= np.uint64(32)
    return width, at


@compiled
@no_type_check
def run_lengths(
    runs: Int64[np.ndarray, " values"], width: int, out: UInt8[np.ndarray, " bytes"]
) -> int:
    """Write value i repeated runs[i] times, for every i, as RLE of that bit width; return bytes."""
    at = 0
    for i in range(runs.shape[0]):
        if runs[i] > 0:
            at = _put(out, at, 2 * runs[i])
            for byte in range((width + 7) // 8):
                out[at] = (i >> (8 * byte)) & 0xFF
                at += 1
    return at


@compiled
@no_type_check
def _put(out: np.ndarray, at: int, n: int) -> int:
    """Write n >= 0 as a varint and return the end."""
    while n > 127:
        out[at] = n & 127 | 128
        at += 1
        n >>= 7
    out[at] = n
    return at + 1


@compiled
@no_type_check
def _zigzag(n: int) -> int:
    return 2 * n if n >= 0 else -2 * n - 1
