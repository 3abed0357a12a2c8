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
    # indices without a sign spare the check for one from the end
    n = np.uint64(values.shape[0])
    at = _put(out, np.uint64(0), np.int64(_BLOCK))
    at = _put(out, at, np.int64(_MINIBLOCKS))
    at = _put(out, at, np.int64(n))
    at = _put(out, at, _zigzag(np.int64(values[0])))
    delta = np.zeros(_BLOCK, np.int64)
    done = np.uint64(1)
    while done < n:
        m = min(np.uint64(_BLOCK), n - done)
        before = np.int64(values[done - np.uint64(1)])
        least = np.int64(values[done]) - before
        for k in range(m):
            value = np.int64(values[done + k])
            delta[k] = value - before
            least = min(least, delta[k])
            before = value
        for k in range(m):
            delta[k] -= least
        for k in range(m, np.uint64(_BLOCK)):
            delta[k] = 0
        at = _put(out, at, _zigzag(least))
        widths = at
        at += np.uint64(_MINIBLOCKS)
        for miniblock in range(_MINIBLOCKS):
            part = delta[miniblock * _MINIBLOCK : (miniblock + 1) * _MINIBLOCK]
            width, at = _pack(part, out, at)
            out[widths + np.uint64(miniblock)] = width
        done += m
    return np.int64(at)


@compiled
@no_type_check
def _pack(delta: np.ndarray, out: np.ndarray, at: np.uint64) -> tuple[int, np.uint64]:
    """Write one miniblock with as few bits per value as it needs; return the bits and the end."""
    every = np.int64(0)
    for k in range(_MINIBLOCK):
        every |= delta[k]
    width = 0
    while every >> width:
        width += 1
    if width == 0:
        return 0, at
    held, bits = np.uint64(0), np.uint64(0)
    for k in range(_MINIBLOCK):
        held |= np.uint64(delta[k]) << bits
        bits += np.uint64(width)
        if bits >= np.uint64(32):
            word = np.uint32(held)
            for byte in range(4):
                out[at + np.uint64(byte)] = (word >> np.uint32(8 * byte)) & np.uint32(0xFF)
            at += np.uint64(4)
            held >>= np.uint64(32)
            bits -= np.uint64(32)
    return width, at


@compiled
@no_type_check
def run_lengths(
    runs: Int64[np.ndarray, " values"], width: int, out: UInt8[np.ndarray, " bytes"]
) -> int:
    """Write value i repeated runs[i] times, for every i, as RLE of that bit width; return bytes."""
    at = np.uint64(0)
    for i in range(runs.shape[0]):
        if runs[i] > 0:
            at = _put(out, at, 2 * runs[i])
            for byte in range((width + 7) // 8):
                out[at] = (i >> (8 * byte)) & 0xFF
                at += np.uint64(1)
    return np.int64(at)


@compiled
@no_type_check
def _put(out: np.ndarray, at: np.uint64, n: int) -> np.uint64:
    """Write n >= 0 as a varint and return the end."""
    while n > 127:
        out[at] = n & 127 | 128
        at += np.uint64(1)
        n >>= 7
    out[at] = n
    return at + np.uint64(1)


@compiled
@no_type_check
def _zigzag(n: int) -> int:
    return 2 * n if n >= 0 else -2 * n - 1
