"""A strip of a tile: some tokens of some units, copied to where the processor has them at hand."""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Int64, UInt16

from activation_store.compiled import compiled
from activation_store.statistics import Moments

TILE = 128
"""Most tokens in a tile; a count per (tile, unit) must fit in a byte."""
STRIP = 64
"""Units handled together: four cache lines of a row."""
LANE = 16
"""Units whose positions are collected together, so that their lists stay in the fastest cache."""


class Strip(NamedTuple):
    """Buffers for one strip of one tile."""

    act: Float32[np.ndarray, "tokens units"]
    at: UInt16[np.ndarray, "units tokens"]
    n: Int64[np.ndarray, " units"]
    """Values above the threshold; `at` holds their rows."""
    finite: Int64[np.ndarray, " units"]
    shift: np.ndarray
    sums: np.ndarray
    low: Float32[np.ndarray, " units"]
    high: Float32[np.ndarray, " units"]
    bad: Float32[np.ndarray, " units"]
    column: Float32[np.ndarray, " tokens"]
    used: np.ndarray


@compiled
@no_type_check
def new_strip() -> Strip:
    """Return fresh buffers."""
    real = np.zeros((3, STRIP), np.float32)
    return Strip(
        np.zeros((TILE, STRIP), np.float32),
        np.zeros((STRIP, TILE + 1), np.uint16),
        np.zeros(STRIP, np.int64),
        np.zeros(STRIP, np.int64),
        np.zeros(STRIP),
        np.zeros((4, STRIP)),
        real[0],
        real[1],
        real[2],
        np.zeros(TILE, np.float32),
        np.zeros(TILE, np.bool_),
    )


@compiled
@no_type_check
def load(x: np.ndarray, row: int, n: int, c: int, width: int, strip: Strip) -> None:
    """Copy one strip of one tile; a strip at the edge is as wide as any, its rest is stale."""
    if width == STRIP:
        for t in range(n):
            source, target = x[row + t, c : c + STRIP], strip.act[t]
            for u in range(STRIP):
                target[u] = source[u]
    else:
        for t in range(n):
            for u in range(width):
                strip.act[t, u] = x[row + t, c + u]


@compiled
@no_type_check
def add_up(n: int, moments: Moments, c: int, width: int, strip: Strip) -> None:
    """Sum powers of the deviation from the mean so far, with extremes and a mark for non-finite."""
    s1, s2 = np.zeros(STRIP), np.zeros(STRIP)
    s3, s4 = np.zeros(STRIP), np.zeros(STRIP)
    shift, low, high, bad = strip.shift, strip.low, strip.high, strip.bad
    for u in range(width):
        known = moments.n[c + u] > 0
        shift[u] = moments.mean[c + u] if known else strip.act[0, u]
        if not np.isfinite(shift[u]):
            shift[u] = 0.0
    for u in range(STRIP):
        low[u], high[u], bad[u] = np.inf, -np.inf, 0.0
    for t in range(n):
        row = strip.act[t]
        for u in range(STRIP):
            v = row[u]
            d = np.float64(v) - shift[u]
            d2 = d * d
            s1[u] += d
            s2[u] += d2
            s3[u] += d2 * d
            s4[u] += d2 * d2
            low[u] = min(low[u], v)
            high[u] = max(high[u], v)
            bad[u] += v * np.float32(0.0)
    for u in range(STRIP):
        strip.sums[0, u] = s1[u]
        strip.sums[1, u] = s2[u]
        strip.sums[2, u] = s3[u]
        strip.sums[3, u] = s4[u]


@compiled
@no_type_check
def collect(n: int, threshold: np.float32, lane: int, strip: Strip) -> None:
    """List the rows of `LANE` units that are above the threshold, without a branch per value."""
    count = np.zeros(LANE, np.uint32)
    at = strip.at[lane : lane + LANE]
    for t in range(n):
        row = strip.act[t, lane : lane + LANE]
        for u in range(LANE):
            k = count[u]
            at[u, k] = t
            count[u] = k + np.uint32(row[u] > threshold)
    for u in range(LANE):
        strip.n[lane + u] = count[u]


@compiled
@no_type_check
def drop_odd(n: int, c: int, width: int, odd: np.ndarray, strip: Strip) -> None:
    """Count NaN and infinities, and redo sums and lists of their units over what is finite."""
    for u in range(width):
        strip.finite[u] = n
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
        active = 0
        for k in range(strip.n[u]):
            t = strip.at[u, k]
            if np.isfinite(strip.act[t, u]):
                strip.at[u, active] = t
                active += 1
        strip.n[u] = active
