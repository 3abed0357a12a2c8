"""A strip of a tile: some tokens of some units, copied to where the processor has them at hand."""

from typing import Any, NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt16, UInt32
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from activation_store.compiled import compiled
from activation_store.write.statistics import Moments

TILE = 128
"""Most tokens in a tile; a count per (tile, unit) must fit in a byte."""
STRIP = 64
"""Units handled together: four cache lines of a row."""
_WORD = 32
"""Tokens whose marks share a word."""
_INFINITE = np.int32(0x7F800000)
"""Bits of the float32 that is infinite."""


class Strip(NamedTuple):
    """Buffers for one strip of one tile."""

    act: Float32[np.ndarray, "tokens units"]
    bits: Int32[np.ndarray, "tokens units"]
    """The same memory."""
    marks: UInt32[np.ndarray, "words units"]
    """A bit per token: whether the value is above the threshold."""
    at: UInt16[np.ndarray, "units tokens"]
    """Rows of the finite values above the threshold, ascending; `n` of each unit."""
    fired: Float32[np.ndarray, "units tokens"]
    """Those values."""
    n: Int64[np.ndarray, " units"]
    finite: Int64[np.ndarray, " units"]
    shift: np.ndarray
    """What deviations are taken from."""
    sums: np.ndarray
    """Sums of the powers 1 to 4 of the deviations, [4, units]."""
    low: Float32[np.ndarray, " units"]
    high: Float32[np.ndarray, " units"]
    low_bits: Int32[np.ndarray, " units"]
    """The memory of `low`, and then of `high`."""
    high_bits: Int32[np.ndarray, " units"]
    bad: Float32[np.ndarray, " units"]
    """NaN where a value is not finite, else zero."""
    every: UInt16[np.ndarray, " tokens"]
    """All rows."""
    column: Float32[np.ndarray, " tokens"]
    """A unit's values in all rows."""
    used: np.ndarray


@compiled
@no_type_check
def new_strip() -> Strip:
    """Return fresh buffers."""
    act = np.zeros((TILE, STRIP), np.float32)
    low, high = np.zeros(STRIP, np.float32), np.zeros(STRIP, np.float32)
    return Strip(
        act,
        act.view(np.int32),
        np.zeros((TILE // _WORD, STRIP), np.uint32),
        np.zeros((STRIP, TILE), np.uint16),
        np.zeros((STRIP, TILE), np.float32),
        np.zeros(STRIP, np.int64),
        np.zeros(STRIP, np.int64),
        np.zeros(STRIP),
        np.zeros((4, STRIP)),
        low,
        high,
        low.view(np.int32),
        high.view(np.int32),
        np.zeros(STRIP, np.float32),
        np.arange(TILE).astype(np.uint16),
        np.zeros(TILE, np.float32),
        np.zeros(TILE, np.bool_),
    )


@compiled
@no_type_check
def load(
    x: np.ndarray, row: int, n: int, c: int, width: int, threshold: np.float32, strip: Strip
) -> None:
    """Copy one strip of one tile, mark what is above the threshold, and find the extremes of bits.

    A strip at the edge is as wide as any; its rest is stale.
    """
    low, high = strip.low_bits, strip.high_bits
    low[:], high[:] = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    strip.marks[:] = 0
    for t in range(n):
        target = strip.act[t]
        if width == STRIP:
            source = x[row + t, c : c + STRIP]
            for u in range(STRIP):
                target[u] = source[u]
        else:
            for u in range(width):
                target[u] = x[row + t, c + u]
        marks = strip.marks[t // _WORD]
        bit = np.uint32(1) << np.uint32(t % _WORD)
        for u in range(STRIP):
            marks[u] |= bit if target[u] > threshold else np.uint32(0)
        bits = strip.bits[t]
        for u in range(STRIP):
            low[u] = min(low[u], bits[u])
            high[u] = max(high[u], bits[u])


@compiled
@no_type_check
def is_rectified(threshold: np.float32, width: int, strip: Strip) -> bool:
    """Tell whether all is finite, and zero where not above the threshold, as after a ReLU.

    The bits of such numbers have the order of the numbers, so the extremes are right already.
    """
    rectified = threshold == 0.0
    for u in range(width):
        rectified &= strip.low_bits[u] >= 0 and strip.high_bits[u] < _INFINITE
    if rectified:
        strip.bad[:] = 0.0
    return rectified


@compiled
@no_type_check
def set_shift(moments: Moments, c: int, width: int, strip: Strip) -> None:
    """Note what deviations of units c.. are taken from: the mean so far, or a value at first."""
    for u in range(width):
        shift = moments.mean[c + u] if moments.n[c + u] > 0 else np.float64(strip.act[0, u])
        strip.shift[u] = shift if np.isfinite(shift) else 0.0


@compiled
@no_type_check
def find_extremes(n: int, strip: Strip) -> None:
    """Find the smallest and largest value of all units, and mark those that are not finite."""
    low, high, bad = strip.low, strip.high, strip.bad
    for u in range(STRIP):
        low[u], high[u], bad[u] = np.inf, -np.inf, 0.0
    for t in range(n):
        row = strip.act[t]
        for u in range(STRIP):
            low[u] = min(low[u], row[u])
            high[u] = max(high[u], row[u])
            bad[u] += row[u] * np.float32(0.0)


@compiled
@no_type_check
def add_up(n: int, strip: Strip) -> None:
    """Sum powers of the deviations of all units, whatever their values."""
    s1, s2 = np.zeros(STRIP), np.zeros(STRIP)
    s3, s4 = np.zeros(STRIP), np.zeros(STRIP)
    shift = strip.shift
    for t in range(n):
        row = strip.act[t]
        for u in range(STRIP):
            d = np.float64(row[u]) - shift[u]
            d2 = d * d
            s1[u] += d
            s2[u] += d2
            s3[u] += d2 * d
            s4[u] += d2 * d2
    for u in range(STRIP):
        strip.sums[0, u] = s1[u]
        strip.sums[1, u] = s2[u]
        strip.sums[2, u] = s3[u]
        strip.sums[3, u] = s4[u]


@compiled
@no_type_check
def add_fired(n: int, width: int, strip: Strip) -> None:
    """Sum powers of the deviations of units that are zero but for their `fired` values."""
    for u in range(width):
        shift, m = strip.shift[u], strip.n[u]
        rest = np.float64(n - m)
        d2 = shift * shift
        s1, s2, s3, s4 = -rest * shift, rest * d2, -rest * d2 * shift, rest * d2 * d2
        for k in range(np.uint64(m)):
            d = np.float64(strip.fired[u, k]) - shift
            d2 = d * d
            s1 += d
            s2 += d2
            s3 += d2 * d
            s4 += d2 * d2
        sums = strip.sums
        sums[0, u], sums[1, u], sums[2, u], sums[3, u] = s1, s2, s3, s4


@compiled
@no_type_check
def drop_odd(n: int, c: int, width: int, odd: np.ndarray, strip: Strip) -> None:
    """Count NaN and infinities; redo sums and extremes of their units over what is finite."""
    for u in range(width):
        if strip.bad[u] == 0.0:
            continue
        strip.sums[:, u] = 0.0
        strip.low[u], strip.high[u] = np.inf, -np.inf
        for t in range(n):
            v = strip.act[t, u]
            if np.isfinite(v):
                d = np.float64(v) - strip.shift[u]
                strip.sums[0, u] += d
                strip.sums[1, u] += d * d
                strip.sums[2, u] += d * d * d
                strip.sums[3, u] += d * d * d * d
                strip.low[u] = min(strip.low[u], v)
                strip.high[u] = max(strip.high[u], v)
            else:
                strip.finite[u] -= 1
                odd[c + u, 0 if np.isnan(v) else 1] += 1


@intrinsic
@no_type_check
def _lowest(_context: Any, bits: Any) -> Any:
    """Return the place of the lowest bit that is set; there must be one."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.cttz(given[0], cgutils.true_bit)

    return types.uint32(bits), generate


@compiled
@no_type_check
def collect(n: int, width: int, strip: Strip) -> None:
    """List the rows and values of the finite values above the threshold."""
    for u in range(np.uint64(width)):
        odd = strip.bad[u] != 0.0
        m = np.uint64(0)
        for word in range(np.uint64(TILE // _WORD)):
            bits = strip.marks[word, u]
            while bits:
                t = np.uint64(word * np.uint64(_WORD)) + np.uint64(_lowest(bits))
                bits &= bits - np.uint32(1)
                v = strip.act[t, u]
                strip.at[u, m] = t
                strip.fired[u, m] = v
                m += np.uint64(not (odd and np.isinf(v)))
        strip.n[u] = m
        strip.finite[u] = n
