"""A quantile sketch: for every unit, a histogram with buckets of bounded relative width.

A bucket is the leading bits of a float32: its sign, its exponent and `MANTISSA_BITS` of its
mantissa, as in DDSketch (Masson, Rim, Lee 2019) and HdrHistogram, without a logarithm. Counting is
exact, so merging is addition and the order of the tokens does not matter. The quantile at q is the
value of rank ceil(q n) (numpy's `inverted_cdf`); the estimate differs from it by at most
`RELATIVE_ERROR` of its size, or by `SMALLEST` where it is smaller than that. Values beyond
`LARGEST` share the last bucket, so for them the bound does not hold; extremes are exact anyway.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float32, Float64, UInt32

from activation_store.compiled import compiled

MANTISSA_BITS = 5
"""Buckets per power of two: 2^5."""
RELATIVE_ERROR = 2.0 ** -(MANTISSA_BITS + 1)
"""Half the width of a bucket relative to its lower end: 1/64."""
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -20, 20
SMALLEST = 2.0**_LOWEST_EXPONENT
LARGEST = 2.0**_HIGHEST_EXPONENT
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (127 + _LOWEST_EXPONENT) << MANTISSA_BITS
SIDE = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) << MANTISSA_BITS
"""Buckets of one sign."""

Counts = UInt32[np.ndarray, "units buckets"]


def new_sketch(n_units: int) -> Counts:
    """Return the sketch of nothing; the system gives memory to the pages that are counted in."""
    return np.zeros((n_units, 2 * SIDE + 1), np.uint32)


@compiled
@no_type_check
def bucket(bits: np.uint32) -> int:
    """Return the bucket of a float32 given its bits: 0 is the most negative, SIDE is zero."""
    at = np.int64((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(_SHIFT)) - (_FIRST - 1)
    at = min(max(at, 0), SIDE)
    return SIDE - at if bits >> np.uint32(31) else SIDE + at


def merge_sketch(into: Counts, other: Counts) -> None:
    """Add the counts of other tokens of the same units."""
    into += other


def midpoints() -> Float64[np.ndarray, " buckets"]:
    """Return the value that stands for each bucket."""
    lower = np.arange(_FIRST, _FIRST + SIDE, dtype=np.uint32)
    ends = np.append(lower, lower[-1] + 1).astype(np.uint32) << np.uint32(_SHIFT)
    edges = ends.view(np.float32).astype(np.float64)
    middle = (edges[:-1] + edges[1:]) / 2
    return np.concatenate([-middle[::-1], [0.0], middle])


def quantiles(
    counts: Counts,
    low: Float32[np.ndarray, " units"],
    high: Float32[np.ndarray, " units"],
    at: tuple[float, ...],
) -> Float64[np.ndarray, "units quantiles"]:
    """Return the quantiles of every unit within the stated error; NaN for a unit without tokens."""
    out = np.full((len(counts), len(at)), np.nan)
    _fill_quantiles(counts, midpoints(), np.array(at), out)
    bounds = low.astype(np.float64)[:, None], high.astype(np.float64)[:, None]
    return np.clip(out, *bounds)


@compiled
@no_type_check
def _fill_quantiles(counts: Counts, value: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
    """Walk each unit's buckets once; `at` ascends."""
    for unit in range(counts.shape[0]):
        row = counts[unit]
        total = np.int64(0)
        for bucket_ in range(row.shape[0]):
            total += row[bucket_]
        if total == 0:
            continue
        reached, filled = np.int64(0), -1
        for i in range(at.shape[0]):
            rank = max(np.int64(np.ceil(at[i] * total - 1e-9)), 1)
            while reached < rank:
                filled += 1
                reached += row[filled]
            out[unit, i] = value[filled]
