"""What is known of every unit over all tokens: its moments and a histogram for its quantiles.

Moments: count, mean and the sums M2, M3, M4 of powers of the deviation from the mean, in float64,
with the smallest and largest value. Merging two states gives the state of their union (P. Pebay,
"Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
moments", SAND2008-6212), so batches and ranks can be taken in any grouping.

Sketch: per unit a histogram with buckets of bounded relative width. A bucket is the leading bits of
a float32: its sign, its exponent and `MANTISSA_BITS` of its mantissa, as in DDSketch (Masson, Rim,
Lee 2019) and HdrHistogram, without a logarithm. Counting is exact, so merging is addition and the
order of the tokens does not matter. The quantile at q is the value of rank ceil(q n) (numpy's
`inverted_cdf`); the estimate differs from it by at most `RELATIVE_ERROR` of its size, or by
`SMALLEST` where it is smaller than that. Values beyond `LARGEST` share the last bucket, so for them
the bound does not hold; extremes are exact anyway.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt32

from activation_store.compiled import compiled

Floats = Float64[np.ndarray, " units"]


class Moments(NamedTuple):
    """Accumulated moments, one entry per unit; the arrays are changed in place."""

    n: Int64[np.ndarray, " units"]
    """Finite values seen."""
    active: Int64[np.ndarray, " units"]
    """Values above the hook's threshold."""
    mean: Float64[np.ndarray, " units"]
    m2: Float64[np.ndarray, " units"]
    """Sum of squared deviations from the mean; m3 and m4 the third and fourth powers."""
    m3: Float64[np.ndarray, " units"]
    m4: Float64[np.ndarray, " units"]
    low: Float32[np.ndarray, " units"]
    """Smallest value; +inf before the first."""
    high: Float32[np.ndarray, " units"]
    """Largest value; -inf before the first."""


def new_moments(n_units: int) -> Moments:
    """Return empty moments; the extremes are those of no value."""
    low = np.full(n_units, np.inf, np.float32)
    return Moments(
        n=np.zeros(n_units, np.int64),
        active=np.zeros(n_units, np.int64),
        mean=np.zeros(n_units),
        m2=np.zeros(n_units),
        m3=np.zeros(n_units),
        m4=np.zeros(n_units),
        low=low,
        high=-low,
    )


@compiled
@no_type_check
def add_sums(
    moments: Moments,
    first: int,
    width: int,
    count: np.ndarray,
    shift: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Merge values of units from `first` on: their count and sums of (value - shift)^1..4."""
    for u in range(width):
        n = np.float64(count[u])
        if n > 0:
            s2, s3, s4 = sums[1, u], sums[2, u], sums[3, u]
            a = sums[0, u] / n
            b2 = s2 - n * a * a
            b3 = s3 - 3 * a * s2 + 2 * n * a * a * a
            b4 = s4 - 4 * a * s3 + 6 * a * a * s2 - 3 * n * a * a * a * a
            # rounding can leave an even power slightly below 0 where a unit hardly varies
            merge_unit(moments, first + u, n, shift[u] + a, max(b2, 0.0), b3, max(b4, 0.0))


@compiled
@no_type_check
def merge_unit(
    moments: Moments, u: int, nb: float, mean_b: float, b2: float, b3: float, b4: float
) -> None:
    """Merge the central moments of nb values into unit u: Pebay's pairwise update."""
    na = np.float64(moments.n[u])
    nb = np.float64(nb)
    n = na + nb
    d = mean_b - moments.mean[u]
    a2, a3, a4 = moments.m2[u], moments.m3[u], moments.m4[u]
    q = d / n
    moments.m4[u] = (
        a4
        + b4
        + d * q * q * q * na * nb * (na * na - na * nb + nb * nb)
        + 6 * q * q * (na * na * b2 + nb * nb * a2)
        + 4 * q * (na * b3 - nb * a3)
    )
    moments.m3[u] = a3 + b3 + d * q * q * na * nb * (na - nb) + 3 * q * (na * b2 - nb * a2)
    moments.m2[u] = a2 + b2 + d * q * na * nb
    moments.mean[u] += q * nb
    moments.n[u] += np.int64(nb)


@compiled
@no_type_check
def merge_moments(into: Moments, other: Moments) -> None:
    """Merge the moments of other tokens of the same units into `into`."""
    for u in range(into.n.shape[0]):
        into.active[u] += other.active[u]
        into.low[u] = min(into.low[u], other.low[u])
        into.high[u] = max(into.high[u], other.high[u])
        if other.n[u] > 0:
            merge_unit(into, u, other.n[u], other.mean[u], other.m2[u], other.m3[u], other.m4[u])


def shape_of(moments: Moments) -> tuple[Floats, Floats, Floats]:
    """Return variance, skewness m3 / m2^1.5 and kurtosis m4 / m2^2, which is 3 for a normal.

    NaN where a number is not defined: without tokens, or for a unit that never varies.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n = moments.n.astype(np.float64)
        variance = moments.m2 / n
        skewness = (moments.m3 / n) / variance**1.5
        kurtosis = (moments.m4 / n) / variance**2
    flat = ~(variance > 0)
    return variance, np.where(flat, np.nan, skewness), np.where(flat, np.nan, kurtosis)


# 2^5 buckets per power of two: an error of 1/64 for 2,561 counters, 10 kB, per unit
MANTISSA_BITS = 5
RELATIVE_ERROR = 2.0 ** -(MANTISSA_BITS + 1)
"""Half the width of a bucket relative to its lower end: 1/64."""
# bounds of the buckets, about 1e-6 and 1e6: beyond them the error bound does not hold
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -20, 20
SMALLEST = 2.0**_LOWEST_EXPONENT
LARGEST = 2.0**_HIGHEST_EXPONENT
_SHIFT = 23 - MANTISSA_BITS  # a float32 has 23 bits of mantissa
_FIRST = (127 + _LOWEST_EXPONENT) << MANTISSA_BITS  # 127: the bias of its exponent
SIDE = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) << MANTISSA_BITS
"""Buckets of one sign."""

Counts = UInt32[np.ndarray, "units buckets"]


def new_sketch(n_units: int) -> Counts:
    """Return an empty sketch; pages that nothing is counted in take no memory."""
    return np.zeros((n_units, 2 * SIDE + 1), np.uint32)


@compiled
@no_type_check
def bucket(bits: np.uint32) -> int:
    """Return the bucket of a float32 given its bits: 0 is the most negative, SIDE is zero."""
    at = np.int64((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(_SHIFT)) - (_FIRST - 1)
    at = min(max(at, 0), SIDE)
    return SIDE - at if bits >> np.uint32(31) else SIDE + at


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
            # 1e-9: a product that is whole but for rounding must not move on to the next rank
            rank = max(np.int64(np.ceil(at[i] * total - 1e-9)), 1)
            while reached < rank:
                filled += 1
                reached += row[filled]
            out[unit, i] = value[filled]
